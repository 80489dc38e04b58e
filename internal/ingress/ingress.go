// Package ingress takes requests from outside to a port of a sandbox: it knows which host
// name leads to which sandbox, who may pass, what the service sees of the request, and
// what the client is told when no service answers.
//
// Clients are served by net/http (HTTP/1, watched by strict.go) and x/net/http2
// (http2.go). The way of a request: route (host.go, route.go) → admit (admit.go, token.go) → the
// sandbox's connections (backend.go) → relay. Every decision is made from memory.
package ingress

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/http/httpguts"

	"github.com/cordonhq/cordon/internal/ingress/relay"
	"github.com/cordonhq/cordon/internal/share"
)

// Config is what an Ingress needs. Domains, Lookup and API are required.
type Config struct {
	// Domains are the names served: sandboxes at <port>-<id>.<domain>, the API at
	// api.<domain> and <domain>. They carry no port, and a request's port does not matter.
	Domains []string
	// Lookup returns the sandbox with the ID. It is called for every request and
	// must answer from memory.
	Lookup func(id string) (*Target, bool)
	// Custom returns the sandbox and port that a name outside Domains leads to. It
	// must answer from memory. May be nil.
	Custom func(host string) (id string, port uint16, ok bool)
	// Challenge answers a request of a certificate authority on a listener of mode
	// Redirect, and reports whether it did. May be nil.
	Challenge func(w http.ResponseWriter, r *http.Request) bool
	// Wake brings a paused sandbox back; Lookup returns it running afterwards. It
	// is called once for all requests that wait, with the first. Nil means that none
	// is woken.
	Wake func(ctx context.Context, id string, by Waker) error
	// Traffic is called when a request to a sandbox begins or ends whose life
	// traffic extends; see Target.TrafficExtends. May be nil.
	Traffic func(id string)
	// BySignature finds the sandbox that a signed file URL without any sandbox
	// in it is for: /files?path=…&signature=… on a shared host. May be nil.
	BySignature func(r *http.Request) (id string, ok bool)
	// API is the control API.
	API http.Handler
	// TLS is used by listeners of mode TLS; see tlsconf. ALPN is set here.
	TLS *tls.Config
	// TrustedProxies may say who the client is by X-Forwarded-For and -Proto.
	TrustedProxies []netip.Prefix
	// ProxyProtocol makes trusted proxies begin each connection with a header of
	// the PROXY protocol, version 1 or 2; others are clients. Not on Plain listeners.
	ProxyProtocol bool
	// Inside returns the sandbox's own address for the source of a connection that
	// was opened for a sandbox which asked for one of our names. Its rules were
	// applied to the name that the TLS handshake shows, so requests for another
	// host are refused there. Nil: sandboxes do not come this way.
	Inside func(src netip.Addr) (sandbox netip.Addr, ok bool)
	// HSTS is the max-age of Strict-Transport-Security; 0 sends none.
	HSTS time.Duration
	// HTTPSPort is where listeners of mode Redirect send clients; 0 means 443.
	HTTPSPort uint16
	Limits    Limits
	// LogRequests shows each request and tunnel in the log at Info; else it is Debug.
	LogRequests bool
	Log         *slog.Logger
	Metrics     prometheus.Registerer // nil registers nothing
}

// Limits bound what clients and services may hold. Zero fields take the defaults.
type Limits struct {
	HeaderBytes     int           // of a request's header; 64 KiB
	HeaderTimeout   time.Duration // TLS handshake and header; 10 s
	IdleTimeout     time.Duration // of a kept client connection; 2 min
	DrainTimeout    time.Duration // for requests under way when Run ends; 10 s
	DialTimeout     time.Duration // to a service; 3 s
	WakeTimeout     time.Duration // for a paused sandbox to come back; 30 s
	ConnsPerSandbox int           // requests and tunnels under way; 16384
	ConnsPerSource  int           // connections of one IPv4 address or IPv6 /64; 16384
	StreamsPerConn  int           // HTTP/2; 250
	Exchanges       int           // requests and tunnels to all sandboxes, which keys share; 4 × ConnsPerSandbox
	HeadsPerSource  int64         // bytes of the heads of one source's requests under way; 8 MiB
	Heads           int64         // of all sources'; 128 MiB
	PerSource       int           // requests of one source under way, but for tunnels; 8192
	Wakes           int           // at a time; 16
	Relay           relay.Limits  // towards services
}

// State says whether a sandbox can be spoken to.
type State uint8

// The states an ingress tells apart.
const (
	Running State = iota
	Paused
)

