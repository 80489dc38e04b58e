package agent

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	osuser "os/user"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	"github.com/cordonhq/cordon/api/gen/agent/filesystem/filesystemconnect"
	"github.com/cordonhq/cordon/api/gen/agent/process/processconnect"
	"github.com/cordonhq/cordon/internal/agent/proof"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testControl = "control-token-of-the-tests"
	testToken   = "0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0"
	testUID     = 4242
)

// harness is a running agent with a user of its own, "tester", whose home is a
// temporary directory. Its processes are real.
type harness struct {
	t     *testing.T
	agent *Agent
	url   string
	http  *http.Client
	etc   string
	home  string
	root  bool // tester is not who runs the tests
}

// start runs an unclaimed agent.
func start(t *testing.T) *harness {
	t.Helper()
	return startBy(t, (*Agent).Run)
}

// unguarded runs all of an agent that processes need, but not its guard.
func unguarded(a *Agent, ctx context.Context, ln net.Listener) error {
	srv := a.server(ctx)
	defer context.AfterFunc(ctx, func() { srv.Close() })()
	go srv.Serve(ln)
	err := a.children.run(ctx)
	a.procs.abandon()
	return err
}

// startBy runs an unclaimed agent by a function like its Run.
func startBy(t *testing.T, run func(*Agent, context.Context, net.Listener) error) *harness {
	t.Helper()
	base, err := os.MkdirTemp("", "cordon-agent-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	h := &harness{t: t, etc: filepath.Join(base, "etc"), home: filepath.Join(base, "home"), root: os.Geteuid() == 0}
	me, err := osuser.Current()
	if err != nil {
		t.Fatal(err)
	}
	uid, gid := me.Uid, me.Gid
	if h.root {
		uid, gid = fmt.Sprint(testUID), fmt.Sprint(testUID)
	}
	for _, dir := range []string{base, h.etc, h.home} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if h.root {
		if err := os.Chown(h.home, testUID, testUID); err != nil {
			t.Fatal(err)
		}
	}
	h.write(filepath.Join(h.etc, "passwd"), "root:x:0:0:root:/root:/bin/bash\ntester:x:"+uid+":"+gid+":,,,:"+h.home+":/bin/bash\n")
	h.write(filepath.Join(h.etc, "group"), "root:x:0:\ntesters:x:"+gid+":\nextra:x:4243:other,tester\n")

	h.agent, err = New(Config{ControlHash: sha256.Sum256([]byte(testControl)), Etc: h.etc, Spool: filepath.Join(base, "spool")})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.url = "http://" + ln.Addr().String()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- run(h.agent, ctx, ln) }()
	transport := &http.Transport{DisableCompression: true}
	h.http = &http.Client{Transport: transport, Timeout: 20 * time.Second}
	t.Cleanup(func() {
		h.killAll()
		transport.CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return h
}

// claimed runs an agent claimed with testToken.
func claimed(t *testing.T) *harness {
	t.Helper()
	h := start(t)
	h.claimDefault()
	return h
}

func (h *harness) claimDefault() {
	h.t.Helper()
	h.claim(map[string]any{"sandboxID": "i1", "templateID": "base", "accessToken": testToken, "defaultUser": "tester", "envVars": map[string]string{"FROM_INIT": "1"}})
}

func (h *harness) claim(body map[string]any) {
	h.t.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		h.t.Fatal(err)
	}
	resp := h.do("POST", "/init", bytes.NewReader(raw), "X-Cordon-Control", testControl)
	if resp.StatusCode != http.StatusNoContent {
		h.t.Fatalf("/init: %d %s", resp.StatusCode, resp.body)
	}
}

// killAll leaves no process of the test behind, whatever it forgot: each was the
// leader of a session and of its group, in which its orphans still are.
func (h *harness) killAll() {
	h.agent.procs.mu.Lock()
	live, ended := slices.Collect(maps.Values(h.agent.procs.live)), slices.Clone(h.agent.procs.ended)
	h.agent.procs.mu.Unlock()
	for _, p := range append(live, ended...) {
		_ = syscall.Kill(-p.pid, syscall.SIGKILL)
	}
	for _, p := range live {
		p.kill()
		<-p.done
	}
}

func (h *harness) write(path, content string) {
	h.t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		h.t.Fatal(err)
	}
}

