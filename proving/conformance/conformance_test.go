package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/conformance/probe"
	"github.com/cordonhq/cordon/proving/lab"
)

// built returns the server's program, which make build makes; TEST_BINARY names another.
func built(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("TEST_BINARY"); path != "" {
		return path
	}
	return made(t, "cordon")
}

// made returns a program that make build makes.
func made(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs("../../bin/" + name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: run make build first", err)
	}
	return path
}

// TestEveryCasePasses runs the suite as a user does. Every case must pass; none
// may be skipped.
func TestEveryCasePasses(t *testing.T) {
	lab.Privileged(t)
	if testing.Short() {
		t.Skip("it takes two minutes")
	}
	// Asked to end, the command cleans up; only then is it killed.
	ctx, cancel := context.WithTimeout(t.Context(), 280*time.Second)
	defer cancel()
	log := filepath.Join(t.TempDir(), "server.log")
	cmd := exec.CommandContext(ctx, made(t, "cordon-lab"), "conformance", "--cordon", built(t), "--json", "--server-log", log)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	runErr := cmd.Run()
	var report Report
	if err := json.Unmarshal(out.Bytes(), &report); err != nil {
		t.Fatalf("read the report: %v; the command: %v\n%s", err, runErr, errOut.Bytes())
	}
	t.Logf("%d cases in %s", len(report.Results), report.Took)
	ran := map[int]bool{}
	for _, r := range report.Results {
		ran[r.Case] = true
		if r.Verdict == Pass {
			continue
		}
		text, err := json.MarshalIndent(r, "", "  ")
		t.Errorf("case %d, %s: %s\n%s%v", r.Case, r.Title, r.Verdict, text, err)
	}
	for _, c := range Cases() {
		if !ran[c.ID] {
			t.Errorf("case %d, %s, did not run: is bin/cordon-lab older than the suite?", c.ID, c.Title)
		}
	}
	if runErr != nil && !t.Failed() {
		t.Errorf("the command: %v\n%s", runErr, errOut.Bytes())
	}
	if t.Failed() {
		b, _ := os.ReadFile(log)
		t.Logf("the server's last words:\n%s", b[max(0, len(b)-8000):])
	}
}

