// Package acme shows certificates from a real ACME server at a live server: the
// wildcard's issuance and renewal, custom domains, and what happens without the CA.
package acme

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cordonhq/cordon/proving/lab"
	"github.com/cordonhq/cordon/proving/stand"
	"github.com/cordonhq/cordon/test/pebble"
)

// place is the host of a lab.
type place struct {
	*lab.Netns
	lab *lab.Lab
}

func (p place) Command(ctx context.Context, name string, args ...string) pebble.Process {
	return p.lab.HostCommand(ctx, name, args...)
}

// site is a server whose certificates are the CA's.
type site struct {
	*stand.Stand
	t    *testing.T
	ca   *pebble.Server
	pool *x509.CertPool
	root string // file
}

func newSite(t *testing.T) *site {
	s := stand.New(t, stand.Options{Domains: []string{"second.test"}, Sandboxes: `  domains_without_proof: ["app.acme.test"]`, LogLevel: "info"})
	ca := pebble.Start(t, pebble.Options{
		In: place{s.Lab.Host(), s.Lab}, Domains: []string{stand.Domain, "second.test", "acme.test"},
		HTTPSPort: 443, HTTPPort: 80, Validity: 36 * time.Second,
	})
	f, err := os.OpenFile(s.Config, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := fmt.Fprintf(f, `tls:
  hsts: 1h
  acme:
    email: operator@%s
    ca: %s
    ca_root: %s
    renew_interval: 1s
    dns: {provider: rfc2136, server: "%s", key_name: %s, key: %s, resolvers: ["%[4]s"]}
`, stand.Domain, ca.Directory, ca.RootsFile, ca.DNS.Addr, pebble.KeyName, pebble.Key); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(t.TempDir(), "root.pem")
	if err := os.WriteFile(root, ca.Root(t), 0o600); err != nil {
		t.Fatal(err)
	}
	return &site{Stand: s, t: t, ca: ca, pool: ca.Pool(t), root: root}
}

// cordon runs a verb and returns what it prints.
func (s *site) cordon(args ...string) string {
	s.t.Helper()
	out, err := s.Command(s.t.Context(), args...).CombinedOutput()
	if err != nil {
		s.t.Fatalf("cordon %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// curl asks for a URL as a client that trusts the CA only.
func (s *site) curl(url string, args ...string) (string, error) {
	host := strings.TrimSuffix(strings.TrimPrefix(url, "https://"), "/")
	args = append([]string{"-sS", "-i", "--max-time", "15", "--cacert", s.root, "--resolve", host + ":443:127.0.0.1", url}, args...)
	out, err := s.Lab.HostCommand(s.t.Context(), "curl", args...).CombinedOutput()
	return string(out), err
}

// dial opens a TLS connection to a name.
func (s *site) dial(name string) (*tls.Conn, error) {
	raw, err := s.Lab.Dial(s.t.Context(), "tcp", "127.0.0.1:443")
	if err != nil {
		return nil, err
	}
	c := tls.Client(raw, &tls.Config{ServerName: name, RootCAs: s.pool})
	c.SetDeadline(time.Now().Add(15 * time.Second))
	if err := c.HandshakeContext(s.t.Context()); err != nil {
		raw.Close()
		return nil, err
	}
	return c, nil
}

// leaf returns a name's certificate once want accepts it.
func (s *site) leaf(name string, want func(*x509.Certificate) bool) *x509.Certificate {
	s.t.Helper()
	var err error
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		var c *tls.Conn
		if c, err = s.dial(name); err != nil {
			continue
		}
		leaf := c.ConnectionState().PeerCertificates[0]
		c.Close()
		if want(leaf) {
			return leaf
		}
	}
	s.t.Fatalf("no such certificate for %s within a minute: %v", name, err)
	return nil
}

// ask sends a request on an open connection.
func ask(t *testing.T, c net.Conn, host string) {
	t.Helper()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host)
	b := make([]byte, 4096)
	if n, err := c.Read(b); err != nil || !bytes.HasPrefix(b[:n], []byte("HTTP/1.1 200")) {
		t.Errorf("the connection to %s: %q, %v", host, b[:n], err)
	}
}

func TestCertificatesOfALiveServer(t *testing.T) {
	if testing.Short() {
		t.Skip("runs a server and an ACME server")
	}
	s := newSite(t)
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	any := func(*x509.Certificate) bool { return true }
	id := s.cordon("create", "--timeout", "10m")
	s.cordon("exec", id, "mkdir -p /tmp/w; cd /tmp/w; echo hello > index.html; nohup python3 -m http.server 8000 >/dev/null 2>&1 &")
	host := "8000-" + id + "." + stand.Domain
	first := s.leaf(host, any)
	if got := strings.Join(first.DNSNames, " "); got != "*."+stand.Domain {
		t.Errorf("certificate for %s", got)
	}
	out, err := s.curl("https://" + host + "/")
	if err != nil || !strings.Contains(out, "hello") || !strings.Contains(strings.ToLower(out), "strict-transport-security: max-age=3600") {
		t.Fatalf("curl %s: %v\n%s", host, err, out)
	}
	second := strings.TrimSuffix(host, stand.Domain) + "second.test"
	s.leaf(second, any)
	if out, err := s.curl("https://" + second + "/"); err != nil || !strings.Contains(out, "hello") {
		t.Errorf("curl %s: %v\n%s", second, err, out)
	}

	open, err := s.dial(host)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	ask(t, open, host)
	pid := s.PID()
	renewed := s.leaf(host, func(c *x509.Certificate) bool { return c.SerialNumber.Cmp(first.SerialNumber) != 0 })
	ask(t, open, host)
	t.Logf("serial %x until %s, then %x until %s, server %d all along", first.SerialNumber, first.NotAfter.Format(time.TimeOnly), renewed.SerialNumber, renewed.NotAfter.Format(time.TimeOnly), pid)
	if s.PID() != pid {
		t.Error("the server was started again")
	}

	s.bindsADomain(id)

	s.ca.Stop()
	s.Stop(t, syscall.SIGTERM)
	began := time.Now()
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("started without the CA in %s", time.Since(began).Round(10*time.Millisecond))
	for _, name := range []string{host, "app.acme.test"} {
		if out, err := s.curl("https://" + name + "/"); err != nil || !strings.Contains(out, "hello") {
			t.Errorf("without the CA, curl %s: %v\n%s", name, err, out)
		}
	}
	s.cordon("domain", "remove", id, "app.acme.test")
	if out, err := s.curl("https://app.acme.test/"); err == nil {
		t.Errorf("a domain that was removed answers: %s", out)
	}
	for end := time.Now().Add(40 * time.Second); !strings.Contains(s.Log(500), "certificate not obtained"); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no log line says that the renewal failed")
		}
	}
	s.cordon("kill", id)
}

// bindsADomain shows that only bound names get a certificate, when they are asked for.
func (s *site) bindsADomain(id string) {
	t := s.t
	t.Helper()
	if out, err := s.curl("https://app.acme.test/"); err == nil {
		t.Errorf("a domain that is bound to nothing answers: %s", out)
	}
	if got := s.cordon("domain", "add", id, "app.acme.test", "8000"); got != "https://app.acme.test" {
		t.Errorf("domain add printed %q", got)
	}
	s.leaf("app.acme.test", func(*x509.Certificate) bool { return true })
	if out, err := s.curl("https://app.acme.test/"); err != nil || !strings.Contains(out, "hello") {
		t.Errorf("curl app.acme.test: %v\n%s", err, out)
	}
	if out, err := s.curl("https://other.acme.test/"); err == nil {
		t.Errorf("a domain that is bound to nothing answers: %s", out)
	}
	if strings.Contains(s.ca.Log(), "other.acme.test") {
		t.Error("the CA was asked for a domain that is bound to nothing")
	}
	if got := s.cordon("domain", "list", id); !strings.Contains(got, "app.acme.test  8000") {
		t.Errorf("domain list printed %q", got)
	}
}
