package relay

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"syscall"
)

// tunnel is a connection after a switch of protocols: bytes both ways, nothing
// looked at.
type tunnel struct {
	pool    *Pool
	client  side
	service side
	open    atomic.Int32 // directions
	octets  Octets       // each written by the pump of its direction
	done    func(tunnel *Octets)
}

// tunnel answers the client's upgrade and hands both connections to a tunnel.
func (x *exchange) tunnel(resp *http.Response) error {
	if x.out.Answer != nil {
		x.out.Answer(resp.StatusCode, resp.Header)
	}
	if x.upload != nil { // what the client sends behind its body is the tunnel's
		x.proceed(true)
		err := <-x.upload
		if x.upload = nil; err != nil {
			return err
		}
		x.uploaded = true
	}
	x.started.Store(true)
	client, rw, err := x.rc.Hijack()
	if err != nil {
		return fmt.Errorf("%w: take over: %w", ErrClient, err)
	}
	x.status = http.StatusSwitchingProtocols
	t := &tunnel{pool: x.pool, client: sideOf(client), service: sideOf(x.conn.Conn), done: x.out.Done}
	t.open.Store(2)
	early, late, err := t.handshake(rw, x.conn.br, x.switched(resp))
	if err != nil {
		abort(client)
		return fmt.Errorf("%w: %w", ErrClient, err)
	}
	if err := x.pool.become(x, t); err != nil {
		abort(client)
		return err
	}
	x.detached = true
	if x.out.Switched != nil {
		x.out.Switched()
	}
	// The exchange, its request and its buffers are not referred to from here
	// on: ten thousand idle tunnels cost little more than their connections.
	go t.pump(&t.service, &t.client, append(early, t.client.held()...))
	go t.pump(&t.client, &t.service, append(late, t.service.held()...))
	return nil
}

// handshake writes the 101 and returns what the client and the service have
// already sent beyond their heads.
func (t *tunnel) handshake(rw *bufio.ReadWriter, service *bufio.Reader, h http.Header) (early, late []byte, err error) {
	rw.WriteString("HTTP/1.1 101 Switching Protocols\r\n") //nolint:errcheck // shows in the flush
	h.Write(rw)                                            //nolint:errcheck // as above
	rw.WriteString("\r\n")                                 //nolint:errcheck // as above
	if err := rw.Flush(); err != nil {
		return nil, nil, err
	}
	return rest(rw.Reader), rest(service), nil
}

func rest(r *bufio.Reader) []byte {
	b, _ := r.Peek(r.Buffered()) // never more than is there: no error
	return bytes.Clone(b)
}

// Carry connects a client's connection with a port and copies both ways until both
// directions have ended, or one of them broke. It closes client.
func (p *Pool) Carry(ctx context.Context, client net.Conn, port uint16) (Octets, error) {
	service, err := p.cfg.Dial(ctx, port)
	if err != nil {
		return Octets{}, &DialError{Port: port, Err: err}
	}
	over := make(chan struct{})
	t := &tunnel{pool: p, client: sideOf(client), service: sideOf(service), done: func(*Octets) { close(over) }}
	t.open.Store(2)
	if err := p.admit(t); err != nil {
		abort(service)
		return Octets{}, err
	}
	go t.pump(&t.service, &t.client, t.client.held())
	t.pump(&t.client, &t.service, nil)
	<-over
	return t.octets, nil
}

// admit takes a tunnel and its two goroutines in, as become does.
func (p *Pool) admit(t *tunnel) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed.Load() {
		return ErrReset
	}
	p.active[t] = struct{}{}
	p.wg.Add(2)
	return nil
}

func (t *tunnel) reset() {
	abort(t.client.Conn)
	abort(t.service.Conn)
}

// pump copies one direction until it ends. The last one out closes.
func (t *tunnel) pump(dst, src *side, first []byte) {
	defer t.pool.wg.Done()
	count := &t.octets.In
	if src == &t.service {
		count = &t.octets.Out
	}
	var err error
	if len(first) > 0 {
		_, err = dst.Write(first)
	}
	if err == nil {
		*count, err = src.copyTo(dst)
	}
	*count += int64(len(first))
	if err == nil {
		err = closeWrite(dst.Conn)
	}
	if src == &t.service && errors.Is(err, syscall.ECONNRESET) {
		abort(t.client.Conn) // closing it properly would make a whole of what is cut
	}
	if err != nil {
		hangUp(t.client)
		hangUp(t.service)
	}
	if t.open.Add(-1) > 0 {
		return
	}
	hangUp(t.client)
	hangUp(t.service)
	t.pool.leave(t)
	if t.done != nil {
		t.done(&t.octets)
	}
}

var errNoHalfClose = errors.New("the connection cannot be half closed")

func closeWrite(c net.Conn) error {
	if h, ok := c.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return errNoHalfClose
}
