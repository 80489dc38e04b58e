package ingress

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// wsEcho is a WebSocket service that sends back what it gets.
var wsEcho = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
	if err != nil {
		return
	}
	defer c.CloseNow()
	c.SetReadLimit(-1)
	for {
		kind, b, err := c.Read(r.Context())
		if err != nil {
			return
		}
		if err := c.Write(r.Context(), kind, b); err != nil {
			return
		}
	}
})

func TestWebSocket(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA, linked)
	port := a.serve(wsEcho)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	client := l.client(false)
	client.Timeout = 0
	opts := &websocket.DialOptions{HTTPClient: client}
	if _, resp, err := websocket.Dial(ctx, "wss://"+a.host(port)+"/", opts); err == nil || resp.StatusCode != 403 {
		t.Fatalf("upgrade without a token: %v %v", resp, err)
	}
	c, _, err := websocket.Dial(ctx, "wss://"+a.host(port)+"/?cordon_token="+link(a.t, port, time.Now().Add(time.Minute)), opts)
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseNow()
	c.SetReadLimit(-1)
	for _, n := range []int{0, 1, 500, 512, 4 << 10, 100 << 10, 3 << 20, 7} {
		want := bytes.Repeat([]byte{byte(n)}, n)
		if err := c.Write(ctx, websocket.MessageBinary, want); err != nil {
			t.Fatal(err)
		}
		if _, got, err := c.Read(ctx); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes: got %d, %v", n, len(got), err)
		}
	}
	if n := l.in.underway(); n != 1 {
		t.Errorf("%d under way", n)
	}
	c.Close(websocket.StatusNormalClosure, "")
	eventually(t, "the tunnel to end", func() bool { return l.in.underway() == 0 })
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second) // the race detector makes everything slow
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func TestTunnelKeepsBytesSentEarlyAndHalfClose(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	port := a.raw(func(c net.Conn, br *bufio.Reader) {
		req, err := http.ReadRequest(br)
		if err != nil || req.Header.Get("Upgrade") != "chat" || req.Header.Get("Connection") != "Upgrade" {
			return
		}
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: chat\r\nX-A: b\r\n\r\nhello ")
		b, _ := io.ReadAll(br) // until the client's half close
		c.Write(b)
	})
	c := l.dialPlain(t)
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: keep-alive, Upgrade\r\nUpgrade: chat\r\n\r\nearly ", a.host(port))
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, nil)
	if err != nil || resp.StatusCode != 101 || resp.Header.Get("X-A") != "b" {
		t.Fatal(resp, err)
	}
	io.WriteString(c, "late")
	c.CloseWrite()
	if got, err := io.ReadAll(br); err != nil || string(got) != "hello early late" {
		t.Errorf("%v %q", err, got)
	}
}

