package agent_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "github.com/cordonhq/cordon/api/gen/agent/filesystem"
	"github.com/cordonhq/cordon/api/gen/agent/filesystem/filesystemconnect"
	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/stand"
)

// run runs a command in the sandbox that must end with a code.
func run(t *testing.T, sb *client.Sandbox, command string, code int) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	r, err := sb.Commands.Run(ctx, command, client.RunOptions{})
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	if r.ExitCode != code {
		t.Fatalf("%s: exit code %d, want %d: %s%s", command, r.ExitCode, code, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout)
}

// routed sends requests to a sandbox's agent through the server's plain address.
type routed struct {
	http.RoundTripper
	sandbox *client.Sandbox
}

func (r routed) RoundTrip(req *http.Request) (*http.Response, error) {
	req.Header.Set("E2b-Sandbox-Id", r.sandbox.ID)
	req.Header.Set("E2b-Sandbox-Port", "49983")
	req.Header.Set("X-Access-Token", r.sandbox.AccessToken)
	return r.RoundTripper.RoundTrip(req)
}

// via is a client of the sandbox's agent.
func (s *live) via(sb *client.Sandbox) *http.Client {
	return &http.Client{Transport: routed{&http.Transport{DialContext: s.Lab.Host().Dial, DisableKeepAlives: true}, sb}}
}

func (s *live) files(sb *client.Sandbox) filesystemconnect.FilesystemClient {
	return filesystemconnect.NewFilesystemClient(s.via(sb), stand.API, connect.WithProtoJSON())
}

// oomEvents are the details of the sandbox's lifecycle events named oom.
func (s *live) oomEvents(t *testing.T, sb *client.Sandbox) (out []string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, stand.API+"/sandboxes/events?events=oom&sandboxID="+sb.ID, nil)
	if err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(s.Dir + "/state/admin.key")
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-API-Key", strings.TrimSpace(string(key)))
	resp, err := s.Stand.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var page struct {
		Items []struct{ EventName, ErrorMsg string }
	}
	if err := json.NewDecoder(resp.Body).Decode(&page); err != nil {
		t.Fatal(err)
	}
	for _, e := range page.Items {
		out = append(out, e.EventName+" "+e.ErrorMsg)
	}
	return out
}

func (s *live) awaitOOM(t *testing.T, sb *client.Sandbox, want string) {
	t.Helper()
	var got []string
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		got = s.oomEvents(t, sb)
		if slices.ContainsFunc(got, func(e string) bool { return strings.Contains(e, want) }) {
			return
		}
	}
	t.Errorf("events: %q, want one with %q", got, want)
}

func TestInside(t *testing.T) {
	s := newStand(t)
	t.Run("the limits are what programs see", s.limitsAreSeen)
	t.Run("without memory the biggest process ends, not the sandbox", s.outOfMemory)
	t.Run("too many processes end together, and the agent answers", s.tooManyProcesses)
	t.Run("one call that needs more memory than there is ends the sandbox, which says why", s.allAtOnce)
	t.Run("a big directory is listed, and a watch sees each of many changes", s.bulk)
	t.Run("a large file passes in little memory", s.large)
	t.Run("programs in the sandbox get nothing from its agent", s.hostile)
	t.Run("the agent's port is the agent's alone", s.ownPort)
	t.Run("what a sandbox may not do is no error of the server's", s.quietEnd)
}

func (s *live) limitsAreSeen(t *testing.T) {
	sb := s.sandbox(t)
	info, err := sb.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for command, want := range map[string]int64{
		`awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo`: info.MemoryMB,
		`df -m --output=size / | tail -1`:                     info.DiskMB,
		`nproc`:                                               int64(max(info.CPUs, 2)), // gVisor shows no fewer than two
		`echo $(($(cat /sys/fs/cgroup/memory/memory.limit_in_bytes) / 1048576))`: info.MemoryMB,
	} {
		if got := run(t, sb, command, 0); got != strconv.FormatInt(want, 10) {
			t.Errorf("%s: %s, want %d", command, got, want)
		}
	}
}

