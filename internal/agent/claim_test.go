package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestAClaimReplacesTheFormerOne(t *testing.T) {
	h := claimed(t)
	if got := h.do("GET", "/envs", nil); got.StatusCode != 200 {
		t.Fatalf("%d %s", got.StatusCode, got.body)
	}
	h.claim(map[string]any{"sandboxID": "i2", "accessToken": "second", "defaultUser": "tester", "envVars": map[string]string{"B": "2"}})
	if got := h.do("GET", "/envs", nil); got.StatusCode != 401 {
		t.Errorf("the former token still works: %d", got.StatusCode)
	}
	got := h.do("GET", "/envs", nil, "X-Access-Token", "second")
	var env map[string]string
	if err := json.Unmarshal([]byte(got.body), &env); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"B": "2", "E2B_SANDBOX": "true", "E2B_SANDBOX_ID": "i2", "NOVITA_SANDBOX": "true", "NOVITA_SANDBOX_ID": "i2"}
	if diff := cmp.Diff(want, env); diff != "" {
		t.Error(diff)
	}
}

func TestABadClaimChangesNothing(t *testing.T) {
	h := claimed(t)
	for name, body := range map[string]string{
		"not JSON":                   `{`,
		"another type":               `{"sandboxID":1}`,
		"a host name with a newline": `{"hostname":"a\nb","accessToken":"new"}`,
		"a host name with a dash":    `{"hostname":"-a"}`,
		"a host name too long":       `{"hostname":"` + strings.Repeat("a", 64) + `"}`,
		"a variable without a name":  `{"envVars":{"":"x"},"accessToken":"new"}`,
		"a variable with a NUL":      `{"envVars":{"A":"x\u0000"}}`,
		"over 1 MiB":                 `{"accessToken":"` + strings.Repeat("x", 1<<20) + `"}`,
	} {
		got := h.do("POST", "/init", strings.NewReader(body), "X-Cordon-Control", testControl)
		if got.StatusCode != 400 {
			t.Errorf("%s: %d %s, want 400", name, got.StatusCode, got.body)
		}
	}
	if got := h.do("GET", "/envs", nil); got.StatusCode != 200 {
		t.Errorf("after bad claims: %d %s", got.StatusCode, got.body)
	}
	if _, err := os.Stat(h.etc + "/hostname"); !os.IsNotExist(err) {
		t.Errorf("a bad claim wrote the host name: %v", err)
	}
}

