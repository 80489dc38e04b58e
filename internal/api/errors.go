package api

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"runtime/debug"
	"strconv"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/internal/errs"
)

// statuses maps what an error means to how HTTP says it. Clients look at the
// code in the body, which is the same number.
var statuses = map[errs.Kind]int{
	errs.Invalid:       http.StatusBadRequest,
	errs.Unauthorized:  http.StatusUnauthorized,
	errs.Forbidden:     http.StatusForbidden,
	errs.NotFound:      http.StatusNotFound,
	errs.Conflict:      http.StatusConflict,
	errs.Exhausted:     http.StatusTooManyRequests,
	errs.Unavailable:   http.StatusServiceUnavailable,
	errs.Unimplemented: http.StatusNotImplemented,
}

// retryAfter is the pause asked of clients that met a limit, in whole seconds:
// the SDKs read nothing else.
const retryAfter = 1

// fail answers with err.
func (s *server) fail(w http.ResponseWriter, r *http.Request, err error) {
	err = asRefusal(err)
	body := s.describe(r.Context(), r.Method+" "+r.URL.Path, err)
	switch body.Code {
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", `Bearer realm="cordon"`)
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		if w.Header().Get("Retry-After") == "" {
			w.Header().Set("Retry-After", strconv.Itoa(retryAfter))
		}
	}
	writeError(w, body)
}

// describe turns what request met into what the caller may see. A fault of ours
// becomes an ID that is in the log beside the cause.
func (s *server) describe(ctx context.Context, request string, err error) control.Error {
	if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return control.Error{
			Code:    http.StatusRequestEntityTooLarge,
			Message: fmt.Sprintf("the body is over %d bytes", tooLarge.Limit),
		}
	}
	var known *errs.Error
	if errors.As(err, &known) && known.Kind != errs.Internal {
		if known.Err != nil {
			s.Log.Warn("request refused", "request", request, "kind", known.Kind.String(), "err", err)
		}
		return control.Error{Code: statuses[known.Kind], Message: known.Msg}
	}
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		// The caller went away, or the server is going.
		return control.Error{Code: http.StatusServiceUnavailable, Message: "the request was cancelled"}
	}
	id := newErrorID()
	s.Log.Error("request failed", "id", id, "request", request, "err", err)
	return control.Error{Code: http.StatusInternalServerError, Message: "internal error, id " + id}
}

func newErrorID() string {
	var b [6]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

func writeError(w http.ResponseWriter, body control.Error) {
	text, err := json.Marshal(body)
	if err != nil { // an int and a string: cannot be
		panic(err)
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Length", strconv.Itoa(len(text)))
	w.WriteHeader(body.Code)
	_, _ = w.Write(text) // the caller may be gone
}

// recovered answers a panic like any other fault of ours.
func (s *server) recovered(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			switch p := recover(); p {
			case nil:
			case http.ErrAbortHandler:
				panic(p)
			default:
				s.fail(w, r, fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
			}
		}()
		next.ServeHTTP(w, r)
	})
}

// noRoute answers what no pattern matches.
func (s *server) noRoute(w http.ResponseWriter, r *http.Request) {
	s.fail(w, r, errs.New(errs.NotFound, "there is no %s %s in this API", r.Method, r.URL.Path))
}

// refuse answers what the dialect has and this server has not.
func (s *server) refuse(what string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		s.fail(w, r, errs.New(errs.Unimplemented, "this server does not support %s", what))
	}
}

// badParameter answers a path, query or header parameter of the wrong form.
func (s *server) badParameter(w http.ResponseWriter, r *http.Request, err error) {
	if form, ok := errors.AsType[*control.InvalidParamFormatError](err); ok {
		err = errs.New(errs.Invalid, "parameter %s is not valid: %s", form.ParamName, rootOf(form.Err))
	} else {
		err = errs.New(errs.Invalid, "%s", err.Error())
	}
	s.fail(w, r, err)
}

// rootOf is the innermost error: strconv's sentence rather than the generated
// code's history of it.
func rootOf(err error) error {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		if number, ok := errors.AsType[*strconv.NumError](err); ok {
			return fmt.Errorf("%q is not a number in range", number.Num)
		}
		err = inner
	}
}

// badBody answers a body that cannot be read or decoded.
func (s *server) badBody(w http.ResponseWriter, r *http.Request, err error) {
	s.fail(w, r, bodyError(err))
}

// inField finds the field that generated decoders name only in their text.
var inField = regexp.MustCompile(`error reading '([^']*)'`)

func bodyError(err error) error {
	var tooLarge *http.MaxBytesError
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &tooLarge):
		return err
	case errors.As(err, &kind):
		field := kind.Field
		if m := inField.FindStringSubmatch(err.Error()); m != nil {
			field = "network." + m[1]
		}
		if field == "" {
			return errs.New(errs.Invalid, "the body must be %s, got %s", wanted(kind), kind.Value)
		}
		return errs.New(errs.Invalid, "field %s must be %s, got %s", field, wanted(kind), kind.Value)
	case errors.As(err, &syntax):
		return errs.New(errs.Invalid, "the body is not valid JSON at byte %d: %s", syntax.Offset, syntax.Error())
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errs.New(errs.Invalid, "the body ends in the middle of its JSON")
	case errors.Is(err, io.EOF):
		return errs.New(errs.Invalid, "the body is empty: send a JSON object")
	}
	return errs.Wrap(errs.Invalid, err, "the body cannot be read")
}

// wanted names a Go type as JSON does.
func wanted(e *json.UnmarshalTypeError) string {
	switch e.Type.Kind().String() {
	case "bool":
		return "true or false"
	case "string":
		return "a string"
	case "slice", "array":
		return "a list"
	case "map", "struct":
		return "an object"
	case "int", "int8", "int16", "int32", "int64", "uint64":
		return "a whole number"
	}
	return "a " + e.Type.Kind().String()
}