func (s *live) outOfMemory(t *testing.T) {
	sb := s.sandbox(t)
	small, err := sb.Commands.Start(t.Context(), "sleep 1000", client.RunOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer small.Close()
	// No faster than the guard looks on a busy machine; docs/agent.md says what is.
	eater := `python3 -c "
import time
b = []
while len(b) < 375:
    b.append(bytearray(8 << 20))
    time.sleep(0.01)
"; echo $?`
	if out := run(t, sb, eater, 0); out != "137" {
		t.Errorf("the eater ended with %s, want 137", out)
	}
	run(t, sb, fmt.Sprintf("kill -0 %d", small.PID), 0)
	s.awaitOOM(t, sb, "(python3) was the biggest")
}

func (s *live) tooManyProcesses(t *testing.T) {
	sb := s.sandbox(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	r, err := sb.Commands.Run(ctx, "for i in $(seq 1 2000); do sleep 1000 & done", client.RunOptions{})
	if err != nil || r.Status != "signal: killed" {
		t.Errorf("2000 processes: %+v, %v", r, err)
	}
	left := 0
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		if left, err = strconv.Atoi(run(t, sb, "ps -e --no-headers | wc -l", 0)); err == nil && left < 50 {
			break
		}
	}
	if left >= 50 {
		t.Errorf("%d processes are left", left)
	}
	s.awaitOOM(t, sb, "processes of a command")
}

func (s *live) allAtOnce(t *testing.T) {
	sb, err := s.Create(t.Context(), client.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if r, err := sb.Commands.Run(ctx, "dd if=/dev/zero of=/dev/null bs=3000M count=1", client.RunOptions{}); err == nil {
		t.Errorf("3000 MiB in one read: %+v", r)
	}
	s.awaitOOM(t, sb, "more memory than it has")
}

func (s *live) bulk(t *testing.T) {
	many := 10_000
	if n, err := strconv.Atoi(os.Getenv("BULK")); err == nil {
		many = n
	}
	sb := s.sandbox(t)
	f := s.files(sb)
	run(t, sb, "mkdir many watched", 0)
	run(t, sb, fmt.Sprintf(`python3 -c "for i in range(%d): open(f'many/file-{i:06d}', 'w').close()"`, many), 0)
	start := time.Now()
	list, err := f.ListDir(t.Context(), connect.NewRequest(&pb.ListDirRequest{Path: "many", Depth: 1}))
	if err != nil || len(list.Msg.GetEntries()) != many {
		t.Fatalf("%d entries, want %d (%v)", len(list.Msg.GetEntries()), many, err)
	}
	t.Logf("%d files listed in %v; the agent: %s", many, time.Since(start), run(t, sb, "grep VmRSS /proc/1/status", 0))

	const changes = 10_000
	stream, err := f.WatchDir(t.Context(), connect.NewRequest(&pb.WatchDirRequest{Path: "watched", Recursive: true}))
	if err != nil || !stream.Receive() {
		t.Fatal(err, stream.Err())
	}
	polled, err := f.CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: "watched", Recursive: true}))
	if err != nil {
		t.Fatal(err)
	}
	start = time.Now()
	run(t, sb, fmt.Sprintf(`cd watched; python3 -c "
import os
for i in range(%d):
    if i %% 1000 == 0: os.mkdir(f'd{i // 1000}')
    open(f'd{i // 1000}/{i}', 'w').close()"`, changes), 0)
	seen, asked := map[string]bool{}, map[string]bool{}
	for len(seen) < changes+changes/1000 && stream.Receive() {
		if ev := stream.Msg().GetFilesystem(); ev.GetType() == pb.EventType_EVENT_TYPE_CREATE {
			seen[ev.GetName()] = true
		}
	}
	for deadline := time.Now().Add(time.Minute); len(asked) < len(seen) && time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		events, err := f.GetWatcherEvents(t.Context(), connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: polled.Msg.GetWatcherId()}))
		if err != nil {
			t.Fatal(err)
		}
		for _, ev := range events.Msg.GetEvents() {
			if ev.GetType() == pb.EventType_EVENT_TYPE_CREATE {
				asked[ev.GetName()] = true
			}
		}
	}
	t.Logf("%d and %d of %d changes in %v", len(seen), len(asked), changes, time.Since(start))
	if want := changes + changes/1000; len(seen) != want || len(asked) != want {
		t.Errorf("the stream told of %d, polling of %d, want %d; the stream ended with %v", len(seen), len(asked), want, stream.Err())
	}
	stream.Close()
}

