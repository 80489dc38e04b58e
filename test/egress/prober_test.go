package egress_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// proberPath is where the prober lies in a sandbox. Started under this name the
// test program is the prober.
const proberPath = "/home/user/egress-prober"

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == filepath.Base(proberPath) {
		if err := serveProbes(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// try is one attempt to reach something.
type try struct {
	Kind string // "tcp", "udp": an echo; "http", "https": a page; "dns": a question
	Addr string // "host:port"; a name is resolved in the sandbox. Of dns: the server
	// Name is what SNI and Host show, or what a DNS question is about; empty: the
	// host of Addr.
	Name   string
	Shape  string // of the ClientHello: "", "bytes", "records", "huge"
	Path   string
	Within time.Duration // default 5 s
}

func (y try) String() string {
	return strings.TrimSpace(fmt.Sprintf("%s %s %s %s", y.Kind, y.Addr, y.Name, y.Shape))
}

// outcome is what the sandbox saw.
type outcome struct {
	// Class is "ok", "refused" (ECONNREFUSED), "reset", "alert" (TLS access_denied),
	// "unreachable", "timeout", "eof", "403", an rcode or "NODATA" for DNS, or "error".
	Class  string
	Detail string // the error, or the beginning of the body
	Server string // who answered: the address and port the server was reached at
	Deny   string // X-Cordon-Deny
	Took   time.Duration
}

func (o outcome) String() string {
	return fmt.Sprintf("%s (%s %s in %s)", o.Class, o.Server, o.Detail, o.Took.Round(time.Millisecond))
}

// serveProbes answers the test's requests, in the sandbox.
func serveProbes() error {
	raiseFiles()
	p := &prober{streams: map[string]*stream{}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ready", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("POST /try", answer(func(ctx context.Context, y try) (outcome, error) { return y.do(ctx), nil }))
	mux.HandleFunc("POST /watch", answer(watch))
	mux.HandleFunc("POST /names", answer(askNames))
	mux.HandleFunc("POST /open", answer(p.open))
	mux.HandleFunc("POST /look", answer(p.look))
	mux.HandleFunc("POST /flood", answer(p.flood))
	mux.HandleFunc("POST /rate", answer(measure))
	mux.HandleFunc("POST /requests", answer(request))
	mux.HandleFunc("POST /send", answer(send))
	mux.HandleFunc("POST /calls", answer(makeCalls))
	s := &http.Server{Addr: fmt.Sprintf(":%d", proberPort), Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	return s.ListenAndServe()
}

// raiseFiles lets the prober hold as many connections as the sandbox lets it.
func raiseFiles() {
	var l syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l) == nil {
		l.Cur = l.Max
		_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l)
	}
}

// answer makes a handler of a function on JSON.
func answer[In, Out any](do func(context.Context, In) (Out, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var in In
		err := json.NewDecoder(r.Body).Decode(&in)
		var out Out
		if err == nil {
			out, err = do(r.Context(), in)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		_ = json.NewEncoder(w).Encode(out)
	}
}

// ask calls the prober.
func ask[Out any](g *guest, path string, in any) Out {
	g.t.Helper()
	out, err := askErr[Out](g, path, in)
	if err != nil {
		g.t.Fatalf("ask the prober %s: %v", path, err)
	}
	return out
}

func askErr[Out any](g *guest, path string, in any) (out Out, err error) {
	b, err := json.Marshal(in)
	if err != nil {
		return out, err
	}
	res, err := g.http.Post("http://"+g.addr+path, "application/json", bytes.NewReader(b))
	if err != nil {
		return out, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", res.Status, body)
	}
	if err != nil {
		return out, err
	}
	return out, json.Unmarshal(body, &out)
}

// try lets the sandbox try something.
func (g *guest) try(y try) outcome {
	g.t.Helper()
	return ask[outcome](g, "/try", y)
}

func (y try) do(ctx context.Context) outcome {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(y.Within, 5*time.Second))
	defer cancel()
	began := time.Now()
	o := y.attempt(ctx)
	o.Took = time.Since(began)
	return o
}

func (y try) attempt(ctx context.Context) outcome {
	host, _, err := net.SplitHostPort(y.Addr)
	if err != nil {
		return failed(err)
	}
	y.Name = cmp.Or(y.Name, host)
	switch y.Kind {
	case "dns":
		return y.question(ctx)
	case "udp":
		return y.datagram(ctx)
	}
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", y.Addr)
	if err != nil {
		return failed(err)
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	_ = c.SetDeadline(deadline)
	switch y.Kind {
	case "tcp":
		return echoed(c)
	case "https":
		t := tls.Client(shaped(c, y.Shape), y.tlsConfig())
		if err := t.HandshakeContext(ctx); err != nil {
			return failed(err)
		}
		c = t
	}
	return y.page(c)
}

func (y try) tlsConfig() *tls.Config {
	cfg := &tls.Config{ServerName: y.Name}
	if y.Shape == "huge" {
		for i := range 240 { // 60 KiB of ALPN
			cfg.NextProtos = append(cfg.NextProtos, fmt.Sprintf("%03d%s", i, strings.Repeat("x", 250)))
		}
		cfg.NextProtos = append(cfg.NextProtos, "http/1.1")
	}
	return cfg
}

// echoed sends a line to an echo service.
func echoed(c net.Conn) outcome {
	const line = "hello from a sandbox\n"
	if _, err := io.WriteString(c, line); err != nil {
		return failed(err)
	}
	b := make([]byte, len(line))
	if _, err := io.ReadFull(c, b); err != nil {
		return failed(err)
	}
	return outcome{Class: "ok", Server: c.RemoteAddr().String(), Detail: string(b)}
}

func (y try) page(c net.Conn) outcome {
	req, err := http.NewRequest(http.MethodGet, "http://"+y.Name+cmp.Or(y.Path, "/"), nil)
	if err != nil {
		return failed(err)
	}
	req.Close = true
	if err := req.Write(c); err != nil {
		return failed(err)
	}
	b, err := io.ReadAll(io.LimitReader(c, 1<<20))
	if err != nil && len(b) == 0 {
		return failed(err)
	}
	return pageOf(b)
}

func pageOf(b []byte) outcome {
	head, body, ok := strings.Cut(string(b), "\r\n\r\n")
	if !ok {
		return outcome{Class: "eof", Detail: string(b)}
	}
	o := outcome{Class: "ok", Detail: body[:min(len(body), 2000)]}
	if !strings.HasPrefix(head, "HTTP/1.1 200") {
		o.Class = strings.Fields(head)[1]
	}
	for line := range strings.SplitSeq(head, "\r\n") {
		if v, ok := strings.CutPrefix(line, "X-Cordon-Deny: "); ok {
			o.Deny = v
		}
	}
	var p struct{ Server string }
	if json.Unmarshal([]byte(body), &p) == nil {
		o.Server = p.Server
	}
	return o
}

func (y try) question(ctx context.Context) outcome {
	m := new(dns.Msg).SetQuestion(dns.Fqdn(y.Name), dns.TypeA)
	m.SetEdns0(1232, false)
	r, _, err := (&dns.Client{Timeout: 5 * time.Second}).ExchangeContext(ctx, m, y.Addr)
	if err != nil {
		return failed(err)
	}
	o := outcome{Class: dns.RcodeToString[r.Rcode]}
	for _, rr := range r.Answer {
		if a, ok := rr.(*dns.A); ok {
			o.Server = a.A.String()
		}
	}
	if r.Rcode == dns.RcodeSuccess && len(r.Answer) == 0 {
		o.Class = "NODATA"
	}
	if opt := r.IsEdns0(); opt != nil {
		for _, e := range opt.Option {
			o.Detail += e.String()
		}
	}
	return o
}

// datagram sends one a few times, as UDP may lose it.
func (y try) datagram(ctx context.Context) outcome {
	c, err := (&net.Dialer{}).DialContext(ctx, "udp", y.Addr)
	if err != nil {
		return failed(err)
	}
	defer c.Close()
	b := make([]byte, 100)
	for range 3 {
		_ = c.SetDeadline(time.Now().Add(time.Second))
		if _, err = c.Write([]byte("hello")); err == nil {
			if _, err = c.Read(b); err == nil {
				return outcome{Class: "ok", Server: c.RemoteAddr().String()}
			}
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
	}
	return failed(err)
}

// failed classes an error.
func failed(err error) outcome {
	o := outcome{Class: "error", Detail: err.Error()}
	var errno syscall.Errno
	var alert tls.AlertError
	var name *net.DNSError
	switch {
	case errors.As(err, &alert) || strings.Contains(err.Error(), "remote error: tls: access denied"):
		o.Class = "alert"
	case errors.As(err, &name):
		o.Class = "no name"
	case errors.As(err, &errno):
		o.Class = map[syscall.Errno]string{
			syscall.ECONNREFUSED: "refused", syscall.ECONNRESET: "reset", syscall.EPIPE: "reset",
			syscall.EHOSTUNREACH: "unreachable", syscall.ENETUNREACH: "unreachable", syscall.EACCES: "unreachable", syscall.EPERM: "unreachable",
		}[errno]
		o.Class = cmp.Or(o.Class, "error")
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		o.Class = "timeout"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		o.Class = "eof"
	}
	return o
}

// shaped returns a connection that sends a ClientHello in an odd way.
func shaped(c net.Conn, shape string) net.Conn {
	switch shape {
	case "bytes":
		return &oneByteConn{Conn: c}
	case "records":
		return &recordConn{Conn: c}
	}
	return c
}

// oneByteConn sends the first flight in segments of one byte.
type oneByteConn struct {
	net.Conn
	done bool
}

func (c *oneByteConn) Write(b []byte) (int, error) {
	if c.done {
		return c.Conn.Write(b)
	}
	c.done = true
	_ = c.Conn.(*net.TCPConn).SetNoDelay(true) // each byte in its own segment
	for i := range b {
		if _, err := c.Conn.Write(b[i : i+1]); err != nil {
			return i, err
		}
	}
	return len(b), nil
}

// recordConn sends the first flight in TLS records of seven bytes (RFC 8446, 5.1).
type recordConn struct {
	net.Conn
	done bool
}

func (c *recordConn) Write(b []byte) (int, error) {
	if c.done {
		return c.Conn.Write(b)
	}
	c.done = true
	const header, size = 5, 7
	var out []byte
	for rest := b; len(rest) > header; {
		n := int(rest[3])<<8 | int(rest[4])
		for body := rest[header : header+n]; len(body) > 0; {
			k := min(size, len(body))
			out = append(append(out, rest[0], rest[1], rest[2], 0, byte(k)), body[:k]...)
			body = body[k:]
		}
		rest = rest[header+n:]
	}
	_, err := c.Conn.Write(out)
	return len(b), err
}

// watching is a series of attempts.
type watching struct {
	Try   try
	Every time.Duration
	For   time.Duration
	Until string // a class that ends it; empty: none
}

// seen is one attempt of a series, by the sandbox's clock.
type seen struct {
	At    time.Time
	Class string
}

// watch tries again and again and returns what was seen and when it began.
func watch(ctx context.Context, w watching) ([]seen, error) {
	var out []seen
	for end := time.Now().Add(w.For); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(w.Every) {
		at := time.Now()
		o := w.Try.do(ctx)
		out = append(out, seen{at, o.Class})
		if o.Class == w.Until {
			break
		}
	}
	return out, nil
}

// asking is a question for each of some names, all at once.
type asking struct {
	Server string
	Format string // of a name, with %d
	Names  int
}

// askNames counts the classes of the answers.
func askNames(ctx context.Context, a asking) (map[string]int, error) {
	classes := make(chan string, a.Names)
	for i := range a.Names {
		go func() { classes <- try{Kind: "dns", Addr: a.Server, Name: fmt.Sprintf(a.Format, i)}.do(ctx).Class }()
	}
	out := map[string]int{}
	for range a.Names {
		out[<-classes]++
	}
	return out, nil
}

// prober holds what goes on between two requests.
type prober struct {
	mu      sync.Mutex // guards streams
	streams map[string]*stream
}

// stream is a flow that goes on.
type stream struct {
	mu    sync.Mutex // guards what follows
	bytes int64
	last  time.Time
	told  time.Time
	ended time.Time
	class string
}

// opening asks for a stream.
type opening struct {
	ID   string
	Kind string // "tcp": HTTP on a port of no meaning; "http", "https", "udp"
	Addr string
	Name string
	Path string
}

// state is what a stream has come to, by the sandbox's clock.
type state struct {
	Bytes int64
	Last  time.Time // when bytes came last
	Told  time.Time // when the sandbox's kernel learned of the end
	Ended time.Time // when the reader did, who first reads what had come before; zero: it goes on
	Class string    // how it ended
}

func (p *prober) open(ctx context.Context, o opening) (outcome, error) {
	y := try{Kind: o.Kind, Addr: o.Addr, Name: o.Name}
	network := "tcp"
	if o.Kind == "udp" {
		network = "udp"
	}
	c, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, network, o.Addr)
	if err != nil {
		return failed(err), nil
	}
	s := &stream{}
	p.mu.Lock()
	p.streams[o.ID] = s
	p.mu.Unlock()
	if o.Kind == "udp" {
		go s.ask(c)
		go s.read(c)
		return outcome{Class: "ok"}, nil
	}
	go s.heed(c.(*net.TCPConn))
	if o.Kind == "https" {
		t := tls.Client(c, y.tlsConfig())
		if err := t.HandshakeContext(ctx); err != nil {
			return failed(err), nil
		}
		c = t
	}
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", o.Path, o.Name); err != nil {
		return failed(err), nil
	}
	go s.read(c)
	return outcome{Class: "ok"}, nil
}

// ask keeps a UDP stream coming: the server sends for a while after each datagram.
func (s *stream) ask(c net.Conn) {
	for s.state().Ended.IsZero() {
		if _, err := c.Write([]byte("more")); err != nil {
			s.end(err)
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// heed notes when the connection is over for the kernel, whatever is left to read.
func (s *stream) heed(c *net.TCPConn) {
	raw, err := c.SyscallConn()
	for over := false; err == nil && !over; time.Sleep(5 * time.Millisecond) {
		err = raw.Control(func(fd uintptr) {
			const closed = 7 // TCP_CLOSE of tcp_states.h
			info, failed := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
			over = failed == nil && info.State == closed
		})
	}
	if err == nil { // otherwise the reader was first
		s.mu.Lock()
		defer s.mu.Unlock()
		s.told = time.Now()
	}
}

// read reads at some 10 MB/s, so that windows are full.
func (s *stream) read(c net.Conn) {
	defer c.Close()
	b := make([]byte, 64<<10)
	for {
		n, err := c.Read(b)
		s.mu.Lock()
		if n > 0 {
			s.bytes, s.last = s.bytes+int64(n), time.Now()
		}
		s.mu.Unlock()
		if err != nil {
			s.end(err)
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (s *stream) end(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.class == "" {
		s.class, s.ended = failed(err).Class, time.Now()
	}
}

func (s *stream) state() state {
	s.mu.Lock()
	defer s.mu.Unlock()
	told := s.told
	if told.IsZero() || told.After(s.ended) {
		told = s.ended
	}
	return state{s.bytes, s.last, told, s.ended, s.class}
}

func (p *prober) look(_ context.Context, id string) (state, error) {
	p.mu.Lock()
	s := p.streams[id]
	p.mu.Unlock()
	if s == nil {
		return state{}, fmt.Errorf("no stream %q", id)
	}
	return s.state(), nil
}

// flooding asks for connections that say nothing, or half of a ClientHello.
type flooding struct {
	Addr          netip.AddrPort
	Silent, Begun int
	For           time.Duration
}

// flooded says how many connections were made, and why others were not.
type flooded struct {
	Made   int
	Failed map[string]int
}

// flood keeps that many connections open for a time, renewing those that the other
// side ends.
func (p *prober) flood(ctx context.Context, f flooding) (flooded, error) {
	ctx, cancel := context.WithTimeout(ctx, f.For)
	defer cancel()
	out := flooded{Failed: map[string]int{}}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range f.Silent + f.Begun {
		wg.Go(func() {
			for ; ctx.Err() == nil; time.Sleep(time.Second) { // so that it holds connections, not the CPU
				err := pester(ctx, f.Addr, i >= f.Silent)
				mu.Lock()
				if err == nil {
					out.Made++
				} else if ctx.Err() == nil {
					out.Failed[failed(err).Class+" "+err.Error()[:20]]++
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return out, nil
}

// pester holds one connection until the other side or ctx ends it.
func pester(ctx context.Context, to netip.AddrPort, begin bool) error {
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if begin { // a record of 512 octets of which four come
		_, _ = c.Write([]byte{22, 3, 1, 2, 0, 1, 0, 1, 252})
	}
	_, _ = io.Copy(io.Discard, c)
	return nil
}

// measuring asks how long new connections take.
type measuring struct {
	Try try
	N   int
	Gap time.Duration
}

// measure returns the time of each attempt that went well, and how others ended.
func measure(ctx context.Context, m measuring) (out struct {
	Took   []time.Duration
	Failed map[string]int
}, _ error) {
	out.Failed = map[string]int{}
	for range m.N {
		o := m.Try.do(ctx)
		if o.Class == "ok" {
			out.Took = append(out.Took, o.Took)
		} else {
			out.Failed[o.Class]++
		}
		time.Sleep(m.Gap)
	}
	return out, nil
}

// requesting asks for HTTP requests on connections that are kept.
type requesting struct {
	Addr, Name string
	PerSecond  int
	For        time.Duration
}

// request sends them and returns how many were answered.
func request(ctx context.Context, q requesting) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, q.For)
	defer cancel()
	const workers = 8
	var answered atomic.Int64
	var wg sync.WaitGroup
	hc := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: workers, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, q.Addr)
	}}}
	defer hc.CloseIdleConnections()
	for range workers {
		wg.Go(func() {
			gap := time.NewTicker(time.Second * workers / time.Duration(q.PerSecond))
			defer gap.Stop()
			for ctx.Err() == nil {
				<-gap.C
				req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+q.Name+"/status/204", nil)
				if err != nil {
					return
				}
				if res, err := hc.Do(req); err == nil {
					res.Body.Close()
					answered.Add(1)
				}
			}
		})
	}
	wg.Wait()
	return int(answered.Load()), nil
}

// sending asks for bytes to be sent to an echo, by TCP or as the body of a POST.
type sending struct {
	Try try
	N   int
}

// send succeeds when all has come back.
func send(ctx context.Context, q sending) (outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", q.Try.Addr)
	if err != nil {
		return failed(err), nil
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	_ = c.SetDeadline(deadline)
	if q.Try.Kind == "https" {
		t := tls.Client(c, q.Try.tlsConfig())
		if err := t.HandshakeContext(ctx); err != nil {
			return failed(err), nil
		}
		c = t
		if _, err := fmt.Fprintf(c, "POST /echo HTTP/1.1\r\nHost: %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n", q.Try.Name, q.N); err != nil {
			return failed(err), nil
		}
	}
	sent := make(chan error, 1)
	go func() {
		_, err := io.CopyN(c, zeros{}, int64(q.N))
		sent <- err
	}()
	_, err = io.CopyN(io.Discard, c, int64(q.N)) // what comes back may have a head as well
	if err != nil {
		c.Close()
	}
	if err = cmp.Or(err, <-sent); err != nil {
		return failed(err), nil
	}
	return outcome{Class: "ok"}, nil
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }
