package ingress

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/cordonhq/cordon/internal/ingress/tlsconf"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	domain = "cordon.localhost"
	idA    = "iaaaaaaaaaaaaaaaaaaaa"
	idB    = "ibbbbbbbbbbbbbbbbbbbb"
)

// lab is an ingress on real listeners, with sandboxes that are addresses of the
// loopback network.
type lab struct {
	t        testing.TB
	in       *Ingress
	registry *prometheus.Registry
	https    string // address
	http     string
	redirect string
	tcp      string // of mode TLSTCP
	roots    *x509.CertPool
	stopped  chan struct{}
	stop     context.CancelFunc
	hosts    byte

	mu      sync.Mutex
	targets map[string]*Target
}

// sandbox is one address of the loopback network with services on it.
type sandbox struct {
	lab  *lab
	t    *Target
	done chan struct{}
}

func newLab(t testing.TB, change ...func(*Config)) *lab {
	t.Helper()
	l := &lab{t: t, targets: map[string]*Target{}, stopped: make(chan struct{}), registry: prometheus.NewRegistry(), hosts: 1}
	conf, caFile, err := tlsconf.LocalCA(t.TempDir(), []string{domain}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(caFile)
	if err != nil {
		t.Fatal(err)
	}
	l.roots = x509.NewCertPool()
	l.roots.AppendCertsFromPEM(ca)
	cfg := Config{
		Domains: []string{domain}, TLS: conf, Lookup: l.lookup, Metrics: l.registry,
		API: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "api %s", r.URL.Path) }),
	}
	for _, c := range change {
		c(&cfg)
	}
	if l.in, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	tl, pl, rl, nl := listen(t, "127.0.0.1:0"), listen(t, "127.0.0.1:0"), listen(t, "127.0.0.1:0"), listen(t, "127.0.0.1:0")
	l.https, l.http, l.redirect, l.tcp = tl.Addr().String(), pl.Addr().String(), rl.Addr().String(), nl.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	l.stop = cancel
	go func() {
		defer close(l.stopped)
		if err := l.in.Run(ctx, Listener{tl, TLS}, Listener{pl, Plain}, Listener{rl, Redirect}, Listener{nl, TLSTCP}); err != nil {
			t.Errorf("run: %v", err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case <-l.stopped:
		case <-time.After(20 * time.Second):
			t.Error("Run did not return")
		}
	})
	return l
}

func listen(t testing.TB, addr string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *lab) lookup(id string) (*Target, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t, ok := l.targets[id]
	return t, ok
}

// sandbox registers a public sandbox with an address of its own.
func (l *lab) sandbox(id string, change ...func(*Target)) *sandbox {
	l.hosts++
	s := &sandbox{lab: l, done: make(chan struct{})}
	s.t = &Target{ID: id, Public: true, Done: s.done, Addr: netip.AddrFrom4([4]byte{127, 77, byte(os.Getpid()), l.hosts})}
	for _, c := range change {
		c(s.t)
	}
	l.mu.Lock()
	l.targets[id] = s.t
	l.mu.Unlock()
	return s
}

// change replaces the sandbox's target by a changed copy.
func (s *sandbox) change(f func(*Target)) {
	s.lab.mu.Lock()
	defer s.lab.mu.Unlock()
	c := *s.t
	f(&c)
	s.t = &c
	s.lab.targets[c.ID] = &c
}

// kill removes the sandbox, as a manager does: from the index first.
func (s *sandbox) kill() {
	s.lab.mu.Lock()
	delete(s.lab.targets, s.t.ID)
	s.lab.mu.Unlock()
	close(s.done)
}

// serve runs a service on a free port of the sandbox, or on the one given.
func (s *sandbox) serve(h http.Handler, port ...int) int {
	s.lab.t.Helper()
	want := 0
	if len(port) > 0 {
		want = port[0]
	}
	ln := listen(s.lab.t, net.JoinHostPort(s.t.Addr.String(), strconv.Itoa(want)))
	var p http.Protocols
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true)
	srv := &http.Server{Handler: h, Protocols: &p, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(ln) }()
	s.lab.t.Cleanup(func() { srv.Close(); <-done })
	return ln.Addr().(*net.TCPAddr).Port
}

// raw runs a service that is a function of the connection.
func (s *sandbox) raw(f func(c net.Conn, br *bufio.Reader)) int {
	s.lab.t.Helper()
	return s.listenRaw(func(c net.Conn) { f(c, bufio.NewReader(c)) })
}

func (s *sandbox) listenRaw(f func(c net.Conn)) int {
	s.lab.t.Helper()
	ln := listen(s.lab.t, net.JoinHostPort(s.t.Addr.String(), "0"))
	var wg sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, c)
			mu.Unlock()
			wg.Go(func() { defer c.Close(); f(c) })
		}
	})
	s.lab.t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for _, c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return ln.Addr().(*net.TCPAddr).Port
}

func (s *sandbox) host(port int) string { return fmt.Sprintf("%d-%s.%s", port, s.t.ID, domain) }

// client returns a client that finds every name at the TLS listener.
func (l *lab) client(h2 bool) *http.Client {
	var p http.Protocols
	p.SetHTTP1(!h2)
	p.SetHTTP2(h2)
	tr := &http.Transport{
		Protocols: &p, DisableCompression: true, MaxIdleConnsPerHost: 100,
		TLSClientConfig: &tls.Config{RootCAs: l.roots},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, network, l.https)
		},
		ExpectContinueTimeout: 5 * time.Second,
	}
	l.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// both runs f with an HTTP/1.1 and an HTTP/2 client.
func (l *lab) both(t *testing.T, f func(t *testing.T, c *http.Client)) {
	for _, h2 := range []bool{false, true} {
		t.Run(map[bool]string{false: "h1", true: "h2"}[h2], func(t *testing.T) { f(t, l.client(h2)) })
	}
}

// plain sends bytes to the plain listener and returns what comes back until the
// end of the connection or for half a second.
func (l *lab) plain(t *testing.T, request string) string {
	t.Helper()
	c := l.dialPlain(t)
	defer c.Close()
	io.WriteString(c, request)
	c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	b, _ := io.ReadAll(c)
	return string(b)
}

func (l *lab) dialPlain(t *testing.T) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", l.http)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

func get(t *testing.T, c *http.Client, url string, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest("GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	return do(t, c, req, header...)
}

func do(t *testing.T, c *http.Client, req *http.Request, header ...string) (*http.Response, string) {
	t.Helper()
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

// echo answers with what it saw of the request.
var echo = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	fmt.Fprintf(w, "%s %s\nhost=%s\n", r.Method, r.RequestURI, r.Host)
	for k, vv := range r.Header {
		for _, v := range vv {
			fmt.Fprintf(w, "%s=%s\n", strings.ToLower(k), v)
		}
	}
	for k, v := range r.Trailer {
		fmt.Fprintf(w, "trailer %s=%s\n", strings.ToLower(k), strings.Join(v, ","))
	}
	fmt.Fprintf(w, "body=%d\n", len(body))
})
