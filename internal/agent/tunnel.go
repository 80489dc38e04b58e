package agent

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The tunnel is how the host reaches services bound to the sandbox's loopback,
// which no packet from outside reaches: GET /cordon/tunnel?port=N with Upgrade:
// cordon-tunnel becomes a plain connection to 127.0.0.1:N or [::1]:N.
const (
	tunnelProtocol = "cordon-tunnel"
	tunnelReason   = "X-Cordon-Tunnel" // why there is none: "refused", "unreachable"
	tunnelDial     = 2 * time.Second
)

func (a *Agent) getTunnel(w http.ResponseWriter, r *http.Request) {
	if !strings.EqualFold(r.Header.Get("Upgrade"), tunnelProtocol) {
		writeError(w, http.StatusUpgradeRequired, "send Connection: Upgrade and Upgrade: "+tunnelProtocol)
		return
	}
	port, err := strconv.ParseUint(r.URL.Query().Get("port"), 10, 16)
	if err != nil || port == 0 {
		writeError(w, http.StatusBadRequest, "port must be a number from 1 to 65535")
		return
	}
	up, err := dialLoopback(r.Context(), uint16(port), a.addresses.earlier())
	if err != nil {
		reason := "unreachable"
		if errors.Is(err, syscall.ECONNREFUSED) {
			reason = "refused"
		}
		w.Header().Set(tunnelReason, reason)
		writeError(w, http.StatusBadGateway, reason)
		return
	}
	defer up.Close()
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		writeError(w, http.StatusInternalServerError, "the connection cannot be taken over")
		return
	}
	defer conn.Close()
	if conn.SetDeadline(time.Time{}) != nil {
		return
	}
	if _, err := io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+tunnelProtocol+"\r\n\r\n"); err != nil {
		return
	}
	// What came right behind the request is the client's first words.
	if n := buffered.Reader.Buffered(); n > 0 {
		if _, err := io.CopyN(up, buffered.Reader, int64(n)); err != nil {
			return
		}
	}
	splice(r.Context(), conn, up)
}

// dialLoopback tries both loopbacks, for a port is mostly bound on one, and then the
// addresses that the sandbox had earlier.
func dialLoopback(ctx context.Context, port uint16, earlier []netip.Addr) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, tunnelDial)
	defer cancel()
	var d net.Dialer
	var errs []error
	for _, host := range append([]netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}, earlier...) {
		c, err := d.DialContext(ctx, "tcp", netip.AddrPortFrom(host, port).String())
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// splice copies both ways until both directions have ended or ctx has; the end
// of one direction is passed on, as programs that half-close expect.
func splice(ctx context.Context, a, b net.Conn) {
	stop := context.AfterFunc(ctx, func() { a.Close(); b.Close() })
	defer stop()
	var wg sync.WaitGroup
	for _, dir := range [][2]net.Conn{{a, b}, {b, a}} {
		wg.Go(func() {
			_, err := io.Copy(dir[1], dir[0])
			half, ok := dir[1].(interface{ CloseWrite() error })
			if err != nil || !ok || half.CloseWrite() != nil {
				a.Close()
				b.Close()
			}
		})
	}
	wg.Wait()
}