// answer is a response read to its end.
type answer struct {
	*http.Response
	body string
}

// send sends a request; one with the control token is the host's, which proves that
// it has it instead.
func (h *harness) send(req *http.Request) (*http.Response, error) {
	token := req.Header.Get("X-Cordon-Control")
	if token == "" {
		return h.http.Do(req)
	}
	req.Header.Del("X-Cordon-Control")
	var body []byte
	if req.Body != nil {
		var err error
		if body, err = io.ReadAll(req.Body); err != nil {
			return nil, err
		}
	}
	conn, err := net.Dial("tcp", req.URL.Host)
	if err != nil {
		return nil, err
	}
	h.t.Cleanup(func() { conn.Close() })
	in := bufio.NewReader(conn)
	n, _, err := challenge(conn, in)
	if err != nil {
		return nil, err
	}
	key := proof.Key(sha256.Sum256([]byte(token)))
	req.Header.Set(proof.Header, key.Host(n, proof.Request{Method: req.Method, URI: req.URL.RequestURI(), Body: body}))
	req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	if err := req.Write(conn); err != nil {
		return nil, err
	}
	return http.ReadResponse(in, req)
}

// challenge has the agent prove itself.
func challenge(conn net.Conn, in *bufio.Reader) (n proof.Nonces, agents string, err error) {
	n.Host = proof.NewNonce()
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\n%s: %s\r\n\r\n", proof.Path, proof.Nonce, n.Host); err != nil {
		return n, "", err
	}
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		return n, "", err
	}
	resp.Body.Close()
	n.Agent = resp.Header.Get(proof.Nonce)
	if resp.StatusCode != http.StatusNoContent {
		return n, "", fmt.Errorf("challenge: %s", resp.Status)
	}
	return n, resp.Header.Get(proof.Header), nil
}

// do sends a request with the access token unless headers say otherwise; headers
// are pairs, an empty value removes.
func (h *harness) do(method, path string, body io.Reader, headers ...string) answer {
	h.t.Helper()
	req, err := http.NewRequestWithContext(h.t.Context(), method, h.url+path, body)
	if err != nil {
		h.t.Fatal(err)
	}
	req.Header.Set("X-Access-Token", testToken)
	for i := 0; i < len(headers); i += 2 {
		if headers[i+1] == "" {
			req.Header.Del(headers[i])
		} else {
			req.Header.Set(headers[i], headers[i+1])
		}
	}
	resp, err := h.send(req)
	if err != nil {
		h.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		h.t.Fatalf("%s %s: %v", method, path, err)
	}
	return answer{resp, string(raw)}
}

// withToken sends the access token, and keepalives quickly, with every RPC.
type withToken struct{ next http.RoundTripper }

func (w withToken) RoundTrip(r *http.Request) (*http.Response, error) {
	r.Header.Set("X-Access-Token", testToken)
	return w.next.RoundTrip(r)
}

func (h *harness) rpcClient() *http.Client {
	return &http.Client{Transport: withToken{h.http.Transport}}
}

func (h *harness) process() processconnect.ProcessClient {
	return processconnect.NewProcessClient(h.rpcClient(), h.url, connect.WithProtoJSON())
}

func (h *harness) files() filesystemconnect.FilesystemClient {
	return filesystemconnect.NewFilesystemClient(h.rpcClient(), h.url, connect.WithProtoJSON())
}

// needRoot skips a test about two users, or fails it where privilege is required.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_PRIVILEGED") == "1" {
		t.Fatal("REQUIRE_PRIVILEGED=1, but this is not root")
	}
	t.Skip("needs root: acts as another user")
}

// eventually waits for a condition of the real world.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 5 s: %s", what)
		}
	}
}

func code(err error) string {
	if err == nil {
		return ""
	}
	return connect.CodeOf(err).String()
}

