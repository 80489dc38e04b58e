package interpreter_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/image"
)

// server is the interpreter as it runs in a sandbox: the agent's program in the
// template's image, as its user, with the kernels that are installed there.
type server struct {
	url   string
	token string // that the agent admits
}

// inImage gives the image a writable layer and the file systems a program needs,
// and becomes the program. All mounts are its mount namespace's, and end with it.
const inImage = `
mount -t tmpfs none "$2" && cd "$2" && mkdir upper work root
mount -t overlay overlay -o "lowerdir=$1,upperdir=upper,workdir=work" root
mount -t proc proc root/proc; mount --rbind /dev root/dev; mount -t tmpfs none root/run
cp "$3" root/run/cordon-agent
exec chroot --userspec=1000:1000 root env -i PATH=/usr/local/bin:/usr/bin:/bin HOME=/home/user USER=user LANG=C.UTF-8 \
	sh -c 'cd && exec /run/cordon-agent interpreter --port "$0" --agent "$1"' "$4" "$5"
`

func start(t *testing.T) *server {
	t.Helper()
	if testing.Short() {
		t.Skip("starts kernels")
	}
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_PRIVILEGED") == "1" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	s := &server{token: "right"}
	agent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/envs" || r.Header.Get("X-Access-Token") != s.token {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		fmt.Fprint(w, `{"E2B_SANDBOX_ID":"isandbox","WHOSE":"the sandbox"}`)
	}))
	t.Cleanup(agent.Close)
	dir := t.TempDir()
	program := filepath.Join(dir, "cordon-agent")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", program, "../../cmd/cordon-agent")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	s.url = fmt.Sprintf("http://127.0.0.1:%d", port)
	ctx, cancel := context.WithCancel(t.Context())
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "--pid", "--fork",
		"bash", "-ec", inImage, "bash", rootfs(t), t.TempDir(), program, fmt.Sprint(port), agent.URL)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	// The server is the first process of its namespace: all others end with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	t.Cleanup(func() {
		cancel()
		<-done
		if t.Failed() {
			t.Logf("the server said:\n%s", &log)
		}
	})
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if res, err := http.Get(s.url + "/health"); err == nil {
			res.Body.Close()
			return s
		}
		select {
		case err := <-done:
			done <- err
			t.Fatalf("it did not start: %v\n%s", err, &log)
		default:
		}
		if time.Now().After(end) {
			t.Fatal("it did not start in time")
		}
	}
}

