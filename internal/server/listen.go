package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/cordonhq/cordon/internal/egress"
	"github.com/cordonhq/cordon/internal/ingress"
	"github.com/cordonhq/cordon/internal/resolver"
)

// listen opens everything the server answers on.
func (s *server) listen(ctx context.Context) error {
	for _, group := range []struct {
		mode  ingress.Mode
		addrs []string
	}{{ingress.TLS, s.cfg.Listen.HTTPS}, {ingress.Redirect, s.cfg.Listen.HTTP}, {ingress.Plain, []string{s.cfg.Listen.Plain}}, {ingress.TLSTCP, s.cfg.Listen.TLSTCP}} {
		for _, addr := range group.addrs {
			l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
			if err != nil {
				if strings.HasPrefix(addr, "[::1]:") { // no IPv6 on this machine
					s.log.Warn("not listening", "addr", addr, "err", err)
					continue
				}
				return fmt.Errorf("%w (cordon doctor says more)", err)
			}
			s.closers = append(s.closers, l)
			s.ingressOn = append(s.ingressOn, ingress.Listener{Listener: l, Mode: group.mode})
			s.remember(group.mode, l.Addr())
		}
	}
	if s.cfg.Listen.Metrics != "" {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", s.cfg.Listen.Metrics)
		if err != nil {
			return fmt.Errorf("%w (cordon doctor says more)", err)
		}
		s.closers = append(s.closers, l)
		s.metricsOn = l
	}
	return s.listenTransparent(ctx)
}

// listenTransparent opens the sockets that the kernel hands sandboxes' flows to.
func (s *server) listenTransparent(ctx context.Context) error {
	for _, ip := range []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()} {
		if ip.Is6() && !s.network.HasIPv6() {
			continue
		}
		proxy, err := egress.ListenTransparent(ctx, netip.AddrPortFrom(ip, s.cfg.Network.ProxyPort))
		if err != nil {
			return err
		}
		s.closers = append(s.closers, proxy)
		s.egressOn = append(s.egressOn, proxy)
		tcp, err := resolver.ListenTransparentTCP(ctx, netip.AddrPortFrom(ip, s.cfg.Network.DNSPort))
		if err != nil {
			return err
		}
		s.closers = append(s.closers, tcp)
		udp, err := resolver.ListenTransparentUDP(ctx, netip.AddrPortFrom(ip, s.cfg.Network.DNSPort))
		if err != nil {
			return err
		}
		s.closers = append(s.closers, udp)
		s.resolverOn = append(s.resolverOn,
			func(ctx context.Context) error { return s.resolver.ServeTCP(ctx, tcp) },
			func(ctx context.Context) error { return s.resolver.ServeUDP(ctx, udp) })
	}
	return nil
}

// below are the parts that carry sandboxes' traffic and lives; they end after
// the ingress has drained.
func (s *server) below() map[string]func(context.Context) error {
	parts := map[string]func(context.Context) error{
		"network":   s.network.Run,
		"sandboxes": s.manager.Run,
		"egress":    func(ctx context.Context) error { return s.egress.Run(ctx, s.egressOn...) },
		"metrics":   s.runMetrics, "surroundings": s.followSurroundings, "denied names": s.followDenied,
	}
	if s.acme != nil {
		parts["certificates"] = s.acme.Run
	}
	for i, serve := range s.resolverOn {
		parts["resolver "+strconv.Itoa(i)] = serve
	}
	return parts
}

func (s *server) runIngress(ctx context.Context) error { return s.ingress.Run(ctx, s.ingressOn...) }

// runMetrics serves Prometheus' page on its own listener, which wants no key
// and so stays on loopback unless the operator says otherwise.
func (s *server) runMetrics(ctx context.Context) error {
	if s.metricsOn == nil {
		<-ctx.Done()
		return nil
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.metrics, promhttp.HandlerOpts{}))
	h := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { h.Close() })
	defer stop()
	if err := h.Serve(s.metricsOn); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// remember notes where the egress proxy reaches the ingress.
func (s *server) remember(mode ingress.Mode, addr net.Addr) {
	a := addr.(*net.TCPAddr).AddrPort()
	ip := a.Addr().Unmap()
	if ip.IsUnspecified() {
		ip = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	if !ip.Is4() { // dialSelf's source is an IPv4 address
		return
	}
	local := netip.AddrPortFrom(ip, a.Port()).String()
	switch {
	case mode == ingress.TLS && s.selfAddress == "":
		s.selfAddress = local
	case mode == ingress.Redirect && s.selfPlain == "":
		s.selfPlain = local
	}
}
