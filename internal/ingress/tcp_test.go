package ingress

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/internal/api"
	"github.com/cordonhq/cordon/internal/api/apitest"
	"github.com/cordonhq/cordon/internal/auth"
)

// tcpLab is an ingress with the real API behind it and one sandbox.
type tcpLab struct {
	*lab
	sbx   *sandbox
	keys  *apitest.Keys
	owner auth.Key
	key   string
}

func newTCPLab(t *testing.T) *tcpLab {
	sandboxes, keys := apitest.NewSandboxes(), &apitest.Keys{}
	owner, secret := auth.NewKey("owner", false, time.Now())
	if err := keys.PutKey(t.Context(), owner); err != nil {
		t.Fatal(err)
	}
	l := &tcpLab{keys: keys, owner: owner, key: secret}
	handler := api.New(api.Config{
		Sandboxes: sandboxes, Keys: keys, Domain: domain,
		Forward: func(w http.ResponseWriter, r *http.Request, id string, port uint16) error {
			return l.in.Forward(w, r, id, port)
		},
	})
	l.lab = newLab(t, func(c *Config) { c.API = handler })
	sb, err := l.client(t, secret).Create(t.Context(), client.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	l.sbx = l.sandbox(sb.ID, func(t *Target) { t.Public = false; t.TrafficToken = "tok" })
	return l
}

func (l *tcpLab) client(t *testing.T, key string) *client.Client {
	t.Helper()
	tr := &http.Transport{}
	t.Cleanup(tr.CloseIdleConnections)
	c, err := client.New(client.Options{APIURL: "http://" + l.http, SandboxURL: "http://" + l.http, APIKey: key, HTTPClient: &http.Client{Transport: tr}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// forward runs Forward as the key's owner and returns the local address.
func (l *tcpLab) forward(t *testing.T, key string, port int) (addr string, failed chan error) {
	t.Helper()
	failed = make(chan error, 100)
	local := listen(t, "127.0.0.1:0")
	sb, err := l.client(t, l.key).Connect(t.Context(), l.sbx.t.ID, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if key != l.key {
		sb, err = l.client(t, key).Connect(t.Context(), l.sbx.t.ID, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- sb.Forward(ctx, local, port, client.ForwardOptions{Failed: func(_ net.Addr, err error) { failed <- err }})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Forward ended with %v", err)
		}
	})
	return local.Addr().String(), failed
}

func dialTCP(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.TCPConn)
}

// touch makes a connection that may be reset before it is seen to be there.
func touch(addr string) {
	if c, err := net.Dial("tcp", addr); err == nil {
		c.Close()
	}
}

func TestForward(t *testing.T) {
	l := newTCPLab(t)
	t.Run("a half-closed connection still gets its answer", func(t *testing.T) {
		port := l.sbx.rawTCP(func(c *net.TCPConn) {
			b, _ := io.ReadAll(c)
			c.Write(append([]byte("read: "), b...))
		})
		addr, _ := l.forward(t, l.key, port)
		c := dialTCP(t, addr)
		io.WriteString(c, "all of it")
		c.CloseWrite()
		if b, err := io.ReadAll(c); err != nil || string(b) != "read: all of it" {
			t.Errorf("got %q %v", b, err)
		}
	})
	t.Run("the service may end first", func(t *testing.T) {
		heard := make(chan string, 1)
		port := l.sbx.rawTCP(func(c *net.TCPConn) {
			io.WriteString(c, "welcome")
			c.CloseWrite()
			b, _ := io.ReadAll(c)
			heard <- string(b)
		})
		addr, _ := l.forward(t, l.key, port)
		c := dialTCP(t, addr)
		if b, err := io.ReadAll(c); err != nil || string(b) != "welcome" {
			t.Errorf("got %q %v", b, err)
		}
		io.WriteString(c, "thanks")
		c.Close()
		if got := <-heard; got != "thanks" {
			t.Errorf("the service heard %q", got)
		}
	})
}

func TestForwardCarriesMuch(t *testing.T) {
	l := newTCPLab(t)
	t.Run("megabytes go both ways at once, over many connections", func(t *testing.T) {
		port := l.sbx.rawTCP(func(c *net.TCPConn) { io.Copy(c, c); c.CloseWrite() })
		addr, _ := l.forward(t, l.key, port)
		var g sync.WaitGroup
		for i := range 20 {
			g.Go(func() {
				want := bytes.Repeat([]byte{byte(i), 1, 2, 3}, 256<<10)
				c := dialTCP(t, addr)
				go func() { c.Write(want); c.CloseWrite() }()
				if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, want) {
					t.Errorf("connection %d: %d bytes back, %v", i, len(got), err)
				}
			})
		}
		g.Wait()
		eventually(t, "the tunnels to end", func() bool { return l.in.underway() == 0 })
	})
	t.Run("a client that does not read holds the service back", func(t *testing.T) {
		sent := make(chan int64, 1)
		port := l.sbx.rawTCP(func(c *net.TCPConn) {
			c.SetWriteDeadline(time.Now().Add(time.Second))
			n, _ := io.Copy(c, io.LimitReader(zeros{}, 1<<30))
			sent <- n
		})
		addr, _ := l.forward(t, l.key, port)
		dialTCP(t, addr)
		if n := <-sent; n > 64<<20 {
			t.Errorf("the service could send %d MiB", n>>20)
		}
	})
}

func TestForwardSaysWhatFailed(t *testing.T) {
	l := newTCPLab(t)
	t.Run("a closed port is said and reset, and the next connection tries anew", func(t *testing.T) {
		free := listen(t, net.JoinHostPort(l.sbx.t.Addr.String(), "0"))
		port := free.Addr().(*net.TCPAddr).Port
		free.Close()
		addr, failed := l.forward(t, l.key, port)
		c, err := net.Dial("tcp", addr)
		if err == nil {
			_, err = c.Read(make([]byte, 1))
			c.Close()
		}
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("got %v", err)
		}
		if err := <-failed; !errors.Is(err, client.ErrNotFound) || !strings.Contains(err.Error(), "nothing listens on port") {
			t.Errorf("said %v", err)
		}
		l.sbx.serve(echo, port)
		again := dialTCP(t, addr)
		io.WriteString(again, "GET / HTTP/1.0\r\n\r\n")
		if b, err := io.ReadAll(again); err != nil || !strings.HasPrefix(string(b), "HTTP/1.0 200") {
			t.Errorf("got %q %v", b, err)
		}
	})
	t.Run("a reset of the service resets the client", func(t *testing.T) {
		port := l.sbx.rawTCP(func(c *net.TCPConn) {
			io.WriteString(c, "half")
			c.Read(make([]byte, 1))
			c.SetLinger(0)
		})
		addr, failed := l.forward(t, l.key, port)
		c := dialTCP(t, addr)
		if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, "x")
		if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("got %v", err)
		}
		<-failed
	})
	t.Run("the agent's port is not for tunnels", func(t *testing.T) {
		addr, failed := l.forward(t, l.key, defaultAgentPort)
		touch(addr)
		if err := <-failed; !errors.Is(err, client.ErrInvalid) {
			t.Errorf("said %v", err)
		}
	})
	t.Run("killing the sandbox resets every tunnel at once", func(t *testing.T) {
		port := l.sbx.rawTCP(func(c *net.TCPConn) { io.Copy(c, c) })
		addr, failed := l.forward(t, l.key, port)
		c := dialTCP(t, addr)
		io.WriteString(c, "x")
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		l.sbx.kill()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("got %v", err)
		}
		<-failed
		touch(addr)
		if err := <-failed; !errors.Is(err, client.ErrNotFound) {
			t.Errorf("afterwards: %v", err)
		}
	})
}

