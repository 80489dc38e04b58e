package ingress

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// Mode is what a listener speaks.
type Mode uint8

// The modes.
const (
	TLS      Mode = iota // https, HTTP/2 and HTTP/1.1; names that are not ours are refused
	Plain                // http; whatever is not for a sandbox goes to the API
	Redirect             // http; sends everyone to https
	TLSTCP               // TLS ends here, its bytes go to the port that the server name says
)

// Listener is a listener and what it speaks.
type Listener struct {
	net.Listener
	Mode Mode
}

// Run serves on the listeners until ctx ends or one of them fails, then lets
// requests under way finish for DrainTimeout and resets the rest. It closes the
// listeners and the Ingress, and returns when every connection has ended.
func (in *Ingress) Run(ctx context.Context, listeners ...Listener) error {
	defer in.Close()
	servers := make([]*server, len(listeners))
	for i, l := range listeners {
		s, err := in.server(l)
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
			return err
		}
		servers[i] = s
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, s := range servers {
		if in.cfg.ProxyProtocol && s.Mode != Plain {
			front := in.behindProxies(s.Listener.Listener)
			s.Listener.Listener = front
			g.Go(func() error { front.run(); return nil })
		}
		g.Go(func() error { return s.accept(ctx) })
	}
	g.Go(func() error {
		<-ctx.Done()
		in.drain(servers)
		return nil
	})
	err := g.Wait()
	for _, s := range servers {
		s.open.Wait()
	}
	return err
}

// drain ends the servers: first politely, at the deadline not.
func (in *Ingress) drain(servers []*server) {
	ctx, cancel := context.WithTimeout(context.Background(), in.cfg.Limits.DrainTimeout)
	defer cancel()
	var g sync.WaitGroup
	for _, s := range servers {
		g.Go(func() { s.shutdown(ctx) })
	}
	g.Wait()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for in.underway() > 0 && ctx.Err() == nil {
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	for _, s := range servers {
		s.close()
	}
	in.Close() // also what a TLSTCP listener carries
}

// underway counts requests and tunnels.
func (in *Ingress) underway() (n int64) {
	in.mu.RLock()
	defer in.mu.RUnlock()
	for _, b := range in.backends {
		n += b.inflight.Load()
	}
	return n
}

// redirect sends clients of our names to the same URL with https.
func (v *visit) redirect() {
	in, r := v.in, v.r
	if in.cfg.Challenge != nil && in.cfg.Challenge(v.w, r) {
		return
	}
	p, err := in.locate(r.Host)
	if err != nil {
		v.refuse(badRequest(err.Error()))
		return
	}
	target, ok := originForm(r)
	if p.kind == foreignHost || !ok {
		v.refuse(badRequest("Host " + shown(r.Host) + " is not served here."))
		return
	}
	host := p.name
	if addr, err := netip.ParseAddr(host); err == nil && addr.Is6() {
		host = "[" + host + "]"
	}
	if port := in.cfg.HTTPSPort; port != 0 && port != 443 {
		host += ":" + strconv.Itoa(int(port))
	}
	if target == "*" {
		target = "/"
	}
	v.w.Header().Set("Location", "https://"+host+target)
	v.code = http.StatusPermanentRedirect // keeps method and body
	v.w.WriteHeader(v.code)
}
