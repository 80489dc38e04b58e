package egress

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
)

// tlsEcho serves TLS on an upstream and answers every line with "echo: line".
func tlsEcho(t testing.TB) func(net.Conn) {
	t.Helper()
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.StartTLS()
	cfg := &tls.Config{Certificates: s.TLS.Certificates}
	s.Close()
	return func(c net.Conn) {
		tc := tls.Server(c, cfg)
		buf := make([]byte, 4096)
		for {
			n, err := tc.Read(buf)
			if err != nil {
				return
			}
			if _, err := fmt.Fprintf(tc, "echo: %s", buf[:n]); err != nil {
				return
			}
		}
	}
}

func clientConfig(name string) *tls.Config {
	return &tls.Config{ServerName: name, InsecureSkipVerify: true} // the test's own certificate
}

// shaped rewrites what a TLS client sends: the first write is the ClientHello.
type shaped struct {
	*net.TCPConn
	shape func(c *net.TCPConn, hello []byte) error
}

func (c *shaped) Write(p []byte) (int, error) {
	if c.shape == nil {
		return c.TCPConn.Write(p)
	}
	shape := c.shape
	c.shape = nil
	return len(p), shape(c.TCPConn, p)
}

// byteByByte sends each byte in a segment of its own.
func byteByByte(c *net.TCPConn, b []byte) error {
	for i := range b {
		if _, err := c.Write(b[i : i+1]); err != nil {
			return err
		}
	}
	return nil
}

// inRecords re-frames the handshake bytes in records of n bytes.
func inRecords(n int) func(*net.TCPConn, []byte) error {
	return func(c *net.TCPConn, b []byte) error {
		_, err := c.Write(reframe(b, n))
		return err
	}
}

func reframe(records []byte, n int) []byte {
	var msg, out []byte
	for len(records) >= 5 {
		size := int(records[3])<<8 | int(records[4])
		msg = append(msg, records[5:5+size]...)
		records = records[5+size:]
	}
	for len(msg) > 0 {
		k := min(n, len(msg))
		out = append(out, 22, 3, 1, byte(k>>8), byte(k))
		out = append(out, msg[:k]...)
		msg = msg[k:]
	}
	return append(out, records...)
}

// converse says hello over TLS and checks that the echo comes back.
func converse(t testing.TB, c net.Conn, cfg *tls.Config) {
	t.Helper()
	tc := tls.Client(c, cfg)
	send(t, tc, "hello\n")
	buf := make([]byte, 100)
	n, err := tc.Read(buf)
	if got := string(buf[:n]); err != nil || got != "echo: hello\n" {
		t.Fatalf("got %q and %v", got, err)
	}
}

func TestAllowedTLSReachesTheRealOwnerOfTheName(t *testing.T) {
	long := clientConfig("a.example")
	for i := range 1000 {
		long.NextProtos = append(long.NextProtos, fmt.Sprintf("protocol-%045d", i)) // about 56 KiB
	}
	long5 := clientConfig("a.example")
	long5.NextProtos = long.NextProtos[:90]
	tests := []struct {
		name  string
		dst   string
		cfg   *tls.Config
		shape func(*net.TCPConn, []byte) error
	}{
		{"plain", "93.184.216.1:443", clientConfig("a.example"), nil},
		{"TLS 1.2", "93.184.216.1:443", &tls.Config{ServerName: "a.example", InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}, nil},
		{"(1) the name at an attacker's address", "93.184.216.66:443", clientConfig("a.example"), nil},
		{"(33) upper case", "93.184.216.66:443", clientConfig("A.EXAMPLE"), nil},
		{"(6) one byte per segment", "93.184.216.66:443", clientConfig("a.example"), byteByByte},
		{"(7) records of 20 bytes, split inside the name", "93.184.216.66:443", clientConfig("a.example"), inRecords(20)},
		{"(7) records of one byte", "93.184.216.66:443", clientConfig("a.example"), inRecords(1)},
		{"(8) a hello of 5 KiB", "93.184.216.66:443", long5, nil},
		{"(8) a hello of 60 KiB", "93.184.216.66:443", long, nil},
		{"(8) a hello of 60 KiB in records of 100 bytes", "93.184.216.66:443", long, inRecords(100)},
		{"a wildcard", "93.184.216.66:443", clientConfig("x.sub.example"), nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, onlyA)
			l.host(tlsEcho(t), "93.184.216.1:443")
			x := l.host(nil, "93.184.216.66:443")
			c := l.connect(tt.dst)
			converse(t, &shaped{c, tt.shape}, tt.cfg)
			c.Close()
			x.untouched(t)
			e := l.await(flowlog.Allowed)
			if e.Upstream.String() != "93.184.216.1:443" || e.Reason != policy.ReasonAllowName || e.Proto != "tls" || e.Name == "" {
				t.Errorf("event %+v", e)
			}
			if e := l.await(flowlog.Closed); e.BytesOut < 200 || e.BytesIn < 200 || e.Duration <= 0 {
				t.Errorf("closed with %+v", e)
			}
		})
	}
}

