// Package lifecycle runs what a user does to a sandbox as a whole, against a live
// server that is stopped and killed meanwhile: pause and resume, snapshots,
// copies, starting over, a full disk.
package lifecycle

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/stand"
)

// TestLifecycle shares one server among its subtests, which run one by one.
func TestLifecycle(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and sandboxes")
	}
	l := &live{stand: stand.New(t, stand.Options{LogLevel: "info"})}
	must(t, l.stand.Start(t.Context()))
	l.user = l.stand.User(t)
	for _, c := range []struct {
		name string
		test func(*testing.T, *live)
	}{
		{"a pause survives the server's restarts and deaths", pauseSurvives},
		{"five copies at once differ in address and randomness", fiveCopies},
		{"a snapshot outlives its sandbox, and a damaged one says so", snapshots},
		{"nothing escapes between a checkpoint and the rules", nothingEscapes},
		{"a reset starts over under the same name", reset},
		{"files do not count as memory after a pause", filesAreNotMemory},
		{"memory comes back as fast as it should", times},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, l) })
	}
}

// live is a server and its user.
type live struct {
	stand *stand.Stand
	user  *client.Client
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// create makes a sandbox that ends with the test.
func (l *live) create(t *testing.T, o client.CreateOptions) *client.Sandbox {
	t.Helper()
	if o.Timeout == 0 {
		o.Timeout = 10 * time.Minute
	}
	sb, err := l.user.Create(t.Context(), o)
	must(t, err)
	t.Cleanup(func() { _ = sb.Kill(context.Background()) })
	return sb
}

// connect resumes a sandbox.
func (l *live) connect(t *testing.T, id string) *client.Sandbox {
	t.Helper()
	sb, err := l.user.Connect(t.Context(), id, 10*time.Minute)
	must(t, err)
	return sb
}

// restart ends the server with a signal and starts it again.
func (l *live) restart(t *testing.T, sig syscall.Signal) {
	t.Helper()
	l.stand.Stop(t, sig)
	must(t, l.stand.Start(t.Context()))
}

func run(t *testing.T, sb *client.Sandbox, command string) string {
	t.Helper()
	r, err := sb.Commands.Run(t.Context(), command, client.RunOptions{Timeout: 30 * time.Second})
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	if r.ExitCode != 0 {
		t.Fatalf("%s: %s\n%s", command, r.Status, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout)
}

// call makes a request of the control API and decodes what it answers.
func (l *live) call(t *testing.T, method, path string, body, into any) (status int, text string) {
	t.Helper()
	var raw []byte
	if body != nil {
		var err error
		raw, err = json.Marshal(body)
		must(t, err)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, stand.API+path, bytes.NewReader(raw))
	must(t, err)
	req.Header.Set("X-API-KEY", l.key(t))
	req.Header.Set("Content-Type", "application/json")
	c := l.stand.Client()
	c.Timeout = time.Minute
	res, err := c.Do(req)
	must(t, err)
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	must(t, err)
	if into != nil && res.StatusCode/100 == 2 {
		if err := json.Unmarshal(b, into); err != nil {
			t.Fatalf("%s %s: %v in %s", method, path, err, b)
		}
	}
	return res.StatusCode, string(b)
}

// key is the administrator's API key.
func (l *live) key(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(l.stand.Dir, "state", "admin.key"))
	must(t, err)
	return strings.TrimSpace(string(b))
}

// worker is a program in the sandbox that is in the middle of something: it has
// written half of a file and holds the rest in its memory until it is told.
const worker = `
import http.server, os, random, signal, threading
f = open("/home/user/half", "w")
f.write("a" * 100000)
f.flush()
secret = os.urandom(8).hex()
def finish(*_):
    f.write("b" * 100000); f.close(); open("/home/user/done", "w").write("x")
signal.signal(signal.SIGUSR1, finish)
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        b = (secret + " " + str(random.random())).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(b))); self.end_headers(); self.wfile.write(b)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", 3000), H).serve_forever()
`

// busy starts the worker and a sleep, and returns what tells them apart from others.
func busy(t *testing.T, sb *client.Sandbox) (facts string) {
	t.Helper()
	must(t, sb.Files.Write(t.Context(), "/home/user/worker.py", strings.NewReader(worker)))
	run(t, sb, "nohup sleep 100000 >/dev/null 2>&1 & nohup python3 worker.py >/dev/null 2>worker.err & sleep 0.2; for i in $(seq 100); do curl -sf 127.0.0.1:3000 >/dev/null && break; sleep 0.1; done")
	return alive(t, sb)
}

// alive asks for the facts again: both pids and what the worker alone knows.
func alive(t *testing.T, sb *client.Sandbox) string {
	t.Helper()
	return run(t, sb, `echo $(pgrep -x sleep | head -1) $(pgrep -f "^python3 worker") $(wc -c <half)`) + " " + strings.Fields(fetch(t, sb))[0]
}

// fetch asks the worker at its public URL.
func fetch(t *testing.T, sb *client.Sandbox) string {
	t.Helper()
	req, err := sb.NewRequest(t.Context(), http.MethodGet, 3000, "/", nil)
	must(t, err)
	res, err := sb.Do(req)
	must(t, err)
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	must(t, err)
	if res.StatusCode != http.StatusOK {
		t.Fatalf("the public URL answers %d: %s", res.StatusCode, b)
	}
	return string(b)
}

// ruled checks that the sandbox's rules hold: it reaches nothing.
func ruled(t *testing.T, sb *client.Sandbox) {
	t.Helper()
	r, err := sb.Commands.Run(t.Context(), "curl -fs -m 3 -o /dev/null http://1.1.1.1", client.RunOptions{Timeout: 10 * time.Second})
	must(t, err)
	if r.ExitCode == 0 {
		t.Error("a denied address is reached")
	}
}

func noInternet() client.Network { return client.Network{DenyOut: []string{"0.0.0.0/0"}} }

// pauseSurvives goes through PAUSE_ROUNDS rounds (ten by hand, fewer in CI) of
// pausing with the server stopped, killed between, and killed in the middle of
// a pause and of a resume at ever other moments.
func pauseSurvives(t *testing.T, l *live) {
	rounds := 2
	if n, err := strconv.Atoi(os.Getenv("PAUSE_ROUNDS")); err == nil {
		rounds = n
	}
	sb := l.create(t, client.CreateOptions{Network: noInternet()})
	want := busy(t, sb)
	check := func(when string) {
		t.Helper()
		sb = l.connect(t, sb.ID)
		if got := alive(t, sb); got != want {
			t.Fatalf("%s: pids, size and secret are %q, they were %q", when, got, want)
		}
		ruled(t, sb)
	}
	for i := range rounds {
		must(t, sb.Pause(t.Context()))
		l.restart(t, []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL}[i%2])
		check(fmt.Sprintf("round %d", i))

		after := time.Duration(5+37*i%300) * time.Millisecond
		l.killDuring(t, after, func(ctx context.Context) { _ = sb.Pause(ctx) })
		check(fmt.Sprintf("killed %v into a pause", after))

		must(t, sb.Pause(t.Context()))
		l.killDuring(t, after, func(ctx context.Context) { _, _ = l.user.Connect(ctx, sb.ID, 10*time.Minute) })
		check(fmt.Sprintf("killed %v into a resume", after))
	}
	run(t, sb, "pkill -USR1 -f '^python3 worker'; for i in $(seq 100); do [ -e done ] && break; sleep 0.1; done")
	if got := run(t, sb, "wc -c <half; tr -d ab <half | wc -c"); got != "200000\n0" {
		t.Errorf("the file has %q octets and others, want 200000 and none", got)
	}
}

