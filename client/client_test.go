package client_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/internal/agent"
	"github.com/cordonhq/cordon/internal/agent/agentctl"
	"github.com/cordonhq/cordon/internal/api"
	"github.com/cordonhq/cordon/internal/api/apitest"
	"github.com/cordonhq/cordon/internal/auth"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/sandbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const control = "proven_control-token"

// server is the real control API over a fake manager, and one real agent that
// serves whatever sandbox is asked for, on this machine.
type server struct {
	url       string
	key       string
	flows     *flowlog.Log
	sandboxes *apitest.Sandboxes
	claim     func(token string)
	seen      []http.Header // of requests to other ports
	home      string
}

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{sandboxes: apitest.NewSandboxes(), home: t.TempDir()}
	var err error
	if s.flows, err = flowlog.New(flowlog.Config{}); err != nil {
		t.Fatal(err)
	}
	key, secret := auth.NewKey("test", true, time.Now())
	keys := &apitest.Keys{}
	if err := keys.PutKey(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	s.key = secret
	control := api.New(api.Config{Sandboxes: s.sandboxes, Keys: keys, Flows: s.flows, Domain: "sbx.test:8443"})
	agent := s.startAgent(t)
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Header.Get("E2b-Sandbox-Port") {
		case "":
			control.ServeHTTP(w, r)
		case "49983":
			agent.ServeHTTP(w, r)
		default:
			s.seen = append(s.seen, r.Header)
			fmt.Fprintf(w, "port %s, %s", r.Header.Get("E2b-Sandbox-Port"), r.URL)
		}
	}))
	t.Cleanup(front.Close)
	s.url = front.URL
	return s
}

// startAgent runs an agent whose only user is whoever runs the test.
func (s *server) startAgent(t *testing.T) http.Handler {
	t.Helper()
	etc := t.TempDir()
	for name, text := range map[string]string{
		"passwd": fmt.Sprintf("tester:x:%d:%d::%s:/bin/bash\n", os.Getuid(), os.Getgid(), s.home),
		"group":  fmt.Sprintf("testers:x:%d:\n", os.Getgid()),
	} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	a, err := agent.New(agent.Config{ControlHash: sha256.Sum256([]byte(control)), Etc: etc, Path: os.Getenv("PATH")})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx, ln) }() // reaps what it starts
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("agent: %v", err)
		}
	})
	s.claim = func(token string) {
		at := sandbox.AgentAddr{Addr: netip.MustParseAddrPort(ln.Addr().String()), Token: control}
		in := sandbox.AgentInit{SandboxID: "i1", AccessToken: token, DefaultUser: "tester", EnvVars: map[string]string{"FROM": "create"}}
		if err := agentctl.New(agentctl.Config{}).Init(t.Context(), at, in); err != nil {
			t.Fatal(err)
		}
	}
	return a.Handler()
}

