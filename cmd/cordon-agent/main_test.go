package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "github.com/cordonhq/cordon/api/gen/agent/process"
	"github.com/cordonhq/cordon/api/gen/agent/process/processconnect"
	"github.com/cordonhq/cordon/internal/agent/agentctl"
	"github.com/cordonhq/cordon/internal/sandbox"
)

const token = "proven_control-token-of-the-tests"

// first is the agent's binary as PID 1 of its own PID, mount and UTS namespaces,
// with an /etc and a network of its own: as in a sandbox.
type first struct {
	t    *testing.T
	dir  string
	cmd  *exec.Cmd
	at   sandbox.AgentAddr
	logs *bytes.Buffer
	boot time.Duration // from fork to the first answer
}

const setup = `set -e
mount --make-rprivate /
mount -t proc proc /proc
mount --bind "$1/etc" /etc
mount -t tmpfs -o size=1m,mode=1777 tmpfs "$1/small"
until ip link set eth0 up 2>/dev/null; do sleep 0.01; done
ip link set lo up
ip address add "$2/30" dev eth0
exec "$1/cordon-agent"
`

func boot(t *testing.T) *first {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_PRIVILEGED") == "1" {
			t.Fatal("REQUIRE_PRIVILEGED=1, but this is not root")
		}
		t.Skip("needs root: runs in namespaces of its own")
	}
	dir, err := os.MkdirTemp("", "cordon-agent-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, d := range []string{".", "etc", "home", "small"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	passwd := "root:x:0:0::/root:/bin/bash\nuser:x:4242:4242::" + dir + "/home:/bin/bash\n"
	err = errors.Join(os.Chmod(dir, 0o755), os.Chown(dir+"/home", 4242, 4242), os.WriteFile(dir+"/etc/passwd", []byte(passwd), 0o644))
	if err != nil {
		t.Fatal(err)
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", dir+"/cordon-agent", ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	// A cable between the machine and the agent: what comes from the agent's own
	// addresses is not the host's. The range is for benchmarks (RFC 2544).
	gate := [4]byte{198, 18 + byte(rand.N(2)), byte(rand.N(256)), byte(rand.N(64))*4 + 1}
	guest := gate
	guest[3]++
	link := fmt.Sprintf("ca%02x%02x%02x", gate[1], gate[2], gate[3])
	hash := sha256.Sum256([]byte(token))
	f := &first{t: t, dir: dir, logs: &bytes.Buffer{}, at: sandbox.AgentAddr{Addr: netip.AddrPortFrom(netip.AddrFrom4(guest), sandbox.AgentPort), Token: token}}
	f.cmd = exec.Command("/bin/sh", "-c", setup, "sh", dir, netip.AddrFrom4(guest).String())
	f.cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", keyVariable + "=" + hex.EncodeToString(hash[:])}
	f.cmd.Stderr = f.logs
	f.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	began := time.Now()
	if err := f.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.cmd.Process.Kill(); f.cmd.Wait() }) // and with PID 1 everything in its namespaces, the cable too
	for _, args := range [][]string{
		{"link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", fmt.Sprint(f.cmd.Process.Pid)},
		{"address", "add", netip.AddrFrom4(gate).String() + "/30", "dev", link},
		{"link", "set", link, "up"},
	} {
		if out, err := exec.CommandContext(t.Context(), "ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %q: %v\n%s", args, err, out)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := agentctl.New(agentctl.Config{}).WaitReady(ctx, f.at); err != nil {
		t.Fatalf("%v\n%s", err, f.logs)
	}
	f.boot = time.Since(began)
	return f
}

func (f *first) init(hostname string) {
	f.t.Helper()
	in := sandbox.AgentInit{SandboxID: "i1", TemplateID: "base", Hostname: hostname, DefaultUser: "user", Time: time.Now()}
	if err := agentctl.New(agentctl.Config{}).Init(f.t.Context(), f.at, in); err != nil {
		f.t.Fatal(err)
	}
}

