package agentctl

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"go.uber.org/goleak"

	"github.com/cordonhq/cordon/internal/agent"
	"github.com/cordonhq/cordon/internal/agent/proof"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const token = "proven_control-token-of-the-tests"

// listen opens a loopback port.
func listen(t *testing.T, addr string) *net.TCPListener {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Skipf("no %s here: %v", addr, err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln.(*net.TCPListener)
}

func addrOf(ln net.Listener) sandbox.AgentAddr {
	return sandbox.AgentAddr{Addr: netip.MustParseAddrPort(ln.Addr().String()), Token: token}
}

// serve runs a real agent on ln.
func serve(t *testing.T, ln net.Listener) {
	t.Helper()
	etc := t.TempDir()
	if err := os.WriteFile(etc+"/passwd", []byte("user:x:0:0::/:/bin/sh\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := agent.New(agent.Config{ControlHash: sha256.Sum256([]byte(token)), Etc: etc})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestTheHostMeetsTheAgent(t *testing.T) {
	ln := listen(t, "127.0.0.1:0")
	serve(t, ln)
	c, at, ctx := New(Config{}), addrOf(ln), t.Context()
	if err := c.WaitReady(ctx, at); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Metrics(ctx, sandbox.AgentAddr{Addr: at.Addr, Token: "wrong"}); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("an unclaimed agent: %v", err)
	}
	in := sandbox.AgentInit{SandboxID: "i1", TemplateID: "base", Hostname: "sbx", AccessToken: "a", EnvVars: map[string]string{"K": "v"}, Time: time.Now()}
	if err := c.Init(ctx, sandbox.AgentAddr{Addr: at.Addr, Token: "wrong"}, in); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("a wrong control token: %v", err)
	}
	if err := c.Init(ctx, at, in); err != nil {
		t.Fatal(err)
	}
	for tok, want := range map[string]int{"a": 200, "b": 401} {
		req, _ := http.NewRequestWithContext(ctx, "GET", "http://"+at.Addr.String()+"/envs", nil)
		req.Header.Set("X-Access-Token", tok)
		req.Close = true
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("token %s: %d, want %d", tok, resp.StatusCode, want)
		}
	}
	in.Hostname = "not a host name"
	if err := c.Init(ctx, at, in); err == nil || !strings.Contains(err.Error(), "hostname") {
		t.Errorf("a bad claim: %v", err)
	}
	m, err := c.Metrics(ctx, at)
	if err != nil || m.CPUCount < 1 || m.MemTotal <= 0 || m.DiskTotal <= 0 || time.Since(m.Time).Abs() > time.Minute {
		t.Errorf("%+v %v", m, err)
	}
}

func TestWaitingForAnAgentThatStartsLate(t *testing.T) {
	ln := listen(t, "127.0.0.1:0")
	at := addrOf(ln)
	ln.Close() // nothing listens yet
	began := make(chan time.Time, 1)
	go func() {
		time.Sleep(100 * time.Millisecond)
		late, err := net.Listen("tcp", at.Addr.String())
		if err != nil {
			began <- time.Time{}
			return
		}
		began <- time.Now()
		conn, err := late.Accept()
		if err == nil {
			io.WriteString(conn, "HTTP/1.1 204 No Content\r\n\r\n")
			io.Copy(io.Discard, conn)
			conn.Close()
		}
		late.Close()
	}()
	if err := New(Config{}).WaitReady(t.Context(), at); err != nil {
		t.Fatal(err)
	}
	if since := time.Since(<-began); since > 50*time.Millisecond {
		t.Errorf("noticed %v after the agent listened", since)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	err := New(Config{}).WaitReady(ctx, at)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "refused") {
		t.Errorf("an agent that never comes: %v", err)
	}
}

func TestTunnelsToLoopbackServices(t *testing.T) {
	ln := listen(t, "127.0.0.1:0")
	serve(t, ln)
	c, at := New(Config{}), addrOf(ln)
	for name, addr := range map[string]string{"IPv4": "127.0.0.1:0", "IPv6": "[::1]:0"} {
		t.Run(name, func(t *testing.T) {
			service := listen(t, addr)
			go func() {
				for {
					conn, err := service.Accept()
					if err != nil {
						return
					}
					io.WriteString(conn, "first words") // the service speaks first
					io.Copy(conn, conn)
					conn.Close()
				}
			}()
			conn, err := c.DialPort(t.Context(), at, uint16(service.Addr().(*net.TCPAddr).Port))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			tcp, ok := conn.(*net.TCPConn)
			if !ok {
				t.Fatalf("a %T, want a bare *net.TCPConn that can be spliced", conn)
			}
			said := strings.Repeat("payload ", 100_000)
			go func() { io.WriteString(tcp, said); tcp.CloseWrite() }()
			got, err := io.ReadAll(tcp)
			if err != nil || string(got) != "first words"+said {
				t.Errorf("%d bytes, %v, want %d", len(got), err, len("first words"+said))
			}
		})
	}
	closed := listen(t, "127.0.0.1:0")
	port := uint16(closed.Addr().(*net.TCPAddr).Port)
	closed.Close()
	began := time.Now()
	_, err := c.DialPort(t.Context(), at, port)
	if !errors.Is(err, ErrRefused) || time.Since(began) > time.Second {
		t.Errorf("a closed port: %v after %v", err, time.Since(began))
	}
	if _, err := c.DialPort(t.Context(), sandbox.AgentAddr{Addr: at.Addr, Token: "wrong"}, port); err == nil || errors.Is(err, ErrRefused) {
		t.Errorf("a wrong token: %v", err)
	}
	if _, err := c.DialPort(t.Context(), sandbox.AgentAddr{Addr: at.Addr, Token: "a\r\nb"}, port); err == nil {
		t.Error("a token with a line break was sent")
	}
	if _, err := c.DialPort(t.Context(), at, 0); err == nil {
		t.Error("port 0 was dialled")
	}
}

