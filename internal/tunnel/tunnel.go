// Package tunnel carries a TCP connection in a WebSocket: its bytes are
// binary messages, the end of one direction is the text message "end", and the
// end of both is a normal closure. Any other end is a reset, and becomes one.
package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/coder/websocket"
)

// Protocol is the WebSocket subprotocol both sides must name.
const Protocol = "cordon.tcp.v1"

// piece is the largest message sent, and the largest accepted.
const piece = 32 << 10

// pulse is how often a dialling side shows that it is there, so that no proxy
// between takes a quiet connection for a dead one; patience is for the answer.
const pulse, patience = 30 * time.Second, 20 * time.Second

const end = "end"

// Join carries conn over ws until both directions have ended, which is nil, or one
// of them breaks, which resets the other. Both are closed when it returns, and in
// and out are the octets that came from ws and went to it.
func Join(ctx context.Context, ws *websocket.Conn, conn net.Conn) (in, out int64, err error) {
	ctx, cancel := context.WithCancel(ctx)
	j := &join{ws: ws, conn: conn, ended: make(chan struct{}), received: make(chan error, 1), sent: make(chan error, 1)}
	ws.SetReadLimit(piece)
	go func() { j.received <- j.receive(ctx) }()
	go func() { j.sent <- j.send(ctx) }()
	err = j.wait(ctx)
	if err == nil {
		err = ws.Close(websocket.StatusNormalClosure, "")
		if websocket.CloseStatus(err) == websocket.StatusNormalClosure || errors.Is(err, net.ErrClosed) {
			err = nil
		}
	} else {
		reset(conn)
		if ws.Close(websocket.StatusInternalError, "reset") != nil {
			ws.CloseNow() //nolint:errcheck // it is being given up
		}
	}
	cancel()
	conn.Close()
	for _, running := range []chan error{j.sent, j.received} {
		if running != nil {
			<-running //nolint:errcheck // what it ended with follows from err
		}
	}
	return j.in, j.out, err
}

// Keep pings the other side until ctx ends or no answer comes, which closes ws.
func Keep(ctx context.Context, ws *websocket.Conn) {
	t := time.NewTicker(pulse)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		within, cancel := context.WithTimeout(ctx, patience)
		err := ws.Ping(within)
		cancel()
		if err != nil {
			ws.CloseNow() //nolint:errcheck // it is dead
			return
		}
	}
}

// join is one connection on its way.
type join struct {
	ws    *websocket.Conn
	conn  net.Conn
	ended chan struct{} // closed when the other side said "end"

	received, sent chan error // nil once read
	in, out        int64      // of receive, and of send
}

// wait returns nil when both directions have ended.
func (j *join) wait(ctx context.Context) error {
	ended := j.ended
	for ended != nil || j.sent != nil {
		select {
		case <-ended:
			ended = nil
		case err := <-j.sent:
			if j.sent = nil; err != nil {
				return err
			}
		case err := <-j.received:
			j.received = nil
			select {
			case <-j.ended:
				if j.sent == nil && websocket.CloseStatus(err) == websocket.StatusNormalClosure {
					return nil
				}
			default:
			}
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// receive writes messages to the connection. It goes on reading after the end of
// data, for the control frames; it always returns an error.
func (j *join) receive(ctx context.Context) error {
	over := false
	for {
		kind, r, err := j.ws.Reader(ctx)
		if err != nil {
			return fmt.Errorf("read from tunnel: %w", err)
		}
		switch {
		case over:
			return errors.New("read from tunnel: data after the end of data")
		case kind == websocket.MessageText:
			word, err := io.ReadAll(io.LimitReader(r, int64(len(end))+1))
			if err != nil {
				return fmt.Errorf("read from tunnel: %w", err)
			}
			if string(word) != end {
				return fmt.Errorf("read from tunnel: the word %q is unknown", word)
			}
			if err := closeWrite(j.conn); err != nil {
				return fmt.Errorf("end connection: %w", err)
			}
			over = true
			close(j.ended)
		default:
			n, err := io.Copy(j.conn, r)
			if j.in += n; err != nil {
				return fmt.Errorf("copy from tunnel: %w", err)
			}
		}
	}
}

// send reads the connection to its end.
func (j *join) send(ctx context.Context) error {
	buf := make([]byte, piece)
	for {
		n, err := j.conn.Read(buf)
		if n > 0 {
			j.out += int64(n)
			if err := j.ws.Write(ctx, websocket.MessageBinary, buf[:n]); err != nil {
				return fmt.Errorf("write to tunnel: %w", err)
			}
		}
		if errors.Is(err, io.EOF) {
			if err := j.ws.Write(ctx, websocket.MessageText, []byte(end)); err != nil {
				return fmt.Errorf("write to tunnel: %w", err)
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("read connection: %w", err)
		}
	}
}

var errNoHalfClose = errors.New("the connection cannot be half closed")

func closeWrite(c net.Conn) error {
	if h, ok := c.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return errNoHalfClose
}

// reset closes a connection so that its peer cannot take what it got for all.
func reset(c net.Conn) {
	if l, ok := c.(interface{ SetLinger(sec int) error }); ok {
		l.SetLinger(0) //nolint:errcheck // one that is closed needs no reset
	}
	c.Close()
}
