package ingress

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cordonhq/cordon/internal/ingress/h1"
	"github.com/cordonhq/cordon/internal/ingress/relay"
)

// isGRPC reports whether the request needs HTTP/2 all the way (gRPC over HTTP2:
// "application/grpc", with or without a suffix such as "+proto").
func isGRPC(r *http.Request) bool {
	ct := r.Header.Get("Content-Type")
	rest, ok := strings.CutPrefix(ct, "application/grpc")
	return ok && r.ProtoMajor == 2 && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

// grpcCall is a gRPC request on its way. httputil.ReverseProxy is not used for
// it: it keeps the client's body from being closed, so that a call whose service
// has died would hang until its client says something.
type grpcCall struct {
	b       *backend
	t       *Target
	to      route
	target  string
	host    string
	fields  []h1.Field
	rc      *http.ResponseController
	started atomic.Bool

	mu    sync.Mutex // guards ended: rc must not be used afterwards
	ended bool
}

var longAgo = time.Unix(1, 0)

// forwardGRPC sends a request over HTTP/2 without TLS ("h2c"), which is what
// gRPC services in sandboxes listen for.
func (v *visit) forwardGRPC(c *grpcCall) {
	c.rc = http.NewResponseController(v.w)
	defer c.end()
	leave, err := c.b.pool.Enter(c.reset)
	if err != nil {
		v.refuse(notFound(c.to.id))
		return
	}
	defer leave()
	out, err := c.request(v.r)
	if err != nil {
		v.refuse(badRequest("The request target is not valid."))
		return
	}
	resp, err := c.b.h2c.RoundTrip(out)
	if err != nil {
		if v.err = err; v.r.Context().Err() != nil {
			panic(http.ErrAbortHandler)
		}
		v.refuse(v.explain(c.b, c.to, false, err))
		return
	}
	defer resp.Body.Close()
	v.code, v.access.wait = resp.StatusCode, time.Since(v.access.start)
	if v.err = c.answer(v, resp); v.err != nil {
		panic(http.ErrAbortHandler) // resets the stream
	}
}

// reset is called when the sandbox ends: it wakes what is blocked on the client.
func (c *grpcCall) reset() {
	c.rc.SetReadDeadline(longAgo) //nolint:errcheck // only to wake a blocked read
	if c.started.Load() {
		c.rc.SetWriteDeadline(longAgo) //nolint:errcheck // resets the stream
	}
}

func (c *grpcCall) end() {
	c.mu.Lock()
	c.ended = true
	c.mu.Unlock()
}

// callBody is the client's half of a call. Close wakes a blocked Read.
type callBody struct {
	io.Reader
	call *grpcCall
}

func (b callBody) Close() error {
	b.call.mu.Lock()
	defer b.call.mu.Unlock()
	if b.call.ended {
		return nil
	}
	return b.call.rc.SetReadDeadline(longAgo)
}

func (c *grpcCall) request(r *http.Request) (*http.Request, error) {
	u, err := url.ParseRequestURI(c.target)
	if err != nil {
		return nil, err
	}
	u.Scheme, u.Host = "http", net.JoinHostPort("sandbox", strconv.Itoa(int(c.to.port)))
	h := maps.Clone(r.Header)
	for name := range h {
		if private(name) || relay.HopByHop(name) && name != "Te" {
			delete(h, name)
		}
	}
	if cookie, had := stripCookie(h); had {
		delete(h, "Cookie")
		if cookie != "" {
			h["Cookie"] = []string{cookie}
		}
	}
	for _, f := range c.fields {
		h[f.Name] = []string{f.Value}
	}
	for name := range r.Trailer { // what is not announced here does not come
		if private(name) || relay.HopByHop(name) {
			delete(r.Trailer, name)
		}
	}
	out := &http.Request{
		Method: r.Method, URL: u, Host: c.host, Header: h, ContentLength: r.ContentLength, Trailer: r.Trailer,
		Proto: "HTTP/2.0", ProtoMajor: 2,
	}
	if r.ContentLength != 0 {
		out.Body = callBody{r.Body, c}
	}
	return out.WithContext(r.Context()), nil
}

// answer copies the answer, flushing every piece: a call may be a conversation.
func (c *grpcCall) answer(v *visit, resp *http.Response) error {
	h := v.w.Header()
	for name, values := range resp.Header {
		if !relay.HopByHop(name) || name == "Content-Length" {
			h[name] = values
		}
	}
	announced := len(resp.Trailer)
	for name := range resp.Trailer {
		h.Add("Trailer", name)
	}
	v.answer(c.t, c.to, resp.StatusCode, h)
	c.started.Store(true)
	if c.b.gone() {
		return relay.ErrReset
	}
	v.w.WriteHeader(resp.StatusCode)
	buf := make([]byte, 16<<10)
	for {
		if err := c.rc.Flush(); err != nil {
			return fmt.Errorf("%w: %w", relay.ErrClient, err)
		}
		n, err := resp.Body.Read(buf)
		v.access.octets.Out += int64(n)
		if _, werr := v.w.Write(buf[:n]); werr != nil {
			return fmt.Errorf("%w: %w", relay.ErrClient, werr)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("%w: %w", relay.ErrAnswer, err)
		}
	}
	for name, values := range resp.Trailer {
		if len(resp.Trailer) != announced {
			name = http.TrailerPrefix + name
		}
		h[name] = values
	}
	return nil
}

// newH2C returns a transport of one sandbox; its connections end with the pool.
func (b *backend) newH2C() *http.Transport {
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	return &http.Transport{
		Protocols:          &protocols,
		DisableCompression: true,
		IdleConnTimeout:    b.in.cfg.Limits.IdleTimeout,
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			n, err := strconv.ParseUint(port, 10, 16)
			if err != nil {
				return nil, err
			}
			return b.pool.Dial(ctx, uint16(n))
		},
	}
}