// rootfs is the image's, which scripts/test builds.
func rootfs(t *testing.T) string {
	t.Helper()
	l, err := image.New(image.Config{Dir: "/var/cache/cordon/images", StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	all, err := l.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range all {
		if i.Name == "code-interpreter-v1" && i.Built {
			return i.Rootfs
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("code-interpreter-v1 is not built: scripts/test does it")
	}
	t.Skip("code-interpreter-v1 is not built: run 'cordon image build code-interpreter-v1'")
	return ""
}

// post sends a request as its owner does.
func (s *server) post(ctx context.Context, t *testing.T, path, body string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Access-Token", s.token)
	req.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// lines are an answer's, each of which must be JSON.
type lines []map[string]any

func (s *server) run(t *testing.T, language, code string) lines {
	t.Helper()
	return s.runTelling(t, language, code, func(map[string]any) {})
}

// begin runs code that prints something first, and returns when it has.
func (s *server) begin(t *testing.T, language, code string) <-chan lines {
	t.Helper()
	begun, ended := make(chan struct{}), make(chan lines, 1)
	tell := sync.OnceFunc(func() { close(begun) })
	go func() {
		defer close(ended)
		defer tell()
		ended <- s.runTelling(t, language, code, func(l map[string]any) {
			if l["type"] == "stdout" {
				tell()
			}
		})
	}()
	<-begun
	return ended
}

// runTelling runs code and tells each line as it comes.
func (s *server) runTelling(t *testing.T, language, code string, tell func(map[string]any)) lines {
	t.Helper()
	body, err := json.Marshal(map[string]string{"code": code, "language": language})
	if err != nil {
		t.Fatal(err)
	}
	res := s.post(t.Context(), t, "/execute", string(body))
	defer res.Body.Close()
	var out lines
	sc := bufio.NewScanner(res.Body)
	sc.Buffer(nil, 80<<20)
	for sc.Scan() {
		var l map[string]any
		if err := json.Unmarshal(sc.Bytes(), &l); err != nil {
			t.Fatalf("%q: %v", sc.Text(), err)
		}
		out = append(out, l)
		tell(l)
	}
	if err := sc.Err(); err != nil {
		t.Fatal(err)
	}
	if len(out) == 0 || out[len(out)-1]["type"] != "end_of_execution" {
		t.Fatalf("%s %q: the last line is not the end: %v", language, code, out)
	}
	return out
}

// text is what a stream said.
func (l lines) text(kind string) string {
	var b strings.Builder
	for _, m := range l {
		if m["type"] == kind {
			b.WriteString(m["text"].(string))
		}
	}
	return b.String()
}

// field is a field of the first line of a type.
func (l lines) field(kind, name string) any {
	for _, m := range l {
		if m["type"] == kind {
			return m[name]
		}
	}
	return nil
}

func TestServer(t *testing.T) {
	s := start(t)
	for name, test := range map[string]func(*testing.T, *server){
		"requests that mean nothing are refused":             refusals,
		"a silent cell says that it is alive":                keepalive,
		"large output comes in pieces, complete":             pieces,
		"a client that does not read slows its kernel":       slowReader,
		"a cell cannot forge or break its protocol":          forgery,
		"an ignored interrupt costs the kernel":              stubborn,
		"what a cell installs is there for the next":         installed,
		"contexts that run restart under their cell":         restartUnderway,
		"a cell that waits for its turn can be given up":     queue,
		"a kernel draws other numbers when its twin may too": reseeding,
	} {
		t.Run(name, func(t *testing.T) { test(t, s) })
	}
}

func refusals(t *testing.T, s *server) {
	for name, c := range map[string]struct {
		path, body string
		status     int
		says       string
	}{
		"no JSON":                  {"/execute", "{", 400, "not the expected JSON"},
		"no code":                  {"/execute", "{}", 400, "code is missing"},
		"a context and a language": {"/execute", `{"code":"1","context_id":"python","language":"python"}`, 400, "send one"},
		"an unknown context":       {"/execute", `{"code":"1","context_id":"x"}`, 404, `"x\" not found`},
		"an unknown language":      {"/execute", `{"code":"1","language":"cobol"}`, 400, "use python"},
		"a variable with =":        {"/execute", `{"code":"1","env_vars":{"a=b":"c"}}`, 400, "env_vars"},
		"a variable with NUL":      {"/execute", `{"code":"1","env_vars":{"a":"\u0000"}}`, 400, "env_vars"},
		"too much for a context":   {"/contexts", `{"cwd":"` + strings.Repeat("x", 65<<10) + `"}`, 413, "over"},
		"too much":                 {"/execute", `{"code":"` + strings.Repeat("x", 17<<20) + `"}`, 413, "over"},
		"a folder that is none":    {"/contexts", `{"cwd":"/etc/passwd"}`, 400, "not a directory"},
		"restart of nothing":       {"/contexts/x/restart", ``, 404, "not found"},
		"no such route":            {"/x", ``, 404, "no such route"},
	} {
		res := s.post(t.Context(), t, c.path, c.body)
		b, _ := io.ReadAll(res.Body)
		res.Body.Close()
		var e struct{ Code int }
		if res.StatusCode != c.status || !strings.Contains(string(b), c.says) || json.Unmarshal(b, &e) != nil || e.Code != c.status {
			t.Errorf("%s: %d %.200s, want %d %q", name, res.StatusCode, b, c.status, c.says)
		}
	}
	stranger := *s
	stranger.token = "wrong"
	for _, path := range []string{"/execute", "/contexts"} {
		res := stranger.post(t.Context(), t, path, `{"code":"1"}`)
		res.Body.Close()
		if res.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s with a wrong token: %d", path, res.StatusCode)
		}
	}
}

func keepalive(t *testing.T, s *server) {
	got := s.run(t, "python", "import time; time.sleep(6); 'woke'")
	if got.field("result", "text") != "woke" || got[1]["type"] != "keepalive" {
		t.Errorf("%v", got)
	}
}

func pieces(t *testing.T, s *server) {
	for language, code := range map[string]string{
		"python":     `print("🦊" * 300000)`,
		"javascript": `console.log("🦊".repeat(300000))`,
		"bash":       `for i in $(seq 3000); do printf '🦊%.0s' {1..100}; done; echo`,
	} {
		got := s.run(t, language, code)
		if text := got.text("stdout"); text != strings.Repeat("🦊", 300000)+"\n" {
			t.Errorf("%s: %d bytes of %d", language, len(text), 4*300000+1)
		}
		for _, l := range got {
			if text, _ := l["text"].(string); len(text) > 64<<10 {
				t.Errorf("%s: a line of %d bytes", language, len(text))
			}
		}
	}
}

func slowReader(t *testing.T, s *server) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	res := s.post(ctx, t, "/execute", `{"code":"kept = 5\nwhile True: print('x' * 1000)"}`)
	defer res.Body.Close()
	if _, err := io.CopyN(io.Discard, res.Body, 1<<20); err != nil {
		t.Fatal(err)
	}
	// It holds a hundred messages of a megabyte, however long the client waits.
	memory := `int(open('/proc/self/status').read().split('VmRSS:')[1].split()[0])`
	time.Sleep(10 * time.Second) // in which it could print gigabytes
	cancel()
	got := s.run(t, "python", "kept, "+memory)
	var kept, kilobytes int
	text, _ := got.field("result", "text").(string)
	if n, err := fmt.Sscanf(text, "(%d, %d)", &kept, &kilobytes); n != 2 || err != nil || kept != 5 {
		t.Errorf("after it: %v", got)
	}
	if kilobytes > 400_000 {
		t.Errorf("the kernel holds %d kB, want at most 400000", kilobytes)
	}
}

func forgery(t *testing.T, s *server) {
	for language, code := range map[string]string{
		"javascript": `require('fs').writeSync(4, 'garbage\n{"mark":"x"}\n'); console.log('\0' + 'a'.repeat(32) + '\0'); process.stdout.end; 1`,
		"bash":       `printf '\0%032d\0' 1; printf '\0half'; exec >/dev/null`,
		"python":     "import zmq, glob\nc = zmq.Context.instance().socket(zmq.DEALER)\nc.connect('ipc://' + glob.glob('/home/user/.cache/cordon/interpreter/*/k-1')[0])\nc.send_multipart([b'x'] * 70)\nNone",
	} {
		s.run(t, language, code)
	}
	for language, code := range map[string]string{"javascript": "1+1", "python": "1+1"} {
		if got := s.run(t, language, code); got.field("result", "text") != "2" {
			t.Errorf("%s afterwards: %v", language, got)
		}
	}
	s.run(t, "bash", "exit 0")
	if got := s.run(t, "bash", "echo 2"); got.text("stdout") != "2\n" {
		t.Errorf("bash afterwards: %v", got)
	}
}

func stubborn(t *testing.T, s *server) {
	ctx, cancel := context.WithCancel(t.Context())
	res := s.post(ctx, t, "/execute", `{"code":"import time\nwhile True:\n  try:\n    print(1, flush=True)\n    time.sleep(9)\n  except KeyboardInterrupt: pass"}`)
	lines := bufio.NewReader(res.Body)
	for line := ""; !strings.Contains(line, `"stdout"`); { // until it is where it ignores
		var err error
		if line, err = lines.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	res.Body.Close()
	if got := s.run(t, "python", "6*7"); got.field("result", "text") != "42" || got.field("number_of_executions", "execution_count") != 1.0 {
		t.Errorf("%v", got)
	}
}

func restartUnderway(t *testing.T, s *server) {
	ended := s.begin(t, "javascript", "console.log(1); await new Promise(() => 0)")
	res := s.post(t.Context(), t, "/contexts/javascript/restart", "")
	res.Body.Close()
	if res.StatusCode != http.StatusNoContent {
		t.Errorf("restart: %d", res.StatusCode)
	}
	if got := <-ended; got.field("unexpected_end_of_execution", "type") == nil {
		t.Errorf("the cell under way: %v", got)
	}
	if got := s.run(t, "javascript", "2"); got.field("result", "text") != "2" {
		t.Errorf("afterwards: %v", got)
	}
}

func queue(t *testing.T, s *server) {
	first := s.begin(t, "python", "import time; print(1, flush=True); time.sleep(3); order = ['first']; order")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	res := s.post(ctx, t, "/execute", `{"code":"order = ['given up']"}`)
	time.AfterFunc(300*time.Millisecond, cancel)
	_, err := io.ReadAll(res.Body)
	res.Body.Close()
	if err == nil {
		t.Error("the second did not wait")
	}
	if got := s.run(t, "python", "order"); got.field("result", "text") != "['first']" {
		t.Errorf("%v", got)
	}
	<-first
}

func installed(t *testing.T, s *server) {
	s.run(t, "python", `!mkdir -p "$(python3 -m site --user-site)" && echo "x = 7" >"$(python3 -m site --user-site)/fresh.py"`)
	if got := s.run(t, "python", "import fresh; fresh.x"); got.field("result", "text") != "7" {
		t.Errorf("%v", got)
	}
}

func reseeding(t *testing.T, s *server) {
	// A new kernel that was not told of a sandbox reseeds; one that was does not.
	res := s.post(t.Context(), t, "/contexts/python/restart", "")
	res.Body.Close()
	if got := s.run(t, "python", "import os, random; random.seed(7); os.environ['WHOSE']"); got.field("result", "text") != "the sandbox" {
		t.Errorf("%v", got)
	}
	got := s.run(t, "python", "a = random.random(); random.seed(7); a == random.random()")
	if got.field("result", "text") != "True" {
		t.Errorf("a seed of the user's was overwritten: %v", got)
	}
}
