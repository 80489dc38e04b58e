package ingress

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"

	"github.com/cordonhq/cordon/internal/ingress/relay"
)

// isGRPC reports whether the request needs HTTP/2 all the way (gRPC over HTTP2:
// "application/grpc", with or without a suffix such as "+proto").
func isGRPC(r *http.Request) bool {
	ct := r.Header.Get("Content-Type")
	rest, ok := strings.CutPrefix(ct, "application/grpc")
	return ok && r.ProtoMajor == 2 && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

// call is what a gRPC request carries through httputil.ReverseProxy.
type call struct {
	visit  *visit
	b      *backend
	to     route
	url    *url.URL
	host   string
	fields []relay.Field
}

type callKey struct{}

func callOf(ctx context.Context) *call { return ctx.Value(callKey{}).(*call) }

// forwardGRPC sends a request over HTTP/2 without TLS ("h2c"), which is what
// gRPC services in sandboxes listen for.
func (v *visit) forwardGRPC(b *backend, to route, target, host string, fields []relay.Field) {
	u, err := url.ParseRequestURI(target)
	if err != nil {
		v.refuse(badRequest("The request target is not valid."))
		return
	}
	u.Scheme, u.Host = "http", net.JoinHostPort("sandbox", strconv.Itoa(int(to.port)))
	c := &call{visit: v, b: b, to: to, url: u, host: host, fields: fields}
	v.in.grpc.ServeHTTP(v.w, v.r.WithContext(context.WithValue(v.r.Context(), callKey{}, c)))
}

func (in *Ingress) newGRPC() http.Handler {
	return &httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) {
			c := callOf(pr.In.Context())
			pr.Out.URL, pr.Out.Host = c.url, c.host
			for name := range pr.Out.Header {
				if private(name) {
					delete(pr.Out.Header, name)
				}
			}
			for _, f := range c.fields {
				pr.Out.Header.Set(f.Name, f.Value)
			}
			if cookie, had := stripCookie(pr.Out.Header); had {
				pr.Out.Header.Del("Cookie")
				if cookie != "" {
					pr.Out.Header.Set("Cookie", cookie)
				}
			}
		},
		Transport:     roundTripper(func(r *http.Request) (*http.Response, error) { return callOf(r.Context()).b.h2c.RoundTrip(r) }),
		FlushInterval: -1,
		ErrorLog:      slog.NewLogLogger(in.log.Handler(), slog.LevelDebug),
		ModifyResponse: func(resp *http.Response) error {
			c := callOf(resp.Request.Context())
			c.visit.code = resp.StatusCode
			c.visit.answer(c.to.host, resp.Header)
			return nil
		},
		ErrorHandler: func(_ http.ResponseWriter, r *http.Request, err error) {
			c := callOf(r.Context())
			c.visit.err = err
			c.visit.refuse(c.visit.explain(c.b, c.to, err))
		},
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

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
