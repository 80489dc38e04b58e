package lab

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
	"github.com/miekg/dns"
)

// Page is what the web servers answer on "/" and on any path of no other meaning.
type Page struct {
	Server  string              `json:"server"` // the address and port the client used
	Proto   string              `json:"proto"`  // "HTTP/2.0"
	TLS     bool                `json:"tls"`
	SNI     string              `json:"sni"`
	Host    string              `json:"host"`
	Method  string              `json:"method"`
	Path    string              `json:"path"` // with the query
	Remote  string              `json:"remote"`
	Headers map[string][]string `json:"headers"`
	Body    string              `json:"body"` // the first KiB of the request's
}

// web serves HTTP on all addresses.
type web struct {
	journal *Journal
	zone    *zone
	stop    context.Context // ends endless responses
	sites   *sync.Map       // host name -> http.Handler
}

// serveWeb starts HTTP on 80 and 8080, where HTTP/2 with prior knowledge is spoken too,
// and HTTPS on 443 and 8443.
func (s *services) serveWeb(z *zone) error {
	h := (&web{journal: s.journal, zone: z, stop: s.ctx, sites: &s.sites}).handler()
	for _, network := range s.networks("tcp") {
		for _, port := range []int{80, 8080} {
			l, err := s.listen(network, port)
			if err != nil {
				return err
			}
			s.serveHTTP(l, h)
		}
		for _, port := range []int{443, 8443} {
			l, err := s.listen(network, port)
			if err != nil {
				return err
			}
			s.serveHTTP(tlsListener(l, s.tlsConfig("h2", "http/1.1")), h)
		}
	}
	return nil
}

func (s *services) serveHTTP(l net.Listener, h http.Handler) {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 30 * time.Second,
		ErrorLog:          log.New(debugWriter{s.log}, "", 0),
		Protocols:         new(http.Protocols),
	}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetHTTP2(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	s.onClose(srv)
	s.run(func() {
		if err := srv.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			s.log.Warn("lab web server ended", "err", err)
		}
	})
}

// debugWriter carries the complaints of net/http into the log.
type debugWriter struct{ log *slog.Logger }

func (w debugWriter) Write(b []byte) (int, error) {
	w.log.Debug("lab web server", "err", string(b))
	return len(b), nil
}

func tlsListener(l net.Listener, cfg *tls.Config) net.Listener { return tls.NewListener(l, cfg) }

// tlsConfig has a certificate for whatever name the client asks for, or for the
// address if it names none, and records each hello.
func (s *services) tlsConfig(protos ...string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: protos,
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			server := addrPort(hello.Conn.LocalAddr())
			s.journal.add(Request{
				Proto: "tls", Server: server, Remote: addrPort(hello.Conn.RemoteAddr()), SNI: hello.ServerName,
			})
			if hello.ServerName != "" {
				return s.ca.Leaf(hello.ServerName)
			}
			return s.ca.Leaf(server.Addr().String())
		},
	}
}

func (w *web) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/bytes/{n}", w.bytes)
	mux.HandleFunc("/slow", w.slow)
	mux.HandleFunc("/sse", w.events)
	mux.HandleFunc("/ws", w.socket)
	mux.HandleFunc("/echo", w.echo)
	mux.HandleFunc("/status/{code}", w.status)
	mux.HandleFunc("/redirect", w.redirect)
	mux.HandleFunc("/dns-query", w.doh)
	mux.HandleFunc("/", w.page)
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		req := Request{
			Proto: "http", Server: localOf(r), Host: r.Host, Method: r.Method, Path: r.URL.RequestURI(),
		}
		req.Remote, _ = netip.ParseAddrPort(r.RemoteAddr)
		if r.TLS != nil {
			req.Proto, req.SNI = "https", r.TLS.ServerName
		}
		w.journal.add(req)
		if target, code, ok := publicResolver(req); ok {
			http.Redirect(rw, r, target, code)
			return
		}
		host, _, err := net.SplitHostPort(r.Host)
		if err != nil {
			host = r.Host
		}
		if site, ok := w.sites.Load(strings.ToLower(strings.TrimSuffix(host, "."))); ok {
			site.(http.Handler).ServeHTTP(rw, r)
			return
		}
		mux.ServeHTTP(rw, r)
	})
}

// Site makes the web servers answer requests for a host by h, on all their ports;
// the host's name has to be in the zone, or in Config.Names.
func (l *Lab) Site(host string, h http.Handler) { l.services.sites.Store(host, h) }

func localOf(r *http.Request) netip.AddrPort {
	a, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	return addrPort(a)
}

// publicResolver is how the web servers of the public DNS resolvers answer when
// they are addressed by IP: 1.1.1.1 with 301, 8.8.8.8 and its kin with 302.
func publicResolver(r Request) (target string, code int, ok bool) {
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		return "", 0, false
	}
	switch {
	case netip.MustParsePrefix("1.1.1.0/24").Contains(a):
		if r.Proto == "http" {
			return "https://" + host + r.Path, http.StatusMovedPermanently, true
		}
		return "https://one.one.one.one" + r.Path, http.StatusMovedPermanently, true
	case netip.MustParsePrefix("8.8.8.0/24").Contains(a), netip.MustParsePrefix("8.8.4.0/24").Contains(a):
		return "https://dns.google" + r.Path, http.StatusFound, true
	}
	return "", 0, false
}

