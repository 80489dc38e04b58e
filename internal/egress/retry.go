package egress

import (
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

// The client's direction of a TLS flow is guarded until it is clear that no second
// ClientHello comes that a server could take its name from. A server asks for one by a
// HelloRetryRequest (RFC 8446 section 4.1.4), which has the form of a ServerHello with
// a certain random value; after any other answer it takes no further hello. Until such
// an answer is seen, the client's records are looked at one by one.

// answer is what a server sent first.
type answer struct {
	b [64]byte
	n int
}

const (
	msgServerHello  = 2
	maxCipherRecord = maxRecord + 256 // RFC 8446 section 5.2
	recordData      = 23
	recordHeader    = 5
	serverHelloHead = recordHeader + 4 + 2 + 32 // up to and with the random value
)

// retryRandom marks a ServerHello as a HelloRetryRequest (RFC 8446 section 4.1.3).
var retryRandom = sha256.Sum256([]byte("HelloRetryRequest"))

// settled reports whether the answer is known to be no HelloRetryRequest; more is set
// while it could still become either.
func (a *answer) settled() (settled, more bool) {
	b := a.b[:a.n]
	for len(b) >= recordHeader && b[0] == recordAlert { // a warning, such as unrecognized_name
		n := recordHeader + int(b[3])<<8 + int(b[4])
		if n > len(b) {
			break
		}
		b = b[n:]
	}
	switch {
	case len(b) == 0 || b[0] == recordAlert:
		return false, a.n < len(a.b)
	case b[0] != recordHandshake || len(b) > recordHeader && b[recordHeader] != msgServerHello: // no answer to a hello
		return true, false
	case len(b) < serverHelloHead:
		return false, a.n < len(a.b)
	}
	return string(b[recordHeader+6:serverHelloHead]) != string(retryRandom[:]), false
}

// side is a direction of a guarded flow.
type side uint8

const (
	unguarded side = iota
	fromClient
	fromServer
)

// look looks at what is there to read before it is moved and says how much of that
// may be; wait: nothing is there. It sets held where the caller has to read.
func (s *splicing) look(fd int, limit int64) (may int64, wait bool) {
	if s.side == fromServer {
		return s.lookAtAnswer(fd, limit)
	}
	if s.settled.Load() { // nothing to look for
		s.side = unguarded
		return limit, false
	}
	a := s.ps.getAnswer()
	n, errno := peekAt(fd, a.b[:1])
	s.ps.answers.Put(a)
	switch {
	case errno == unix.EAGAIN || errno == unix.EINTR:
		return 0, true
	case errno == 0 && n > 0 && !s.settled.Load(): // looked at after the peek: an answer came before what it caused
		s.held = true
		return 0, false
	}
	s.side = unguarded
	return limit, false
}

// lookAtAnswer is look for the server's direction. What it sees is not on the stack:
// that of a goroutine that waits here stays small.
func (s *splicing) lookAtAnswer(fd int, limit int64) (may int64, wait bool) {
	a := s.answer
	if s.answer = nil; a == nil {
		a = s.ps.getAnswer()
	}
	n, errno := peekAt(fd, a.b[a.n:])
	if errno == unix.EAGAIN || errno == unix.EINTR {
		if a.n > 0 {
			s.answer = a
		} else {
			s.ps.answers.Put(a)
		}
		return 0, true
	}
	if errno == 0 && n > 0 { // else moving tells
		a.n += n
		settled, more := a.settled()
		if more {
			s.answer = a
			return min(limit, int64(n)), false
		}
		if settled {
			s.settled.Store(true)
		}
	}
	a.n = 0
	s.ps.answers.Put(a)
	s.side = unguarded
	return limit, false
}

// spliceTLS is splice for a flow whose name came from a ClientHello.
func (f *flow) spliceTLS(up net.Conn) {
	_ = f.client.SetDeadline(time.Time{})
	_ = up.SetDeadline(time.Time{})
	f.pumps.Store(2)
	f.p.conns.Add(2)
	go f.pumpHellos(up)
	go f.pumpAnswer(up)
}

// pumpAnswer is pump for the server's direction.
func (f *flow) pumpAnswer(up net.Conn) {
	defer f.p.conns.Done()
	n, _, err := f.p.pipes.move(f.client, up, &f.settled, fromServer)
	f.bytesIn.Add(n)
	f.pumped(f.client, up, err)
}

// pumpHellos is pump for the client's direction.
func (f *flow) pumpHellos(up net.Conn) {
	defer f.p.conns.Done()
	for {
		if len(f.in.pending()) > 0 {
			if err := f.passRecords(up); err != nil {
				f.refuseHello(err)
				f.pumped(up, f.client, err)
				return
			}
		}
		n, held, err := f.p.pipes.move(up, f.client, &f.settled, fromClient)
		f.bytesOut.Add(n)
		if held && err == nil {
			if err = f.in.fill(smallBuffer); err == nil {
				continue
			}
			if errors.Is(err, io.EOF) {
				err = nil
			}
		}
		f.pumped(up, f.client, err)
		return
	}
}

// passRecords passes on whole records of the client until none is pending or the
// guard ends.
func (f *flow) passRecords(up net.Conn) error {
	defer f.in.rest()
	for len(f.in.pending()) > 0 {
		if f.settled.Load() {
			return f.passPending(up, len(f.in.pending()))
		}
		_ = f.client.SetReadDeadline(time.Now().Add(f.p.lim.SniffTimeout))
		size, err := f.nextRecord()
		switch {
		case errors.Is(err, io.EOF): // cut short: the server finds out
			return f.passPending(up, len(f.in.pending()))
		case err != nil:
			return err
		case size == 0:
			return f.passHello(up)
		}
		_ = f.client.SetReadDeadline(time.Time{})
		have := min(size, len(f.in.pending()))
		if err := f.passPending(up, have); err != nil {
			return err
		}
		if rest := int64(size - have); rest > 0 {
			n, err := f.p.pipes.copyN(up, f.client, rest)
			f.bytesOut.Add(n)
			if err != nil || n < rest {
				return err
			}
		}
	}
	return nil
}

// nextRecord returns the size of the record that is pending with its header, or 0
// when it is one of a handshake.
func (f *flow) nextRecord() (int, error) {
	for len(f.in.pending()) < recordHeader {
		if err := f.in.fill(smallBuffer); err != nil {
			return 0, sniffFailed(err, io.EOF)
		}
	}
	b := f.in.pending()
	size := int(b[3])<<8 | int(b[4])
	switch {
	case b[0] < recordFirst || b[0] > recordData || b[1] != 3 || size > maxCipherRecord:
		return 0, badHello("what follows the ClientHello is no TLS record")
	case b[0] == recordHandshake && size == 0:
		return 0, badHello("a handshake record is empty")
	case b[0] == recordHandshake:
		return 0, nil
	}
	return recordHeader + size, nil
}

// passHello passes a handshake record on: a second ClientHello if it shows the name of
// the first. Any other message is one that a server takes only after its ServerHello.
func (f *flow) passHello(up net.Conn) error {
	for len(f.in.pending()) <= recordHeader {
		if err := f.in.fill(smallBuffer); err != nil {
			return sniffFailed(err, badHello("the connection ended inside a handshake record"))
		}
	}
	if f.in.pending()[recordHeader] == msgClientHello {
		name, _, err := readHello(&f.in)
		if err != nil {
			return err
		}
		if err := f.sameName(name); err != nil {
			return err
		}
	}
	f.settled.Store(true)
	if err := f.passPending(up, len(f.in.pending())); err != nil {
		return err
	}
	return f.client.SetReadDeadline(time.Time{})
}

func (f *flow) passPending(up net.Conn, n int) error {
	if !f.send(up, f.in.pending()[:n]) {
		return io.ErrShortWrite
	}
	f.in.consume(n)
	return nil
}

// secondNameError says that a second ClientHello shows another name.
type secondNameError struct{ name string }

func (e *secondNameError) Error() string { return "the second ClientHello shows another name" }

// sameName compares the name of a second hello with the one that was judged.
func (f *flow) sameName(name string) error {
	r := f.ruled()
	switch {
	case name == r.name:
		return nil
	case r.policy.Mode() == policy.ModeObserve:
		f.record(flowlog.Observed, event{policy: r.policy, name: name, rule: proxyRule, reason: ReasonBadHello, detail: (&secondNameError{}).Error()})
		return nil
	}
	return &secondNameError{name}
}

// refuseHello denies a flow that is already passed on for what its client says
// before the handshake is settled; err that is of the connection itself denies nothing.
func (f *flow) refuseHello(err error) {
	r := f.ruled()
	d := denial{rule: proxyRule, reason: ReasonBadHello, name: r.name}
	var bad *sniffError
	var second *secondNameError
	switch {
	case errors.As(err, &bad):
		d.reason, d.detail = bad.reason, bad.detail
	case errors.As(err, &second):
		d.name, d.detail = second.name, err.Error()
	default:
		return
	}
	f.deny(r.policy, d)
	f.kill(d.reason)
}

func (f *flow) ruled() ruling {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ruling
}
