package api

import (
	"context"
	"strconv"
	"time"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/internal/auth"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// urlLife is how long a signed URL opens when its creator named no time.
const urlLife = time.Hour

// CreateURL makes a signed URL.
func (s *server) CreateURL(ctx context.Context, r control.CreateURLRequestObject) (control.CreateURLResponseObject, error) {
	id, err := sandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	p, err := port(r.Body.Port)
	if err != nil {
		return nil, err
	}
	ttl, err := seconds("ttl", r.Body.Ttl)
	if err != nil {
		return nil, err
	}
	if ttl == 0 {
		ttl = urlLife
	}
	rec, link, err := s.Sandboxes.CreateLink(ctx, owner(ctx), id, sandbox.LinkRequest{Port: p, Life: ttl})
	if err != nil {
		return nil, err
	}
	access := auth.URLAccess{Sandbox: string(rec.ID), Port: link.Port, Link: link.ID, Expires: link.Expires}
	out := urlOf(&link)
	out.Token = access.Sign(rec.LinkKey)
	out.Url = "https://" + strconv.Itoa(int(link.Port)) + "-" + string(rec.ID) + "." + s.Domain + "/?cordon_token=" + out.Token
	return control.CreateURL201JSONResponse(out), nil
}

func urlOf(l *sandbox.Link) control.SignedURL {
	return control.SignedURL{Id: l.ID, Port: int(l.Port), Created: l.Created, Expires: l.Expires}
}

// ListURLs lists the signed URLs in force.
func (s *server) ListURLs(ctx context.Context, r control.ListURLsRequestObject) (control.ListURLsResponseObject, error) {
	id, err := sandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	links, err := s.Sandboxes.Links(ctx, owner(ctx), id)
	if err != nil {
		return nil, err
	}
	list := make(control.ListURLs200JSONResponse, len(links))
	for i := range links {
		list[i] = urlOf(&links[i])
	}
	return list, nil
}

// DeleteURL revokes one signed URL.
func (s *server) DeleteURL(ctx context.Context, r control.DeleteURLRequestObject) (control.DeleteURLResponseObject, error) {
	id, err := sandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	if r.UrlID == "" {
		return nil, errs.New(errs.NotFound, "name a URL's ID")
	}
	return control.DeleteURL204Response{}, s.Sandboxes.RevokeLinks(ctx, owner(ctx), id, r.UrlID)
}

// DeleteURLs revokes all of a sandbox's signed URLs.
func (s *server) DeleteURLs(ctx context.Context, r control.DeleteURLsRequestObject) (control.DeleteURLsResponseObject, error) {
	id, err := sandboxID(r.SandboxID)
	if err != nil {
		return nil, err
	}
	return control.DeleteURLs204Response{}, s.Sandboxes.RevokeLinks(ctx, owner(ctx), id, "")
}