// resident is the memory of a process on the host, in KiB.
func resident(t *testing.T, pid int) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	var kib int64
	for line := range strings.Lines(string(status)) {
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kib); err == nil {
			return kib
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

func (s *live) large(t *testing.T) {
	mib := 128
	if n, err := strconv.Atoi(os.Getenv("LARGE_MIB")); err == nil {
		mib = n
	}
	size := int64(mib) << 20
	sb := s.sandbox(t)
	rss := func(when string) (server, agent int64) {
		fmt.Sscanf(run(t, sb, "grep VmRSS /proc/1/status", 0), "VmRSS: %d kB", &agent)
		server = resident(t, s.PID())
		t.Logf("%s: the server has %d MiB, the agent %d MiB", when, server>>10, agent>>10)
		return server, agent
	}
	server0, agent0 := rss("before")
	start := time.Now()
	if err := sb.Files.Write(t.Context(), "large", io.LimitReader(zero{}, size)); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d MiB up in %v", mib, time.Since(start))
	server1, agent1 := rss("after the upload")
	start = time.Now()
	r, err := sb.Files.Open(t.Context(), "large")
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, r)
	r.Close()
	if err != nil || n != size {
		t.Errorf("%d bytes came back, want %d (%v)", n, size, err)
	}
	t.Logf("%d MiB down in %v", mib, time.Since(start))
	server2, agent2 := rss("after the download")
	const grown = 48 << 10 // KiB
	if max(server1, server2)-server0 > grown || max(agent1, agent2)-agent0 > grown {
		t.Error("memory grew with the file")
	}
}

// zero reads as zeros without end.
type zero struct{}