func (s *server) client(t *testing.T) *client.Client {
	t.Helper()
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	c, err := client.New(client.Options{APIURL: s.url, SandboxURL: s.url + "/", APIKey: s.key, HTTPClient: &http.Client{Transport: transport}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// sandbox creates one and gives the agent its token.
func (s *server) sandbox(t *testing.T, o client.CreateOptions) *client.Sandbox {
	t.Helper()
	sb, err := s.client(t).Create(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	s.claim(sb.AccessToken)
	return sb
}

func TestNewRefusesWhatCannotWork(t *testing.T) {
	for _, o := range []client.Options{
		{}, {APIURL: "127.0.0.1:3000", APIKey: "k"}, {APIURL: "http://", APIKey: "k"},
		{APIURL: "http://x"}, {APIURL: "http://x", APIKey: "k", SandboxURL: "sandbox"},
	} {
		if _, err := client.New(o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
}

func TestASandboxLife(t *testing.T) {
	s := newServer(t)
	c, ctx := s.client(t), t.Context()
	public := false
	sb, err := c.Create(ctx, client.CreateOptions{
		Template: "base", Timeout: 90*time.Second + 1, Metadata: map[string]string{"a b": "c&d=%"}, Env: map[string]string{"K": "v"},
		Network: client.Network{AllowOut: []string{"example.com"}, DenyOut: []string{client.AllTraffic}, AllowPublicTraffic: &public},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := s.sandboxes.Created[0]; got.Timeout != 91*time.Second || got.EnvVars["K"] != "v" || got.Egress.AllowOut[0] != "example.com" || !got.Secure {
		t.Fatalf("the server was asked for %+v", got)
	}
	if sb.AccessToken == "" || sb.TrafficToken == "" {
		t.Fatalf("tokens are %q and %q", sb.AccessToken, sb.TrafficToken)
	}
	if got, want := sb.Host(3000), "3000-"+sb.ID+".sbx.test:8443"; got != want {
		t.Fatalf("host is %s, want %s", got, want)
	}
	if _, err := c.Create(ctx, client.CreateOptions{Template: "other"}); err != nil {
		t.Fatal(err)
	}
	list, err := c.List(ctx, client.ListOptions{State: "running", Metadata: map[string]string{"a b": "c&d=%"}})
	if err != nil || len(list) != 1 || list[0].ID != sb.ID || list[0].Template != "base" {
		t.Fatalf("list is %+v, %v", list, err)
	}
	if err := sb.SetNetwork(ctx, client.Network{}); err != nil {
		t.Fatal(err)
	}
	if err := sb.SetNetwork(ctx, client.Network{DenyOut: []string{"nonsense"}}); !errors.Is(err, client.ErrInvalid) || !strings.Contains(err.Error(), "invalid denied CIDR nonsense") {
		t.Fatalf("a bad rule: %v", err)
	}
	if err := sb.BindDomain(ctx, "app.example.com", 3000); err != nil {
		t.Fatal(err)
	}
	if err := sb.BindDomain(ctx, "app.example.com", 8080); err != nil {
		t.Fatal(err)
	}
	if got, err := sb.Domains(ctx); err != nil || len(got) != 1 || got[0] != (client.Domain{Name: "app.example.com", Port: 8080}) {
		t.Fatalf("domains are %+v, %v", got, err)
	}
	if err := sb.UnbindDomain(ctx, "app.example.com"); err != nil {
		t.Fatal(err)
	}
	if err := sb.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	if err := sb.Pause(ctx); !errors.Is(err, client.ErrConflict) {
		t.Fatalf("pausing again: %v", err)
	}
	if info, err := sb.Info(ctx); err != nil || info.State != "paused" {
		t.Fatalf("info is %+v, %v", info, err)
	}
	again, err := c.Connect(ctx, sb.ID, 0)
	if err != nil || again.AccessToken != sb.AccessToken {
		t.Fatalf("connect: %+v, %v", again, err)
	}
	if err := sb.SetTimeout(ctx, time.Hour); err != nil {
		t.Fatal(err)
	}
	if info, err := sb.Info(ctx); err != nil || info.State != "running" || time.Until(info.Ends) < 59*time.Minute {
		t.Fatalf("info is %+v, %v", info, err)
	}
	if err := sb.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if err := sb.Kill(ctx); !errors.Is(err, client.ErrNotFound) {
		t.Fatalf("killing again: %v", err)
	}
}

func TestErrorsTellTheirKind(t *testing.T) {
	s := newServer(t)
	s.sandboxes.Limit = 0
	_, err := s.client(t).Create(t.Context(), client.CreateOptions{})
	var said *client.Error
	if !errors.Is(err, client.ErrExhausted) || !errors.As(err, &said) || said.Status != 429 || !strings.Contains(said.Message, "limit of 0") {
		t.Fatalf("got %v", err)
	}
	wrong, err := client.New(client.Options{APIURL: s.url, APIKey: "e2b_00"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := wrong.List(t.Context(), client.ListOptions{}); !errors.Is(err, client.ErrUnauthorized) {
		t.Fatalf("got %v", err)
	}
}

func TestRun(t *testing.T) {
	s := newServer(t)
	sb := s.sandbox(t, client.CreateOptions{})
	tests := []struct {
		name    string
		command string
		o       client.RunOptions
		want    client.Result
	}{
		{"both streams", "echo out; echo err >&2", client.RunOptions{}, client.Result{Stdout: "out\n", Stderr: "err\n", Status: "exit status 0"}},
		{"an exit code is no error", "exit 3", client.RunOptions{}, client.Result{ExitCode: 3, Status: "exit status 3"}},
		{"the environment", "echo $FROM $MORE", client.RunOptions{Env: map[string]string{"MORE": "run"}}, client.Result{Stdout: "create run\n", Status: "exit status 0"}},
		{"the directory", "pwd", client.RunOptions{Dir: "/usr"}, client.Result{Stdout: "/usr\n", Status: "exit status 0"}},
		{"no input", "cat", client.RunOptions{}, client.Result{Status: "exit status 0"}},
		{"much output", "head -c 100000 /dev/zero | tr '\\0' x", client.RunOptions{MaxOutput: 7}, client.Result{Stdout: "xxxxxxx", Truncated: true, Status: "exit status 0"}},
		{"a signal", "kill -9 $$", client.RunOptions{}, client.Result{ExitCode: -1, Status: "signal: killed"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := sb.Commands.Run(t.Context(), tt.command, tt.o)
			if err != nil {
				t.Fatal(err)
			}
			if *got != tt.want {
				t.Fatalf("got %+v, want %+v", *got, tt.want)
			}
		})
	}
	var live bytes.Buffer
	if _, err := sb.Commands.Run(t.Context(), "echo live", client.RunOptions{Stdout: &live}); err != nil || live.String() != "live\n" {
		t.Fatalf("the writer got %q, %v", live.String(), err)
	}
	if _, err := sb.Commands.Run(t.Context(), "true", client.RunOptions{User: "nobody-here"}); !errors.Is(err, client.ErrUnauthorized) {
		t.Fatalf("an unknown user: %v", err)
	}
	if _, err := sb.Commands.Run(t.Context(), "true", client.RunOptions{Dir: "/no/such"}); !errors.Is(err, client.ErrInvalid) {
		t.Fatalf("a missing directory: %v", err)
	}
	dead, err := client.New(client.Options{APIURL: s.url, APIKey: s.key, SandboxURL: "http://127.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	unreachable, err := dead.Connect(t.Context(), sb.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	var said *client.Error
	if _, err := unreachable.Commands.Run(t.Context(), "true", client.RunOptions{}); !errors.Is(err, syscall.ECONNREFUSED) || errors.As(err, &said) {
		t.Fatalf("nobody there: %v", err)
	}
	sb.AccessToken = "wrong"
	if _, err := sb.Commands.Run(t.Context(), "true", client.RunOptions{}); !errors.Is(err, client.ErrUnauthorized) {
		t.Fatalf("a wrong token: %v", err)
	}
}

// gone waits until a process has ended and was reaped.
func gone(t *testing.T, pid uint32) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); os.IsNotExist(err) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d is still there", pid)
		}
	}
}

func TestBackgroundCommands(t *testing.T) {
	s := newServer(t)
	sb := s.sandbox(t, client.CreateOptions{})
	ctx := t.Context()
	t.Run("input", func(t *testing.T) {
		p, err := sb.Commands.Start(ctx, "exec cat", client.RunOptions{Stdin: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(p.Send(ctx, []byte("hello")), p.CloseStdin(ctx)); err != nil {
			t.Fatal(err)
		}
		if got, err := p.Wait(ctx); err != nil || got.Stdout != "hello" {
			t.Fatalf("got %+v, %v", got, err)
		}
	})
	t.Run("kill", func(t *testing.T) {
		p, err := sb.Commands.Start(ctx, "exec sleep 60", client.RunOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Kill(ctx); err != nil {
			t.Fatal(err)
		}
		if got, err := p.Wait(ctx); err != nil || got.ExitCode != -1 {
			t.Fatalf("got %+v, %v", got, err)
		}
		if err := p.Kill(ctx); err != nil {
			t.Fatalf("killing what has ended: %v", err)
		}
	})
	t.Run("the end of the starting context leaves it alone", func(t *testing.T) {
		startCtx, cancel := context.WithCancel(ctx)
		p, err := sb.Commands.Start(startCtx, "sleep 0.2; echo done", client.RunOptions{})
		if err != nil {
			t.Fatal(err)
		}
		cancel()
		if got, err := p.Wait(ctx); err != nil || got.Stdout != "done\n" {
			t.Fatalf("got %+v, %v", got, err)
		}
	})
	t.Run("closing leaves it alone", func(t *testing.T) {
		p, err := sb.Commands.Start(ctx, "exec sleep 60", client.RunOptions{})
		if err != nil {
			t.Fatal(err)
		}
		p.Close()
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", p.PID)); err != nil {
			t.Fatal("the command went with its watcher")
		}
		if err := p.Kill(ctx); err != nil {
			t.Fatal(err)
		}
		gone(t, p.PID)
	})
	t.Run("the end of the waiting context kills it", func(t *testing.T) {
		p, err := sb.Commands.Start(ctx, "exec sleep 60", client.RunOptions{})
		if err != nil {
			t.Fatal(err)
		}
		waitCtx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		defer cancel()
		if _, err := p.Wait(waitCtx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v", err)
		}
		gone(t, p.PID)
	})
	t.Run("its timeout kills it", func(t *testing.T) {
		p, err := sb.Commands.Start(ctx, "exec sleep 60", client.RunOptions{Timeout: 100 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v", err)
		}
		gone(t, p.PID)
	})
}

func TestFiles(t *testing.T) {
	s := newServer(t)
	sb := s.sandbox(t, client.CreateOptions{})
	ctx := t.Context()
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	for path, contents := range map[string][]byte{"a/b/small.txt": []byte("hello"), "a/empty": {}, "a/big": big, "a/ö & ?": []byte("odd")} {
		if err := sb.Files.Write(ctx, path, bytes.NewReader(contents)); err != nil {
			t.Fatal(err)
		}
		if got, err := sb.Files.Read(ctx, filepath.Join(s.home, path)); err != nil || !bytes.Equal(got, contents) {
			t.Fatalf("%s: read %d bytes, %v", path, len(got), err)
		}
	}
	entries, err := sb.Files.As("tester").List(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, fmt.Sprintf("%s:%v:%d", e.Name, e.Dir, e.Size))
	}
	if got := strings.Join(names, " "); !strings.Contains(got, "big:false:1048576") || !strings.Contains(got, "b:true:") || len(entries) != 4 {
		t.Fatalf("entries are %s", got)
	}
	if e, err := sb.Files.Stat(ctx, "a/b/small.txt"); err != nil || e.Size != 5 || e.Owner != "tester" || time.Since(e.Modified) > time.Minute {
		t.Fatalf("stat is %+v, %v", e, err)
	}
	for range 2 {
		if err := sb.Files.MakeDir(ctx, "made"); err != nil {
			t.Fatal(err)
		}
		if err := sb.Files.Remove(ctx, "a"); err != nil {
			t.Fatal(err)
		}
	}
	for name, err := range map[string]error{
		"read": second(sb.Files.Read(ctx, "a/big")), "list": second(sb.Files.List(ctx, "a")), "stat": second(sb.Files.Stat(ctx, "a")),
	} {
		if !errors.Is(err, client.ErrNotFound) {
			t.Errorf("%s of what is gone: %v", name, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestRequestsToPortsCarryTheRightToken(t *testing.T) {
	s := newServer(t)
	public := false
	sb := s.sandbox(t, client.CreateOptions{Network: client.Network{AllowPublicTraffic: &public}})
	req, err := sb.NewRequest(t.Context(), http.MethodGet, 3000, "/x?y=1", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := sb.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var body bytes.Buffer
	if _, err := body.ReadFrom(resp.Body); err != nil || body.String() != "port 3000, /x?y=1" {
		t.Fatalf("got %q, %v", body.String(), err)
	}
	got := s.seen[0]
	if got.Get("E2b-Sandbox-Id") != sb.ID || got.Get("E2b-Traffic-Access-Token") != sb.TrafficToken {
		t.Fatalf("headers are %v", got)
	}
	if got.Get("X-Access-Token") != "" || got.Get("X-Api-Key") != "" {
		t.Fatalf("the service was shown what is not for it: %v", got)
	}
}

func TestWithoutASandboxURLPortsHaveTheirHosts(t *testing.T) {
	s := newServer(t)
	c, err := client.New(client.Options{APIURL: s.url, APIKey: s.key, Domain: "other.test"})
	if err != nil {
		t.Fatal(err)
	}
	sb, err := c.Create(t.Context(), client.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	req, err := sb.NewRequest(t.Context(), http.MethodGet, 8000, "/", nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := req.URL.String(), "https://8000-"+sb.ID+".other.test/"; got != want {
		t.Fatalf("URL is %s, want %s", got, want)
	}
	if len(req.Header) != 0 {
		t.Fatalf("headers are %v", req.Header)
	}
}

func TestEvents(t *testing.T) {
	s := newServer(t)
	sb := s.sandbox(t, client.CreateOptions{})
	record := func(name string, v flowlog.Verdict) {
		s.flows.Record(flowlog.Event{Sandbox: sb.ID, Name: name, Verdict: v})
	}
	record("a.com", flowlog.Allowed)
	record("b.com", flowlog.Denied)
	all, err := sb.Events(t.Context(), client.EventOptions{})
	if err != nil || len(all) != 2 || all[0].Name != "a.com" {
		t.Fatalf("events are %+v, %v", all, err)
	}
	denied, err := sb.Events(t.Context(), client.EventOptions{Verdict: client.Denied, Since: all[0].Seq, Limit: 5})
	if err != nil || len(denied) != 1 || denied[0].Name != "b.com" {
		t.Fatalf("denied are %+v, %v", denied, err)
	}
	var seen []string
	for e, err := range sb.Follow(t.Context(), client.EventOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		if seen = append(seen, e.Name); len(seen) == 2 {
			record("c.com", flowlog.Denied)
		}
		if len(seen) == 3 {
			break
		}
	}
	if got := strings.Join(seen, " "); got != "a.com b.com c.com" {
		t.Fatalf("followed %s", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for _, err := range sb.Follow(ctx, client.EventOptions{Limit: 1}) {
		cancel()
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
}
