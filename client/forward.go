package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/coder/websocket"

	"github.com/cordonhq/cordon/internal/tunnel"
)

// maxForwarded is how many connections one Forward carries at a time; more wait
// to be accepted.
const maxForwarded = 1024

// forwardDial is how long the server may take to reach the port.
const forwardDial = 15 * time.Second

// ForwardOptions are for Forward; the zero value is ready.
type ForwardOptions struct {
	// Failed is told of each connection that could not be carried or broke. It may
	// be called by several goroutines at once.
	Failed func(from net.Addr, err error)
}

// Forward carries every TCP connection that l accepts to a port of the sandbox,
// also one that only listens on its loopback, until ctx ends or l fails, which is
// returned. It closes l. Each connection is a tunnel of its own: a port that is
// closed now may be open for the next one.
func (s *Sandbox) Forward(ctx context.Context, l net.Listener, port int, o ForwardOptions) error {
	if port < 1 || port > 65535 {
		l.Close()
		return fmt.Errorf("port is %d, it must be from 1 to 65535", port)
	}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	carrying, cancel := context.WithCancel(ctx) // may be told of ctx's end later than l is closed
	var open sync.WaitGroup
	defer open.Wait()
	defer cancel()
	free := make(chan struct{}, maxForwarded)
	for {
		select {
		case free <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		conn, err := l.Accept()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		if err != nil {
			if conn != nil {
				conn.Close()
			}
			return err
		}
		open.Go(func() {
			defer func() { <-free }()
			if err := s.carry(carrying, conn, port); err != nil && o.Failed != nil && carrying.Err() == nil {
				o.Failed(conn.RemoteAddr(), err)
			}
		})
	}
}

// carry takes one connection through a tunnel and closes it.
func (s *Sandbox) carry(ctx context.Context, conn net.Conn, port int) error {
	ws, err := s.dialTunnel(ctx, port)
	if err != nil {
		if t, ok := conn.(*net.TCPConn); ok {
			t.SetLinger(0) //nolint:errcheck // a reset is what a closed port answers
		}
		conn.Close()
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var kept sync.WaitGroup
	kept.Go(func() { tunnel.Keep(ctx, ws) })
	_, _, err = tunnel.Join(ctx, ws, conn)
	cancel()
	kept.Wait()
	return err
}

func (s *Sandbox) dialTunnel(ctx context.Context, port int) (*websocket.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, forwardDial)
	defer cancel()
	target := s.client.opts.APIURL + "/sandboxes/" + url.PathEscape(s.ID) + "/forward/" + strconv.Itoa(port)
	ws, resp, err := websocket.Dial(ctx, target, &websocket.DialOptions{ //nolint:bodyclose // the library has read and closed it
		HTTPClient: s.client.http, HTTPHeader: http.Header{"X-Api-Key": {s.client.opts.APIKey}}, Subprotocols: []string{tunnel.Protocol},
	})
	switch {
	case err == nil && ws.Subprotocol() != tunnel.Protocol:
		return nil, errors.Join(errors.New("the server does not speak "+tunnel.Protocol), ws.CloseNow())
	case err == nil:
		return ws, nil
	case resp != nil && resp.StatusCode >= 400:
		return nil, errorOf(resp)
	}
	return nil, fmt.Errorf("open tunnel: %w", err)
}
