package client

import (
	"context"
	"net/http"
	"net/url"

	"github.com/cordonhq/cordon/api/gen/control"
)

// Domain is a name of one's own that leads to a port of a sandbox.
type Domain struct {
	Name string
	Port int
}

// BindDomain makes a domain of one's own lead to a port until the sandbox ends,
// paused or not. Its DNS record is the caller's to make. A domain that leads to
// another sandbox is ErrConflict; one that leads to this sandbox gets the new port.
func (s *Sandbox) BindDomain(ctx context.Context, name string, port int) error {
	in := map[string]int{"port": port}
	return s.do(ctx, "bind domain", call{method: http.MethodPut, path: "/domains/" + url.PathEscape(name), in: in})
}

// UnbindDomain ends what BindDomain began. A domain that does not lead to this
// sandbox is ErrNotFound.
func (s *Sandbox) UnbindDomain(ctx context.Context, name string) error {
	return s.do(ctx, "unbind domain", call{method: http.MethodDelete, path: "/domains/" + url.PathEscape(name)})
}

// Domains returns the sandbox's own domains, oldest first.
func (s *Sandbox) Domains(ctx context.Context) ([]Domain, error) {
	var list []control.SandboxDomain
	if err := s.do(ctx, "list domains", call{method: http.MethodGet, path: "/domains", out: &list}); err != nil {
		return nil, err
	}
	out := make([]Domain, len(list))
	for i, d := range list {
		out[i] = Domain{d.Domain, d.Port}
	}
	return out, nil
}