// Target is one sandbox as the ingress sees it. It must not be changed once
// returned from Lookup; return another one instead.
type Target struct {
	ID        string
	State     State
	Addr      netip.Addr // dialable from here
	AgentPort uint16     // 0 means 49983
	// DialLoopback reaches services bound to 127.0.0.1 or ::1 inside. May be nil.
	DialLoopback func(ctx context.Context, port uint16) (net.Conn, error)
	Public       bool   // ports other than the agent's answer without a token
	TrafficToken string // what clients of a sandbox that is not public must show
	AccessToken  string // what the agent wants to be shown; empty: nothing
	Owner        string // whose it is: owners share the waking of sandboxes fairly
	// LinkKey signs this sandbox's URLs; Link reports whether one of them still
	// counts, and may be nil: none does. See auth.URLAccess.
	LinkKey string
	Link    func(id string) bool
	// AllowIn are the only sources that may speak to its ports; nil: everybody.
	AllowIn  []netip.Prefix
	MaskHost string // Host for services, ${PORT} replaced; empty passes it unchanged
	// MaskOrigin makes services see an Origin and a Referer of their own URL as those
	// of the mask, and no X-Forwarded-Host.
	MaskOrigin bool
	HTTPSPorts []uint16 // whose services speak TLS themselves
	AutoResume bool     // traffic wakes it when it is paused
	WakeOn     WakeOn   // which traffic does
	// TrafficExtends makes requests call Config.Traffic.
	TrafficExtends bool
	// Done is closed when the sandbox is killed or paused: its connections are
	// reset at once. A resumed sandbox has a new one.
	Done <-chan struct{}
}

const defaultAgentPort = 49983

func (t *Target) agentPort() uint16 {
	if t.AgentPort != 0 {
		return t.AgentPort
	}
	return defaultAgentPort
}

// Ingress serves sandboxes and the API on one set of listeners.
type Ingress struct {
	cfg     Config
	domains domains
	log     *slog.Logger
	pages   *pages
	metrics *metrics
	sources *sources
	heads   *heads

	exchanges *share.Pool

	base context.Context // of what outlives a request; ends with Close
	stop context.CancelFunc
	wg   sync.WaitGroup // watchers and wakes

	mu       sync.RWMutex        // guards the fields below
	closed   bool                // no backend is made any more
	backends map[string]*backend // by sandbox ID

	wakes  *wakes
	judged atomic.Uint64 // counts calls of Recheck
}

// New checks cfg and returns an Ingress that serves nothing yet.
func New(cfg Config) (*Ingress, error) {
	ds, err := parseDomains(cfg.Domains)
	if err != nil {
		return nil, err
	}
	if cfg.Lookup == nil || cfg.API == nil {
		return nil, errors.New("ingress: Lookup and API must be set")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Limits.fill()
	pages, err := newPages()
	if err != nil {
		return nil, fmt.Errorf("ingress: error pages: %w", err)
	}
	in := &Ingress{
		cfg: cfg, domains: ds, log: cfg.Log, pages: pages,
		metrics: newMetrics(),
		sources: newSources(&cfg),
		heads: &heads{
			perSource: cfg.Limits.HeadsPerSource, all: cfg.Limits.Heads, streams: int64(cfg.Limits.PerSource), source: map[netip.Prefix]headUse{},
		},
		exchanges: share.NewPool(share.Exchanges.Of(int64(cfg.Limits.Exchanges), int64(cfg.Limits.ConnsPerSandbox))),
		backends:  map[string]*backend{},
		wakes:     newWakes(cfg.Limits.Wakes),
	}
	if cfg.Metrics != nil {
		if err := in.register(cfg.Metrics); err != nil {
			return nil, fmt.Errorf("ingress: %w", err)
		}
	}
	in.base, in.stop = context.WithCancel(context.Background())
	return in, nil
}

func (l *Limits) fill() {
	for _, f := range []struct {
		v *int
		d int
	}{
		{&l.HeaderBytes, 64 << 10}, {&l.ConnsPerSandbox, 16384}, {&l.ConnsPerSource, 16384},
		{&l.StreamsPerConn, 250}, {&l.Wakes, 16}, {&l.PerSource, 8192},
	} {
		if *f.v <= 0 {
			*f.v = f.d
		}
	}
	if l.Exchanges <= 0 {
		l.Exchanges = 4 * l.ConnsPerSandbox
	}
	if l.HeadsPerSource <= 0 {
		l.HeadsPerSource = 8 << 20
	}
	if l.Heads <= 0 {
		l.Heads = 128 << 20
	}
	for _, f := range []struct {
		v *time.Duration
		d time.Duration
	}{
		{&l.HeaderTimeout, 10 * time.Second}, {&l.IdleTimeout, 2 * time.Minute}, {&l.DrainTimeout, 10 * time.Second},
		{&l.DialTimeout, 3 * time.Second}, {&l.WakeTimeout, 30 * time.Second}, {&l.Relay.StallTimeout, 5 * time.Minute},
	} {
		if *f.v <= 0 {
			*f.v = f.d
		}
	}
}

// Handler returns the handler for listeners of the mode. Run uses it; it is
// there for those who bring their own server. Close ends what it leaves behind.
func (in *Ingress) Handler(mode Mode) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v := &visit{in: in, w: w, r: r, mode: mode, access: access{start: time.Now()}, info: infoOf(r)}
		defer v.end()
		if v.info.http1 != nil {
			v.info.upgrading = false
			defer v.info.handled()
			if refused := v.info.http1.admits(r); refused != nil {
				w.Header().Set("Connection", "close")
				v.refuse(refused)
				return
			}
		}
		if mode == Redirect {
			v.redirect()
			return
		}
		bytes, fields := headSize(r)
		if fields > fieldsMost {
			v.refuse(&refusal{Code: http.StatusRequestHeaderFieldsTooLarge, Message: "The request has too many header fields", Limit: fieldsMost})
			return
		}
		from := sourceOf(v.caller().addr)
		if refused := in.heads.enter(from, bytes); refused != nil {
			v.refuse(refused)
			return
		}
		defer in.heads.leave(from, bytes)
		v.serve()
	})
}