// killDuring kills the server a while after a call began, and starts it again.
func (l *live) killDuring(t *testing.T, after time.Duration, call func(context.Context)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { call(ctx) })
	time.Sleep(after)
	l.restart(t, syscall.SIGKILL)
	cancel()
	wg.Wait()
}

// forked is an element of fork's answer.
type forked struct {
	Sandbox *struct{ SandboxID string }
	Error   *struct{ Message string }
}

func fiveCopies(t *testing.T, l *live) {
	sb := l.create(t, client.CreateOptions{Network: noInternet(), Metadata: map[string]string{"kind": "original"}})
	want := busy(t, sb)
	var copies []forked
	if status, text := l.call(t, http.MethodPost, "/sandboxes/"+sb.ID+"/fork", map[string]any{"count": 5, "timeout": 600}, &copies); status != http.StatusCreated || len(copies) != 5 {
		t.Fatalf("fork: %d %s", status, text)
	}
	seen := map[string]string{}
	differ := func(what, who, value string) {
		if other := seen[what+value]; other != "" {
			t.Errorf("%s and %s have the same %s %q", who, other, what, value)
		}
		seen[what+value] = who
	}
	const ask = `hostname; hostname -I; od -An -tx8 -N16 /dev/urandom | tr -d ' \n'; echo; python3 -c 'import random,uuid; print(random.random()); print(uuid.uuid4())'; openssl rand -hex 16; bash -c 'echo $RANDOM$RANDOM$RANDOM'`
	names := []string{"host name", "address", "urandom", "random()", "uuid", "openssl", "$RANDOM"}
	probe := func(who string, sb *client.Sandbox) {
		for i, value := range strings.Split(run(t, sb, ask), "\n") {
			differ(names[i], who, strings.TrimSpace(value))
		}
	}
	probe("the original", sb)
	for i, c := range copies {
		if c.Error != nil {
			t.Fatalf("copy %d: %s", i, c.Error.Message)
		}
		twin := l.connect(t, c.Sandbox.SandboxID)
		t.Cleanup(func() { _ = twin.Kill(context.Background()) })
		if got := alive(t, twin); got != want {
			t.Errorf("copy %d: pids, size and secret are %q, the original's %q", i, got, want)
		}
		probe(fmt.Sprint("copy ", i), twin)
		differ("token", fmt.Sprint("copy ", i), twin.AccessToken)
		ruled(t, twin)
		run(t, twin, "echo changed >/home/user/half")
	}
	if got := alive(t, sb); got != want {
		t.Errorf("the original has %q, it had %q", got, want)
	}
	var clones struct{ Sandboxes []struct{ SandboxID string } }
	if status, text := l.call(t, http.MethodPost, "/sandboxes/"+sb.ID+"/clone", map[string]any{"count": 2, "strict": true}, &clones); status/100 != 2 || len(clones.Sandboxes) != 2 {
		t.Fatalf("clone: %d %s", status, text)
	}
	for _, c := range clones.Sandboxes {
		must(t, l.connect(t, c.SandboxID).Kill(t.Context()))
	}
}