// A request with a body may ask for another protocol: the body goes first, framed as
// it came, and what follows it is the tunnel's, however the octets are cut.
func TestAnUpgradeMayHaveABody(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	port := a.raw(func(c net.Conn, br *bufio.Reader) {
		req, err := http.ReadRequest(br)
		if err != nil || req.Method != "POST" || req.Header.Get("Upgrade") != "tcp" || req.Header.Get("Connection") != "Upgrade" {
			io.WriteString(c, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nnot asked to switch")
			return
		}
		body, err := io.ReadAll(req.Body)
		if err != nil {
			return
		}
		fmt.Fprintf(c, "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n%d ", len(body))
		io.Copy(c, br)
	})
	large := strings.Repeat("b", 200<<10)
	for name, body := range map[string]string{
		"a short body":                   "Content-Length: 4\r\n\r\nbody",
		"a chunked body":                 "Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
		"a long body":                    fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(large), large),
		"a body that is to be asked for": "Content-Length: 4\r\nExpect: 100-continue\r\n\r\nbody",
	} {
		t.Run(name, func(t *testing.T) {
			c := l.dialPlain(t)
			c.SetDeadline(time.Now().Add(10 * time.Second))
			fmt.Fprintf(c, "POST /exec/start HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n%searly ", a.host(port), body)
			br := bufio.NewReader(c)
			resp, err := http.ReadResponse(br, nil)
			if err == nil && resp.StatusCode == 100 {
				resp, err = http.ReadResponse(br, nil)
			}
			if err != nil || resp.StatusCode != 101 {
				t.Fatalf("got %v, %v", resp, err)
			}
			io.WriteString(c, "late")
			c.CloseWrite()
			want := "4 early late"
			if name == "a long body" {
				want = fmt.Sprint(len(large), " early late")
			}
			if got, err := io.ReadAll(br); err != nil || string(got) != want {
				t.Errorf("%v %q, want %q", err, got, want)
			}
		})
	}
	t.Run("a service that does not switch leaves what follows a request of its own", func(t *testing.T) {
		plain := a.serve(echo)
		hidden := "GET /second HTTP/1.1\r\nHost: " + a.host(plain) + "\r\nConnection: close\r\n\r\n"
		got := l.plain(t, "POST /first HTTP/1.1\r\nHost: "+a.host(plain)+"\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 4\r\n\r\nbody"+hidden)
		if strings.Count(got, "HTTP/1.1 200") != 2 || !strings.Contains(got, "GET /second") || !strings.Contains(got, "body=4") {
			t.Errorf("got %s", got)
		}
	})
	t.Run("a body that is cut short opens nothing", func(t *testing.T) {
		c := l.dialPlain(t)
		fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 40\r\n\r\nbody", a.host(port))
		c.CloseWrite()
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if got, _ := io.ReadAll(c); strings.Contains(string(got), "101") {
			t.Errorf("got %s", got)
		}
	})
	t.Run("a WebSocket has no body", func(t *testing.T) {
		got := l.plain(t, "GET / HTTP/1.1\r\nHost: "+a.host(port)+"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 4\r\n\r\nbody")
		if !strings.Contains(got, "not asked to switch") {
			t.Errorf("got %s", got)
		}
	})
}

func TestUpgradesThatDoNotPass(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	port := a.serve(echo)
	for _, upgrade := range []string{"h2c", "HTTP/2.0", "h2c, websocket", "TLS/1.2"} {
		out := l.plain(t, "GET / HTTP/1.1\r\nHost: "+a.host(port)+"\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: "+upgrade+"\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n")
		if !strings.HasPrefix(out, "HTTP/1.1 200") || strings.Contains(out, "upgrade=") || strings.Contains(out, "http2-settings=") {
			t.Errorf("%s: %s", upgrade, out)
		}
	}
	unasked := a.raw(func(c net.Conn, br *bufio.Reader) {
		http.ReadRequest(br)
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: chat\r\n\r\n")
	})
	for _, h := range []string{"", "Connection: upgrade\r\nUpgrade: websocket\r\n"} {
		if out := l.plain(t, "GET / HTTP/1.1\r\nHost: "+a.host(unasked)+"\r\n"+h+"\r\n"); !strings.HasPrefix(out, "HTTP/1.1 502") {
			t.Errorf("%q: %s", h, out)
		}
	}
}

func TestEventsArriveOneByOne(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	next := make(chan struct{})
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		w.(http.Flusher).Flush()
		for i := range 3 {
			<-next
			fmt.Fprintf(w, "data: %d\n\n", i)
			w.(http.Flusher).Flush()
		}
	}))
	l.both(t, func(t *testing.T, c *http.Client) {
		resp, err := c.Get("https://" + a.host(port) + "/")
		if err != nil {
			t.Fatal(err) // the head came before the first event
		}
		defer resp.Body.Close()
		br := bufio.NewReader(resp.Body)
		for i := range 3 {
			next <- struct{}{}
			if line, err := br.ReadString('\n'); err != nil || line != fmt.Sprintf("data: %d\n", i) {
				t.Fatalf("%q %v", line, err)
			}
			br.ReadString('\n')
		}
	})
}

func TestTrailersBothWays(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Known")
		echo(w, r)
		w.Header().Set("X-Known", "1")
		w.Header().Set(http.TrailerPrefix+"X-Surprise", "2")
	}))
	l.both(t, func(t *testing.T, c *http.Client) {
		req, _ := http.NewRequest("POST", "https://"+a.host(port)+"/", io.MultiReader(strings.NewReader("abc")))
		req.Trailer = http.Header{"X-Sum": {"9"}, "X-Forwarded-For": {"6.6.6.6"}, "Cookie": {"a=b"}}
		resp, body := do(t, c, req)
		if !strings.Contains(body, "trailer x-sum=9\n") || strings.Contains(body, "6.6.6.6") || strings.Contains(body, "cookie") || !strings.Contains(body, "body=3") {
			t.Errorf("service saw %s", body)
		}
		if resp.Trailer.Get("X-Known") != "1" || resp.Trailer.Get("X-Surprise") != "2" {
			t.Errorf("client saw %v", resp.Trailer)
		}
	})
}

