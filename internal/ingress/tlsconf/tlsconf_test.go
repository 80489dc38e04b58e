package tlsconf

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

var quiet = slog.New(slog.DiscardHandler)

func serve(t *testing.T, conf *tls.Config) string {
	t.Helper()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", conf)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-done })
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(5 * time.Second))
			io.ReadFull(c, make([]byte, 4))
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
			c.Close()
		}
	}()
	return ln.Addr().String()
}

func roots(t *testing.T, file string) *x509.CertPool {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	p := x509.NewCertPool()
	if !p.AppendCertsFromPEM(b) {
		t.Fatal("no certificate in ", file)
	}
	return p
}

func verify(leaf *x509.Certificate, pool *x509.CertPool, name string) error {
	_, err := leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: name})
	return err
}

func TestLocalCA(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	conf, ca, err := LocalCA(dir, []string{"cordon.localhost", "sbx.test"}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := conf.GetCertificate(&tls.ClientHelloInfo{ServerName: "x"})
	if err != nil {
		t.Fatal(err)
	}
	pool := roots(t, ca)
	for _, name := range []string{"3000-i0.cordon.localhost", "api.cordon.localhost", "cordon.localhost", "1-a.sbx.test", "localhost", "127.0.0.1", "::1"} {
		if err := verify(pair.Leaf, pool, name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := verify(pair.Leaf, pool, "a.b.cordon.localhost"); err == nil {
		t.Error("two levels below the domain are covered")
	}
	if life := pair.Leaf.NotAfter.Sub(pair.Leaf.NotBefore); life > 397*24*time.Hour {
		t.Errorf("leaf lives %v", life)
	}
	for name, mode := range map[string]os.FileMode{"ca.key": 0o600, "leaf.key": 0o600, "ca.pem": 0o644, "leaf.pem": 0o644} {
		if fi, err := os.Stat(filepath.Join(dir, name)); err != nil || fi.Mode() != mode {
			t.Errorf("%s: %v %v", name, fi, err)
		}
	}
	again, _, err := LocalCA(dir, []string{"cordon.localhost", "sbx.test"}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	if second, err := again.GetCertificate(nil); err != nil || !second.Leaf.Equal(pair.Leaf) {
		t.Errorf("a second start has another leaf: %v", err)
	}
	fewer, _, err := LocalCA(dir, []string{"sbx.test"}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	if leaf, err := fewer.GetCertificate(nil); err != nil || verify(leaf.Leaf, pool, "1-a.sbx.test") != nil || verify(leaf.Leaf, pool, "1-a.cordon.localhost") == nil {
		t.Errorf("fewer domains: %v", err)
	}
	more, _, err := LocalCA(dir, []string{"other.test"}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	if leaf, err := more.GetCertificate(nil); err != nil || verify(leaf.Leaf, pool, "1-a.other.test") == nil || verify(leaf.Leaf, roots(t, ca), "1-a.other.test") != nil {
		t.Errorf("another domain needs a new authority: %v", err)
	}
}

// TestConstraints signs for a name the authority has no business with.
func TestConstraints(t *testing.T) {
	a := &authority{dir: t.TempDir(), domains: []string{"cordon.localhost"}, log: quiet}
	if err := a.open(); err != nil {
		t.Fatal(err)
	}
	a.domains = []string{"bank.example"}
	leaf, err := a.sign()
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(leaf.Leaf, roots(t, a.path("ca.pem")), "bank.example"); err == nil {
		t.Error("the authority can sign for any site")
	}
}

func TestLeafIsRenewed(t *testing.T) {
	a := &authority{dir: t.TempDir(), domains: []string{"cordon.localhost"}, log: quiet}
	if err := a.open(); err != nil {
		t.Fatal(err)
	}
	first, err := a.get(nil)
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := a.get(nil); again != first {
		t.Error("a fresh leaf is replaced")
	}
	old := *first.Leaf
	old.NotAfter = time.Now().Add(leafRenew - time.Minute)
	first.Leaf = &old
	if second, err := a.get(nil); err != nil || second == first || time.Until(second.Leaf.NotAfter) < leafRenew {
		t.Errorf("not renewed: %v", err)
	}
}

// TestClientsAcceptLocalCA asks the TLS stacks found on the machine.
func TestClientsAcceptLocalCA(t *testing.T) {
	conf, ca, err := LocalCA(t.TempDir(), []string{"cordon.localhost"}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	addr := serve(t, conf)
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	const name = "3000-iaaaaaaaaaaaaaaaaaaaa.cordon.localhost"
	for _, tt := range []struct {
		name string
		args []string
		env  string
	}{
		{"curl", []string{"curl", "-sS", "--http1.1", "--cacert", ca, "--connect-to", "::127.0.0.1:" + port, "https://" + name + "/"}, ""},
		{"openssl", []string{"openssl", "s_client", "-connect", addr, "-servername", name, "-verify_hostname", name, "-CAfile", ca, "-verify_return_error", "-brief"}, ""},
		{"node", []string{"node", "-e", `require('tls').connect({host:'127.0.0.1',port:` + port + `,servername:'` + name + `'},function(){console.log(this.authorized);this.end('GET ');}).on('error',e=>{console.error(e);process.exit(1)})`}, "NODE_EXTRA_CA_CERTS=" + ca},
		{"python3", []string{"python3", "-c", `import ssl,socket;c=ssl.create_default_context();s=c.wrap_socket(socket.create_connection(('127.0.0.1',` + port + `)),server_hostname='` + name + `');s.send(b'GET ')`}, "SSL_CERT_FILE=" + ca},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := exec.LookPath(tt.args[0]); err != nil {
				t.Skip(err)
			}
			cmd := exec.CommandContext(t.Context(), tt.args[0], tt.args[1:]...)
			cmd.Env = append(os.Environ(), tt.env)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}

func TestFilesAreReadAgain(t *testing.T) {
	dir := t.TempDir()
	pair := func(name string) []byte {
		a := &authority{dir: filepath.Join(dir, name), domains: []string{name}, log: quiet}
		if err := os.MkdirAll(a.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := a.open(); err != nil {
			t.Fatal(err)
		}
		if _, err := a.get(nil); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(a.path("leaf.pem"))
		if err != nil {
			t.Fatal(err)
		}
		k, err := os.ReadFile(a.path("leaf.key"))
		if err != nil {
			t.Fatal(err)
		}
		os.WriteFile(filepath.Join(dir, "key.pem"), k, 0o600)
		return b
	}
	cert := filepath.Join(dir, "cert.pem")
	os.WriteFile(cert, pair("one.test"), 0o644)
	if _, err := Files([]Pair{{cert, filepath.Join(dir, "absent.pem")}}, quiet); err == nil {
		t.Error("an absent key is accepted")
	}
	f := &files{Pair: Pair{cert, filepath.Join(dir, "key.pem")}, log: quiet}
	if err := f.load(); err != nil {
		t.Fatal(err)
	}
	name := func() string {
		f.checked = time.Time{} // the ten seconds are over
		return f.current().Leaf.Subject.CommonName
	}
	if got := name(); got != "one.test" {
		t.Fatal(got)
	}
	os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("junk")}), 0o644)
	if got := name(); got != "one.test" {
		t.Errorf("a broken file serves %s", got)
	}
	os.WriteFile(cert, pair("two.test"), 0o644)
	if got := name(); got != "two.test" {
		t.Errorf("a new file still serves %s", got)
	}
	os.Remove(cert)
	if got := name(); got != "two.test" {
		t.Errorf("a removed file serves %s", got)
	}
}

func TestSeveralCertificatesAreChosenByName(t *testing.T) {
	var pairs []Pair
	for _, d := range []string{"one.test", "two.test"} {
		dir := t.TempDir()
		if _, _, err := LocalCA(dir, []string{d}, quiet); err != nil {
			t.Fatal(err)
		}
		pairs = append(pairs, Pair{filepath.Join(dir, "leaf.pem"), filepath.Join(dir, "leaf.key")})
	}
	conf, err := Files(pairs, quiet)
	if err != nil {
		t.Fatal(err)
	}
	for asked, want := range map[string]string{
		"one.test": "one.test", "80-x.one.test": "one.test", "two.test": "two.test", "80-X.Two.test": "two.test",
		"a.b.two.test": "one.test", "other.test": "one.test", "": "one.test",
	} {
		c, err := conf.GetCertificate(&tls.ClientHelloInfo{ServerName: asked})
		if err != nil || c.Leaf.Subject.CommonName != want {
			t.Errorf("%q: certificate of %s, want %s (%v)", asked, c.Leaf.Subject.CommonName, want, err)
		}
	}
	if _, err := Files(nil, quiet); err == nil {
		t.Error("no files at all are accepted")
	}
}
