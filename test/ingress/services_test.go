package ingress_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
)

func TestPublicURLs(t *testing.T) {
	s := newLive(t)
	for _, tc := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"answers of the server's own, for programs and people", s.answers},
		{"services are reached whatever address they listen on", s.listeners},
		{"a service that is still starting is waited for", s.starting},
		{"a kill in the middle of a stream resets the client", s.killed},
		{"an address used again has no connection of its former owner", s.reused},
		{"large bodies take constant memory", s.large},
	} {
		t.Run(tc.name, tc.run)
	}
}

func (s *live) listeners(t *testing.T) {
	g := s.guest(t, client.CreateOptions{})
	addrs := []string{"0.0.0.0:8001", "[::]:8002", "127.0.0.1:8003", "[::1]:8004"}
	g.serve(s, addrs...)
	s.bothProtocols(t, func(t *testing.T, c *http.Client) {
		for i, addr := range addrs {
			for range 2 { // the second on what was learnt from the first
				if code, body := fetch(t, c, g.url(8001+i)); code != http.StatusOK || body != g.ID+" at "+addr {
					t.Errorf("%s: %d %s", addr, code, body)
				}
			}
		}
	})
}

// starting asks for a service's URL in the same breath as it starts the service. A
// busy machine may take longer than the server is patient, so one success of a few
// is enough; without any waiting there is none.
func (s *live) starting(t *testing.T) {
	g := s.guest(t, client.CreateOptions{})
	g.install(s)
	c := s.web(t, true)
	waited := false
	for port := 8010; port < 8015 && !waited; port++ {
		p, err := g.Commands.Start(t.Context(), fmt.Sprintf("sleep 0.2; exec %s starter 127.0.0.1:%d", servicePath, port), client.RunOptions{})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		code, body := fetch(t, c, g.url(port))
		t.Logf("port %d: %d after %s", port, code, time.Since(began))
		if waited = code == http.StatusOK; waited && body != fmt.Sprintf("starter at 127.0.0.1:%d", port) {
			t.Errorf("got %s", body)
		}
		if waited { // the command has opened its port: nothing else is expected of it
			began = time.Now()
			if code, body := fetch(t, c, g.url(9)); code != http.StatusBadGateway {
				t.Errorf("a closed port: %d %s", code, body)
			}
			t.Logf("a closed port took %s", time.Since(began))
		}
		if err := p.Kill(t.Context()); err != nil {
			t.Error(err)
		}
		p.Close()
	}
	if !waited {
		t.Error("no service was waited for")
	}
}

// stream opens a never-ending answer and returns it with its first lines read.
func (g *guest) stream(c *http.Client, port int) (*http.Response, *bufio.Reader) {
	g.t.Helper()
	req, err := http.NewRequestWithContext(g.t.Context(), http.MethodGet, g.url(port)+"stream", nil)
	if err != nil {
		g.t.Fatal(err)
	}
	res, err := c.Do(req)
	if err != nil {
		g.t.Fatal(err)
	}
	lines := bufio.NewReader(res.Body)
	for range 3 {
		if line, err := lines.ReadString('\n'); err != nil || line != g.ID+"\n" {
			g.t.Fatalf("stream of %s: %q %v", g.ID, line, err)
		}
	}
	return res, lines
}

// cutOff reads what is left of a stream: only its own lines, then a failure that
// cannot be taken for its end.
func (g *guest) cutOff(lines io.Reader) {
	g.t.Helper()
	rest, err := io.ReadAll(io.LimitReader(lines, 1<<20))
	if err == nil || errors.Is(err, context.DeadlineExceeded) {
		g.t.Errorf("the stream of a killed sandbox ended with %v", err)
	}
	if foreign := strings.ReplaceAll(string(rest), g.ID+"\n", ""); !strings.HasPrefix(g.ID+"\n", foreign) {
		g.t.Errorf("the stream of %s brought %q", g.ID, foreign)
	}
}

func (s *live) killed(t *testing.T) {
	g := s.guest(t, client.CreateOptions{})
	g.serve(s, "0.0.0.0:3000", "127.0.0.1:3001")
	type open struct {
		name  string
		lines io.Reader
	}
	var streams []open
	for name, c := range map[string]*http.Client{"HTTP/1.1": s.web(t, false), "HTTP/2": s.web(t, true)} {
		for _, port := range []int{3000, 3001} {
			res, lines := g.stream(c, port)
			defer res.Body.Close()
			streams = append(streams, open{fmt.Sprintf("%s to port %d", name, port), lines})
		}
	}
	began := time.Now()
	done := make(chan time.Duration, len(streams))
	for _, o := range streams {
		go func() {
			g.cutOff(o.lines)
			done <- time.Since(began)
		}()
	}
	g.kill()
	t.Logf("killed within %s", time.Since(began))
	for range streams {
		if took := <-done; took > 5*time.Second {
			t.Errorf("a client noticed after %s", took)
		} else {
			t.Logf("a client noticed %s after the kill began", took)
		}
	}
}