func TestATrailingDotInSNIIsTheSameName(t *testing.T) { // (32)
	l := newLab(t, onlyA)
	a := l.host(nil, "93.184.216.1:443")
	c := l.connect("93.184.216.66:443")
	h := hello{names: [][]byte{[]byte("a.example.")}}.records()
	send(t, c, string(h))
	l.await(flowlog.Allowed)
	c.CloseWrite()
	if _, err := everything(c); err != nil {
		t.Error(err)
	}
	if a.text() != string(h) {
		t.Error("the upstream did not get the hello as it was sent")
	}
}

// hello builds a ClientHello by hand.
type hello struct {
	names    [][]byte // entries of server_name
	nameType byte
	noSNI    bool
	extra    [][]byte // whole extensions, before server_name
	after    []byte   // after the message, in its record
	bareName bool     // server_name with a list that is cut short
}

func ext(kind uint16, data []byte) []byte {
	return append([]byte{byte(kind >> 8), byte(kind), byte(len(data) >> 8), byte(len(data))}, data...)
}

func (h hello) serverName() []byte {
	var list []byte
	for _, n := range h.names {
		list = append(list, h.nameType, byte(len(n)>>8), byte(len(n)))
		list = append(list, n...)
	}
	size := len(list)
	if h.bareName {
		size++
	}
	return ext(0, append([]byte{byte(size >> 8), byte(size)}, list...))
}