func TestInterimAnswersAndContinue(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength == 0 {
			w.Header().Set("Link", "</x>")
			w.WriteHeader(http.StatusEarlyHints)
		}
		if r.URL.Path == "/refuse" {
			w.WriteHeader(http.StatusExpectationFailed)
			return
		}
		echo(w, r)
	}))
	l.both(t, func(t *testing.T, c *http.Client) {
		for _, path := range []string{"/", "/refuse"} {
			var hints, continued, reads atomic.Int32
			req, _ := http.NewRequest("POST", "https://"+a.host(port)+path, readerFunc(func(b []byte) (int, error) {
				if reads.Add(1) > 1 {
					return 0, io.EOF
				}
				return copy(b, "abc"), nil
			}))
			req = req.WithContext(httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
				Got100Continue: func() { continued.Add(1) },
				Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
					if code == 103 {
						hints.Add(1)
					}
					return nil
				},
			}))
			start := time.Now()
			hinted := req.Clone(req.Context())
			hinted.Body = nil
			if resp, _ := do(t, c, hinted); resp.StatusCode/100 == 1 || hints.Load() != 1 {
				t.Errorf("got %d after %d hints", resp.StatusCode, hints.Load())
			}
			if path == "/refuse" && !c.Transport.(*http.Transport).Protocols.HTTP1() {
				continue // net/http's HTTP/2 server hides Expect, and asks for the body when it is first read
			}
			hints.Store(0)
			continued.Store(0)
			reads.Store(0)
			resp, body := do(t, c, req, "Expect", "100-continue")
			if path == "/" && (resp.StatusCode != 200 || !strings.Contains(body, "body=3") || continued.Load() != 1) {
				t.Errorf("got %d %s, told to continue %d times", resp.StatusCode, body, continued.Load())
			}
			if path == "/refuse" && (resp.StatusCode != 417 || continued.Load() != 0) {
				t.Errorf("refused: got %d, told to continue %d times", resp.StatusCode, continued.Load())
			}
			if time.Since(start) > time.Second {
				t.Errorf("took %v", time.Since(start))
			}
		}
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

func TestLargeBodiesTakeConstantMemory(t *testing.T) {
	const size = 64 << 20
	l := newLab(t)
	a := l.sandbox(idA)
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		w.Header().Set("X-Got", strconv.FormatInt(n, 10))
		if r.Method == "GET" {
			io.CopyN(w, zeros{}, size)
		}
	}))
	before := heap()
	l.both(t, func(t *testing.T, c *http.Client) {
		c.Timeout = time.Minute
		resp, err := c.Get("https://" + a.host(port) + "/")
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if err != nil || n != size {
			t.Errorf("down: %d %v", n, err)
		}
		resp, err = c.Post("https://"+a.host(port)+"/", "", io.LimitReader(zeros{}, size))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.Header.Get("X-Got") != strconv.Itoa(size) {
			t.Errorf("up: %s", resp.Header.Get("X-Got"))
		}
	})
	if after := heap(); after > before+(16<<20) {
		t.Errorf("heap grew from %d to %d MiB", before>>20, after>>20)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapInuse
}

