package api

import (
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/cordonhq/cordon/internal/auth"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// tunnels answers GET /sandboxes/{sandboxID}/forward/{port}, which is not part of
// the generated API: it becomes a WebSocket, and a sandbox's own token opens it.
func (s *server) tunnels(next http.Handler) http.Handler {
	mux := http.NewServeMux()
	const pattern = "GET /sandboxes/{sandboxID}/forward/{port}"
	mux.HandleFunc(pattern, s.forward)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, found := mux.Handler(r); found == pattern {
			mux.ServeHTTP(w, r)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (s *server) forward(w http.ResponseWriter, r *http.Request) {
	if s.Forward == nil {
		s.refuse("tunnels to ports")(w, r)
		return
	}
	id, err := s.mayForward(r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	port, err := strconv.ParseUint(r.PathValue("port"), 10, 16)
	if err != nil || port == 0 {
		s.fail(w, r, errs.New(errs.Invalid, "port is %q, it must be a number from 1 to 65535", r.PathValue("port")))
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		s.watchForward(ctx, r, cancel)
	}()
	defer func() { cancel(); <-watched }()
	if err := s.Forward(w, r.WithContext(ctx), string(id), uint16(port)); err != nil {
		s.fail(w, r, err)
	}
}

// mayForward returns the sandbox when the request has its access token, or the
// API key of whoever may touch it.
func (s *server) mayForward(r *http.Request) (sandbox.ID, error) {
	id, err := sandboxID(r.PathValue("sandboxID"))
	if err != nil {
		return "", err
	}
	if token := r.Header.Get("X-Access-Token"); token != "" && r.Header.Get("X-API-KEY") == "" {
		rec, err := s.Sandboxes.Get(r.Context(), "", id)
		if err != nil || rec.AccessToken == "" || auth.HashOf(token) != auth.HashOf(rec.AccessToken) {
			return "", errs.New(errs.Unauthorized, "the access token is not this sandbox's")
		}
		return id, nil
	}
	key, err := s.caller(r)
	if err != nil {
		return "", err
	}
	_, err = s.Sandboxes.Get(r.Context(), owner(context.WithValue(r.Context(), callerKey{}, key)), id)
	return id, err
}

// watchForward ends a tunnel when what opened it is not valid any more.
func (s *server) watchForward(ctx context.Context, r *http.Request, end func()) {
	t := time.NewTicker(streamPulse)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if _, err := s.mayForward(r); err != nil {
				end()
			}
		}
	}
}