func (h hello) message() []byte {
	exts := bytes.Join(h.extra, nil)
	if !h.noSNI {
		exts = append(exts, h.serverName()...)
	}
	exts = append(exts, ext(43, []byte{2, 3, 4})...)       // supported_versions: 1.3
	exts = append(exts, ext(13, []byte{0, 2, 4, 3})...)    // signature_algorithms
	exts = append(exts, ext(10, []byte{0, 2, 0, 0x1d})...) // supported_groups
	body := append([]byte{3, 3}, make([]byte, 32)...)
	body = append(body, 0)                // session id
	body = append(body, 0, 2, 0x13, 0x01) // TLS_AES_128_GCM_SHA256
	body = append(body, 1, 0)             // compression
	body = append(body, byte(len(exts)>>8), byte(len(exts)))
	body = append(body, exts...)
	return append([]byte{1, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
}

func (h hello) records() []byte {
	msg := append(h.message(), h.after...)
	return append([]byte{22, 3, 1, byte(len(msg) >> 8), byte(len(msg))}, msg...)
}

func TestDeniedTLSGetsAnAlertAndNothingLeaves(t *testing.T) {
	a, b := []byte("a.example"), []byte("b.example")
	name := func(s string) []byte { return hello{names: [][]byte{[]byte(s)}}.records() }
	ech := ext(0xfe0d, append([]byte{0, 0, 1, 0, 1, 7, 0, 32}, append(make([]byte, 32), 0, 4, 1, 2, 3, 4)...))
	tests := []struct {
		name string
		sent []byte
		want policy.Reason
	}{
		{"another name", name("b.example"), policy.ReasonNameDenied},
		{"(35) the name as a suffix of another", name("nota.example"), policy.ReasonNameDenied},
		{"(35) the name as a prefix of another", name("a.example.evil.example"), policy.ReasonNameDenied},
		{"the apex of a wildcard", name("sub.example"), policy.ReasonNameDenied},
		{"(4) no server_name", hello{noSNI: true}.records(), ReasonNoSNI},
		{"(4) an empty name", hello{names: [][]byte{{}}}.records(), ReasonBadHello},
		{"(4) an empty list", hello{}.records(), ReasonBadHello},
		{"(4) an IPv4 address", name("93.184.216.1"), ReasonBadHello},
		{"(40) an IPv6 address", name("2606:4700::1"), ReasonBadHello},
		{"(41) an IPv4 address in hex", name("0x5db8d801"), ReasonBadName},
		{"(41) an IPv4 address in decimal", name("1572395009"), ReasonBadName},
		{"(41) a short IPv4 address", name("93.12113921"), ReasonBadName},
		{"(5) two entries", hello{names: [][]byte{a, b}}.records(), ReasonBadHello},
		{"(5) two equal entries", hello{names: [][]byte{a, a}}.records(), ReasonBadHello},
		{"(5) two extensions, the allowed name last", hello{names: [][]byte{a}, extra: [][]byte{hello{names: [][]byte{b}}.serverName()}}.records(), ReasonBadHello},
		{"(5) two extensions, the allowed name first", hello{names: [][]byte{b}, extra: [][]byte{hello{names: [][]byte{a}}.serverName()}}.records(), ReasonBadHello},
		{"(5) an unknown name type", hello{names: [][]byte{a}, nameType: 1}.records(), ReasonBadHello},
		{"a list longer than its extension", hello{names: [][]byte{a}, bareName: true}.records(), ReasonBadHello},
		{"another extension twice", hello{names: [][]byte{a}, extra: [][]byte{ext(99, nil), ext(99, nil)}}.records(), ReasonBadHello},
		{"bytes after the hello in its record", hello{names: [][]byte{a}, after: []byte{1, 0, 0, 0}}.records(), ReasonBadHello},
		{"an empty record first", append([]byte{22, 3, 1, 0, 0}, name("a.example")...), ReasonBadHello},
		{"an alert inside the hello", append(reframe(name("a.example"), 10)[:15], 21, 3, 3, 0, 2, 1, 0), ReasonBadHello},
		{"another message than a hello", []byte{22, 3, 1, 0, 4, 2, 0, 0, 0}, ReasonBadHello},
		{"a record of the wrong version", append([]byte{22, 9, 9}, name("a.example")[3:]...), ReasonBadHello},
		{"a hello that announces a megabyte", []byte{22, 3, 1, 0, 4, 1, 0x10, 0, 0}, ReasonSniffTooBig},
		{"(10) ECH: the outer name decides", hello{names: [][]byte{b}, extra: [][]byte{ech}}.records(), policy.ReasonNameDenied},
		{"(34) full-width dots", name("a．example"), ReasonBadName},
		{"(34) a homoglyph", name("а.example"), ReasonBadName},
		{"(34) the homoglyph's A-label", name("xn--80a.example"), policy.ReasonNameDenied},
		{"(36) a NUL after the name", name("a.example\x00.b.example"), ReasonBadName},
		{"(36) a backslash", name("a.example\\.b.example"), ReasonBadName},
		{"(36) a space", name("a.example b.example"), ReasonBadName},
		{"(37) userinfo", name("x@a.example"), ReasonBadName},
		{"(37) a port", name("a.example:443"), ReasonBadName},
		{"(32) two trailing dots", name("a.example.."), ReasonBadName},
		{"(39) a label of 64", name(strings.Repeat("a", 64) + ".sub.example"), ReasonBadName},
		{"(39) 255 octets", name(strings.Repeat("a.", 122) + "sub.example"), ReasonBadName},
		{"(38) a star", name("*.sub.example"), ReasonBadName},
		{"our own name, not listed", name("3000-x.cordon.localhost"), policy.ReasonNameDenied},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, onlyA)
			up := l.host(nil, "93.184.216.1:443", "93.184.216.2:443", "93.184.216.66:443")
			c := l.connect("93.184.216.66:443")
			if _, err := c.Write(tt.sent); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			wantAlert(t, c)
			if took := time.Since(start); took > 3*time.Second { // the deadline to show a name is five
				t.Errorf("denied after %v, want at once", took)
			}
			l.awaitDenied(tt.want)
			up.untouched(t)
		})
	}
}

func TestARealTLSClientSeesAccessDenied(t *testing.T) {
	l := newLab(t, onlyA)
	tc := tls.Client(l.connect("93.184.216.66:443"), clientConfig("b.example"))
	err := tc.Handshake()
	if err == nil || !strings.Contains(err.Error(), "access denied") {
		t.Errorf("got %v, want access denied", err)
	}
}

func TestTheECHOuterNamePasses(t *testing.T) { // (10)
	ech := ext(0xfe0d, append([]byte{0, 0, 1, 0, 1, 7, 0, 32}, append(make([]byte, 32), 0, 4, 1, 2, 3, 4)...))
	l := newLab(t, onlyA)
	l.host(nil, "93.184.216.1:443")
	c := l.connect("93.184.216.66:443")
	send(t, c, string(hello{names: [][]byte{[]byte("a.example")}, extra: [][]byte{ech}}.records()))
	if e := l.await(flowlog.Allowed); e.Name != "a.example" {
		t.Errorf("event %+v", e)
	}
}

func TestAHelloThatNeverEndsIsEndedAtTheDeadline(t *testing.T) { // (9)
	l := newLab(t, onlyA, func(c *Config) { c.Limits.SniffTimeout = 100 * time.Millisecond })
	up := l.host(nil, "93.184.216.1:443")
	h := hello{names: [][]byte{[]byte("a.example")}}.records()
	for _, sent := range [][]byte{h[:1], h[:4], h[:5], h[:20], h[:len(h)-1]} {
		c := l.connect("93.184.216.1:443")
		send(t, c, string(sent))
		wantAlert(t, c)
		l.awaitDenied(ReasonSniffTimeout)
	}
	c := l.connect("93.184.216.1:443")
	send(t, c, string(h[:20]))
	c.CloseWrite()
	wantAlert(t, c)
	l.awaitDenied(ReasonBadHello)
	up.untouched(t)
}

func TestOtherProtocolsHaveNoName(t *testing.T) { // (11)
	tests := []struct{ name, dst, sent string }{
		{"HTTP on 443", "93.184.216.1:443", lines("GET / HTTP/1.1", "Host: a.example")},
		{"TLS on 80", "93.184.216.1:80", string(hello{names: [][]byte{[]byte("a.example")}}.records())},
		{"SSH on 443", "93.184.216.1:443", "SSH-2.0-OpenSSH_9.2\r\n"},
		{"SSH on 80", "93.184.216.1:80", "SSH-2.0-OpenSSH_9.2\r\n"},
		{"binary on 80", "93.184.216.1:80", "\x00\x01\x02\x03"},
		{"a long token on 80", "93.184.216.1:80", strings.Repeat("A", 100)},
		{"an empty line on 80", "93.184.216.1:80", "\r\nGET / HTTP/1.1\r\nHost: a.example\r\n\r\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name+", deny-all", func(t *testing.T) {
			l := newLab(t, onlyA)
			up := l.host(nil, "93.184.216.1:443", "93.184.216.1:80")
			c := l.connect(tt.dst)
			send(t, c, tt.sent)
			wantReset(t, c)
			l.awaitDenied(ReasonProtocolMismatch)
			up.untouched(t)
		})
		t.Run(tt.name+", the address allowed by default", func(t *testing.T) {
			l := newLab(t, policy.Input{})
			up := l.host(func(c net.Conn) {
				buf := make([]byte, len(tt.sent))
				_, _ = io.ReadFull(c, buf)
				_, _ = c.Write([]byte("answer"))
			}, "93.184.216.1:443", "93.184.216.1:80")
			c := l.connect(tt.dst)
			send(t, c, tt.sent)
			if got, err := everything(c); got != "answer" || err != nil {
				t.Errorf("got %q and %v", got, err)
			}
			if up.text() != tt.sent {
				t.Errorf("the upstream got %q", up.text())
			}
		})
	}
}

