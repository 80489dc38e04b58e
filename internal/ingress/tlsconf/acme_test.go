package tlsconf_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/ingress/tlsconf"
	"github.com/cordonhq/cordon/test/pebble"
)

const domain = "sbx.acme.test"

// logbook is a log that can be read while it is written.
type logbook struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *logbook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// site is an HTTPS server with certificates from an ACME server.
type site struct {
	acme *tlsconf.ACME
	addr string
	log  *logbook
	stop func() // ends it before the test does
}

// open starts the site; ports are where the CA looks for it.
func open(t *testing.T, cfg tlsconf.ACMEConfig, https, http80 net.Listener) *site {
	t.Helper()
	s := &site{log: &logbook{}, addr: https.Addr().String()}
	cfg.Log = slog.New(slog.NewTextHandler(s.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	cfg.HTTPS = s.addr
	if http80 != nil {
		cfg.HTTP = http80.Addr().String()
	}
	var err error
	if s.acme, err = tlsconf.NewACME(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.acme.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	srv := &http.Server{
		Handler:   http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok") }),
		TLSConfig: s.acme.TLS(), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0),
	}
	wg.Go(func() { _ = srv.ServeTLS(https, "", "") })
	plain := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !s.acme.HTTPChallenge(w, r) {
			http.NotFound(w, r)
		}
	})}
	if http80 != nil {
		wg.Go(func() { _ = plain.Serve(http80) })
	}
	s.stop = sync.OnceFunc(func() {
		srv.Close()
		plain.Close()
		stop()
		wg.Wait()
	})
	t.Cleanup(func() {
		s.stop()
		if t.Failed() {
			t.Logf("server:\n%s", s.log)
		}
	})
	return s
}

func listen(t *testing.T) (net.Listener, int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, l.Addr().(*net.TCPAddr).Port
}

// leaf shakes hands as a client that trusts roots only.
func (s *site) leaf(name string, roots *x509.CertPool) (*x509.Certificate, error) {
	d := &tls.Dialer{NetDialer: &net.Dialer{Timeout: 15 * time.Second}, Config: &tls.Config{ServerName: name, RootCAs: roots}}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	c, err := d.DialContext(ctx, "tcp", s.addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.(*tls.Conn).ConnectionState().PeerCertificates[0], nil
}

// await asks for a certificate until want accepts it.
func (s *site) await(t *testing.T, name string, roots *x509.CertPool, want func(*x509.Certificate) bool) *x509.Certificate {
	t.Helper()
	var err error
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		var c *x509.Certificate
		if c, err = s.leaf(name, roots); err == nil && want(c) {
			return c
		}
	}
	t.Fatalf("no such certificate for %s within a minute: %v", name, err)
	return nil
}

func whichever(*x509.Certificate) bool { return true }

func rfc2136(ca *pebble.Server) tlsconf.DNS {
	return tlsconf.DNS{
		Provider: "rfc2136", Server: ca.DNS.Addr, KeyName: strings.TrimSuffix(pebble.KeyName, "."), Key: pebble.Key,
		Resolvers: []string{ca.DNS.Addr},
	}
}

func rootsOf(t *testing.T, ca *pebble.Server) *x509.CertPool {
	t.Helper()
	pool := x509.NewCertPool()
	b, err := os.ReadFile(ca.RootsFile)
	if err != nil || !pool.AppendCertsFromPEM(b) {
		t.Fatal(err)
	}
	return pool
}

func TestWildcardIsIssuedRenewedAndServedWhenTheCAIsGone(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and runs an ACME server")
	}
	t.Parallel() // it mostly waits
	ca := pebble.Start(t, pebble.Options{Domains: []string{domain}, Validity: 36 * time.Second})
	roots := ca.Pool(t)
	cfg := tlsconf.ACMEConfig{
		Dir: t.TempDir(), Email: "operator@" + domain, CA: ca.Directory, Roots: rootsOf(t, ca),
		Domains: []string{domain}, DNS: rfc2136(ca), Interval: time.Second,
	}
	https, _ := listen(t)
	s := open(t, cfg, https, nil)
	host := "3000-i00000000000000000000." + domain
	first := s.await(t, host, roots, whichever)
	if !slices.Equal(first.DNSNames, []string{"*." + domain}) {
		t.Errorf("certificate for %v, want the wildcard", first.DNSNames)
	}
	if apex := s.await(t, domain, roots, whichever); !slices.Equal(apex.DNSNames, []string{domain}) {
		t.Errorf("apex has a certificate for %v", apex.DNSNames)
	}
	// A connection that is open stays as it is while its certificate is replaced.
	c, err := tls.Dial("tcp", s.addr, &tls.Config{ServerName: host, RootCAs: roots})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ask := func() {
		t.Helper()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host)
		b := make([]byte, 512)
		if n, err := c.Read(b); err != nil || !bytes.HasPrefix(b[:n], []byte("HTTP/1.1 200")) {
			t.Errorf("kept connection: %q, %v", b[:n], err)
		}
	}
	ask()
	second := s.await(t, host, roots, func(c *x509.Certificate) bool { return c.SerialNumber.Cmp(first.SerialNumber) != 0 })
	ask()
	t.Logf("serial %x until %s, then %x until %s", first.SerialNumber, first.NotAfter.Format(time.TimeOnly), second.SerialNumber, second.NotAfter.Format(time.TimeOnly))
	// The renewal for the apex may be under way still.
	for end := time.Now().Add(10 * time.Second); len(ca.DNS.Left()) > 0; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("TXT records left behind: %v", ca.DNS.Left())
		}
	}

	ca.Stop()
	s.stop() // two in one process would share one attempt at the renewal
	https, _ = listen(t)
	began := time.Now()
	again := open(t, cfg, https, nil)
	got, err := again.leaf(host, roots)
	if err != nil {
		t.Fatalf("with the CA gone: %v", err)
	}
	t.Logf("with the CA gone: serial %x, %s after the start", got.SerialNumber, time.Since(began).Round(time.Millisecond))
	for end := time.Now().Add(40 * time.Second); !strings.Contains(again.log.String(), "certificate not obtained"); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no log line says that the renewal failed")
		}
	}
	if _, err := again.leaf(host, nil); err == nil {
		t.Error("a client without the root trusts the certificate")
	}
}