// reused kills a sandbox whose connections are in use and kept, and starts another
// with a service on the same port; with INGRESS_REUSE at the same address.
func (s *live) reused(t *testing.T) {
	former := s.guest(t, client.CreateOptions{})
	former.serve(s, "0.0.0.0:3000")
	address := former.address()
	clients := []*http.Client{s.web(t, false), s.web(t, true)}
	var open []io.Reader
	for _, c := range clients {
		fetch(t, c, former.url(3000)) // a connection to keep, on either side of the server
		res, lines := former.stream(c, 3000)
		defer res.Body.Close()
		open = append(open, lines)
	}
	former.kill()
	for _, lines := range open {
		former.cutOff(lines)
	}
	next := s.after(t, address)
	next.serve(s, "0.0.0.0:3000")
	for _, c := range clients {
		for range 3 {
			if code, body := fetch(t, c, former.url(3000)); code != http.StatusBadGateway || !strings.Contains(body, "The sandbox was not found") {
				t.Errorf("the former sandbox's URL: %d %s", code, body)
			}
			if code, body := fetch(t, c, next.url(3000)); code != http.StatusOK || body != next.ID+" at 0.0.0.0:3000" {
				t.Errorf("the next sandbox's URL: %d %s", code, body)
			}
		}
	}
}

// after returns a sandbox started after one with this address was killed. Addresses
// go round and rest for a minute, so the next one has another; with INGRESS_REUSE
// sandboxes are started until one has the same.
func (s *live) after(t *testing.T, address string) *guest {
	t.Helper()
	if os.Getenv("INGRESS_REUSE") == "" {
		g := s.guest(t, client.CreateOptions{})
		if g.address() == address {
			t.Errorf("%s was used again at once", address)
		}
		return g
	}
	began := time.Now()
	for tries := 1; time.Since(began) < 4*time.Minute; tries++ {
		sb, err := s.Create(t.Context(), client.CreateOptions{})
		if err != nil {
			time.Sleep(time.Second) // every address is in use or resting
			continue
		}
		g := &guest{Sandbox: sb, t: t}
		t.Cleanup(g.kill)
		if g.address() == address {
			t.Logf("%s was used again after %s, by sandbox %d", address, time.Since(began).Round(time.Second), tries)
			return g
		}
		g.kill()
	}
	t.Fatalf("no sandbox got %s again", address)
	return nil
}

// large moves INGRESS_SIZE octets (256 MiB) each way over each protocol and watches
// what the server holds of memory meanwhile.
func (s *live) large(t *testing.T) {
	size := int64(256 << 20)
	if v := os.Getenv("INGRESS_SIZE"); v != "" {
		n, err := strconv.ParseInt(strings.TrimSuffix(v, "MiB"), 10, 32)
		if err != nil {
			t.Fatalf("INGRESS_SIZE is %q: use a number of MiB, such as 2048MiB", v)
		}
		size = n << 20
	}
	g := s.guest(t, client.CreateOptions{})
	g.serve(s, "0.0.0.0:3000")
	before := s.resident(t)
	s.bothProtocols(t, func(t *testing.T, c *http.Client) {
		c.Timeout = 10 * time.Minute
		c.Transport.(*http.Transport).DisableCompression = true
		for _, way := range []struct {
			name string
			move func(ctx context.Context, c *http.Client, size int64) error
		}{{"down", g.download}, {"up", g.upload}} {
			began := time.Now()
			peak := s.watch(t, func() error { return way.move(t.Context(), c, size) })
			took := time.Since(began)
			t.Logf("%s: %d MiB in %s, %.0f MiB/s; the server held %d MiB before and %d MiB at most", way.name,
				size>>20, took.Round(time.Millisecond), float64(size>>20)/took.Seconds(), before>>20, peak>>20)
			if peak > before+(64<<20) {
				t.Errorf("%s: the server grew from %d to %d MiB", way.name, before>>20, peak>>20)
			}
		}
	})
	t.Logf("the server holds %d MiB afterwards", s.resident(t)>>20)
}

func (g *guest) download(ctx context.Context, c *http.Client, size int64) error {
	return g.move(ctx, c, http.MethodGet, "bytes?n="+strconv.FormatInt(size, 10), nil, func(body io.Reader) error {
		if n, err := io.Copy(io.Discard, body); n != size || err != nil {
			return fmt.Errorf("downloaded %d of %d: %w", n, size, err)
		}
		return nil
	})
}

// upload sends a body of unknown length.
func (g *guest) upload(ctx context.Context, c *http.Client, size int64) error {
	return g.move(ctx, c, http.MethodPost, "count", io.LimitReader(zeros{}, size), func(body io.Reader) error {
		if said, err := io.ReadAll(body); string(said) != fmt.Sprintln(size, nil) || err != nil {
			return fmt.Errorf("uploaded %d, the service says %q: %w", size, said, err)
		}
		return nil
	})
}

func (g *guest) move(ctx context.Context, c *http.Client, method, path string, body io.Reader, check func(io.Reader) error) error {
	req, err := http.NewRequestWithContext(ctx, method, g.url(3000)+path, body)
	if err != nil {
		return err
	}
	res, err := c.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s /%s: %s", method, path, res.Status)
	}
	return check(res.Body)
}

// watch returns the most that the server held of memory while f ran.
func (s *live) watch(t *testing.T, f func() error) (peak int64) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	for tick := time.Tick(50 * time.Millisecond); ; {
		peak = max(peak, s.resident(t))
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
			return peak
		case <-tick:
		}
	}
}

// resident is what the server's process holds of memory.
func (s *live) resident(t *testing.T) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		var kib int64
		if n, _ := fmt.Sscanf(line, "VmRSS: %d kB", &kib); n == 1 {
			return kib << 10
		}
	}
	t.Fatal("the server's process has no VmRSS")
	return 0
}