func snapshots(t *testing.T, l *live) {
	sb := l.create(t, client.CreateOptions{Network: noInternet()})
	want := busy(t, sb)
	var snap struct {
		SnapshotID string
		Names      []string
	}
	if status, text := l.call(t, http.MethodPost, "/sandboxes/"+sb.ID+"/snapshots", map[string]any{"name": "mine:v1"}, &snap); status != http.StatusCreated {
		t.Fatalf("snapshot: %d %s", status, text)
	}
	if got := alive(t, sb); got != want {
		t.Errorf("after its snapshot the sandbox has %q, it had %q", got, want)
	}
	must(t, sb.Kill(t.Context()))
	l.restart(t, syscall.SIGKILL)
	for _, template := range []string{snap.SnapshotID, "mine:v1"} {
		made := l.create(t, client.CreateOptions{Template: template, Network: noInternet(), Env: map[string]string{"WHO": "me"}})
		if got := alive(t, made); got != want {
			t.Errorf("from %s: %q, the snapshot was taken of %q", template, got, want)
		}
		ruled(t, made)
		if got := run(t, made, "echo $WHO"); got != "me" {
			t.Errorf("from %s: the environment has %q", template, got)
		}
		must(t, made.Pause(t.Context()))
		if got := alive(t, l.connect(t, made.ID)); got != want {
			t.Errorf("from %s, paused and resumed: %q", template, got)
		}
	}
	pages, err := filepath.Glob(filepath.Join(l.stand.Dir, "state", "snapshots", "c*", "pages.img"))
	if err != nil || len(pages) != 1 {
		t.Fatalf("%d checkpoints on disk, want the snapshot's alone: %v", len(pages), err)
	}
	flip(t, pages[0])
	status, text := l.call(t, http.MethodPost, "/sandboxes", map[string]any{"templateID": snap.SnapshotID}, nil)
	if status != http.StatusConflict || !strings.Contains(text, "damaged") {
		t.Errorf("from a damaged snapshot: %d %s, want 409 and the reason", status, text)
	}
	if status, text := l.call(t, http.MethodDelete, "/templates/mine%3Av1", nil, nil); status != http.StatusNoContent {
		t.Errorf("delete: %d %s", status, text)
	}
	if left, _ := filepath.Glob(filepath.Join(l.stand.Dir, "state", "snapshots", "*")); len(left) > 0 {
		t.Errorf("left on disk: %v", left)
	}
	if status, _ := l.call(t, http.MethodDelete, "/templates/"+snap.SnapshotID, nil, nil); status != http.StatusNotFound {
		t.Errorf("delete again: %d, want 404", status)
	}
}