// A sandbox may put anything behind the agent's address.
func TestHostileAgents(t *testing.T) {
	slow := Config{CallTimeout: 300 * time.Millisecond}
	redirected := listen(t, "127.0.0.1:0")
	hits := make(chan struct{}, 1)
	go func() {
		if conn, err := redirected.Accept(); err == nil {
			hits <- struct{}{}
			conn.Close()
		}
	}()
	for name, say := range map[string]func(c net.Conn){
		"nothing at all":          func(c net.Conn) { io.Copy(io.Discard, c) },
		"closes at once":          func(net.Conn) {},
		"not HTTP":                func(c net.Conn) { io.WriteString(c, "SSH-2.0-x\r\n\r\n") },
		"an endless header":       func(c net.Conn) { io.WriteString(c, "HTTP/1.1 101 X\r\n"); io.Copy(c, endless("A: b\r\n")) },
		"an endless status line":  func(c net.Conn) { io.Copy(c, endless("H")) },
		"one byte in a while":     func(c net.Conn) { drip(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: cordon-tunnel\r\n\r\n") },
		"an upgrade to another":   func(c net.Conn) { io.WriteString(c, "HTTP/1.1 101 X\r\nUpgrade: websocket\r\n\r\n") },
		"success without upgrade": func(c net.Conn) { io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nxx") },
		"a redirect": func(c net.Conn) {
			fmt.Fprintf(c, "HTTP/1.1 307 X\r\nLocation: http://%s/\r\nContent-Length: 0\r\n\r\n", redirected.Addr())
		},
		"an endless body": func(c net.Conn) { io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n"); io.Copy(c, endless("[")) },
		"a chunk of absurd length": func(c net.Conn) {
			io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff1\r\n")
		},
	} {
		t.Run(name, func(t *testing.T) {
			ln := listen(t, "127.0.0.1:0")
			go func() {
				for {
					conn, err := ln.Accept()
					if err != nil {
						return
					}
					go func() {
						defer conn.Close()
						bufio.NewReader(conn).ReadString('\n')
						say(conn)
					}()
				}
			}()
			c, at := New(slow), addrOf(ln)
			began := time.Now()
			if conn, err := c.DialPort(t.Context(), at, 80); err == nil {
				conn.Close()
				t.Error("a tunnel was taken for granted")
			}
			if _, err := c.Metrics(t.Context(), at); err == nil {
				t.Error("metrics were taken for granted")
			}
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			if err := c.WaitReady(ctx, at); err == nil {
				t.Error("it was taken for ready")
			}
			if took := time.Since(began); took > 2*time.Second {
				t.Errorf("it held the host for %v", took)
			}
			ln.Close()
		})
	}
	select {
	case <-hits:
		t.Error("the host followed a redirect out of the sandbox")
	default:
	}
}

type endless string

func (e endless) Read(p []byte) (int, error) {
	return copy(p, strings.Repeat(string(e), len(p)/len(e)+1)), nil
}

func drip(c net.Conn, text string) {
	for _, b := range []byte(text) {
		if _, err := c.Write([]byte{b}); err != nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestAHeadInPiecesLosesNoByteBehindIt(t *testing.T) {
	const head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: cordon-tunnel\r\n\r\n"
	for cut := range len(head) {
		near, far := pair(t)
		go func() {
			io.WriteString(far, head[:cut])
			time.Sleep(time.Millisecond)
			io.WriteString(far, head[cut:]+"behind")
			far.Close()
		}()
		raw, err := readHead(near)
		if err != nil || string(raw) != head {
			t.Fatalf("cut at %d: %q %v", cut, raw, err)
		}
		rest, err := io.ReadAll(near)
		if err != nil || string(rest) != "behind" {
			t.Fatalf("cut at %d: %q %v behind the head", cut, rest, err)
		}
		near.Close()
	}
}

// pair is a TCP connection's two ends.
func pair(t *testing.T) (near, far net.Conn) {
	t.Helper()
	ln := listen(t, "127.0.0.1:0")
	defer ln.Close()
	near, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if far, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	return near, far
}

func TestMetricsAreBounded(t *testing.T) {
	m, err := parseMetrics([]byte(`{"ts":99999999999999,"cpu_count":-3,"cpu_used_pct":1e300,"mem_used":-1,"disk_total":5}`))
	if err != nil || m.Time.Year() != 9999 || m.CPUCount != 0 || m.CPUUsedPct != 100 || m.MemUsed != 0 || m.DiskTotal != 5 {
		t.Errorf("%+v %v", m, err)
	}
	if k := errs.KindOf(ErrRefused); k != errs.NotFound {
		t.Errorf("ErrRefused is %v", k)
	}
}

func TestKillsAreBounded(t *testing.T) {
	kill := `{"time":"2026-01-02T03:04:05Z","pid":-9,"command":"a\u0000\u001b[31m\u202e` + strings.Repeat("é", 100) + `","bytes":-1},`
	kills, latest, err := parseKills([]byte(`{"latest":-5,"kills":[` + strings.TrimSuffix(strings.Repeat(kill, 200), ",") + `]}`))
	if err != nil || latest != 0 || len(kills) != maxKills {
		t.Fatalf("%d kills, latest %d, %v", len(kills), latest, err)
	}
	if k := kills[0]; k.PID != 0 || k.Bytes != 0 || len(k.Command) > 64 || !strings.HasPrefix(k.Command, "a[31mé") || !utf8.ValidString(k.Command) {
		t.Errorf("%+v", k)
	}
	if _, _, err := parseKills([]byte(`{"kills":"many"}`)); err == nil {
		t.Error("nonsense was understood")
	}
}

func FuzzKills(f *testing.F) {
	f.Add([]byte(`{"latest":1,"kills":[{"number":1,"time":"2026-01-02T03:04:05Z","pid":17,"command":"python3","bytes":1}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		kills, latest, err := parseKills(raw)
		if err != nil {
			return
		}
		if latest < 0 || len(kills) > maxKills {
			t.Errorf("%d kills, latest %d", len(kills), latest)
		}
		for _, k := range kills {
			if k.PID < 0 || k.Bytes < 0 || len(k.Command) > 64 || !utf8.ValidString(k.Command) {
				t.Errorf("%+v", k)
			}
		}
	})
}

func FuzzMetrics(f *testing.F) {
	f.Add([]byte(`{"ts":1,"cpu_count":2,"cpu_used_pct":3.5}`))
	f.Add([]byte(`{"ts":1e400}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := parseMetrics(raw)
		if err != nil {
			return
		}
		if _, err := m.Time.MarshalJSON(); err != nil || m.MemUsed < 0 || m.CPUUsedPct < 0 || m.CPUUsedPct > 100 {
			t.Errorf("%+v %v", m, err)
		}
	})
}

func FuzzHead(f *testing.F) {
	f.Add([]byte("HTTP/1.1 101 X\r\nUpgrade: cordon-tunnel\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"))
	f.Add([]byte("\r\n\r\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, err := parseHead(raw)
		if err == nil && (got.status < 0 || got.header == nil) {
			t.Errorf("%+v", got)
		}
	})
}

// An impostor is what listens on the agent's port and is not the agent.
func TestAnImpostorLearnsNothing(t *testing.T) {
	for name, answer := range map[string]string{
		"as an agent of an older version": "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
		"success without a proof":         "HTTP/1.1 204 No Content\r\n\r\n",
		"a proof of its own making": "HTTP/1.1 204 No Content\r\n" + proof.Nonce + ": " + proof.NewNonce() + "\r\n" + proof.Header + ": " +
			proof.Key{1}.Agent(proof.Nonces{}) + "\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			ln := listen(t, "127.0.0.1:0")
			var heard bytes.Buffer
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					conn, err := ln.Accept()
					if err != nil {
						return
					}
					in := bufio.NewReader(conn)
					for line := ""; line != "\r\n" && err == nil; {
						line, err = in.ReadString('\n')
						heard.WriteString(line)
					}
					io.WriteString(conn, answer)
					io.Copy(&heard, in)
					conn.Close()
				}
			}()
			c, at := New(Config{CallTimeout: time.Second}), addrOf(ln)
			const secret = "users-secret"
			err := c.Init(t.Context(), at, sandbox.AgentInit{SandboxID: "i1", AccessToken: secret, EnvVars: map[string]string{"K": secret}})
			if !errors.Is(err, errImpostor) {
				t.Errorf("Init: %v", err)
			}
			if err := c.Start(t.Context(), at, sandbox.AgentStart{Args: []string{secret}}); !errors.Is(err, errImpostor) {
				t.Errorf("Start: %v", err)
			}
			if conn, err := c.DialPort(t.Context(), at, 80); !errors.Is(err, errImpostor) {
				t.Errorf("DialPort: %v, %v", conn, err)
			}
			ln.Close()
			<-done
			if sum := sha256.Sum256([]byte(token)); strings.Contains(heard.String(), token) || strings.Contains(heard.String(), secret) || strings.Contains(heard.String(), fmt.Sprintf("%x", sum)) {
				t.Errorf("it heard %s", heard.String())
			}
			if n := strings.Count(heard.String(), "HTTP/1.1"); n != 3 || strings.Count(heard.String(), "GET "+proof.Path) != 3 {
				t.Errorf("it was asked for more than a proof: %s", heard.String())
			}
		})
	}
}