// sh runs a script as the default user and returns its output.
func (f *first) sh(script string) string {
	f.t.Helper()
	transport := &http.Transport{DisableKeepAlives: true}
	c := processconnect.NewProcessClient(&http.Client{Transport: transport}, "http://"+f.at.Addr.String(), connect.WithProtoJSON())
	no := false
	ctx, cancel := context.WithTimeout(f.t.Context(), 10*time.Second)
	defer cancel()
	s, err := c.Start(ctx, connect.NewRequest(&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-c", script}}, Stdin: &no}))
	if err != nil {
		f.t.Fatal(err)
	}
	defer s.Close()
	var out strings.Builder
	for s.Receive() {
		out.Write(s.Msg().GetEvent().GetData().GetStdout())
		out.Write(s.Msg().GetEvent().GetData().GetStderr())
	}
	if s.Err() != nil {
		f.t.Fatalf("%s: %v", script, s.Err())
	}
	return out.String()
}

func TestTheFirstProcessOfASandbox(t *testing.T) {
	f := boot(t)
	t.Logf("ready %v after fork, with sh and four mounts", f.boot)
	before, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	f.init("sbx-one")
	f.init("sbx-two") // as after a restore

	if got := f.sh("hostname; cat /etc/hostname; grep -c sbx-two /etc/hosts; id -un; cat /proc/1/comm; umask"); got != "sbx-two\nsbx-two\n"+strings.SplitN(got, "\n", 4)[2]+"\nuser\ncordon-agent\n0022\n" || strings.Contains(got, "\n0\n") {
		t.Errorf("inside: %q", got)
	}
	if after, _ := os.Hostname(); after != before {
		t.Errorf("the machine is now called %s", after)
	}

	t.Run("orphans are reaped", func(t *testing.T) {
		f.sh("for i in $(seq 50); do (setsid sleep 0.0$((i % 10)) >/dev/null 2>&1 &) ; done")
		zombies := `for s in /proc/[0-9]*/stat; do read -r _ _ state _ < $s && [ "$state" = Z ] && echo zombie; done 2>/dev/null; true`
		deadline := time.Now().Add(5 * time.Second)
		for f.sh(zombies+"; pgrep -c sleep") != "0\n" {
			if time.Now().After(deadline) {
				t.Fatalf("left: %q", f.sh(zombies+"; ps -ef"))
			}
			time.Sleep(50 * time.Millisecond)
		}
	})

	t.Run("a full disk is 507", func(t *testing.T) {
		req, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+f.at.Addr.String()+"/files?path="+f.dir+"/small/x", bytes.NewReader(make([]byte, 2<<20)))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/octet-stream")
		req.Close = true
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		raw, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != 507 || !strings.Contains(string(raw), "not enough disk space available") {
			t.Errorf("%d %s", resp.StatusCode, raw)
		}
	})

	t.Run("it ends when asked to", func(t *testing.T) {
		if err := f.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- f.cmd.Wait() }()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("%v\n%s", err, f.logs)
			}
		case <-time.After(5 * time.Second):
			t.Error("it did not end within 5 s")
		}
	})
}

func TestBadCommandLinesSayWhy(t *testing.T) {
	key := strings.Repeat("ab", 32)
	for name, c := range map[string]struct {
		args []string
		key  string
		want string
	}{
		"no key":          {nil, "", "CORDON_CONTROL_KEY has 0 characters"},
		"half a key":      {nil, "abcd", "64 hex digits"},
		"not hex":         {nil, strings.Repeat("x", 64), "64 hex digits"},
		"the key of none": {nil, strings.Repeat("0", 64), "ControlHash is empty"},
		"port 0":          {[]string{"--port", "0"}, key, "--port 0"},
		"port 70000":      {[]string{"--port", "70000"}, key, "--port 70000"},
		"an argument":     {[]string{"x"}, key, `unexpected argument "x"`},
		"an unknown flag": {[]string{"--what"}, key, "flag provided but not defined"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			getenv := func(name string) string { return map[string]string{keyVariable: c.key}[name] }
			err := run(ctx, c.args, getenv, io.Discard)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if c.key != "" && err != nil && strings.Contains(err.Error(), c.key) {
				t.Errorf("%v shows the key", err)
			}
		})
	}
}
