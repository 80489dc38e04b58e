package ingress

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"
)

// dialFrom returns a dialler from a source address to addr that says first at once.
func dialFrom(source, addr, first string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
		c, err := d.DialContext(ctx, "tcp", addr)
		if err == nil {
			_, err = io.WriteString(c, first)
		}
		return c, err
	}
}

func (l *lab) named(t *testing.T, name string, protocols ...string) (*tls.Conn, error) {
	t.Helper()
	d := tls.Dialer{Config: &tls.Config{RootCAs: l.roots, ServerName: name, NextProtos: protocols}}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := d.DialContext(ctx, "tcp", l.tcp)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return c.(*tls.Conn), nil
}

func TestPortsByServerName(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	port := a.rawTCP(func(c *net.TCPConn) {
		b, _ := io.ReadAll(c)
		io.WriteString(c, "read: "+string(b))
	})
	t.Run("bytes reach the port the name says, and half-closes too", func(t *testing.T) {
		c, err := l.named(t, a.host(port))
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, "select 1")
		c.CloseWrite()
		if b, err := io.ReadAll(c); err != nil || string(b) != "read: select 1" {
			t.Errorf("got %q %v", b, err)
		}
		eventually(t, "the connection to end", func() bool { return l.in.underway() == 0 })
	})
	for _, p := range []struct {
		name    string
		offered []string
		want    string
	}{
		{"the protocol a client insists on is agreed to", []string{"postgresql"}, "postgresql"},
		{"HTTP/2 is not, when there is another", []string{"h2", "http/1.1"}, "http/1.1"},
		{"none is fine", nil, ""},
	} {
		t.Run(p.name, func(t *testing.T) {
			c, err := l.named(t, a.host(port), p.offered...)
			if err != nil || c.ConnectionState().NegotiatedProtocol != p.want {
				t.Errorf("agreed on %q, %v", c.ConnectionState().NegotiatedProtocol, err)
			}
		})
	}
	private := l.sandbox(idB, func(t *Target) { t.Public = false; t.TrafficToken = "tok" })
	private.serve(echo, port)
	listed := l.sandbox("ilisted", func(t *Target) { t.AllowIn = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")} })
	listed.serve(echo, port)
	for name, host := range map[string]string{
		"no sandbox":                       "80-inobody." + domain,
		"a private sandbox":                private.host(port),
		"a sandbox that lists its callers": listed.host(port),
		"the agent":                        a.host(defaultAgentPort),
		"the API":                          "api." + domain,
	} {
		t.Run("refused in the handshake: "+name, func(t *testing.T) {
			if _, err := l.named(t, host); err == nil || !strings.Contains(err.Error(), "unrecognized name") {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("a closed port ends at once, and not properly", func(t *testing.T) {
		c, err := l.named(t, a.host(1))
		if err == nil {
			_, err = c.Read(make([]byte, 1))
		}
		if err == nil || err == io.EOF {
			t.Errorf("got %v", err)
		}
	})
	t.Run("killing the sandbox resets the connection", func(t *testing.T) {
		c, err := l.named(t, a.host(port))
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, "x")
		eventually(t, "the connection", func() bool { return l.in.underway() == 1 })
		a.kill()
		if _, err := c.Read(make([]byte, 1)); !strings.Contains(err.Error(), syscall.ECONNRESET.Error()) {
			t.Errorf("got %v", err)
		}
	})
}

func TestShutdownEndsNamedConnections(t *testing.T) {
	l := newLab(t, func(c *Config) { c.Limits.DrainTimeout = 200 * time.Millisecond })
	a := l.sandbox(idA)
	c, err := l.named(t, a.host(a.rawTCP(func(c *net.TCPConn) { io.Copy(c, c) })))
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "x")
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	l.stop()
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the connection goes on")
	}
}