func (w *web) page(rw http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<10))
	if err != nil {
		return // the client is gone
	}
	p := Page{
		Server: localOf(r).String(), Proto: r.Proto, TLS: r.TLS != nil, Host: r.Host, Method: r.Method,
		Path: r.URL.RequestURI(), Remote: r.RemoteAddr, Headers: r.Header, Body: string(body),
	}
	if r.TLS != nil {
		p.SNI = r.TLS.ServerName
	}
	rw.Header().Set("Content-Type", "application/json")
	rw.Header().Set("Server", "cordon-lab")
	enc := json.NewEncoder(rw)
	enc.SetIndent("", "  ")
	_ = enc.Encode(p) // a client that is gone
}

// bytes sends n bytes, at most 64 GiB.
func (w *web) bytes(rw http.ResponseWriter, r *http.Request) {
	n, err := strconv.ParseInt(r.PathValue("n"), 10, 64)
	if err != nil || n < 0 || n > 64<<30 {
		http.Error(rw, "want /bytes/<number up to 64 GiB>", http.StatusBadRequest)
		return
	}
	rw.Header().Set("Content-Type", "application/octet-stream")
	rw.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	chunk := make([]byte, 256<<10)
	for n > 0 {
		k, err := rw.Write(chunk[:min(n, int64(len(chunk)))])
		if err != nil {
			return
		}
		n -= int64(k)
	}
}

// ticks calls send n times, a pause apart, and flushes after each.
func (w *web) ticks(rw http.ResponseWriter, r *http.Request, send func(i int)) {
	n, err := strconv.Atoi(r.URL.Query().Get("n"))
	if err != nil {
		n = 10
	}
	every, err := time.ParseDuration(r.URL.Query().Get("every"))
	if err != nil {
		every = 100 * time.Millisecond
	}
	for i := range n {
		send(i)
		if http.NewResponseController(rw).Flush() != nil {
			return
		}
		select {
		case <-time.After(every):
		case <-r.Context().Done():
			return
		case <-w.stop.Done():
			return
		}
	}
}

// slow streams "tick <i>" lines: ?n=10&every=100ms.
func (w *web) slow(rw http.ResponseWriter, r *http.Request) {
	rw.Header().Set("Content-Type", "text/plain")
	w.ticks(rw, r, func(i int) { fmt.Fprintf(rw, "tick %d\n", i) })
}

// events streams server-sent events: ?n=10&every=100ms.
func (w *web) events(rw http.ResponseWriter, r *http.Request) {
	rw.Header().Set("Content-Type", "text/event-stream")
	w.ticks(rw, r, func(i int) { fmt.Fprintf(rw, "id: %d\ndata: tick %d\n\n", i, i) })
}

// socket echoes WebSocket messages.
func (w *web) socket(rw http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(rw, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
	if err != nil {
		return // Accept has answered
	}
	defer c.CloseNow() //nolint:errcheck // the connection is over either way
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	stop := context.AfterFunc(w.stop, cancel)
	defer stop()
	for {
		kind, msg, err := c.Read(ctx)
		if err != nil {
			return
		}
		if err := c.Write(ctx, kind, msg); err != nil {
			return
		}
	}
}

// echo sends the request's body back as it comes.
func (w *web) echo(rw http.ResponseWriter, r *http.Request) {
	_ = http.NewResponseController(rw).EnableFullDuplex() // HTTP/2 is full duplex by itself
	rw.Header().Set("Content-Type", "application/octet-stream")
	_, _ = io.Copy(flushing{rw}, r.Body) // a client that is gone
}

type flushing struct{ http.ResponseWriter }

func (f flushing) Write(b []byte) (int, error) {
	n, err := f.ResponseWriter.Write(b)
	if err == nil {
		err = http.NewResponseController(f.ResponseWriter).Flush()
	}
	return n, err
}

func (w *web) status(rw http.ResponseWriter, r *http.Request) {
	code, err := strconv.Atoi(r.PathValue("code"))
	if err != nil || code < 200 || code > 599 {
		http.Error(rw, "want /status/<200…599>", http.StatusBadRequest)
		return
	}
	rw.WriteHeader(code)
}

// redirect sends the client elsewhere: ?to=<url>.
func (w *web) redirect(rw http.ResponseWriter, r *http.Request) {
	http.Redirect(rw, r, r.URL.Query().Get("to"), http.StatusFound)
}

// doh is DNS over HTTPS (RFC 8484).
func (w *web) doh(rw http.ResponseWriter, r *http.Request) {
	var wire []byte
	var err error
	if r.Method == http.MethodPost {
		wire, err = io.ReadAll(io.LimitReader(r.Body, 64<<10))
	} else {
		wire, err = base64.RawURLEncoding.DecodeString(r.URL.Query().Get("dns"))
	}
	var q dns.Msg
	if err != nil || q.Unpack(wire) != nil {
		http.Error(rw, "want a DNS message", http.StatusBadRequest)
		return
	}
	remote, _ := netip.ParseAddrPort(r.RemoteAddr)
	m := w.zone.answer(&q, net.TCPAddrFromAddrPort(remote), net.TCPAddrFromAddrPort(localOf(r)))
	if m == nil {
		m = new(dns.Msg).SetRcode(&q, dns.RcodeServerFailure)
	}
	out, err := m.Pack()
	if err != nil {
		http.Error(rw, err.Error(), http.StatusInternalServerError)
		return
	}
	rw.Header().Set("Content-Type", "application/dns-message")
	_, _ = rw.Write(out) // a client that is gone
}
