package ingress

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/pires/go-proxyproto"
)

// block makes a header of version 2.
func block(command, family byte, body string) string {
	return string(proxyproto.SIGV2) + string([]byte{command, family}) + string(binary.BigEndian.AppendUint16(nil, uint16(len(body)))) + body
}

const (
	v4 = "\x0a\x01\x02\x03\x0a\x00\x00\x01\x30\x39\x01\xbb"
	v6 = "\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07" + "\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01" + "\x30\x39\x01\xbb"
)

func TestFrontHeaders(t *testing.T) {
	for name, c := range map[string]struct {
		in   string
		want string // empty: refused
	}{
		"version 1, IPv4":                        {"PROXY TCP4 10.1.2.3 10.0.0.1 12345 443\r\n", "10.1.2.3:12345"},
		"version 1, IPv6":                        {"PROXY TCP6 2001:db8::7 2001:db8::1 12345 443\r\n", "[2001:db8::7]:12345"},
		"version 1, nobody":                      {"PROXY UNKNOWN\r\n", "invalid AddrPort"},
		"version 1, nobody, with what to ignore": {"PROXY UNKNOWN ff::1 ff::2 1 2\r\n", "invalid AddrPort"},
		"version 1, another family":              {"PROXY TCP4 2001:db8::7 2001:db8::1 12345 443\r\n", ""},
		"version 1, a zone":                      {"PROXY TCP6 fe80::1%eth0 2001:db8::1 12345 443\r\n", ""},
		"version 1, a port out of range":         {"PROXY TCP4 10.1.2.3 10.0.0.1 65536 443\r\n", ""},
		"version 1, a port with a sign":          {"PROXY TCP4 10.1.2.3 10.0.0.1 +1 443\r\n", ""},
		"version 1, two blanks":                  {"PROXY TCP4  10.1.2.3 10.0.0.1 12345 443\r\n", ""},
		"version 1, too few words":               {"PROXY TCP4 10.1.2.3 10.0.0.1 12345\r\n", ""},
		"version 1, UDP":                         {"PROXY UDP4 10.1.2.3 10.0.0.1 12345 443\r\n", ""},
		"version 1, a line without end":          {"PROXY TCP4 " + strings.Repeat("1", 200), ""},
		"version 1, cut":                         {"PROXY TCP4 10.1.2.3", ""},
		"version 2, IPv4":                        {block(0x21, 0x11, v4), "10.1.2.3:12345"},
		"version 2, IPv4 and more":               {block(0x21, 0x11, v4+"\x04\x00\x01x"), "10.1.2.3:12345"},
		"version 2, IPv6":                        {block(0x21, 0x21, v6), "[2001:db8::7]:12345"},
		"version 2, the proxy itself":            {block(0x20, 0x11, v4), "invalid AddrPort"},
		"version 2, unspecified":                 {block(0x21, 0, ""), "invalid AddrPort"},
		"version 2, addresses cut":               {block(0x21, 0x11, v4[:11]), ""},
		"version 2, UDP":                         {block(0x21, 0x12, v4), ""},
		"version 3":                              {block(0x31, 0x11, v4), ""},
		"version 2, an unknown command":          {block(0x22, 0x11, v4), ""},
		"version 2, too large":                   {block(0x21, 0x11, v4+strings.Repeat("x", frontBlock)), ""},
		"no header":                              {"GET / HTTP/1.1\r\nHost: x\r\n\r\n", ""},
		"nothing":                                {"", ""},
	} {
		t.Run(name, func(t *testing.T) {
			in := strings.NewReader(c.in + "rest")
			got, err := readFront(iotest.OneByteReader(in))
			if (err != nil) != (c.want == "") || err == nil && got.String() != c.want {
				t.Fatalf("got %v, %v", got, err)
			}
			if rest, _ := io.ReadAll(in); err == nil && string(rest) != "rest" {
				t.Errorf("%q is left for the client's own bytes", rest)
			}
		})
	}
}

// FuzzFront: no header is read past its end, and none makes an address of a kind
// that its family has not.
func FuzzFront(f *testing.F) {
	for _, s := range []string{"PROXY TCP4 10.1.2.3 10.0.0.1 12345 443\r\nx", "PROXY UNKNOWN\r\n", block(0x21, 0x11, v4) + "x", block(0x21, 0x21, v6), block(0x20, 0, "")} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		in := bytes.NewReader(b)
		got, err := readFront(in)
		read := len(b) - in.Len()
		if read > 16+frontBlock {
			t.Fatalf("read %d octets", read)
		}
		if err != nil {
			return
		}
		if got.IsValid() && (got.Addr().Zone() != "" || got.Addr().Is4In6()) {
			t.Fatalf("address %v", got)
		}
		again, err := readFront(bytes.NewReader(b[:read]))
		if err != nil || again != got {
			t.Fatalf("the header alone is read as %v, %v and with more as %v", again, err, got)
		}
	})
}