func TestAnswerBeforeTheBodyIsRead(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	port := a.raw(func(c net.Conn, br *bufio.Reader) {
		http.ReadRequest(br)
		io.WriteString(c, "HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
	})
	l.both(t, func(t *testing.T, c *http.Client) {
		resp, err := c.Post("https://"+a.host(port)+"/", "", io.LimitReader(zeros{}, 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if b, err := io.ReadAll(resp.Body); resp.StatusCode != 413 || string(b) != "big" || err != nil {
			t.Errorf("got %d %q %v", resp.StatusCode, b, err)
		}
	})
	// What follows an unread body must not become a request.
	out := l.plain(t, "POST / HTTP/1.1\r\nHost: "+a.host(port)+"\r\nContent-Length: 100000\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: "+a.host(port)+"\r\n\r\n")
	if n := strings.Count(out, "HTTP/1.1 "); n != 1 {
		t.Errorf("%d answers: %s", n, out)
	}
}

func TestFullDuplex(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		rc.EnableFullDuplex()
		rc.Flush()
		b := make([]byte, 4)
		for {
			n, err := r.Body.Read(b)
			w.Write(bytes.ToUpper(b[:n]))
			rc.Flush()
			if err != nil {
				return
			}
		}
	}))
	l.both(t, func(t *testing.T, c *http.Client) {
		pr, pw := io.Pipe()
		req, _ := http.NewRequest("POST", "https://"+a.host(port)+"/", pr)
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b := make([]byte, 2)
		for _, word := range []string{"ab", "cd", "ef"} {
			io.WriteString(pw, word)
			if _, err := io.ReadFull(resp.Body, b); err != nil || string(b) != strings.ToUpper(word) {
				t.Fatalf("%q %v", b, err)
			}
		}
		pw.Close()
		if rest, err := io.ReadAll(resp.Body); err != nil || len(rest) > 0 {
			t.Errorf("%q %v", rest, err)
		}
	})
}

func TestGRPCGoesByHTTP2(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	var proto, trailer atomic.Value
	port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		proto.Store(fmt.Sprint(r.Proto, r.Host, r.RequestURI, r.Header.Get("X-Forwarded-For"), r.Header.Get("Te")))
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status")
		rc := http.NewResponseController(w)
		rc.Flush()
		b := make([]byte, 5)
		for {
			if _, err := io.ReadFull(r.Body, b); err != nil {
				break
			}
			w.Write(b)
			rc.Flush()
		}
		trailer.Store(r.Trailer)
		w.Header().Set("Grpc-Status", "0")
	}))
	c := l.client(true)
	pr, pw := io.Pipe()
	req, _ := http.NewRequest("POST", "https://"+a.host(port)+"/pkg.Service/Method", pr)
	req.Header.Set("Content-Type", "application/grpc+proto")
	req.Header.Set("Te", "trailers")
	req.Header.Set("X-Forwarded-For", "6.6.6.6")
	req.Trailer = http.Header{"X-Note": {"passes"}, "X-Real-Ip": {"6.6.6.6"}}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b := make([]byte, 5)
	for range 3 {
		io.WriteString(pw, "\x00\x00\x00\x00\x00")
		if _, err := io.ReadFull(resp.Body, b); err != nil {
			t.Fatal(err)
		}
	}
	pw.Close()
	io.Copy(io.Discard, resp.Body)
	if resp.Trailer.Get("Grpc-Status") != "0" {
		t.Errorf("trailer %v", resp.Trailer)
	}
	if got, want := proto.Load(), "HTTP/2.0"+a.host(port)+"/pkg.Service/Method127.0.0.1trailers"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got, want := trailer.Load(), (http.Header{"X-Note": {"passes"}}); !reflect.DeepEqual(got, want) {
		t.Errorf("the service saw the trailer %v, want %v", got, want)
	}
	if resp, body := get(t, c, "https://"+a.host(1)+"/", "Content-Type", "application/grpc"); resp.StatusCode != 502 || !strings.Contains(body, "port is not open") {
		t.Errorf("closed port: %d %s", resp.StatusCode, body)
	}
	// A call under way ends with its sandbox.
	pr, pw = io.Pipe()
	defer pw.Close()
	req, _ = http.NewRequest("POST", "https://"+a.host(port)+"/pkg.Service/Method", pr)
	req.Header.Set("Content-Type", "application/grpc")
	if resp, err = c.Do(req); err != nil {
		t.Fatal(err)
	}
	a.kill()
	if _, err := io.ReadAll(resp.Body); err == nil {
		t.Error("a killed call ended cleanly")
	}
}