// visit is one request on its way.
type visit struct {
	in   *Ingress
	w    http.ResponseWriter
	r    *http.Request
	mode Mode
	info *connInfo
	code int   // sent to the client
	err  error // why it did not go well
	// access is filled in on the way.
	access access
	// stream is what the client of a WebSocket over HTTP/2 sends; see streamed.
	stream io.ReadCloser
	// judged is Ingress.judged from before the sandbox was looked up.
	judged uint64
}

func (v *visit) serve() {
	if v.mode == TLS && v.in.cfg.HSTS > 0 {
		v.w.Header().Set("Strict-Transport-Security", v.in.hsts())
	}
	if !httpguts.ValidHeaderFieldName(v.r.Method) { // HTTP/2 carries any octets; both are tokens
		v.refuse(badRequest("The request's method is not a token."))
		return
	}
	if v.info.inside && !showsItsHost(v.r) {
		v.refuse(misdirected())
		return
	}
	if refused := v.streamed(); refused != nil {
		v.refuse(refused)
		return
	}
	to, refused := v.in.route(v.r, v.mode)
	if refused != nil {
		v.refuse(refused)
		return
	}
	if to.api {
		rec := &recorder{ResponseWriter: v.w, client: v.info.http1}
		defer func() { v.code = rec.code }()
		v.in.cfg.API.ServeHTTP(rec, v.r)
		return
	}
	v.access.sandbox = to.id
	v.sandbox(to)
}

// sandbox serves a request for a sandbox.
func (v *visit) sandbox(to route) {
	v.judged = v.in.judged.Load()
	t, ok := v.in.cfg.Lookup(to.id)
	if !ok {
		v.refuse(notFound(to.id))
		return
	}
	if to.port == 0 {
		to.port = t.agentPort()
	}
	v.access.port = to.port
	pass, refused := v.admit(t, to)
	if refused != nil {
		v.refuse(refused)
		return
	}
	if pass.preflight {
		v.permit(to.id)
		return
	}
	if pass.cookie != nil {
		v.exchange(pass)
		return
	}
	if t.State != Running {
		by := v.waker(to)
		if t.AutoResume && !t.wakes(by, v.r.Header.Get(wakeHeader) != "") {
			v.refuse(asleep(t.ID, t.WakeOn))
			return
		}
		if t, refused = v.in.wake(v.r.Context(), t, by); refused != nil {
			v.refuse(refused)
			return
		}
	}
	b := v.in.backend(t)
	if b == nil {
		v.refuse(notFound(to.id))
		return
	}
	if refused := b.occupy(v.caller().addr); refused != nil {
		v.refuse(refused)
		return
	}
	g, ok := v.enter(b, t, to, pass.ticket)
	if !ok {
		v.refuse(withdrawn(to.id))
		return
	}
	if g.busy {
		v.in.traffic(t)
	}
	v.forward(&call{backend: b, target: t, to: to, pass: pass, guest: g})
}

// exchange answers a browser's navigation with a token in its URL by a redirect
// to the same URL without it, and a cookie in its place.
func (v *visit) exchange(pass pass) {
	h := v.w.Header()
	h.Set("Location", v.scheme()+"://"+v.r.Host+pass.target)
	h.Set("Cache-Control", "no-store")
	h.Set("Referrer-Policy", "no-referrer")
	http.SetCookie(v.w, pass.cookie)
	v.code = http.StatusFound
	v.w.WriteHeader(v.code)
}

// scheme is what the client used, as far as we may believe it.
func (v *visit) scheme() string {
	if v.info.trusted {
		if p := strings.ToLower(v.r.Header.Get("X-Forwarded-Proto")); p == "http" || p == "https" {
			return p
		}
	}
	if v.mode == TLS || v.r.TLS != nil {
		return "https"
	}
	return "http"
}

// recorder remembers the status of an answer of the API.
type recorder struct {
	http.ResponseWriter
	client *watched // nil for HTTP/2
	code   int
}

func (r *recorder) WriteHeader(code int) {
	if r.code < 200 {
		r.begins(code)
	}
	r.ResponseWriter.WriteHeader(code)
}

func (r *recorder) Write(b []byte) (int, error) {
	if r.code < 200 {
		r.begins(http.StatusOK)
	}
	return r.ResponseWriter.Write(b)
}

func (r *recorder) begins(code int) {
	if r.code = code; r.client != nil && code >= 200 {
		r.client.hasten()
	}
}

func (r *recorder) Flush() {
	if f, ok := r.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
}

// Unwrap is for http.ResponseController.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }
