package ingress

import (
	"errors"
	"log/slog"
	"net/http"
	"syscall"
	"time"

	"github.com/coder/websocket"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/tunnel"
)

// Forward carries TCP to a port of the sandbox in a WebSocket (package tunnel)
// until either side ends it or the sandbox ends. Whoever calls it has made sure
// that the client may. An error means that nothing has been answered yet.
func (in *Ingress) Forward(w http.ResponseWriter, r *http.Request, id string, port uint16) error {
	judged := in.judged.Load()
	b, t, err := in.live(id)
	if err != nil {
		return err
	}
	if port == t.agentPort() {
		return errs.New(errs.Invalid, "port %d is the sandbox's agent: it is reached by the SDKs at its URL, not by a tunnel", port)
	}
	g := &guest{owner: true, busy: true} // its source is the key, whose share counts
	if refused := b.occupy(g.from.addr); refused != nil {
		return errs.New(errs.Exhausted, "%s: the limit is %d, close some", refused.Message, refused.Limit)
	}
	if !b.join(g, t, time.Time{}, judged) {
		return errs.New(errs.NotFound, "sandbox %s was not found", id)
	}
	defer b.depart(g)
	in.traffic(t)
	conn, err := b.pool.Dial(r.Context(), port)
	if err != nil {
		return b.whyNot(port, err)
	}
	defer conn.Close()
	info := infoOf(r)
	info.upgrading = true
	defer info.release()
	// Any origin: the API key in the header is what admits, and no page can set it.
	ws, err := websocket.Accept(w, r, &websocket.AcceptOptions{Subprotocols: []string{tunnel.Protocol}, InsecureSkipVerify: true})
	if err != nil {
		info.upgrading = false
		return nil //nolint:nilerr // Accept has answered
	}
	told := access{sandbox: id, port: port, src: info.addr, start: time.Now()}
	told.octets.In, told.octets.Out, err = tunnel.Join(r.Context(), ws, conn)
	in.over("tunnel ended", told, slog.Any("err", err))
	return nil
}

// live returns the connections of a running sandbox.
func (in *Ingress) live(id string) (*backend, *Target, error) {
	t, ok := in.cfg.Lookup(id)
	if !ok {
		return nil, nil, errs.New(errs.NotFound, "sandbox %s was not found", id)
	}
	if t.State != Running {
		return nil, nil, errs.New(errs.Conflict, "sandbox %s is paused: connect to it first, which resumes it", id)
	}
	b := in.backend(t)
	if b == nil {
		return nil, nil, errs.New(errs.NotFound, "sandbox %s was not found", id)
	}
	return b, t, nil
}

// whyNot says why a port cannot be reached.
func (b *backend) whyNot(port uint16, err error) error {
	switch {
	case b.gone():
		return errs.New(errs.NotFound, "sandbox %s was not found", b.target.ID)
	case errors.Is(err, syscall.ECONNREFUSED):
		return errs.New(errs.NotFound, "nothing listens on port %d of sandbox %s: start the service, then try again", port, b.target.ID)
	}
	return errs.Wrap(errs.Unavailable, err, "port %d of sandbox %s does not answer", port, b.target.ID)
}