func TestKillResetsOpenConnections(t *testing.T) {
	stream := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/flood" {
			for {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		}
		io.WriteString(w, "begun")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	start := func(t *testing.T, c *http.Client, url string) io.ReadCloser {
		resp, err := c.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(resp.Body, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		return resp.Body
	}
	for _, path := range []string{"/quiet", "/flood"} {
		for _, h2 := range []bool{false, true} {
			t.Run(fmt.Sprintf("a stream over TLS breaks off: %s h2=%v", path, h2), func(t *testing.T) {
				l := newLab(t)
				a := l.sandbox(idA)
				body := start(t, l.client(h2), "https://"+a.host(a.serve(stream))+path)
				if path == "/flood" {
					time.Sleep(100 * time.Millisecond) // until every buffer is full and the handler blocked in a write
				}
				a.kill()
				began := time.Now()
				eventually(t, "the request to end", func() bool { return l.in.underway() == 0 })
				_, err := io.Copy(io.Discard, body)
				if err == nil || time.Since(began) > 2*time.Second {
					t.Errorf("ended with %v after %v", err, time.Since(began))
				}
				if h2 && !strings.Contains(fmt.Sprint(err), "stream error") {
					t.Errorf("want a stream error, got %v", err)
				}
				if !h2 && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("want a reset, got %v", err)
				}
			})
		}
	}
	t.Run("plain HTTP/1.1 gets a reset", func(t *testing.T) {
		l := newLab(t)
		a := l.sandbox(idA)
		c := l.dialPlain(t)
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", a.host(a.serve(stream)))
		br := bufio.NewReader(c)
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		io.ReadFull(resp.Body, make([]byte, 5))
		a.kill()
		if _, err := br.ReadByte(); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a WebSocket gets a reset", func(t *testing.T) {
		l := newLab(t)
		a := l.sandbox(idA)
		port := a.serve(wsEcho)
		conn, err := tls.Dial("tcp", l.https, &tls.Config{RootCAs: l.roots, ServerName: a.host(port), NextProtos: []string{"http/1.1"}})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", a.host(port))
		br := bufio.NewReader(conn)
		if resp, err := http.ReadResponse(br, nil); err != nil || resp.StatusCode != 101 {
			t.Fatal(resp, err)
		}
		a.kill()
		if _, err := br.ReadByte(); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("got %v", err)
		}
	})
	for i, size := range []int64{100, 1 << 20, -1, 100, 1 << 20, -1} {
		only2 := i >= 3
		t.Run(fmt.Sprintf("a request without an answer gets a 502: body %d, HTTP/2 only %v", size, only2), func(t *testing.T) {
			l := newLab(t)
			a := l.sandbox(idA)
			h := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body); <-r.Context().Done() })
			var port int
			if only2 {
				port, _ = a.only2(h)
			} else {
				port = a.serve(h)
			}
			l.both(t, func(t *testing.T, c *http.Client) {
				a := l.sandbox(fmt.Sprintf("i%dx", time.Now().UnixNano()), func(n *Target) { n.Addr = a.t.Addr })
				pr, pw := io.Pipe()
				defer pw.Close()
				wait := time.AfterFunc(10*time.Second, func() { pw.Close() })
				defer wait.Stop()
				go func() {
					pw.Write([]byte("x"))
					eventually(t, "the request", func() bool { return l.in.underway() > 0 })
					time.Sleep(20 * time.Millisecond)
					a.kill()
				}()
				req, _ := http.NewRequest("POST", "https://"+a.host(port)+"/", pr)
				req.ContentLength = size
				resp, err := c.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				if b, _ := io.ReadAll(resp.Body); resp.StatusCode != 502 || !strings.Contains(string(b), "The sandbox was not found") {
					t.Errorf("got %d %s", resp.StatusCode, b)
				}
			})
		})
	}
}

func TestResumedSandboxGetsFreshConnections(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	var conns atomic.Int32
	port := a.raw(func(c net.Conn, br *bufio.Reader) {
		n := conns.Add(1)
		for {
			if _, err := http.ReadRequest(br); err != nil {
				return
			}
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d", n)
		}
	})
	c := l.client(true)
	for range 3 {
		if _, body := get(t, c, "https://"+a.host(port)+"/"); body != "1" {
			t.Errorf("connection %s is not the first", body)
		}
	}
	old := a.done
	a.done = make(chan struct{})
	a.change(func(t *Target) { t.Done = a.done })
	close(old)
	if _, body := get(t, c, "https://"+a.host(port)+"/"); body != "2" {
		t.Errorf("an address used again was served by connection %s", body)
	}
}

