package api

import (
	"context"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// ListDomains lists a sandbox's custom domains.
func (s *server) ListDomains(ctx context.Context, r control.ListDomainsRequestObject) (control.ListDomainsResponseObject, error) {
	rec, err := s.get(ctx, r.SandboxID)
	if err != nil {
		return nil, err
	}
	list := make(control.ListDomains200JSONResponse, len(rec.Domains))
	for i, d := range rec.Domains {
		list[i] = domainOf(d)
	}
	return list, nil
}

// BindDomain makes a custom domain lead to a sandbox.
func (s *server) BindDomain(ctx context.Context, r control.BindDomainRequestObject) (control.BindDomainResponseObject, error) {
	id, err := sandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	p, err := port(r.Body.Port)
	if err != nil {
		return nil, err
	}
	d, err := s.Sandboxes.Bind(ctx, owner(ctx), id, sandbox.Domain{Name: r.Domain, Port: p})
	if err != nil {
		return nil, err
	}
	return control.BindDomain200JSONResponse(domainOf(d)), nil
}

// UnbindDomain makes a custom domain free.
func (s *server) UnbindDomain(ctx context.Context, r control.UnbindDomainRequestObject) (control.UnbindDomainResponseObject, error) {
	id, err := sandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	return control.UnbindDomain204Response{}, s.Sandboxes.Unbind(ctx, owner(ctx), id, r.Domain)
}

func domainOf(d sandbox.Domain) control.SandboxDomain {
	return control.SandboxDomain{Domain: d.Name, Port: int(d.Port)}
}