func TestHostsKeepsWhatUsersWrite(t *testing.T) {
	own := []netip.Addr{netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00::2")}
	block := func(lines string) string {
		return blockBegin + "\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n" + lines + blockEnd + "\n"
	}
	ours := block("10.1.0.2\tname\nfd00::2\tname\n")
	for name, c := range map[string]struct {
		old  string
		own  []netip.Addr
		want string
	}{
		"no file yet":                 {"", own, ours},
		"an image's own file":         {"127.0.0.1 localhost\n", own, ours + "127.0.0.1 localhost\n"},
		"a former block is replaced":  {"1.2.3.4 mine\n" + block("10.9.9.9\tolder\n") + "5.6.7.8 too\n", own, "1.2.3.4 mine\n" + ours + "5.6.7.8 too\n"},
		"a block that was cut":        {"1.2.3.4 mine\n" + blockBegin + "\nrest", own, "1.2.3.4 mine\n" + ours},
		"a machine without addresses": {"", nil, block("127.0.1.1\tname\n")},
	} {
		t.Run(name, func(t *testing.T) {
			got := hostsFile([]byte(c.old), "name", c.own)
			if diff := cmp.Diff(c.want, string(got)); diff != "" {
				t.Error(diff)
			}
			if again := hostsFile(got, "name", c.own); string(again) != string(got) {
				t.Errorf("a second time gives %q", again)
			}
		})
	}
}

func TestAClaimNamesTheMachine(t *testing.T) {
	h := start(t)
	named := ""
	h.agent.cfg.SetHostname = func(n string) error { named = n; return nil }
	claim := func(name string) { h.claim(map[string]any{"hostname": name, "defaultUser": "tester"}) }
	claim("first")
	h.write(h.etc+"/hosts", read(t, h.etc+"/hosts")+"9.9.9.9 users-own\n")
	claim("second")
	hosts := read(t, h.etc+"/hosts")
	if named != "second" || read(t, h.etc+"/hostname") != "second\n" || !strings.Contains(hosts, "\tsecond\n") || strings.Contains(hosts, "first") || !strings.HasSuffix(hosts, "9.9.9.9 users-own\n") {
		t.Errorf("named %q, hosts:\n%s", named, hosts)
	}
	left, err := filepath.Glob(h.etc + "/.*")
	if err != nil || len(left) != 0 {
		t.Errorf("left: %v %v", left, err)
	}
}

func TestAHostNameThatMayNotBeSetIsNoReasonToRefuse(t *testing.T) {
	h := start(t)
	h.agent.cfg.SetHostname = func(string) error { return syscall.EPERM }
	h.claim(map[string]any{"hostname": "kept-out", "defaultUser": "tester"})
	if hosts := read(t, h.etc+"/hosts"); !strings.Contains(hosts, "\tkept-out\n") {
		t.Errorf("the name does not resolve:\n%s", hosts)
	}
	h.agent.cfg.SetHostname = func(string) error { return syscall.EIO }
	got := h.do("POST", "/init", strings.NewReader(`{"hostname":"broken"}`), "X-Cordon-Control", testControl)
	if got.StatusCode != 500 || !strings.Contains(got.body, "set the host name") {
		t.Errorf("another error: %d %s", got.StatusCode, got.body)
	}
}

func TestTheResolverIsOursUnlessTheUserChoseOne(t *testing.T) {
	h := start(t)
	path := h.etc + "/resolv.conf"
	for _, c := range []struct{ name, old, want string }{
		{"missing", "-", resolvConf},
		{"ours", "# cordon: written by an older agent\nnameserver 192.0.2.1\n", resolvConf},
		{"empty", "\n", resolvConf},
		{"the user's", "nameserver 192.0.2.53\n", "nameserver 192.0.2.53\n"},
	} {
		if c.old == "-" {
			os.Remove(path)
		} else {
			h.write(path, c.old)
		}
		h.claim(map[string]any{"defaultUser": "tester"})
		if got := read(t, path); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	// An image's dangling link to another resolver's file counts as missing.
	os.Remove(path)
	if err := os.Symlink("/no/such/stub", path); err != nil {
		t.Fatal(err)
	}
	h.claim(map[string]any{"defaultUser": "tester"})
	if got := read(t, path); got != resolvConf {
		t.Errorf("a dangling link: %q", got)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func TestMetrics(t *testing.T) {
	h := claimed(t)
	got := h.do("GET", "/metrics", nil)
	var m map[string]float64
	if err := json.Unmarshal([]byte(got.body), &m); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"ts", "cpu_count", "cpu_used_pct", "mem_total", "mem_used", "mem_cache", "disk_used", "disk_total"} {
		if v, ok := m[key]; !ok || v <= 0 && key != "cpu_used_pct" && key != "mem_cache" {
			t.Errorf("%s = %v", key, m[key])
		}
		delete(m, key)
	}
	if len(m) != 0 {
		t.Errorf("more than the SDKs know: %v", m)
	}
}

func TestTheCPUShareIsThatBetweenTwoQuestions(t *testing.T) {
	proc := t.TempDir()
	stat := func(line string) {
		if err := os.WriteFile(proc+"/stat", []byte(line+"\ncpu0 1 2 3\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s := newSampler(proc)
	at := time.Unix(1000, 0)
	ask := func(after time.Duration) float64 {
		at = at.Add(after)
		pct, err := s.cpu(at)
		if err != nil {
			t.Fatal(err)
		}
		return pct
	}
	stat("cpu  100 0 100 800 0 0 0 0 0 0")
	ask(0)
	stat("cpu  150 0 125 1025 0 0 0 0 0 0") // 75 of 300 ticks
	if got := ask(time.Second); got != 25 {
		t.Errorf("%v, want 25", got)
	}
	stat("cpu  950 0 125 1025 0 0 0 0 0 0")
	if got := ask(100 * time.Millisecond); got != 25 {
		t.Errorf("too early a question: %v, want the former answer", got)
	}
	stat("cpu  1 0 1 1 0 0 0 0 0 0") // restored elsewhere: the counters went back
	if got := ask(time.Second); got != 25 {
		t.Errorf("counters that went back: %v, want the former answer", got)
	}
	stat("nonsense")
	at = at.Add(time.Second)
	if _, err := s.cpu(at); err == nil {
		t.Error("nonsense was understood")
	}
}

// The proc directory is made up so that memory is short; the process killed for
// it is real. The guard looks only when it is told to: this machine's own processes
// are none of its business.
func TestTheGuardKillsTheBiggestProcess(t *testing.T) {
	h := startBy(t, unguarded)
	h.claimDefault()
	pids := map[string]string{}
	for _, name := range []string{"small", "big"} {
		pid, s := h.begin(t.Context(), bash("sleep 100; : "+name))
		defer s.Close()
		pids[name] = itoa(pid)
	}
	proc := t.TempDir()
	put := func(path, text string) {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(proc, path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(proc, path), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put("1/statm", "999999999 999999999 0")
	put(itoa(uint32(os.Getpid()))+"/statm", "999999999 999999999 0")
	put(pids["small"]+"/statm", "9999999 100 0")
	put(pids["big"]+"/statm", "200 200 0")
	put(pids["big"]+"/comm", "eater\n")
	g := h.agent.guard
	g.proc = proc

	put("meminfo", "MemTotal: 524288 kB\nMemFree: 1 kB\nMemAvailable: 262144 kB\n")
	if again := g.check(); again > lookLate || len(g.kills) != 0 {
		t.Errorf("with memory left: %v, look again in %v", g.kills, again)
	}
	put("meminfo", "MemTotal: 524288 kB\nMemFree: 1 kB\nMemAvailable: 18432 kB\n")
	if again := g.check(); again != lookSoon || len(g.kills) != 0 {
		t.Errorf("2 MiB above the floor: look again in %v, want %v", again, lookSoon)
	}
	put("meminfo", "MemTotal: 524288 kB\nMemFree: 1 kB\nMemAvailable: 14336 kB\n")
	g.check()
	eventually(t, "the biggest is killed", func() bool {
		left := h.agent.procs.list()
		return len(left) == 1 && itoa(left[0].GetPid()) == pids["small"]
	})
	for path, want := range map[string]string{
		"/cordon/kills?after=0&wait=60": `"pid":` + pids["big"] + `,"command":"eater","bytes":` + itoa(uint32(200*os.Getpagesize())),
		"/cordon/kills?after=-1&wait=9": `{"kills":null,"latest":1}`,
		"/cordon/kills?after=1&wait=0":  `{"latest":1}`,
		"/cordon/kills?after=x&wait=0":  "must be numbers",
	} {
		if got := h.do("GET", path, nil, "X-Cordon-Control", testControl); !strings.Contains(got.body, want) {
			t.Errorf("%s: %s, want %s", path, got.body, want)
		}
	}
}

func itoa(n uint32) string { return strconv.FormatUint(uint64(n), 10) }

func TestTheGuardSleepsUntilTheFirstProcess(t *testing.T) {
	proc := t.TempDir() // without meminfo: every look is logged
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		g := newGuard(proc, slog.New(slog.NewTextHandler(&log, nil)))
		ctx, cancel := context.WithCancel(t.Context())
		used := make(chan struct{}, 1)
		done := make(chan error, 1)
		go func() { done <- g.run(ctx, used) }()
		time.Sleep(time.Hour)
		synctest.Wait()
		if log.Len() != 0 {
			t.Errorf("it looked before any process ran: %s", log.String())
		}
		used <- struct{}{}
		time.Sleep(lookLate + time.Millisecond)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if n := strings.Count(log.String(), "memory not guarded"); n != 2 {
			t.Errorf("it looked %d times, want 2: %s", n, log.String())
		}
	})
}

func TestFilesOnDiskAreNotMemory(t *testing.T) {
	for _, c := range []struct {
		name                            string
		shmem, inMemory, onDisk, stored uint64
	}{
		{"nothing was checkpointed yet", 0, 0, 500, 0},
		{"a checkpoint counted the layer", 250, 0, 250, 250},
		{"part of it is in /dev/shm", 250, 50, 250, 200},
		{"/dev/shm holds more than is counted", 50, 60, 250, 0},
		{"memory that is shared is more than the layer", 300, 0, 100, 100},
	} {
		if got := stored(c.shmem, c.inMemory, c.onDisk); got != c.stored {
			t.Errorf("%s: %d, want %d", c.name, got, c.stored)
		}
	}
}