// flip changes one octet in the middle of a file.
func flip(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	fi, err := f.Stat()
	must(t, err)
	b := make([]byte, 1)
	_, err = f.ReadAt(b, fi.Size()/2)
	must(t, err)
	_, err = f.WriteAt([]byte{b[0] ^ 1}, fi.Size()/2)
	must(t, err)
}

func reset(t *testing.T, l *live) {
	sb := l.create(t, client.CreateOptions{Network: noInternet(), Metadata: map[string]string{"a": "b"}, Env: map[string]string{"WHO": "me"}})
	run(t, sb, "echo x >/home/user/file; nohup sleep 100000 >/dev/null 2>&1 &")
	for _, first := range []string{"running", "paused"} {
		if first == "paused" {
			run(t, sb, "echo x >/home/user/file")
			must(t, sb.Pause(t.Context()))
			if status, text := l.call(t, http.MethodPost, "/sandboxes/"+sb.ID+"/reset", map[string]any{"resume": false}, nil); status != http.StatusConflict {
				t.Errorf("reset of a paused one that is not to be resumed: %d %s, want 409", status, text)
			}
		}
		if status, text := l.call(t, http.MethodPost, "/sandboxes/"+sb.ID+"/reset", map[string]any{"resume": true, "timeout": 600}, nil); status/100 != 2 {
			t.Fatalf("%s: reset: %d %s", first, status, text)
		}
		// The tokens are the same: the old handle still works.
		if got := run(t, sb, "ls /home/user; pgrep -x sleep; hostname; echo $WHO"); got != sb.ID+"\nme" {
			t.Errorf("%s: files, processes, name and environment are %q", first, got)
		}
		ruled(t, sb)
	}
	info, err := sb.Info(t.Context())
	must(t, err)
	if info.Metadata["a"] != "b" {
		t.Errorf("metadata is %v", info.Metadata)
	}
}