func TestServicesThatCloseKeptConnections(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	var conns, hits atomic.Int32
	once := a.raw(func(c net.Conn, br *bufio.Reader) { // promises to keep the connection and does not
		conns.Add(1)
		if _, err := http.ReadRequest(br); err != nil {
			return
		}
		hits.Add(1)
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
	})
	c := l.client(false)
	for i := range 20 {
		req, _ := http.NewRequest([]string{"GET", "POST"}[i%2], "https://"+a.host(once)+"/", strings.NewReader(strings.Repeat("x", i%2)))
		if resp, body := do(t, c, req); resp.StatusCode != 200 || body != "ok" {
			t.Errorf("request %d: %d %s", i, resp.StatusCode, body)
		}
		time.Sleep(25 * time.Millisecond) // POST is not sent twice: let the close arrive
	}
	if hits.Load() != 20 {
		t.Errorf("%d requests arrived", hits.Load())
	}
	extra := a.raw(func(c net.Conn, br *bufio.Reader) { // sends an answer nobody asked for
		for {
			if _, err := http.ReadRequest(br); err != nil {
				return
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			if conns.Add(1)%2 == 0 {
				time.Sleep(time.Millisecond)
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
		}
	})
	for range 6 {
		if _, body := get(t, c, "https://"+a.host(extra)+"/"); body != "ok" {
			t.Errorf("got %q", body)
		}
		time.Sleep(50 * time.Millisecond) // far more than the service takes
	}
}

func TestServicesThatDoNotSpeakHTTP(t *testing.T) {
	l := newLab(t, func(c *Config) {
		c.Limits.Relay.HeadBytes, c.Limits.Relay.HeadTimeout = 8<<10, 200*time.Millisecond
	})
	a := l.sandbox(idA)
	c := l.client(true)
	for name, answer := range map[string]string{
		"nothing":              "",
		"a banner":             "SSH-2.0-OpenSSH_9.2\r\n",
		"half a head":          "HTTP/1.1 200 OK\r\nContent-",
		"an endless head":      "HTTP/1.1 200 OK\r\nA: " + strings.Repeat("x", 20<<10),
		"many fields":          "HTTP/1.1 200 OK\r\n" + strings.Repeat("A: b\r\n", 4<<10),
		"two lengths":          "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
		"a negative length":    "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
		"a strange status":     "HTTP/1.1 99 X\r\n\r\n",
		"endless interim ones": strings.Repeat("HTTP/1.1 102 Processing\r\n\r\n", 20),
	} {
		t.Run(name, func(t *testing.T) {
			port := a.raw(func(c net.Conn, br *bufio.Reader) {
				http.ReadRequest(br)
				io.WriteString(c, answer)
				if name == "half a head" {
					io.Copy(io.Discard, br) // never finished, never closed
				}
			})
			start := time.Now()
			resp, body := get(t, c, "https://"+a.host(port)+"/")
			if resp.StatusCode != 502 || !strings.Contains(body, `"port":`+strconv.Itoa(port)) || time.Since(start) > 2*time.Second {
				t.Errorf("got %d %s after %v", resp.StatusCode, body, time.Since(start))
			}
		})
	}
	t.Run("an answer cut short is not taken for whole", func(t *testing.T) {
		port := a.raw(func(c net.Conn, br *bufio.Reader) {
			http.ReadRequest(br)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
		})
		l.both(t, func(t *testing.T, c *http.Client) {
			resp, err := c.Get("https://" + a.host(port) + "/")
			if err == nil {
				_, err = io.ReadAll(resp.Body)
				resp.Body.Close()
			}
			if err == nil {
				t.Error("no error")
			}
		})
	})
	t.Run("an answer that ends with the connection is whole", func(t *testing.T) {
		port := a.raw(func(c net.Conn, br *bufio.Reader) {
			http.ReadRequest(br)
			io.WriteString(c, "HTTP/1.0 200 OK\r\n\r\nabc")
		})
		if _, body := get(t, c, "https://"+a.host(port)+"/"); body != "abc" {
			t.Error(body)
		}
	})
}

// TestSmuggling sends what two readers might understand differently. Whatever
// the answer, the service must see the requests the client framed by RFC 9112,
// and never one that hid in another.
func TestSmuggling(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	var mu sync.Mutex
	var seen []string
	port := a.raw(func(c net.Conn, br *bufio.Reader) {
		for {
			req, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			io.Copy(io.Discard, req.Body)
			mu.Lock()
			seen = append(seen, req.RequestURI)
			mu.Unlock()
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
	})
	h := "Host: " + a.host(port) + "\r\n"
	hidden := "GET /hidden HTTP/1.1\r\n" + h + "\r\n"
	for name, request := range map[string]string{
		"length and chunks":         "POST /a HTTP/1.1\r\n" + h + "Content-Length: " + strconv.Itoa(5+len(hidden)) + "\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n" + hidden,
		"two lengths":               "POST /a HTTP/1.1\r\n" + h + "Content-Length: 0\r\nContent-Length: 5\r\n\r\n" + hidden,
		"a signed length":           "POST /a HTTP/1.1\r\n" + h + "Content-Length: +0\r\n\r\n" + hidden,
		"a list of lengths":         "POST /a HTTP/1.1\r\n" + h + "Content-Length: 0, 5\r\n\r\n" + hidden,
		"an unknown encoding":       "POST /a HTTP/1.1\r\n" + h + "Transfer-Encoding: xchunked\r\n\r\n" + hidden,
		"chunked twice":             "POST /a HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + hidden,
		"two encodings":             "POST /a HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + hidden,
		"a space before the colon":  "POST /a HTTP/1.1\r\n" + h + "Content-Length : 5\r\n\r\n" + hidden,
		"a tab in the name":         "POST /a HTTP/1.1\r\n" + h + "Transfer-Encoding\t: chunked\r\n\r\n" + hidden,
		"two hosts":                 "GET /hidden HTTP/1.1\r\n" + h + "Host: evil\r\n\r\n",
		"no host":                   "GET /hidden HTTP/1.1\r\n\r\n",
		"NUL in a value":            "GET /hidden HTTP/1.1\r\n" + h + "A: b\x00c\r\n\r\n",
		"a bare CR in a value":      "GET /hidden HTTP/1.1\r\n" + h + "A: b\rX: c\r\n\r\n",
		"a chunk size with a sign":  "POST /a HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n-1\r\n" + hidden,
		"a chunk size too large":    "POST /a HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n" + hidden,
		"a length with a hex digit": "POST /a HTTP/1.1\r\n" + h + "Content-Length: 0x0\r\n\r\n" + hidden,
	} {
		t.Run(name, func(t *testing.T) {
			mu.Lock()
			seen = nil
			mu.Unlock()
			out := l.plain(t, request)
			mu.Lock()
			defer mu.Unlock()
			for _, target := range seen {
				if target == "/hidden" {
					t.Errorf("the hidden request arrived; answer %s", out)
				}
			}
			if !strings.HasPrefix(out, "HTTP/1.1 ") {
				t.Errorf("no answer: %q", out)
			}
		})
	}
	for name, target := range map[string]string{
		"a path with a second request line": "/two HTTP/1.1\r\nX: y", "a space": "/two b", "a fragment": "/two#b",
	} {
		t.Run("HTTP/2: "+name, func(t *testing.T) {
			req, _ := http.NewRequest("GET", "https://"+a.host(port)+"/", nil)
			req.URL.Opaque = target
			c := l.client(true)
			c.Timeout = time.Second // the server's parser may just drop the stream
			resp, err := c.Do(req)
			if err == nil {
				resp.Body.Close()
			}
			mu.Lock()
			defer mu.Unlock()
			if slices.ContainsFunc(seen, func(s string) bool { return strings.HasPrefix(s, "/two") }) || err == nil && resp.StatusCode != 400 {
				t.Errorf("seen %q, %v %v", seen, resp, err)
			}
		})
	}
	t.Run("the hop-by-hop fields cannot take ours away", func(t *testing.T) {
		port := a.serve(echo)
		out := l.plain(t, "GET / HTTP/1.1\r\nHost: "+a.host(port)+"\r\nConnection: close, X-Forwarded-For, X-Forwarded-Proto, X-Mine\r\nX-Mine: 1\r\nKeep-Alive: 1\r\nProxy-Connection: x\r\n\r\n")
		if !strings.Contains(out, "x-forwarded-for=127.0.0.1\n") || !strings.Contains(out, "x-forwarded-proto=http\n") || strings.Contains(out, "x-mine") || strings.Contains(out, "keep-alive=") || strings.Contains(out, "proxy-connection") {
			t.Error(out)
		}
	})
	t.Run("absolute form goes where it says", func(t *testing.T) {
		port := a.serve(echo)
		out := l.plain(t, "GET http://"+a.host(port)+"?x HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
		if !strings.Contains(out, "GET /?x\nhost="+a.host(port)+"\n") || strings.Contains(out, "evil") {
			t.Error(out)
		}
	})
	t.Run("CONNECT is refused", func(t *testing.T) {
		if out := l.plain(t, "CONNECT "+a.host(port)+":80 HTTP/1.1\r\nHost: "+a.host(port)+"\r\n\r\n"); !strings.HasPrefix(out, "HTTP/1.1 400") {
			t.Error(out)
		}
	})
	t.Run("OPTIONS * reaches the service", func(t *testing.T) {
		port := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(204) }))
		if out := l.plain(t, "OPTIONS * HTTP/1.1\r\nHost: "+a.host(port)+"\r\nConnection: close\r\n\r\n"); !strings.HasPrefix(out, "HTTP/1.1 20") {
			t.Error(out)
		}
	})
}

func TestClientThatLeavesIsNoticedByTheService(t *testing.T) {
	l := newLab(t)
	a := l.sandbox(idA)
	came, gone := make(chan struct{}), make(chan struct{})
	port := a.serve(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		came <- struct{}{}
		<-r.Context().Done()
		gone <- struct{}{}
	}))
	l.both(t, func(t *testing.T, c *http.Client) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		go func() {
			<-came
			cancel()
		}()
		req, _ := http.NewRequestWithContext(ctx, "GET", "https://"+a.host(port)+"/", nil)
		if _, err := c.Do(req); err == nil {
			t.Error("an answer")
		}
		select {
		case <-gone:
		case <-time.After(5 * time.Second):
			t.Fatal("the service still waits")
		}
	})
}