func TestCustomDomainsGetACertificateOnlyWhileBound(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and runs an ACME server")
	}
	t.Parallel() // it mostly waits
	for _, tt := range []struct {
		name string
		http bool // the CA can reach HTTP only, else TLS only
	}{{"by TLS-ALPN-01", false}, {"by HTTP-01", true}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			https, tlsPort := listen(t)
			o := pebble.Options{Domains: []string{"app.test"}, HTTPSPort: tlsPort}
			var http80 net.Listener
			if tt.http {
				http80, o.HTTPPort = listen(t)
				_, o.HTTPSPort = listen(t) // nothing answers there
			}
			ca := pebble.Start(t, o)
			roots := ca.Pool(t)
			bound := sync.Map{}
			bound.Store("www.app.test", true)
			static := &tls.Certificate{}
			s := open(t, tlsconf.ACMEConfig{
				Dir: t.TempDir(), CA: ca.Directory, Roots: rootsOf(t, ca), Domains: []string{domain}, Interval: time.Second,
				Own:   func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return static, nil },
				Allow: func(name string) bool { _, ok := bound.Load(name); return ok },
			}, https, http80)
			if _, err := s.leaf("other.app.test", roots); err == nil {
				t.Error("an unbound name got a certificate")
			}
			if c := s.await(t, "WWW.app.test", roots, whichever); !slices.Equal(c.DNSNames, []string{"www.app.test"}) {
				t.Errorf("certificate for %v", c.DNSNames)
			}
			bound.Delete("www.app.test")
			if _, err := s.leaf("www.app.test", roots); err == nil {
				t.Error("a name that was unbound still has a certificate")
			}
			if strings.Contains(ca.Log(), "other.app.test") {
				t.Error("the CA was asked for a name that is not bound")
			}
		})
	}
}

func TestAFailingCustomDomainIsOrderedOnce(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and runs an ACME server")
	}
	t.Parallel() // it mostly waits
	https, _ := listen(t)
	dead, deadPort := listen(t)
	dead.Close()
	ca := pebble.Start(t, pebble.Options{Domains: []string{"app.test"}, HTTPSPort: deadPort})
	roots := ca.Pool(t)
	s := open(t, tlsconf.ACMEConfig{
		Dir: t.TempDir(), CA: ca.Directory, Roots: rootsOf(t, ca), Domains: []string{domain},
		Own:   func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &tls.Certificate{}, nil },
		Allow: func(string) bool { return true },
	}, https, nil)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := s.leaf("www.app.test", roots); err == nil {
				t.Error("a name the CA cannot reach got a certificate")
			}
		})
	}
	wg.Wait()
	if _, err := s.leaf("www.app.test", roots); err == nil {
		t.Error("a name the CA cannot reach got a certificate")
	}
	if n := strings.Count(s.log.String(), "certificate not obtained"); n != 1 {
		t.Errorf("%d orders failed, want 1", n)
	}
}

func TestHookPutsTheRecordIntoTheZone(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and runs an ACME server")
	}
	t.Parallel() // it mostly waits
	ca := pebble.Start(t, pebble.Options{Domains: []string{domain}})
	zone := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		ca.DNS.Set(r.FormValue("name"), r.FormValue("value"), r.FormValue("what") == "present")
	}))
	defer zone.Close()
	hook := filepath.Join(t.TempDir(), "hook")
	script := "#!/bin/sh\nset -eu\ncurl -sS --fail -d what=\"$1\" -d name=\"$2\" -d value=\"$3\" " + zone.URL + "\n"
	if err := os.WriteFile(hook, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	https, _ := listen(t)
	s := open(t, tlsconf.ACMEConfig{
		Dir: t.TempDir(), CA: ca.Directory, Roots: rootsOf(t, ca), Domains: []string{domain},
		DNS: tlsconf.DNS{Provider: "exec", Program: hook, Resolvers: []string{ca.DNS.Addr}},
	}, https, nil)
	s.await(t, "a."+domain, ca.Pool(t), whichever)
	if got := ca.DNS.Seen(); !slices.Contains(got, "_acme-challenge."+domain+".") {
		t.Errorf("records %v", got)
	}
}

func TestDNSSettingsNameWhatIsMissing(t *testing.T) {
	for _, tt := range []struct {
		name string
		dns  tlsconf.DNS
		want string
	}{
		{"no provider", tlsconf.DNS{}, "provider"},
		{"an unknown provider", tlsconf.DNS{Provider: "route53"}, "route53"},
		{"updates without a key", tlsconf.DNS{Provider: "rfc2136", Server: "ns.example", KeyName: "k"}, "key is missing"},
		{"cloudflare without a token", tlsconf.DNS{Provider: "cloudflare"}, "token"},
		{"a hook that is not absolute", tlsconf.DNS{Provider: "exec", Program: "hook"}, "absolute"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := tlsconf.NewACME(tlsconf.ACMEConfig{Domains: []string{domain}, DNS: tt.dns})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want something about %q", err, tt.want)
			}
		})
	}
}