// TestAgainstAnotherServer runs the cases that need no recorder against a server
// by its URL, and finds the others skipped.
func TestAgainstAnotherServer(t *testing.T) {
	lab.Privileged(t)
	if testing.Short() {
		t.Skip("it starts a server")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	s, err := newStand(ctx, Options{Binary: built(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	}()
	key, err := os.ReadFile(filepath.Join(s.dir, "state", "admin.key"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := s.lab.HostCommand(ctx, made(t, "cordon-lab"), "conformance", "--json", "--against", "http://"+plain, "--case", "1,38,66,67,68,69,70,71")
	cmd.Env = append(cmd.Env, "CORDON_API_KEY="+strings.TrimSpace(string(key)))
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	var report Report
	if jerr := json.Unmarshal(out, &report); jerr != nil {
		t.Fatalf("read the report: %v; the command: %v\n%s%s", jerr, err, out, &complaints)
	}
	if skipped, passed := report.Count(Skip), report.Count(Pass); skipped != 2 || passed != 6 { // the cookies want TLS
		t.Errorf("%d skipped and %d passed, want 2 and 6: %v\n%s", skipped, passed, err, out)
	}
}

// TestKilledRunsAreTidiedUp finds what a run left that could not clean up, and
// leaves alone what is held.
func TestKilledRunsAreTidiedUp(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	dead, _, lock, err := newFolder()
	if err != nil {
		t.Fatal(err)
	}
	lock.Close() // as the kernel does for the dead
	alive, _, held, err := newFolder()
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := removeLeft(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dead); err == nil {
		t.Error("the folder of a dead run is still there")
	}
	if _, err := os.Stat(alive); err != nil {
		t.Error("the folder of a living run is gone")
	}
}

func TestCasesAreNumberedOnce(t *testing.T) {
	seen := map[int]bool{}
	for _, c := range Cases() {
		if seen[c.ID] || c.ID == 0 || c.Title == "" || c.Group == "" || c.Run == nil {
			t.Errorf("case %d, %q: numbered twice, or incomplete", c.ID, c.Title)
		}
		seen[c.ID] = true
	}
}

func TestHelloIsPutTogetherAsItWas(t *testing.T) {
	h := newHello(nameA)
	if got := takeApart(h.bytes()[5:]).bytes(); !bytes.Equal(got, h.bytes()) {
		t.Error("a hello taken apart and put together is another")
	}
	if !bytes.Contains(h.bytes(), []byte(nameA)) || bytes.Contains(h.named().bytes(), []byte(nameA)) {
		t.Error("the name is not replaced")
	}
	cut := probe.Records(h.bytes(), 7)
	var message []byte
	for len(cut) > 0 {
		n := int(cut[3])<<8 | int(cut[4])
		message, cut = append(message, cut[5:5+n]...), cut[5+n:]
	}
	if !bytes.Equal(message, h.bytes()[5:]) {
		t.Error("records lose bytes of the message")
	}
}

func TestNaiveMatcher(t *testing.T) {
	n := client.Network{AllowOut: []string{"198.51.100.70/29"}, DenyOut: []string{"198.51.100.64/26", "198.51.100.200/32"}}
	for addr, want := range map[string]bool{
		"198.51.100.63": true, "198.51.100.64": true, "198.51.100.71": true, "198.51.100.72": false,
		"198.51.100.127": false, "198.51.100.128": true, "198.51.100.200": false, "198.51.100.201": true,
	} {
		if got := naive(n, netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s is allowed: %v, want %v", addr, got, want)
		}
	}
}

func TestListedNames(t *testing.T) {
	n := only("allowed.test", "*.wild.test", "ported.test:25")
	for name, want := range map[string]bool{
		"allowed.test": true, "x.allowed.test": false, "wild.test": false, "x.wild.test": true, "a.b.wild.test": true,
		"notwild.test": false, "ported.test": true, "denied.test": false,
	} {
		if got := listed(n, name); got != want {
			t.Errorf("%s is listed: %v, want %v", name, got, want)
		}
	}
}

// FuzzOutcomes feeds what a probe in a sandbox may say.
func FuzzOutcomes(f *testing.F) {
	f.Add([]byte("{\"ID\":1,\"Received\":\"SFRUUC8xLjEgMjAwIE9LDQpDb250ZW50LUxlbmd0aDogMg0KDQp7fQ==\",\"End\":\"eof\"}\n"))
	f.Add([]byte("{\"ID\":1,\"Replies\":[\"AAAAAAABAAAAAAAA\"],\"End\":\"wanted\"}\n{\"ID\":1}\n"))
	f.Add([]byte("not JSON\n"))
	f.Fuzz(func(t *testing.T, said []byte) {
		p := newProber()
		p.send = func(context.Context, []byte) error { return nil }
		c, err := p.begin(t.Context(), probe.Order{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Write(said); err != nil {
			return
		}
		select {
		case got := <-c:
			for _, judge := range []func(probe.Outcome) error{cut, alerted, reset, refused, served(addrA, nameA), blocked, resolvesTo(addrA), serverHello} {
				_ = judge(got) // any verdict, no panic
			}
			_ = describe(got)
		default:
		}
	})
}

// TestDocsListEveryCase keeps docs/conformance.md complete.
func TestDocsListEveryCase(t *testing.T) {
	page, err := os.ReadFile("../../docs/conformance.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range Cases() {
		where := ""
		if c.Anywhere {
			where = "any server "
		}
		if line := fmt.Sprintf("| %d | %s | %s|\n", c.ID, c.Title, where); !bytes.Contains(page, []byte(line)) {
			t.Errorf("docs/conformance.md lacks the line %q", line)
		}
	}
}
