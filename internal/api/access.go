package api

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/cordonhq/cordon/internal/auth"
	"github.com/cordonhq/cordon/internal/errs"
)

// The limits of a request's body. Network rules may be 10,000 entries long.
const (
	maxBody      = 1 << 20
	maxRulesBody = 4 << 20
	bodyDeadline = 30 * time.Second
)

// callerKey is the context key of the caller's auth.Key.
type callerKey struct{}

// authenticated lets requests with a valid API key pass, and /health.
func (s *server) authenticated(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && r.URL.Path == "/health" {
			next.ServeHTTP(w, r)
			return
		}
		key, err := s.caller(r)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, key)))
	})
}

func (s *server) caller(r *http.Request) (auth.Key, error) {
	secret := r.Header.Get("X-API-KEY")
	if secret == "" {
		scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
		if strings.EqualFold(scheme, "Bearer") {
			secret = strings.TrimSpace(token)
		}
	}
	if secret == "" {
		return auth.Key{}, errs.New(errs.Unauthorized, "no API key: send it in the header X-API-KEY")
	}
	keys, err := s.Keys.Keys(r.Context())
	if err != nil {
		return auth.Key{}, err
	}
	key, ok := auth.Find(keys, secret)
	if !ok {
		return auth.Key{}, errs.New(errs.Unauthorized, "the API key is not valid")
	}
	return key, nil
}

func callerOf(ctx context.Context) auth.Key {
	key, _ := ctx.Value(callerKey{}).(auth.Key)
	return key
}

// noOwner owns nothing: no key has such an ID.
const noOwner = "-"

// owner is whose sandboxes the caller may touch: its own; those of all keys, which is
// "", only with an admin key. A caller that is not known, or whose key has no ID, owns
// nothing.
func owner(ctx context.Context) string {
	key := callerOf(ctx)
	switch {
	case key.Admin:
		return ""
	case key.ID == "":
		return noOwner
	}
	return key.ID
}

func adminOnly(ctx context.Context) error {
	if !callerOf(ctx).Admin {
		return errs.New(errs.Forbidden, "this API key may not manage keys: use an admin key")
	}
	return nil
}

// bodied reads the whole body, within a size and a time, before the request is
// looked at: a slow sender holds no more than a buffer.
func (s *server) bodied(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		limit := int64(maxBody)
		if carriesRules(r.URL.Path) {
			limit = maxRulesBody
		}
		rc := http.NewResponseController(w)
		// The deadline is lifted again, since it would also end a request that
		// takes its time to answer. A writer without deadlines is one of a test.
		_ = rc.SetReadDeadline(time.Now().Add(bodyDeadline))
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
		if err != nil {
			s.badBody(w, r, err)
			return
		}
		_ = rc.SetReadDeadline(time.Time{})
		r.Body = io.NopCloser(bytes.NewReader(body))
		next.ServeHTTP(w, r)
	})
}

func carriesRules(path string) bool {
	return path == "/sandboxes" || path == "/v2/sandboxes" || path == "/network/explain" || strings.HasSuffix(path, "/network")
}
