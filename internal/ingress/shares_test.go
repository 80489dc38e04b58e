package ingress

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// hanging is a service that answers when the test is over.
func hanging(t *testing.T) http.Handler {
	over := make(chan struct{})
	t.Cleanup(func() { close(over) })
	return http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-over:
		case <-r.Context().Done():
		}
	})
}

// hold keeps n requests under way and returns the codes of those that were answered.
func hold(t *testing.T, c *http.Client, url string, n int, header ...string) (answered chan int) {
	answered = make(chan int, n)
	var wg sync.WaitGroup
	ctx := t.Context()
	for range n {
		req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(header); i += 2 {
			req.Header.Add(header[i], header[i+1])
		}
		wg.Go(func() {
			if resp, err := c.Do(req); err == nil {
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				answered <- resp.StatusCode
			}
		})
	}
	t.Cleanup(wg.Wait)
	return answered
}

// What the heads of requests take of memory is bounded by source and in all, however
// many connections they are on.
func TestHeadsOfRequestsAreBounded(t *testing.T) {
	for _, tt := range []struct {
		name       string
		source, of int64
		want       string
	}{
		{"of a source", 1 << 20, 64 << 20, "from your address are too large"},
		{"of all", 64 << 20, 1 << 20, "from all clients together are too large"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, func(c *Config) { c.Limits.HeadsPerSource, c.Limits.Heads = tt.source, tt.of })
			a := l.sandbox(idA)
			port := a.serve(hanging(t))
			url := "https://" + a.host(port) + "/"
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			refused := make(chan int, 400)
			for range 4 { // connections
				answered := hold(t, l.client(true), url, 100, "X-Large", strings.Repeat("x", 30<<10))
				go func() {
					for code := range answered {
						refused <- code
					}
				}()
				t.Cleanup(func() { close(answered) })
			}
			eventually(t, "all but what fits are answered", func() bool { return len(refused) >= 400-35 })
			if held := l.in.heads.held(); held > 1<<20 {
				t.Errorf("%d bytes are held", held)
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			t.Logf("the heap grew by %d KiB", (int64(after.HeapAlloc)-int64(before.HeapAlloc))>>10)
			for range len(refused) {
				if code := <-refused; code != 429 {
					t.Fatalf("got %d", code)
				}
			}
			resp, body := get(t, l.client(true), url, "X-Large", strings.Repeat("x", 60<<10))
			if resp.StatusCode != 429 || !strings.Contains(body, tt.want) || resp.Header.Get("Retry-After") == "" {
				t.Errorf("got %d %s", resp.StatusCode, body)
			}
		})
	}
	t.Run("what has ended is given back", func(t *testing.T) {
		l := newLab(t)
		a := l.sandbox(idA)
		port := a.serve(echo)
		l.both(t, func(t *testing.T, c *http.Client) {
			get(t, c, "https://"+a.host(port)+"/")
			get(t, c, "https://"+a.host(1)+"/")
		})
		eventually(t, "nothing is held", func() bool {
			l.in.heads.mu.Lock()
			defer l.in.heads.mu.Unlock()
			return l.in.heads.used == 0 && len(l.in.heads.source) == 0
		})
		if l.in.exchanges.Used() != 0 {
			t.Errorf("%d exchanges", l.in.exchanges.Used())
		}
	})
}

// A client that a trusted proxy does not name is in no source's count.
func TestAClientWithoutAnAddressIsServed(t *testing.T) {
	l := newLab(t, func(c *Config) { c.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} })
	a := l.sandbox(idA)
	port := a.serve(echo)
	l.both(t, func(t *testing.T, c *http.Client) {
		if resp, body := get(t, c, "https://"+a.host(port)+"/", "X-Forwarded-For", "_hidden"); resp.StatusCode != 200 {
			t.Errorf("got %d %s", resp.StatusCode, body)
		}
	})
	eventually(t, "nothing is held", func() bool { return l.in.heads.held() == 0 && l.in.exchanges.Used() == 0 })
}

// One client does not shut out the others of a sandbox, nor one key's sandboxes those
// of another.
func TestConnectionsAreSharedOut(t *testing.T) {
	l := newLab(t, func(c *Config) {
		c.Limits.ConnsPerSandbox, c.Limits.Exchanges = 400, 600
	})
	own := func(owner string) func(*Target) { return func(x *Target) { x.Owner = owner } }
	a, b, other := l.sandbox(idA, own("one")), l.sandbox(idB, own("one")), l.sandbox("icccc", own("two"))
	port, pb, po := a.serve(hanging(t)), b.serve(echo), other.serve(echo)
	hold(t, l.client(true), "https://"+a.host(port)+"/", 100)
	eventually(t, "a quarter is under way", func() bool { return l.in.underway() == 100 })
	if resp, body := get(t, l.client(true), "https://"+a.host(port)+"/"); resp.StatusCode != 429 || !strings.Contains(body, "Your address has too many open connections") {
		t.Errorf("beyond a quarter of the sandbox's: got %d %s", resp.StatusCode, body)
	}
	// The rest of the key's share, as other sources would hold it.
	if err := l.in.exchanges.Take("one", idB, 200); err != nil {
		t.Fatal(err)
	}
	if resp, body := get(t, l.client(true), "https://"+b.host(pb)+"/"); resp.StatusCode != 429 || !strings.Contains(body, "this API key holds its share of") {
		t.Errorf("beyond the key's share: got %d %s", resp.StatusCode, body)
	}
	if resp, body := get(t, l.client(true), "https://"+other.host(po)+"/"); resp.StatusCode != 200 {
		t.Errorf("another key's: got %d %s", resp.StatusCode, body)
	}
	l.in.exchanges.Give("one", idB, 200)
	if resp, body := get(t, l.client(true), "https://"+b.host(pb)+"/"); resp.StatusCode != 200 {
		t.Errorf("when there is room again: got %d %s", resp.StatusCode, body)
	}
}

func TestMethodsAreTokens(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	host := a.host(a.serve(echo))
	for method, want := range map[string]string{"GET": "200", "REPORT": "200", "G T": "400", "GET\r\nX": "400", "GET /x HTTP/1.1": "400", "\xff": "400"} {
		c, err := tls.Dial("tcp", l.https, &tls.Config{RootCAs: l.roots, ServerName: host, NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(10 * time.Second))
		io.WriteString(c, http2.ClientPreface)
		fr := http2.NewFramer(c, c)
		fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
		fr.WriteSettings()
		var block strings.Builder
		enc := hpack.NewEncoder(&block)
		for _, f := range [][2]string{{":method", method}, {":scheme", "https"}, {":authority", host}, {":path", "/"}} {
			enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
		}
		fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte(block.String()), EndStream: true, EndHeaders: true})
		for {
			f, err := fr.ReadFrame()
			if err != nil {
				t.Errorf("%q: %v", method, err)
				break
			}
			if h, ok := f.(*http2.MetaHeadersFrame); ok {
				if got := h.PseudoValue("status"); got != want {
					t.Errorf("%q: got %s, want %s", method, got, want)
				}
				break
			}
			if r, ok := f.(*http2.RSTStreamFrame); ok {
				if want == "200" {
					t.Errorf("%q: %v", method, fmt.Sprint(r))
				}
				break
			}
		}
		c.Close()
	}
}