func (zero) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// hostile is what a program in the sandbox, without a token, tries on its agent.
func (s *live) hostile(t *testing.T) {
	sb := s.sandbox(t)
	curl := "curl -s -o /dev/null -m 10 -w '%{http_code}' "
	for command, want := range map[string]string{
		curl + "http://127.0.0.1:49983/envs":                                                             "401",
		curl + "http://127.0.0.1:49983/metrics":                                                          "401",
		curl + "'http://127.0.0.1:49983/files?path=/etc/passwd'":                                         "401",
		curl + "'http://127.0.0.1:49983/files?path=/etc/passwd&signature=v1_x'":                          "401",
		curl + "'http://127.0.0.1:49983/files?path=/etc/passwd&signature=v1_x&signature_expiration=1'":   "401",
		curl + "-d '{}' http://127.0.0.1:49983/init":                                                     "404",
		curl + "http://127.0.0.1:49983/cordon/kills":                                                     "404",
		curl + "http://127.0.0.1:49983/cordon/tunnel?port=22":                                            "404",
		curl + "-d '{}' -H 'Content-Type: application/json' http://127.0.0.1:49983/process.Process/List": "401",
		"cat /proc/1/environ >/dev/null 2>&1; echo $?":                                                   "1",
		"cat /proc/1/mem >/dev/null 2>&1; echo $?":                                                       "1",
		"ls /proc/1/fd >/dev/null 2>&1; echo $?":                                                         "2",
		"kill -9 1 2>/dev/null; echo $?":                                                                 "1",
		"echo 99999 2>/dev/null >/sys/fs/cgroup/pids/commands/pids.max; echo $?":                         "1",
	} {
		if got := run(t, sb, command, 0); got != want {
			t.Errorf("%s: %s, want %s", command, got, want)
		}
	}
	// What is the agent's is nobody's, and links that a program laid lend no rights.
	run(t, sb, "ln -s /proc/self/environ own; ln -s /proc/self/mem mem; ln -s /etc/shadow shadow; ln -s /root secret; mkfifo fifo", 0)
	for path, kinds := range map[string]string{
		"own": "rw", "mem": "rw", "/proc/1/environ": "rw", "/proc/self/environ": "rw", "/proc/self/root/proc/1/environ": "rw", "/proc/thread-self/maps": "rw",
		"fifo": "rw", "/dev/zero": "rw", "shadow": "w", "secret/x": "rw",
	} {
		if body, err := sb.Files.Read(t.Context(), path); strings.Contains(kinds, "r") && err == nil {
			t.Errorf("read %s: %d bytes", path, len(body))
		}
		if err := sb.Files.Write(t.Context(), path, strings.NewReader("evil")); strings.Contains(kinds, "w") && err == nil {
			t.Errorf("wrote %s", path)
		}
	}
	agent := run(t, sb, "sudo readlink /proc/1/exe", 0)
	if err := sb.Files.Write(t.Context(), agent, strings.NewReader("evil")); err == nil {
		t.Errorf("wrote %s", agent)
	}
	if err := sb.Files.Remove(t.Context(), agent); err == nil {
		t.Errorf("removed %s", agent)
	}
	// A program with set-user-ID that is overwritten is root's no more.
	run(t, sb, "sudo cp /bin/true /usr/local/bin/tool && sudo chmod 4755 /usr/local/bin/tool", 0)
	if err := sb.Files.Write(t.Context(), "/usr/local/bin/tool", strings.NewReader("#!/bin/sh")); err != nil {
		t.Error(err)
	}
	if got := run(t, sb, "stat -c '%U %a' /usr/local/bin/tool", 0); got != "user 755" {
		t.Errorf("an overwritten program is %s", got)
	}
	// A link that changes between a look and the use never lends root's rights.
	p, err := sb.Commands.Start(t.Context(), "touch good; while :; do ln -sfn /home/user/good race; ln -sfn /etc/hostname.evil race; done", client.RunOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for range 100 {
		_ = sb.Files.Write(t.Context(), "race", strings.NewReader("evil"))
	}
	if err := p.Kill(t.Context()); err != nil {
		t.Error(err)
	}
	run(t, sb, "test ! -e /etc/hostname.evil", 0)
}

// ownPort is what a program in the sandbox, of the default user, tries with the
// port that the host calls the agent at.
func (s *live) ownPort(t *testing.T) {
	sb := s.sandbox(t)
	bind := `python3 -c "
import errno, socket, subprocess
own = subprocess.run(['hostname', '-I'], capture_output=True, text=True).stdout.split()
for family, address in [(socket.AF_INET, a) for a in own + ['127.0.0.1', '0.0.0.0', '127.0.0.2']] + [(socket.AF_INET6, '::'), (socket.AF_INET6, '::1')]:
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        l = socket.socket(family)
        l.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            l.bind((address, 49983))
            l.listen()
            print('listens', address, option)
        except OSError as e:
            if e.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL): print(e)
"`
	if got := run(t, sb, bind, 0); got != "" {
		t.Errorf("%s", got)
	}
	// What opens the agent to the host is not to be seen, and the agent does not
	// prove itself to its own machine, which could pass that on.
	run(t, sb, `! tr '\0' '\n' </proc/1/cmdline | grep -E '[0-9a-f]{64}'`, 0)
	own := run(t, sb, "hostname -I | cut -d' ' -f1", 0)
	for _, at := range []string{"127.0.0.1", own} {
		if got := run(t, sb, "curl -s -o /dev/null -m 10 -w '%{http_code}' -H 'X-Cordon-Nonce: ABCDEFGHIJKLMNOPQRSTUVWXYZ' http://"+at+":49983/cordon/challenge", 0); got != "404" {
			t.Errorf("a challenge from inside by %s: %s", at, got)
		}
	}
}

// quietEnd tries sockets that are forbidden, as every user, and ends the sandbox.
func (s *live) quietEnd(t *testing.T) {
	sb, err := s.Create(t.Context(), client.CreateOptions{Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	const sockets = `python3 -c "
import socket
for family, kind, protocol in [(socket.AF_INET, socket.SOCK_RAW, 1), (socket.AF_INET, socket.SOCK_RAW, 255), (socket.AF_INET6, socket.SOCK_RAW, 58), (socket.AF_PACKET, socket.SOCK_RAW, 768), (socket.AF_PACKET, socket.SOCK_DGRAM, 768)]:
    try:
        socket.socket(family, kind, protocol)
        print('made', family, kind, protocol)
    except PermissionError:
        print('refused')
"`
	for _, as := range []string{"", "sudo "} {
		run(t, sb, as+sockets, 0)
	}
	if err := sb.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond) // what is left of it is removed behind the answer
	for line := range strings.Lines(s.Log(500)) {
		if strings.Contains(line, "level=ERROR") && strings.Contains(line, sb.ID) {
			t.Error(line)
		}
	}
}
