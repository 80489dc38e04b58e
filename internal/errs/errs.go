// Package errs gives errors a kind, which travels with them from where it is known to
// where it is shown: every package classifies, only the API knows status codes.
package errs

import (
	"errors"
	"fmt"
)

// Kind says what an error means to the caller.
type Kind uint8

// The kinds. The zero value is Internal, so that an unclassified error never
// shows its text to a user.
const (
	Internal      Kind = iota // a fault of ours; the user sees an ID, the log the cause
	Invalid                   // the request names something that cannot be
	Unauthorized              // no or wrong credentials
	Forbidden                 // known caller, not allowed
	NotFound                  // no such thing
	Conflict                  // the thing is in a state that refuses this
	Exhausted                 // a limit or quota is reached; trying later may work
	Unavailable               // cordon is starting, draining or overloaded
	Unimplemented             // cordon does not do this yet
)

var kindNames = [...]string{
	"internal", "invalid", "unauthorized", "forbidden", "not found",
	"conflict", "exhausted", "unavailable", "unimplemented",
}

func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Error carries a kind, a message that is safe to show to the user, and the
// cause for the log.
type Error struct {
	Kind Kind
	Msg  string // safe to show to the user: names the field, the value and the fix
	Err  error  // for the log only; may be nil
}

// New returns an error of the kind with a message for the user.
func New(kind Kind, format string, args ...any) *Error {
	return &Error{Kind: kind, Msg: fmt.Sprintf(format, args...)}
}

// Wrap returns an error of the kind with a message for the user and the cause
// for the log.
func Wrap(kind Kind, err error, format string, args ...any) *Error {
	return &Error{Kind: kind, Msg: fmt.Sprintf(format, args...), Err: err}
}

func (e *Error) Error() string {
	if e.Err == nil {
		return e.Msg
	}
	if e.Msg == "" {
		return e.Err.Error()
	}
	return e.Msg + ": " + e.Err.Error()
}

func (e *Error) Unwrap() error { return e.Err }

// KindOf returns the kind of the first Error in err's chain, or Internal.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return Internal
}

// Is reports whether err is of the kind.
func Is(err error, kind Kind) bool { return err != nil && KindOf(err) == kind }
