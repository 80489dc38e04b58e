package probe

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// stream connects, does the handshake if there is to be one, and sends the parts
// while it reads.
func stream(ctx context.Context, o Order) (got Outcome) {
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", o.To)
	if err != nil {
		got.End = ending(err)
		return got
	}
	defer c.Close()
	got.Connected = true
	deadline, _ := ctx.Deadline()
	_ = c.SetDeadline(deadline) // a dead connection shows at the next call
	if o.Segment > 0 {
		c = &segmented{Conn: c, size: o.Segment}
	}
	if o.TLS != nil {
		secured, err := secure(ctx, c, o.TLS)
		if err != nil {
			got.End = ending(err)
			return got
		}
		got.Secured, c = true, secured
	}
	x := exchange{conn: c, order: o, came: make(chan struct{}, 1)}
	return x.run(got)
}

// exchange is the bytes of one connection, both ways.
type exchange struct {
	conn  net.Conn
	order Order
	came  chan struct{} // something was received

	mu   sync.Mutex // guards sent
	sent int
}

func (x *exchange) run(got Outcome) Outcome {
	wrote := make(chan error, 1)
	stop := make(chan struct{})
	go func() { wrote <- x.write(stop) }()
	err := x.read(&got)
	close(stop)
	if errors.Is(err, errWanted) || errors.Is(err, io.EOF) {
		_ = x.conn.SetDeadline(time.Now()) // wakes a writer that nobody reads from
	}
	werr := <-wrote
	got.End = ending(err)
	if errors.Is(err, os.ErrDeadlineExceeded) && werr != nil {
		got.End = ending(werr) // the write saw more than the read
	}
	x.mu.Lock()
	got.Sent = x.sent
	x.mu.Unlock()
	return got
}

// read keeps what comes until the end, or until it is what is wanted.
func (x *exchange) read(got *Outcome) error {
	buf := make([]byte, 32<<10)
	total := 0
	for {
		n, err := x.conn.Read(buf)
		total += n
		got.Received = append(got.Received, buf[:min(n, maxReceived-len(got.Received))]...)
		if n > 0 {
			select {
			case x.came <- struct{}{}:
			default:
			}
		}
		if err != nil {
			return err
		}
		if x.order.Want > 0 && total >= x.order.Want {
			return errWanted
		}
	}
}

func (x *exchange) write(stop <-chan struct{}) error {
	for first := true; first || x.order.Repeat; first = false {
		for i, part := range x.order.Parts {
			if !x.pause(i, first, stop) {
				return nil
			}
			n, err := x.conn.Write(part)
			x.mu.Lock()
			x.sent += n
			x.mu.Unlock()
			if err != nil {
				return err
			}
		}
	}
	if h, ok := x.conn.(interface{ CloseWrite() error }); ok && x.order.HalfClose {
		return h.CloseWrite()
	}
	return nil
}

// pause waits before part i; false means that the reading is over.
func (x *exchange) pause(i int, first bool, stop <-chan struct{}) bool {
	if i == 0 && first {
		return true
	}
	if x.order.Turns {
		select {
		case <-x.came:
		case <-stop:
			return false
		}
	}
	select {
	case <-time.After(x.order.Gap):
		return true
	case <-stop:
		return false
	}
}

// segmented writes so few bytes at a time that each is a segment of its own.
type segmented struct {
	net.Conn
	size int
}

func (s *segmented) Write(b []byte) (sent int, err error) {
	if tc, ok := s.Conn.(*net.TCPConn); ok {
		_ = tc.SetNoDelay(true) // it is the default
	}
	for len(b) > 0 {
		n, err := s.Conn.Write(b[:min(s.size, len(b))])
		if sent += n; err != nil {
			return sent, err
		}
		b = b[n:]
	}
	return sent, nil
}

// secure does a handshake; the certificate is verified for the name.
func secure(ctx context.Context, c net.Conn, o *TLS) (net.Conn, error) {
	cfg := &tls.Config{ServerName: o.Name, MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"}}
	if len(o.ECH) > 0 {
		cfg.EncryptedClientHelloConfigList = o.ECH
	}
	const each = 250
	for left, i := o.Padding, 0; left > 0; left, i = left-each, i+1 {
		size := min(each, max(left, 8))
		name := strings.Repeat("x", size-6) + strconv.Itoa(100000+i)
		cfg.NextProtos = append(cfg.NextProtos, name)
	}
	if o.Record > 0 {
		c = &recorded{Conn: c, size: o.Record}
	}
	t := tls.Client(c, cfg)
	return t, t.HandshakeContext(ctx)
}

// recorded cuts the first record written, the hello, into records of a few bytes.
type recorded struct {
	net.Conn
	size int
	done bool
}

func (r *recorded) Write(b []byte) (int, error) {
	if r.done || len(b) < 5 {
		return r.Conn.Write(b)
	}
	r.done = true
	if _, err := r.Conn.Write(Records(b, r.size)); err != nil {
		return 0, err
	}
	return len(b), nil
}

// Records cuts the payload of one or more TLS records into records of size bytes.
func Records(b []byte, size int) []byte {
	var out []byte
	for len(b) >= 5 {
		n := int(b[3])<<8 | int(b[4])
		head, payload := b[:3], b[5:min(5+n, len(b))]
		b = b[5+len(payload):]
		for len(payload) > 0 {
			k := min(size, len(payload))
			out = append(append(out, head...), byte(k>>8), byte(k))
			out = append(out, payload[:k]...)
			payload = payload[k:]
		}
	}
	return append(out, b...)
}

// ending is one word for how something ended, or the error's own text.
func ending(err error) string {
	var alert tls.AlertError
	switch {
	case err == nil, errors.Is(err, errWanted):
		return Wanted
	case errors.As(err, &alert), strings.Contains(err.Error(), "remote error: tls:"):
		return err.Error()
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return EOF
	case errors.Is(err, syscall.ECONNREFUSED):
		return Refused
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNABORTED):
		return Reset
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		return Timeout
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EADDRNOTAVAIL):
		return Unreachable
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES):
		return Forbidden
	}
	return err.Error()
}
