package ingress

import (
	"context"
	"log/slog"
	"net/http"
	"net/netip"
	"runtime/debug"
	"strings"
	"time"

	"github.com/cordonhq/cordon/internal/ingress/relay"
)

// access is what the log says of a request or connection when it is over. Queries
// and header fields are not in it: they carry tokens and signatures.
type access struct {
	sandbox string
	port    uint16
	src     netip.Addr
	start   time.Time
	octets  relay.Octets
	wait    time.Duration // for the service's answer to begin
}

// longestPath is how much of a path the log shows.
const longestPath = 256

// level is Debug, as of any one flow, unless the operator wants to see requests.
func (in *Ingress) level() slog.Level {
	if in.cfg.LogRequests {
		return slog.LevelInfo
	}
	return slog.LevelDebug
}

// over counts and logs a; more are facts that only some have.
func (in *Ingress) over(message string, a access, more ...slog.Attr) {
	in.metrics.in.Add(float64(a.octets.In))
	in.metrics.out.Add(float64(a.octets.Out))
	if a.wait > 0 {
		in.metrics.upstream.Observe(a.wait.Seconds())
	}
	if !in.log.Enabled(context.Background(), in.level()) {
		return
	}
	in.log.LogAttrs(context.Background(), in.level(), message, append([]slog.Attr{
		slog.String("sandbox", a.sandbox), slog.Int("port", int(a.port)), slog.Any("src", a.src),
		slog.Int64("in", a.octets.In), slog.Int64("out", a.octets.Out), slog.Duration("took", time.Since(a.start)), slog.Duration("upstream", a.wait),
	}, more...)...)
}

// end runs when the request is answered, given up or handed to a tunnel, or its
// handler panics.
func (v *visit) end() {
	if p := recover(); p != nil {
		if p != http.ErrAbortHandler { //nolint:errorlint // a panic's value, compared as net/http does
			v.in.log.Error("request handler panicked", "err", p, "stack", string(debug.Stack()))
		}
		defer panic(http.ErrAbortHandler)
	}
	v.in.metrics.observe(v.code, time.Since(v.access.start))
	v.access.src = v.info.addr
	path, _, _ := strings.Cut(v.r.RequestURI, "?")
	v.in.over("request served", v.access, slog.String("host", v.r.Host), slog.String("method", v.r.Method),
		slog.String("path", path[:min(len(path), longestPath)]), slog.Int("code", v.code), slog.Any("err", v.err))
}