func TestServerFirstProtocols(t *testing.T) {
	banner := func(c net.Conn) { _, _ = io.WriteString(c, "220 hello\r\n"); _, _ = io.Copy(io.Discard, c) }
	t.Run("denied at the deadline", func(t *testing.T) {
		l := newLab(t, onlyA, func(c *Config) { c.Limits.SniffTimeout = 50 * time.Millisecond })
		up := l.host(banner, "93.184.216.1:443")
		wantReset(t, l.connect("93.184.216.1:443"))
		l.awaitDenied(ReasonSniffTimeout)
		up.untouched(t)
	})
	t.Run("passed after the deadline when the address is allowed by default", func(t *testing.T) {
		l := newLab(t, policy.Input{}, func(c *Config) { c.Limits.SniffTimeout = 50 * time.Millisecond })
		l.host(banner, "93.184.216.1:443")
		buf := make([]byte, 100)
		n, err := l.connect("93.184.216.1:443").Read(buf)
		if string(buf[:n]) != "220 hello\r\n" || err != nil {
			t.Errorf("got %q and %v", buf[:n], err)
		}
	})
	t.Run("passed at once when the address is listed", func(t *testing.T) {
		l := newLab(t, policy.Input{AllowOut: []string{"93.184.216.1", "b.example"}, DenyOut: []string{"0.0.0.0/0"}}, func(c *Config) { c.Limits.SniffTimeout = time.Hour })
		l.host(banner, "93.184.216.1:443")
		buf := make([]byte, 100)
		n, err := l.connect("93.184.216.1:443").Read(buf)
		if string(buf[:n]) != "220 hello\r\n" || err != nil {
			t.Errorf("got %q and %v", buf[:n], err)
		}
		if e := l.await(flowlog.Allowed); e.Reason != policy.ReasonAllowAddr {
			t.Errorf("event %+v", e)
		}
	})
}

func TestSpliceKeepsHalfClose(t *testing.T) {
	l := newLab(t, policy.Input{})
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	l.host(func(c net.Conn) {
		got, err := io.ReadAll(c) // until the client's FIN
		if err == nil {
			_, _ = fmt.Fprintf(c, "%d ", len(got))
			_, _ = c.Write(big)
		}
	}, "93.184.216.1:443")
	c := l.connect("93.184.216.1:443")
	go func() {
		_, _ = c.Write(append([]byte{0}, big...))
		c.CloseWrite()
	}()
	got, err := everything(c)
	if want := fmt.Sprintf("%d ", len(big)+1) + string(big); got != want || err != nil {
		t.Errorf("got %d bytes and %v, want %d", len(got), err, len(want))
	}
	if e := l.await(flowlog.Closed); e.BytesOut != int64(len(big)+1) || e.BytesIn != int64(len(got)) {
		t.Errorf("closed with %d out and %d in", e.BytesOut, e.BytesIn)
	}
}

func TestAResetIsPassedOn(t *testing.T) {
	l := newLab(t, policy.Input{})
	l.host(func(c net.Conn) {
		_, _ = io.ReadFull(c, make([]byte, 4))
		reset(c.(*counted).Conn)
	}, "93.184.216.1:443")
	c := l.connect("93.184.216.1:443")
	send(t, c, "\x00abc")
	wantReset(t, c)
}