// rawTCP runs a service that is a function of the connection.
func (s *sandbox) rawTCP(f func(c *net.TCPConn)) int {
	return s.listenRaw(func(c net.Conn) { f(c.(*net.TCPConn)) })
}

func TestForwardIsForOwners(t *testing.T) {
	l := newTCPLab(t)
	stranger, secret := auth.NewKey("stranger", false, time.Now())
	if err := l.keys.PutKey(t.Context(), stranger); err != nil {
		t.Fatal(err)
	}
	port := l.sbx.serve(echo)
	for name, c := range map[string]struct {
		header []string
		path   string
		want   int
	}{
		"without a key":                       {nil, "", 401},
		"with another owner's key":            {[]string{"X-API-KEY", secret}, "", 404},
		"with a wrong access token":           {[]string{"X-Access-Token", "guess"}, "", 401},
		"with the sandbox's access token":     {[]string{"X-Access-Token", "access-" + l.sbx.t.ID}, "", 426},
		"with the owner's key, but plain GET": {[]string{"X-API-KEY", l.key}, "", 426},
		"a port that is none":                 {[]string{"X-API-KEY", l.key}, "/sandboxes/" + l.sbx.t.ID + "/forward/070000", 400},
		"a closed port":                       {[]string{"X-API-KEY", l.key}, "/sandboxes/" + l.sbx.t.ID + "/forward/1", 404},
	} {
		t.Run(name, func(t *testing.T) {
			path := c.path
			if path == "" {
				path = "/sandboxes/" + l.sbx.t.ID + "/forward/" + strconv.Itoa(port)
			}
			resp, body := get(t, http.DefaultClient, "http://"+l.http+path, c.header...)
			if resp.StatusCode != c.want {
				t.Errorf("got %d %s, want %d", resp.StatusCode, body, c.want)
			}
		})
	}
	http.DefaultClient.CloseIdleConnections()
}
