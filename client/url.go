package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/cordonhq/cordon/api/gen/control"
)

// SignedURL opens one port of a private sandbox for whoever has it.
type SignedURL struct {
	ID   string // to revoke it by
	Port int
	// URL is what to open, and Token what a program may send instead in the header
	// E2b-Traffic-Access-Token. Both are known to who made it only.
	URL, Token       string
	Created, Expires time.Time
}

func signedOf(u *control.SignedURL) SignedURL {
	return SignedURL{ID: u.Id, Port: u.Port, URL: u.Url, Token: u.Token, Created: u.Created, Expires: u.Expires}
}

func urlsOf(sandbox string) string { return "/sandboxes/" + url.PathEscape(sandbox) + "/urls" }

// SignURL makes a URL that opens a port of a sandbox without its traffic token for
// ttl (whole seconds, 0: an hour, at most a week). It ends with the sandbox, or when
// it is revoked, and survives pauses. A public sandbox is ErrConflict.
func (cl *Client) SignURL(ctx context.Context, sandbox string, port int, ttl time.Duration) (SignedURL, error) {
	in := struct {
		Port int   `json:"port"`
		TTL  int64 `json:"ttl,omitempty"`
	}{port, seconds(ttl)}
	var out control.SignedURL
	if _, err := cl.do(ctx, call{method: http.MethodPost, path: urlsOf(sandbox), in: in, out: &out}); err != nil {
		return SignedURL{}, fmt.Errorf("sign URL: %w", err)
	}
	return signedOf(&out), nil
}

// SignedURLs returns a sandbox's signed URLs that are in force, oldest first, without
// URL and Token.
func (cl *Client) SignedURLs(ctx context.Context, sandbox string) ([]SignedURL, error) {
	var list []control.SignedURL
	if _, err := cl.do(ctx, call{method: http.MethodGet, path: urlsOf(sandbox), out: &list}); err != nil {
		return nil, fmt.Errorf("list signed URLs: %w", err)
	}
	out := make([]SignedURL, len(list))
	for i := range list {
		out[i] = signedOf(&list[i])
	}
	return out, nil
}

// RevokeURL makes a signed URL open nothing any more, nor the cookies made from it,
// and cuts what is open through it. One that is not in force is ErrNotFound.
func (cl *Client) RevokeURL(ctx context.Context, sandbox, id string) error {
	if _, err := cl.do(ctx, call{method: http.MethodDelete, path: urlsOf(sandbox) + "/" + url.PathEscape(id)}); err != nil {
		return fmt.Errorf("revoke signed URL: %w", err)
	}
	return nil
}

// RevokeURLs is RevokeURL for all of a sandbox's.
func (cl *Client) RevokeURLs(ctx context.Context, sandbox string) error {
	if _, err := cl.do(ctx, call{method: http.MethodDelete, path: urlsOf(sandbox)}); err != nil {
		return fmt.Errorf("revoke signed URLs: %w", err)
	}
	return nil
}