func TestProxyProtocolInFront(t *testing.T) {
	trusted := netip.MustParsePrefix("127.1.1.0/24")
	l := newLab(t, func(c *Config) {
		c.ProxyProtocol, c.TrustedProxies = true, []netip.Prefix{trusted}
		c.Limits.HeaderTimeout = time.Second
	})
	a := l.sandbox(idA)
	port := a.serve(echo)
	from := func(source, first string) *http.Client {
		c := l.client(false)
		tr := c.Transport.(*http.Transport)
		tr.DialContext = nil
		tr.DialContext = dialFrom(source, l.https, first)
		return c
	}
	t.Run("a trusted proxy says who the client is", func(t *testing.T) {
		for _, header := range []string{"PROXY TCP4 10.1.2.3 10.0.0.1 12345 443\r\n", block(0x21, 0x11, v4)} {
			_, body := get(t, from("127.1.1.5", header), "https://"+a.host(port)+"/", "X-Forwarded-For", "6.6.6.6")
			if !strings.Contains(body, "x-forwarded-for=10.1.2.3\n") {
				t.Errorf("the service saw %s", body)
			}
		}
	})
	t.Run("a health check of the proxy counts as the proxy", func(t *testing.T) {
		_, body := get(t, from("127.1.1.5", block(0x20, 0, "")), "https://"+a.host(port)+"/")
		if !strings.Contains(body, "x-forwarded-for=127.1.1.5\n") {
			t.Errorf("the service saw %s", body)
		}
	})
	t.Run("others are clients and need no header", func(t *testing.T) {
		_, body := get(t, from("127.1.2.5", ""), "https://"+a.host(port)+"/")
		if !strings.Contains(body, "x-forwarded-for=127.1.2.5\n") {
			t.Errorf("the service saw %s", body)
		}
	})
	for name, c := range map[string]struct{ source, first string }{
		"others cannot pretend":                     {"127.1.2.5", "PROXY TCP4 10.1.2.3 10.0.0.1 12345 443\r\n"},
		"a trusted proxy without one is not served": {"127.1.1.5", ""},
		"nor with a broken one":                     {"127.1.1.5", "PROXY TCP4 10.1.2.3\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			if resp, err := from(c.source, c.first).Get("https://" + a.host(port) + "/"); err == nil {
				resp.Body.Close()
				t.Errorf("got %d", resp.StatusCode)
			}
		})
	}
	t.Run("a proxy that is silent keeps nobody waiting", func(t *testing.T) {
		c, err := dialFrom("127.1.1.5", l.https, "")(t.Context(), "tcp", "")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, body := get(t, from("127.1.1.6", "PROXY UNKNOWN\r\n"), "https://"+a.host(port)+"/"); !strings.Contains(body, "GET /") {
			t.Errorf("got %s", body)
		}
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !isReset(err) {
			t.Errorf("the silent one ended with %v", err)
		}
	})
	t.Run("the plain listener is the machine's own and takes none", func(t *testing.T) {
		c, err := dialFrom("127.1.1.5", l.http, "")(t.Context(), "tcp", "")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "GET / HTTP/1.0\r\nHost: "+a.host(port)+"\r\n\r\n")
		if b, _ := io.ReadAll(c); !bytes.HasPrefix(b, []byte("HTTP/1.0 200")) {
			t.Errorf("got %s", b)
		}
	})
}

// lateListener accepts a connection at the moment when it is being closed.
type lateListener struct {
	net.Listener
	closing func()
	conn    net.Conn
}

func (l *lateListener) Accept() (net.Conn, error) {
	l.closing()
	return l.conn, nil
}

func TestAConnectionAcceptedAtTheEndKeepsNothingRunning(t *testing.T) {
	l := newLab(t)
	for range 20 { // either of two things may be seen first
		ours, theirs := net.Pipe()
		late := &lateListener{conn: theirs}
		f := l.in.behindProxies(late)
		late.closing = f.close
		over := make(chan struct{})
		go func() { f.run(); close(over) }()
		select {
		case <-over:
		case <-time.After(10 * time.Second):
			t.Fatal("the listener does not end")
		}
		if _, err := ours.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("the connection ended with %v", err)
		}
	}
}

func isReset(err error) bool {
	var op *net.OpError
	return errors.As(err, &op)
}