// filesAreNotMemory has more in files and in a process together than the
// sandbox has memory: nothing may be killed for that.
func filesAreNotMemory(t *testing.T, l *live) {
	sb := l.create(t, client.CreateOptions{})
	run(t, sb, "head -c 350M /dev/zero | tr '\\0' x >big; nohup python3 -c 'import time; b=b\"x\"*(150<<20); open(\"ready\",\"w\"); time.sleep(1000)' >/dev/null 2>&1 & for i in $(seq 250); do [ -e ready ] && break; sleep 0.1; done; [ -e ready ]")
	must(t, sb.Pause(t.Context()))
	sb = l.connect(t, sb.ID)
	run(t, sb, "sleep 1; pgrep -f '^python3 -c'")
	var events struct {
		Items []struct{ EventName, ErrorMsg string }
	}
	l.call(t, http.MethodGet, "/sandboxes/events?sandboxID="+sb.ID+"&events=oom", nil, &events)
	for _, e := range events.Items {
		t.Errorf("event %s: %s", e.EventName, e.ErrorMsg)
	}
}

// times reports how long a pause and a resume take; nothing is asserted but that
// the memory is whole.
func times(t *testing.T, l *live) {
	for _, mb := range []int{30, 100} {
		sb := l.create(t, client.CreateOptions{})
		must(t, sb.Files.Write(t.Context(), "/home/user/fill.py", strings.NewReader(
			"import os,sys,time\nb=[os.urandom(1<<20) for _ in range(int(sys.argv[1]))]\nopen('ready','w').write('x')\nwhile True: time.sleep(1)\n")))
		run(t, sb, fmt.Sprintf("nohup python3 fill.py %d >/dev/null 2>&1 & for i in $(seq 300); do [ -e ready ] && break; sleep 0.1; done; [ -e ready ]", mb))
		var pause, resume []time.Duration
		for range 3 {
			began := time.Now()
			must(t, sb.Pause(t.Context()))
			paused := time.Now()
			sb = l.connect(t, sb.ID)
			run(t, sb, "pgrep -f '^python3 fill'")
			pause, resume = append(pause, paused.Sub(began).Round(time.Millisecond)), append(resume, time.Since(paused).Round(time.Millisecond))
		}
		t.Logf("%d MB: pause %v, resume and first command %v", mb, pause, resume)
		must(t, sb.Kill(t.Context()))
	}
}

// TestFullDisk gives the server a file system that is too small.
func TestFullDisk(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and sandboxes")
	}
	small, err := os.MkdirTemp("", "TestFullDisk") // not t.TempDir, which would be the parent of all that follow
	must(t, err)
	t.Cleanup(func() { must(t, os.Remove(small)) })
	must(t, unix.Mount("tmpfs", small, "tmpfs", 0, "size=400m"))
	t.Cleanup(func() { must(t, unix.Unmount(small, unix.MNT_DETACH)) })
	t.Setenv("TMPDIR", small)
	l := &live{stand: stand.New(t, stand.Options{LogLevel: "info"})}
	must(t, l.stand.Start(t.Context()))
	l.user = l.stand.User(t)
	sb := l.create(t, client.CreateOptions{Network: noInternet()})
	want := busy(t, sb)
	run(t, sb, "head -c 200M /dev/urandom >/home/user/large")
	status, text := l.call(t, http.MethodPost, "/sandboxes/"+sb.ID+"/pause", nil, nil)
	if status != http.StatusServiceUnavailable || !strings.Contains(text, "disk is too full") {
		t.Errorf("a pause that does not fit: %d %s", status, text)
	}
	if left, _ := filepath.Glob(filepath.Join(l.stand.Dir, "state", "snapshots", "*")); len(left) > 0 {
		t.Errorf("left on disk: %v", left)
	}
	if got := alive(t, sb); got != want {
		t.Errorf("after the pause that did not fit: %q, it was %q", got, want)
	}
	run(t, sb, "rm /home/user/large")
	err = sb.Pause(t.Context()) // what was written is not given back at once
	for end := time.Now().Add(30 * time.Second); err != nil && time.Now().Before(end); err = sb.Pause(t.Context()) {
		time.Sleep(100 * time.Millisecond)
	}
	must(t, err)
	sb = l.connect(t, sb.ID)
	if got := alive(t, sb); got != want {
		t.Errorf("paused and resumed: %q, it was %q", got, want)
	}
}
