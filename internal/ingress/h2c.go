package ingress

import (
	"context"
	"crypto/tls"
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

	"github.com/cordonhq/cordon/internal/ingress/relay"
)

// isGRPC reports whether the request needs HTTP/2 all the way (gRPC over HTTP2:
// "application/grpc", with or without a suffix such as "+proto").
func isGRPC(r *http.Request) bool {
	ct := r.Header.Get("Content-Type")
	rest, ok := strings.CutPrefix(ct, "application/grpc")
	return ok && r.ProtoMajor == 2 && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

// h2Call is a request on its way by HTTP/2. httputil.ReverseProxy is not used for
// it: it keeps the client's body from being closed, so that a call whose service
// has died would hang until its client says something.
type h2Call struct {
	*call
	rc      *http.ResponseController
	http1   *watched // the client's connection when it speaks HTTP/1
	started atomic.Bool

	reading sync.Mutex // held while the client's body is read

	mu    sync.Mutex // guards ended: rc must not be used afterwards
	ended bool
}

var longAgo = time.Unix(1, 0)

// forwardHTTP2 sends a request over HTTP/2, in clear ("h2c") but for ports whose
// services speak TLS.
func (v *visit) forwardHTTP2(to *call) {
	c := &h2Call{call: to, rc: http.NewResponseController(v.w), http1: v.info.http1}
	defer c.end()
	if v.r.ProtoMajor == 1 && v.r.ContentLength != 0 {
		if err := c.rc.EnableFullDuplex(); err != nil { // or the server reads the body itself before it answers
			v.refuse(badRequest("The request's body cannot be read."))
			return
		}
	}
	leave, err := c.backend.pool.Enter(c.reset)
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
	resp, err := c.backend.h2c.RoundTrip(out)
	if err != nil {
		c.backend.forget(c.to.port) // it may be another service now
		c.stopReading()
		if v.err = err; v.r.Context().Err() != nil && !c.backend.gone() {
			v.abort()
		}
		v.refuse(v.explain(to, err))
		return
	}
	defer resp.Body.Close()
	v.code, v.access.wait = resp.StatusCode, time.Since(v.access.start)
	if v.err = c.answer(v, resp); v.err != nil {
		v.abort() // resets the stream
	}
}

// reset is called when the sandbox ends: it wakes what is blocked on the client.
func (c *h2Call) reset() {
	c.cutBody()
	if c.started.Load() {
		c.rc.SetWriteDeadline(longAgo) //nolint:errcheck // resets the stream
	}
}

func (c *h2Call) end() {
	c.mu.Lock()
	c.ended = true
	c.mu.Unlock()
}

// stopReading ends the reading of the client's body, which the transport may be at
// when it returns; a server of HTTP/1 needs the body before it can end the request.
func (c *h2Call) stopReading() {
	c.cutBody()
	c.reading.Lock()
	defer c.reading.Unlock()
}

// callBody is the client's half of a call. Close wakes a blocked Read.
type callBody struct {
	io.Reader
	on *h2Call
}

func (b callBody) Read(p []byte) (int, error) {
	b.on.reading.Lock()
	defer b.on.reading.Unlock()
	return b.Reader.Read(p)
}

func (b callBody) Close() error {
	b.on.mu.Lock()
	defer b.on.mu.Unlock()
	if !b.on.ended {
		b.on.cutBody()
	}
	return nil
}

// cutBody wakes what reads the client's body.
func (c *h2Call) cutBody() {
	if c.http1 != nil {
		c.http1.cut()
		return
	}
	c.rc.SetReadDeadline(longAgo) //nolint:errcheck // only to wake a blocked read
}

func (c *h2Call) request(r *http.Request) (*http.Request, error) {
	// In this form the target goes out byte for byte.
	u := &url.URL{Scheme: "http", Host: net.JoinHostPort("sandbox", strconv.Itoa(int(c.to.port))), Opaque: "//" + c.host + c.pass.target}
	if c.pass.target == "*" {
		u.Opaque, u.Path = "", "*"
	}
	h := maps.Clone(r.Header)
	listed := relay.ConnectionListed(r.Header)
	for name := range h {
		if listed[name] || private(name) || relay.HopByHop(name) && name != "Te" || name == "Expect" {
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
		if private(name) || relay.UnsafeTrailer(name) {
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
func (c *h2Call) answer(v *visit, resp *http.Response) error {
	h := v.w.Header()
	for name, values := range resp.Header {
		if !relay.HopByHop(name) || name == "Content-Length" {
			h[name] = values
		}
	}
	if _, typed := h["Content-Type"]; !typed {
		h["Content-Type"] = nil // or the server guesses one
	}
	announced := len(resp.Trailer)
	for name := range resp.Trailer {
		h.Add("Trailer", name)
	}
	v.answer(c.target, c.to, resp.StatusCode, h)
	c.started.Store(true)
	if c.backend.gone() {
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
		DisableCompression: true, MaxResponseHeaderBytes: 256 << 10,
		IdleConnTimeout: b.in.cfg.Limits.IdleTimeout,
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			n, err := strconv.ParseUint(port, 10, 16)
			if err != nil {
				return nil, err
			}
			c, err := b.pool.Dial(ctx, uint16(n))
			if conf := b.tlsFor(uint16(n), "h2"); err == nil && conf != nil {
				return b.seal(ctx, c, conf)
			}
			return c, err
		},
	}
}

// seal makes TLS of a connection to a service that speaks HTTP/2 in it. The transport
// goes on with it when the request that it began for is over.
func (b *backend) seal(ctx context.Context, c net.Conn, conf *tls.Config) (net.Conn, error) {
	s, err := b.pool.Handshake(ctx, c, conf)
	if err != nil {
		return nil, err
	}
	if s.ConnectionState().NegotiatedProtocol != "h2" {
		relay.Abort(c)
		return nil, fmt.Errorf("%w: the service did not choose HTTP/2", relay.ErrNoTLS)
	}
	return s, nil
}
