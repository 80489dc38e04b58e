package resolver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/proving/lab"
)

// libc is a C library that a program can be built with.
type libc struct{ name, compiler, flag string }

var (
	glibc = libc{"glibc", "gcc", "-pthread"}
	musl  = libc{"static musl", "musl-gcc", "-static"}
)

// build compiles testdata/lookup.c.
func (l libc) build(t *testing.T) string {
	t.Helper()
	cc, err := exec.LookPath(l.compiler)
	if err != nil {
		t.Skipf("no %s: apt-get install gcc musl-tools", l.compiler)
	}
	out := filepath.Join(t.TempDir(), "lookup")
	if text, err := exec.CommandContext(t.Context(), cc, "-O1", "-Wall", "-Werror", l.flag, "-o", out, "testdata/lookup.c").CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cc, err, text)
	}
	return out
}

// found is what a run of lookup.c printed.
type found struct {
	failed    int
	slowest   time.Duration
	addresses string
	output    string
}

var lookupLine = regexp.MustCompile(`(\d+) failed of \d+, slowest ([\d.]+) s(.*)`)

// inside runs a program in a sandbox's namespace, with the resolv.conf that
// sandboxes have, and returns what it prints.
func inside(t *testing.T, sandbox *lab.Netns, argv ...string) (string, error) {
	t.Helper()
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(conf, []byte("nameserver 8.8.8.8\nnameserver 1.1.1.1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", append([]string{"-c", `mount --bind "$0" /etc/resolv.conf && exec "$@"`, conf}, argv...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := sandbox.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	err := cmd.Wait()
	return out.String(), err
}

// lookUp runs a program of build.
func lookUp(t *testing.T, sandbox *lab.Netns, program string, threads int, format string) found {
	t.Helper()
	out, err := inside(t, sandbox, program, strconv.Itoa(threads), format)
	var exit *exec.ExitError
	m := lookupLine.FindStringSubmatch(out)
	if m == nil || err != nil && !errors.As(err, &exit) {
		t.Fatalf("lookup %d %s: %v\n%s", threads, format, err, out)
	}
	failed, _ := strconv.Atoi(m[1])
	slowest, err := time.ParseDuration(m[2] + "s")
	if err != nil {
		t.Fatal(err)
	}
	return found{failed, slowest, strings.TrimSpace(m[3]), out}
}

// lookupInGo makes the test binary look a name up instead: it is a static Go program.
const lookupInGo = "CORDON_TEST_LOOK_UP"

// lookUpInGo is that program.
func lookUpInGo(name string) {
	began := time.Now()
	_, err := net.DefaultResolver.LookupHost(context.Background(), name)
	fmt.Printf("%.3f %v\n", time.Since(began).Seconds(), err)
}

// TestRuntimesTakeADenialAsFinal is TestProgramsTakeADenialAsFinal for language
// runtimes that have a resolver of their own, or words.
func TestRuntimesTakeADenialAsFinal(t *testing.T) {
	l := lab.Start(t, lab.Config{IPv6: true})
	sandbox := gateway(t, l)
	serveInLab(t, l, policy.Input{AllowOut: []string{"allowed.test"}, DenyOut: []string{"0.0.0.0/0"}})
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const node = `const t = process.hrtime.bigint(), dns = require("dns"); dns[process.argv[1]](process.argv[2], (e) => console.log((Number(process.hrtime.bigint() - t) / 1e9).toFixed(3), String(e)))`
	const python = `import socket, sys, time
t = time.monotonic()
try:
    words = socket.getaddrinfo(sys.argv[1], 443)
except OSError as e:
    words = repr(e)
print("%.3f %s" % (time.monotonic() - t, words))`
	for i, c := range []struct {
		name, words string
		argv        []string // and the name
	}{
		{"Go", "no such host", []string{"env", lookupInGo + "=1", self}},
		{"Node lookup", "ENOTFOUND", []string{"node", "-e", node, "lookup"}},
		{"Node resolve4 (c-ares)", "ENODATA", []string{"node", "-e", node, "resolve4"}},
		{"Python", "No address associated with hostname", []string{"python3", "-c", python}},
		{"Java", "UnknownHostException", []string{"java", "testdata/Lookup.java"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := exec.LookPath(c.argv[0]); err != nil {
				t.Skip(err)
			}
			out, err := inside(t, sandbox, append(c.argv, fmt.Sprintf("denied%d.test", i))...)
			var seconds float64
			if _, scan := fmt.Sscan(out, &seconds); err != nil || scan != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if seconds > 2 || !strings.Contains(out, c.words) {
				t.Errorf("got %s; want %q at once", out, c.words)
			}
			t.Log(strings.TrimSpace(out))
		})
	}
}

// TestProgramsTakeADenialAsFinal runs real programs: each says at once that there
// is no such host, and the flow log has one event for each look-up.
func TestProgramsTakeADenialAsFinal(t *testing.T) {
	l := lab.Start(t, lab.Config{IPv6: true})
	sandbox := gateway(t, l)
	for _, rules := range []struct {
		name   string
		input  policy.Input
		look   string // up, with the number of the library
		reason policy.Reason
	}{
		{"names listed", policy.Input{AllowOut: []string{"allowed.test"}, DenyOut: []string{"0.0.0.0/0"}}, "denied%d.test", policy.ReasonNameDenied},
		{"no server allowed", policy.Input{DenyOut: []string{"0.0.0.0/0"}}, "denied%d.test", policy.ReasonDenyAddr},
		{"one server denied, and the name by the operator", policy.Input{DenyOut: []string{"8.8.8.8"}}, "operator%d.test", policy.ReasonOperator},
	} {
		t.Run(rules.name, func(t *testing.T) {
			flows := serveInLab(t, l, rules.input)
			for i, c := range []libc{glibc, musl} {
				t.Run(c.name, func(t *testing.T) {
					before := flows.len()
					name := fmt.Sprintf(rules.look, i)
					got := lookUp(t, sandbox, c.build(t), 1, name)
					if got.failed != 1 || got.slowest > 500*time.Millisecond {
						t.Errorf("%s: want a failure within half a second", got.output)
					}
					if strings.Contains(got.output, "emporary") || strings.Contains(got.output, "Try again") {
						t.Errorf("%s: want a final error", got.output)
					}
					events := flows.since(before)
					if len(events) != 1 || events[0].Verdict != flowlog.Denied || events[0].Reason != rules.reason || events[0].Name != name {
						t.Errorf("the flow log has %d events: %+v; want one, %s", len(events), events, rules.reason)
					}
				})
			}
		})
	}
}

// TestProgramsPassOverADeniedServer: a listed name resolves, although the second
// server of the resolv.conf is denied and answers first.
func TestProgramsPassOverADeniedServer(t *testing.T) {
	l := lab.Start(t, lab.Config{IPv6: true})
	sandbox := gateway(t, l)
	serveInLab(t, l, policy.Input{AllowOut: []string{"allowed.test"}, DenyOut: []string{"0.0.0.0/0"}})
	for _, c := range []libc{glibc, musl} {
		t.Run(c.name, func(t *testing.T) {
			got := lookUp(t, sandbox, c.build(t), 1, "allowed.test")
			if got.failed != 0 || !strings.Contains(got.addresses, "198.51.100.10") || got.slowest > 2*time.Second {
				t.Error(got.output)
			}
		})
	}
}

// slowUpstream is a server in the test's own namespace that takes 200 ms for an
// answer, as Config fields.
func slowUpstream(t *testing.T, change func(*upstream)) func(*Config) {
	t.Helper()
	u := newUpstream(t, zone)
	u.set(func(u *upstream) {
		u.delay = 200 * time.Millisecond
		for i := range 250 {
			name := fmt.Sprintf("n%d.wild.test.", i)
			u.records[name+" A"] = []string{name + " 60 IN A 198.51.100.40"}
			u.records[name+" AAAA"] = []string{name + " 60 IN AAAA 2001:db8:80::40"}
		}
		change(u)
	})
	return func(c *Config) {
		c.Upstreams, c.Dial = []netip.AddrPort{u.addr}, (&net.Dialer{}).DialContext
	}
}

// TestProgramsWithManyThreads looks names up in 250 threads at once: none fails,
// whether the answers are known or not.
func TestProgramsWithManyThreads(t *testing.T) {
	l := lab.Start(t, lab.Config{IPv6: true})
	sandbox := gateway(t, l)
	for _, c := range []libc{glibc, musl} {
		t.Run(c.name, func(t *testing.T) {
			serveInLab(t, l, policy.Input{}, slowUpstream(t, func(*upstream) {}))
			program := c.build(t)
			for _, format := range []string{"a.test", "n%d.wild.test", "n%d.wild.test"} { // one name; many; many that are known
				if got := lookUp(t, sandbox, program, 250, format); got.failed != 0 {
					t.Errorf("%s: %s", format, got.output)
				} else {
					t.Logf("%s: slowest %s", format, got.slowest)
				}
			}
		})
	}
}

// TestProgramsAndABrokenAddressFamily: where the upstream fails for AAAA, programs
// get the A record, and at once.
func TestProgramsAndABrokenAddressFamily(t *testing.T) {
	l := lab.Start(t, lab.Config{IPv6: true})
	sandbox := gateway(t, l)
	for name, rcode := range map[string]int{"SERVFAIL": dns.RcodeServerFailure, "NXDOMAIN": dns.RcodeNameError, "silence": -1} {
		for _, c := range []libc{glibc, musl} {
			t.Run(name+", "+c.name, func(t *testing.T) {
				serveInLab(t, l, policy.Input{}, slowUpstream(t, func(u *upstream) {
					u.delay, u.broken = 0, map[uint16]int{dns.TypeAAAA: rcode}
				}))
				got := lookUp(t, sandbox, c.build(t), 1, "a.test")
				if got.failed != 0 || got.addresses != "198.51.100.10" || got.slowest > 500*time.Millisecond {
					t.Error(got.output)
				}
			})
		}
	}
}
