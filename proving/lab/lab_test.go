package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/miekg/dns"
	"go.uber.org/goleak"
)

// crashVariable makes TestMain run a lab until it is killed: the child of
// TestNothingIsLeftAfterBeingKilled.
const crashVariable = "CORDON_LAB_CRASH"

func TestMain(m *testing.M) {
	if os.Getenv(crashVariable) != "" {
		runUntilKilled()
	}
	goleak.VerifyTestMain(m)
}

// limited is a context for one test: nothing here takes longer.
func limited(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func get(t *testing.T, l *Lab, url string) (Page, *http.Response) {
	t.Helper()
	req, err := http.NewRequestWithContext(limited(t), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := l.Client().Do(req)
	if err != nil {
		t.Fatalf("GET %s: %v", url, err)
	}
	defer resp.Body.Close()
	var p Page
	if resp.StatusCode == http.StatusOK {
		if err := json.NewDecoder(resp.Body).Decode(&p); err != nil {
			t.Fatalf("GET %s: %v", url, err)
		}
	}
	return p, resp
}

func TestWebServersSayWhoAskedForWhat(t *testing.T) {
	l := Start(t, Config{IPv6: true, Domain: "sbx.test"})
	mark := l.Journal().Mark()
	for _, c := range []struct {
		url, server, sni, proto string
		tls                     bool
	}{
		{"http://allowed.test/x?y=1", "198.51.100.10:80", "", "HTTP/1.1", false},
		{"https://allowed.test/x?y=1", "198.51.100.10:443", "allowed.test", "HTTP/2.0", true},
		{"https://shared-b.test:8443/x?y=1", "198.51.100.30:8443", "shared-b.test", "HTTP/2.0", true},
		{"https://[2001:db8:80::c633:6414]/x?y=1", "[2001:db8:80::c633:6414]:443", "", "HTTP/2.0", true},
		{"http://169.254.169.254/x?y=1", "169.254.169.254:80", "", "HTTP/1.1", false},
		{"http://10.0.0.5/x?y=1", "10.0.0.5:80", "", "HTTP/1.1", false},
	} {
		p, _ := get(t, l, c.url)
		if p.Server != c.server || p.SNI != c.sni || p.Proto != c.proto || p.TLS != c.tls || p.Path != "/x?y=1" {
			t.Errorf("GET %s: %+v", c.url, p)
		}
	}
	got := l.Journal().Since(mark, func(r Request) bool { return r.Host == "allowed.test" })
	if len(got) != 2 || got[0].Proto != "http" || got[1].Proto != "https" || got[1].SNI != "allowed.test" {
		t.Errorf("the journal has %+v", got)
	}
}

func TestPublicResolversRedirectLikeTheRealOnes(t *testing.T) {
	l := Start(t, Config{})
	for url, want := range map[string]int{
		"http://1.1.1.1": 301, "https://1.1.1.1": 301, "http://8.8.8.8": 302, "https://8.8.8.8": 302,
		"https://8.8.4.4": 302, "https://8.8.8.77": 302, "https://dns.google/": 200, "https://one.one.one.one/": 200,
	} {
		if _, resp := get(t, l, url); resp.StatusCode != want {
			t.Errorf("GET %s: got %d, want %d", url, resp.StatusCode, want)
		}
	}
}

func TestStreamsAndSockets(t *testing.T) {
	l := Start(t, Config{})
	ctx := limited(t)
	read := func(url, body string) string {
		t.Helper()
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := l.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatalf("read %s: %v", url, err)
		}
		return string(b)
	}
	if got := len(read("https://allowed.test/bytes/5000000", "")); got != 5_000_000 {
		t.Errorf("/bytes sent %d bytes", got)
	}
	if got := read("http://allowed.test/slow?n=3&every=1ms", ""); got != "tick 0\ntick 1\ntick 2\n" {
		t.Errorf("/slow sent %q", got)
	}
	if got := read("https://allowed.test/sse?n=1&every=1ms", ""); got != "id: 0\ndata: tick 0\n\n" {
		t.Errorf("/sse sent %q", got)
	}
	if got := read("http://allowed.test/echo", "and back"); got != "and back" {
		t.Errorf("/echo sent %q", got)
	}
	ws, _, err := websocket.Dial(ctx, "ws://allowed.test/ws", &websocket.DialOptions{HTTPClient: l.Client()})
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	if err := ws.Write(ctx, websocket.MessageText, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, msg, err := ws.Read(ctx); err != nil || string(msg) != "hello" {
		t.Errorf("WebSocket echoed %q, %v", msg, err)
	}
}

func TestRawServices(t *testing.T) {
	l := Start(t, Config{IPv6: true})
	ctx := limited(t)
	for _, c := range []struct{ name, network, addr, send, want string }{
		{"TCP echo", "tcp", "198.51.100.20:4000", "ping", "ping"},
		{"TCP echo by name over the high port", "tcp", "denied.test:7", "ping", "ping"},
		{"UDP echo from the address that was asked", "udp", "198.51.100.20:4000", "ping", "ping"},
		{"UDP echo over IPv6", "udp", "[2001:db8:80::c633:6414]:4000", "ping", "ping"},
		{"UDP echo at a resolver's neighbour", "udp", "8.8.8.99:123", "ping", "ping"},
		{"SSH speaks first", "tcp", "198.51.100.20:22", "", "SSH-2.0"},
		{"SMTP speaks first", "tcp", "mail.allowed.test:25", "", "220 lab"},
		{"SMTP offers STARTTLS", "tcp", "mail.allowed.test:587", "EHLO me\r\n", "220 lab ESMTP\r\n250-lab\r\n250 STARTTLS"},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn, err := l.Dial(ctx, c.network, c.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conn, c.send); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(c.want))
			if _, err := io.ReadFull(conn, got); err != nil || string(got) != c.want {
				t.Errorf("got %q, %v, want %q", got, err, c.want)
			}
		})
	}
}

// ask sends one question from the host.
func ask(t *testing.T, l *Lab, network, server, name string, qtype uint16) *dns.Msg {
	t.Helper()
	c, err := l.Host().Dial(limited(t), strings.TrimSuffix(network, "-tls"), server)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	m := new(dns.Msg).SetQuestion(dns.Fqdn(name), qtype)
	r, _, err := (&dns.Client{Net: network, Timeout: 5 * time.Second}).ExchangeWithConn(m, &dns.Conn{Conn: c})
	if err != nil {
		t.Fatalf("ask %s for %s: %v", server, name, err)
	}
	return r
}

func TestNameServers(t *testing.T) {
	l := Start(t, Config{
		Domain: "sbx.test", IPv6: true,
		Names: map[string][]netip.Addr{"own.example": {netip.MustParseAddr("192.0.2.9")}},
	})
	for _, c := range []struct {
		name  string
		qtype uint16
		want  string // the last field of each answer
		rcode int
	}{
		{"allowed.test", dns.TypeA, "198.51.100.10", 0},
		{"ALLOWED.test", dns.TypeA, "198.51.100.10", 0},
		{"allowed.test", dns.TypeAAAA, "2001:db8:80::c633:640a", 0},
		{"shared-a.test", dns.TypeA, "198.51.100.30", 0},
		{"a.b.wild.test", dns.TypeA, "198.51.100.40", 0},
		{"wild.test", dns.TypeA, "198.51.100.41", 0},
		{"chain.test", dns.TypeA, "alias.test. allowed.test. 198.51.100.10", 0},
		{"alias-private.test", dns.TypeA, "private.test. 10.0.0.5", 0},
		{"private.test", dns.TypeAAAA, "", 0},
		{"mapped.test", dns.TypeAAAA, "::ffff:10.0.0.5", 0},
		{"metadata.google.internal", dns.TypeA, "169.254.169.254", 0},
		{"3000-abc.sbx.test", dns.TypeA, "203.0.113.2", 0},
		{"sbx.test", dns.TypeAAAA, "", 0},
		{"own.example", dns.TypeA, "192.0.2.9", 0},
		{"nothing.test", dns.TypeA, "", dns.RcodeNameError},
		{"x.allowed.test", dns.TypeA, "", dns.RcodeNameError},
		{"loop.test", dns.TypeA, "*", dns.RcodeServerFailure},
		{"servfail.test", dns.TypeA, "", dns.RcodeServerFailure},
	} {
		r := ask(t, l, "udp", "8.8.8.8:53", c.name, c.qtype)
		var got []string
		for _, rr := range r.Answer {
			fields := strings.Fields(rr.String())
			got = append(got, fields[len(fields)-1])
		}
		if s := strings.Join(got, " "); c.want != "*" && s != c.want || r.Rcode != c.rcode {
			t.Errorf("%s %s: got %q %s, want %q", c.name, dns.TypeToString[c.qtype], s, dns.RcodeToString[r.Rcode], c.want)
		}
	}
	for network, server := range map[string]string{"udp": "1.1.1.1:53", "tcp": "198.51.100.66:53"} {
		r := ask(t, l, network, server, "big.test", dns.TypeTXT)
		if r.Truncated != (network == "udp") {
			t.Errorf("big.test over %s: truncated is %v with %d answers", network, r.Truncated, len(r.Answer))
		}
	}
	first := ask(t, l, "udp", "[2001:4860:4860::8888]:53", "flip.test", dns.TypeA).Answer[0].String()
	second := ask(t, l, "udp", "8.8.8.8:53", "flip.test", dns.TypeA).Answer[0].String()
	if first == second {
		t.Errorf("flip.test answered %q twice", first)
	}
	ech := ask(t, l, "tcp", "8.8.8.8:53", "ech.test", dns.TypeHTTPS)
	if len(ech.Answer) != 1 || !strings.Contains(ech.Answer[0].String(), "ech=") {
		t.Errorf("ech.test has no encrypted hello: %v", ech.Answer)
	}
}

func TestRecorderSeesWhatArrives(t *testing.T) {
	l := Start(t, Config{IPv6: true})
	ctx := limited(t)
	rec := l.Recorder()

	mark := rec.Mark()
	c, err := l.Host().Dial(ctx, "tcp", "198.51.100.20:4000")
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range "cut into bytes" { // one segment each
		if _, err := c.Write([]byte(string(b))); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	c.Close()
	ask(t, l, "udp", "8.8.8.8:53", "Secret-Data.Tunnel.Attacker.test", dns.TypeTXT)
	ask(t, l, "tcp", "1.1.1.1:53", "wild.test", dns.TypeA)
	u, err := l.Host().Dial(ctx, "udp", "[2001:db8:80::1]:443")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if _, err := io.WriteString(u, "quic?"); err != nil {
		t.Fatal(err)
	}

	seen := rec.Since(mark)
	server := netip.MustParseAddr("198.51.100.20")
	if !seen.Contains([]byte("cut into bytes")) || seen.Contains([]byte("cut into pieces")) {
		t.Errorf("a payload cut into segments is not found:\n%s", seen.Payload())
	}
	if n := len(seen.To(server).Connects().ToPort(4000).Packets()); n != 1 {
		t.Errorf("saw %d SYNs, want 1", n)
	}
	if got := seen.To(netip.MustParseAddr("2001:db8:80::1")).Proto(ProtoUDP).Payload(); string(got) != "quic?" {
		t.Errorf("the datagram over IPv6 carried %q", got)
	}
	if !seen.AskedFor("attacker.test") || !seen.AskedFor("secret-data.tunnel.attacker.test") || !seen.AskedFor("wild.test") || seen.AskedFor("allowed.test") {
		t.Errorf("questions seen: %v", seen.Questions())
	}
	if err := seen.ToPort(25).None(); err != nil {
		t.Errorf("nothing was sent to port 25: %v", err)
	}
	if err := seen.To(server).None(); err == nil || !strings.Contains(err.Error(), "198.51.100.20:4000 [S]") {
		t.Errorf("None must list what arrived, got %v", err)
	}
	if err := rec.Since(rec.Mark()).None(); err != nil {
		t.Errorf("after everything: %v", err)
	}
	if n := rec.Lost(); n != 0 {
		t.Errorf("lost %d packets", n)
	}
}

func TestRecorderKeepsUpWithAnUpload(t *testing.T) {
	l := Start(t, Config{})
	mark := l.Recorder().Mark()
	c, err := l.Host().Dial(limited(t), "tcp", "198.51.100.20:7")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	sent := bytes.Repeat([]byte("0123456789abcdef"), 2<<20/16*8) // 16 MiB
	echoed := make(chan error, 1)
	go func() {
		_, err := io.CopyN(io.Discard, c, int64(len(sent)))
		echoed <- err
	}()
	if _, err := c.Write(sent); err != nil {
		t.Fatal(err)
	}
	if err := <-echoed; err != nil { // all of it has been over the wire, then
		t.Fatal(err)
	}
	seen := l.Recorder().Since(mark)
	if seen.Err() != nil || !bytes.Equal(seen.Payload(), sent) {
		t.Errorf("recorded %d of %d bytes, err %v", len(seen.Payload()), len(sent), seen.Err())
	}
}

func TestNothingCanLeave(t *testing.T) {
	l := Start(t, Config{IPv6: true})
	for n, want := range map[*Netns][]string{l.host: {"lo", hostLink}, l.internet: {"lo", internetLink}} {
		err := n.Do(func() error {
			links, err := net.Interfaces()
			if err != nil {
				return err
			}
			for _, link := range links {
				if !slices.Contains(want, link.Name) {
					t.Errorf("found link %s, want %v only", link.Name, want)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	err := l.internet.Do(func() error {
		for _, path := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
			b, err := os.ReadFile(path)
			if err != nil || strings.TrimSpace(string(b)) != "0" {
				t.Errorf("%s is %q, %v", path, b, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, unknown := range []string{"9.9.9.9:443", "[2620:fe::fe]:443", "172.16.0.1:80"} {
		begun := time.Now()
		c, err := l.Host().Dial(limited(t), "tcp", unknown)
		if err == nil {
			c.Close()
		}
		if !errors.Is(err, syscall.EHOSTUNREACH) || time.Since(begun) > 2*time.Second {
			t.Errorf("dial %s: %v after %v, want host unreachable at once", unknown, err, time.Since(begun))
		}
	}
}

func TestProgramsInTheHostUseItsNamesAndCertificates(t *testing.T) {
	l := Start(t, Config{Domain: "sbx.test"})
	ctx := limited(t)
	before, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"curl":    {"-sS", "--max-time", "10", "https://allowed.test/"},
		"node":    {"-e", `fetch("https://allowed.test/").then(r=>r.text()).then(console.log)`},
		"python3": {"-c", `import urllib.request as u; print(u.urlopen("https://allowed.test/").read().decode())`},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := exec.LookPath(name); err != nil {
				t.Skipf("%s is not installed", name)
			}
			out, err := l.HostCommand(ctx, name, args...).CombinedOutput()
			if err != nil || !strings.Contains(string(out), `"sni": "allowed.test"`) {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	after, err := os.ReadFile("/etc/resolv.conf")
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("the machine's resolv.conf changed: %q, %v", after, err)
	}
}

func TestProgramsInTheHostShareMountsAndProcesses(t *testing.T) {
	l := Start(t, Config{})
	ctx := limited(t)
	sh := func(script string) string {
		t.Helper()
		out, err := l.HostCommand(ctx, "sh", "-c", script).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	sh("mkdir /run/mine && mount -t tmpfs mine /run/mine && touch /run/mine/here && ip netns add named && setsid sleep 1000 </dev/null >/dev/null 2>&1 &")
	if got := sh("for i in 1 2 3 4 5 6 7 8 9; do ls /run/mine/here && break; sleep 0.1; done; ls /run/netns"); got != "/run/mine/here\nnamed" {
		t.Errorf("a later program sees %q", got)
	}
	sh("for i in 1 2 3 4 5 6 7 8 9; do grep -qx setsid /proc/[0-9]*/comm || break; sleep 0.1; done") // until it is what it starts
	if got := sh("ps -e -o comm= 2>/dev/null || cat /proc/[0-9]*/comm"); strings.Count(got, "sleep") != 1 {
		t.Errorf("the daemon is not seen by a later program: %q", got)
	}
	if _, err := os.Stat("/run/mine"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the machine sees the lab's /run: %v", err)
	}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if got := sh("pwd"); got != wd {
		t.Errorf("a program starts in %s, want %s", got, wd)
	}
	if err := l.HostCommand(ctx, "true").Cmd.Run(); !errors.Is(err, errOutside) {
		t.Errorf("the embedded exec.Cmd must not run outside the lab, got %v", err)
	}
	if err := l.HostCommand(ctx, "no-such-program").Run(); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("got %v, want not found", err)
	}
	var exit *exec.ExitError
	if out, err := l.HostCommand(ctx, "sh", "-c", "echo out; echo err >&2; exit 3").Output(); !errors.As(err, &exit) ||
		exit.ExitCode() != 3 || string(out) != "out\n" || string(exit.Stderr) != "err\n" {
		t.Errorf("got %q, %v", out, err)
	}
}

func TestNothingIsLeftAfterClose(t *testing.T) {
	Privileged(t)
	l, err := New(limited(t), Config{IPv6: true})
	if err != nil {
		t.Fatal(err)
	}
	ids := namespaces(t, l)
	daemon := l.HostCommand(context.Background(), "sh", "-c", "setsid sleep 1000 & sleep 1000")
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	dir := l.cfg.Dir
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("closing twice: %v", err)
	}
	if err := daemon.Wait(); err == nil {
		t.Error("a program outlived the lab")
	}
	if err := l.HostCommand(context.Background(), "true").Run(); err == nil {
		t.Error("a program started in a closed lab")
	}
	gone(t, ids)
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the lab's folder is still there: %v", err)
	}
}

func TestNothingIsLeftAfterBeingKilled(t *testing.T) {
	Privileged(t)
	child := exec.CommandContext(limited(t), "/proc/self/exe")
	child.Env = append(os.Environ(), crashVariable+"="+t.TempDir())
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	child.Stderr = os.Stderr
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	var ids []string
	if err := json.NewDecoder(out).Decode(&ids); err != nil {
		t.Fatal("the child said nothing:", err)
	}
	if n := holders(t, ids); n == 0 {
		t.Fatal("nobody holds the child's namespaces: this test would find nothing")
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // killed
	gone(t, ids)
}

// runUntilKilled is the child's part: a lab with a daemon and a named namespace
// in it. It prints the namespaces.
func runUntilKilled() {
	l, err := New(context.Background(), Config{Dir: os.Getenv(crashVariable)})
	if err == nil {
		err = l.HostCommand(context.Background(), "sh", "-c", "ip netns add named; setsid sleep 1000 </dev/null >/dev/null 2>&1 &").Run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	ids, err := namespaceIDs(l)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(ids)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	time.Sleep(time.Minute) // much longer than the parent takes
	os.Exit(1)
}

func namespaces(t *testing.T, l *Lab) []string {
	t.Helper()
	ids, err := namespaceIDs(l)
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

// namespaceIDs are the lab's namespaces as /proc shows them: "net:[4026532281]".
func namespaceIDs(l *Lab) ([]string, error) {
	var ids []string
	for _, n := range []*Netns{l.host, l.internet} {
		id, err := os.Readlink(n.Path())
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	for _, kind := range []string{"mnt", "pid"} {
		id, err := os.Readlink("/proc/" + strconv.Itoa(l.hostSide.first.Process.Pid) + "/ns/" + kind)
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// holders counts the threads in the namespaces, the descriptors of them and the
// mounts that pin them, on the whole machine.
func holders(t *testing.T, ids []string) int {
	t.Helper()
	n := 0
	for _, pattern := range []string{"/proc/[0-9]*/task/*/ns/*", "/proc/[0-9]*/fd/*"} {
		links, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range links {
			if id, err := os.Readlink(link); err == nil && slices.Contains(ids, id) {
				n++
			}
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		n += strings.Count(string(mounts), id)
	}
	return n
}

// gone waits until nobody holds the namespaces, a few seconds at most.
func gone(t *testing.T, ids []string) {
	t.Helper()
	n := 0
	for range 50 {
		if n = holders(t, ids); n == 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Errorf("namespaces %v are still held in %d places", ids, n)
}

func TestRunEndsWithItsContextAndDescribeTellsWhatIsThere(t *testing.T) {
	Privileged(t)
	l, err := New(limited(t), Config{Dir: t.TempDir(), Domain: "sbx.test"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"203.0.113.2", "*.sbx.test", "allowed.test", "198.51.100.10", l.CAFile()} {
		if !strings.Contains(l.Describe(), want) {
			t.Errorf("the description has no %q:\n%s", want, l.Describe())
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- l.Run(ctx) }()
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestConfigErrorsLeaveNothing(t *testing.T) {
	Privileged(t)
	before := descriptors(t)
	for name, cfg := range map[string]Config{
		"a folder that is not there": {Dir: "/nonexistent/lab"},
		"a name that is none":        {Dir: t.TempDir(), Names: map[string][]netip.Addr{"a..b": nil}},
	} {
		_, err := New(limited(t), cfg)
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if after := descriptors(t); after > before+2 { // the runtime's own poller
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func TestFoldersOfKilledLabsAreRemoved(t *testing.T) {
	Privileged(t)
	t.Setenv("TMPDIR", t.TempDir())
	live, err := New(limited(t), Config{})
	if err != nil {
		t.Fatal(err)
	}
	left, err := os.MkdirTemp("", dirPattern)
	if err != nil {
		t.Fatal(err)
	}
	long := time.Now().Add(-time.Hour)
	for _, dir := range []string{left, live.cfg.Dir} {
		if err := os.Chtimes(dir, long, long); err != nil {
			t.Fatal(err)
		}
	}
	next, err := New(limited(t), Config{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder of a killed lab is still there: %v", err)
	}
	if _, err := os.Stat(live.CAFile()); err != nil {
		t.Errorf("the folder of a living lab is gone: %v", err)
	}
	if err := errors.Join(live.Close(), next.Close()); err != nil {
		t.Error(err)
	}
}
