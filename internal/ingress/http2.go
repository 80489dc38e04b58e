package ingress

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"time"
	_ "unsafe" // for go:linkname

	"golang.org/x/net/http2"
)

// extendedConnectOff keeps golang.org/x/net/http2 from announcing
// SETTINGS_ENABLE_CONNECT_PROTOCOL (RFC 8441, section 3). It is read when a
// connection begins, and the only other way to it is a variable of the environment
// that is looked at before main (https://go.dev/issue/71128). From Go 1.27 on the
// module wraps net/http, and the link fails to build rather than to work.
//
//go:linkname extendedConnectOff golang.org/x/net/http2.disableExtendedConnectProtocol
var extendedConnectOff bool

// writeStall is how long a client of HTTP/2 may take no octet of what it is sent.
const writeStall = time.Minute

func isTLS(c net.Conn) bool {
	_, ok := c.(*tls.Conn)
	return ok
}

// streams serves connections of HTTP/2, with WebSockets over their streams.
type streams struct {
	handler http.Handler
	h2      *http2.Server //nolint:staticcheck // net/http's own copy cannot accept an extended CONNECT
	// base is what h2 takes its limits and the order to shut down from. It listens
	// to nothing.
	base *http.Server
}

// newStreams also puts into conf, when that is not nil, what HTTP/2 asks of TLS.
func newStreams(h http.Handler, limits Limits, conf *tls.Config, log *slog.Logger) (*streams, error) {
	if extendedConnectOff {
		extendedConnectOff = false
	}
	s := &streams{handler: h, h2: &http2.Server{}} //nolint:staticcheck // as above
	s.base = &http.Server{
		TLSConfig: conf, ReadHeaderTimeout: limits.HeaderTimeout, IdleTimeout: limits.IdleTimeout, MaxHeaderBytes: limits.HeaderBytes,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: limits.StreamsPerConn,
			SendPingTimeout:      30 * time.Second, PingTimeout: 15 * time.Second, // a peer that vanished
		},
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug), // the client's doing
	}
	return s, http2.ConfigureServer(s.base, s.h2) //nolint:staticcheck // as above
}

// serve serves one connection until it ends.
func (s *streams) serve(ctx context.Context, c net.Conn) {
	p := &patient{Conn: c, stall: writeStall}
	if c = p; isTLS(p.Conn) {
		c = patientTLS{p}
	}
	s.h2.ServeConn(c, &http2.ServeConnOpts{Context: ctx, Handler: s.handler, BaseConfig: s.base}) //nolint:staticcheck // as above
}

// shutdown tells the clients of all connections to go away, which they do with their
// last stream; those that come now are told with their first. It does not wait. A
// connection whose serve has only just begun may not hear of it until it is called again.
func (s *streams) shutdown(ctx context.Context) {
	s.base.Shutdown(ctx) //nolint:errcheck // there is no listener to close and nothing of its own to wait for
}