func TestAnUnclaimedAgentServesNobody(t *testing.T) {
	h := start(t)
	for _, r := range []struct{ method, path string }{
		{"GET", "/files?path=/etc/passwd"},
		{"GET", "/files?path=/etc/passwd&signature=" + sign("/etc/passwd", opRead, "", "", "")},
		{"POST", "/files?path=/tmp/x"},
		{"POST", "/files/compose"},
		{"GET", "/metrics"},
		{"GET", "/envs"},
		{"POST", "/process.Process/List"},
		{"POST", "/process.Process/Start"},
		{"POST", "/filesystem.Filesystem/Stat"},
	} {
		got := h.do(r.method, r.path, strings.NewReader("{}"), "Content-Type", "application/json")
		if want := `{"code":503,"message":"this sandbox is not claimed yet"}`; got.StatusCode != 503 || got.body != want {
			t.Errorf("%s %s: %d %s, want 503 %s", r.method, r.path, got.StatusCode, got.body, want)
		}
	}
	if got := h.do("GET", "/health", nil); got.StatusCode != 204 || got.body != "" {
		t.Errorf("/health: %d %q, want an empty 204", got.StatusCode, got.body)
	}
}

func TestAccessNeedsTheToken(t *testing.T) {
	h := claimed(t)
	const refused = `{"code":401,"message":"unauthorized access, please provide a valid access token or method signing if supported"}`
	for name, c := range map[string]struct {
		headers []string
		want    int
	}{
		"the right token is admitted":       {nil, 200},
		"a wrong token is refused":          {[]string{"X-Access-Token", testToken + "x"}, 401},
		"no token is refused":               {[]string{"X-Access-Token", ""}, 401},
		"the host is admitted":              {[]string{"X-Access-Token", "", "X-Cordon-Control", testControl}, 200},
		"a wrong control token is no token": {[]string{"X-Access-Token", "", "X-Cordon-Control", "x"}, 401},
	} {
		t.Run(name, func(t *testing.T) {
			for _, path := range []string{"/process.Process/List", "/envs"} {
				method := "GET"
				if path != "/envs" {
					method = "POST"
				}
				got := h.do(method, path, strings.NewReader("{}"), append([]string{"Content-Type", "application/json"}, c.headers...)...)
				if got.StatusCode != c.want || c.want == 401 && got.body != refused {
					t.Errorf("%s: %d %s, want %d", path, got.StatusCode, got.body, c.want)
				}
			}
		})
	}
}

func TestAnOpenSandboxNeedsNoToken(t *testing.T) {
	h := start(t)
	h.claim(map[string]any{"sandboxID": "i1", "defaultUser": "tester"})
	for _, path := range []string{"/envs", "/files?path=" + h.etc + "/passwd"} {
		if got := h.do("GET", path, nil, "X-Access-Token", ""); got.StatusCode != 200 {
			t.Errorf("%s: %d %s", path, got.StatusCode, got.body)
		}
	}
}

func TestControlRoutesDoNotExistForOthers(t *testing.T) {
	h := claimed(t)
	unknown := h.do("GET", "/no/such/route", nil)
	for _, r := range []struct{ method, path string }{
		{"POST", "/init"}, {"GET", "/cordon/tunnel?port=1"}, {"GET", "/cordon/kills?after=0&wait=0"},
	} {
		for _, token := range []string{"", "wrong"} {
			got := h.do(r.method, r.path, strings.NewReader("{}"), "X-Cordon-Control", token)
			if got.StatusCode != 404 || got.body != unknown.body {
				t.Errorf("%s %s with token %q: %d %s, want what an unknown route gets", r.method, r.path, token, got.StatusCode, got.body)
			}
		}
	}
}

func TestPagesOfAnyOriginMayCall(t *testing.T) {
	h := claimed(t)
	got := h.do("OPTIONS", "/process.Process/Start", nil,
		"Origin", "https://example.com", "Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "x-access-token,authorization", "X-Access-Token", "")
	if got.StatusCode != 204 || got.Header.Get("Access-Control-Allow-Origin") != "*" || got.Header.Get("Access-Control-Allow-Headers") != "x-access-token,authorization" {
		t.Errorf("preflight: %d %v", got.StatusCode, got.Header)
	}
	if got := h.do("GET", "/health", nil, "Origin", "https://example.com"); got.Header.Get("Access-Control-Allow-Origin") != "*" {
		t.Errorf("no Access-Control-Allow-Origin: %v", got.Header)
	}
}