func TestSlowloris(t *testing.T) {
	l := newLab(t, func(c *Config) {
		c.Limits.HeaderTimeout = 200 * time.Millisecond
		c.Limits.Relay.StallTimeout = 200 * time.Millisecond
	})
	a := l.sandbox(idA)
	port := a.serve(echo)
	for name, part := range map[string]string{
		"a head":                       "GET / HTTP/1.1\r\nHost: " + a.host(port) + "\r\nA",
		"a small body":                 "POST / HTTP/1.1\r\nHost: " + a.host(port) + "\r\nContent-Length: 10\r\n\r\nx",
		"a large body":                 "POST / HTTP/1.1\r\nHost: " + a.host(port) + "\r\nContent-Length: 1000000\r\n\r\nx",
		"nothing":                      "",
		"a head over 64 KiB is a 431 ": "GET / HTTP/1.1\r\nHost: " + a.host(port) + "\r\nA: " + strings.Repeat("x", 80<<10) + "\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			c := l.dialPlain(t)
			start := time.Now()
			io.WriteString(c, part)
			c.SetReadDeadline(time.Now().Add(5 * time.Second))
			b, err := io.ReadAll(c)
			if errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 2*time.Second || strings.Contains(string(b), " 200 ") {
				t.Errorf("%q %v after %v", b, err, time.Since(start))
			}
		})
	}
}

func TestDrain(t *testing.T) {
	l := newLab(t, func(c *Config) { c.Limits.DrainTimeout = 500 * time.Millisecond })
	a := l.sandbox(idA)
	entered, finish := make(chan struct{}), make(chan struct{})
	slow := a.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { close(entered); <-finish; io.WriteString(w, "done") }))
	ws := a.serve(wsEcho)
	client := l.client(false)
	client.Timeout = 0
	c, _, err := websocket.Dial(t.Context(), "wss://"+a.host(ws)+"/", &websocket.DialOptions{HTTPClient: client})
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseNow()
	var wg sync.WaitGroup
	h2 := l.client(true)
	wg.Go(func() {
		resp, err := h2.Get("https://" + a.host(slow) + "/")
		if err != nil {
			t.Error(err)
			return
		}
		defer resp.Body.Close()
		if b, err := io.ReadAll(resp.Body); string(b) != "done" || err != nil {
			t.Errorf("%q %v", b, err)
		}
	})
	<-entered
	l.stop()
	time.Sleep(50 * time.Millisecond)
	close(finish)
	wg.Wait()
	if _, _, err := c.Read(t.Context()); err == nil {
		t.Error("the WebSocket outlived the deadline")
	}
	<-l.stopped
}
