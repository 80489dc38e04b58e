package api

import (
	"context"
	"slices"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

func (s *server) templates(ctx context.Context) ([]sandbox.Template, error) {
	if s.Templates == nil {
		return nil, errs.New(errs.Unimplemented, "this server does not list its templates")
	}
	return s.Templates(ctx)
}

// ListTemplates lists what sandboxes can be started from.
func (s *server) ListTemplates(ctx context.Context, _ control.ListTemplatesRequestObject) (control.ListTemplatesResponseObject, error) {
	all, err := s.templates(ctx)
	if err != nil {
		return nil, err
	}
	return control.ListTemplates200JSONResponse(templatesOf(all)), nil
}

// ListTemplatesV2 is the same by pages.
func (s *server) ListTemplatesV2(ctx context.Context, r control.ListTemplatesV2RequestObject) (control.ListTemplatesV2ResponseObject, error) {
	limit, err := pageLimit(r.Params.Limit)
	if err != nil {
		return nil, err
	}
	if r.Params.Page < 0 {
		return nil, errs.New(errs.Invalid, "parameter page is %d, it must be at least 1", r.Params.Page)
	}
	all, err := s.templates(ctx)
	if err != nil {
		return nil, err
	}
	if limit == 0 {
		limit = maxPage
	}
	number := max(r.Params.Page, 1)
	first := len(all)
	if number-1 <= len(all)/limit { // also keeps the product small
		first = min((number-1)*limit, len(all))
	}
	return control.ListTemplatesV2200JSONResponse{
		Templates:  templatesOf(all[first:min(first+limit, len(all))]),
		Total:      len(all),
		Page:       number,
		Limit:      limit,
		TotalPages: (len(all) + limit - 1) / limit,
	}, nil
}

func templatesOf(all []sandbox.Template) []control.Template {
	list := make([]control.Template, len(all))
	for i, t := range all {
		list[i] = control.Template{
			TemplateID:  t.ID,
			BuildID:     t.ID,
			BuildStatus: control.Building,
			CpuCount:    t.Resources.CPUs,
			MemoryMB:    t.Resources.MemoryMB,
			DiskSizeMB:  t.Resources.DiskMB,
			Public:      true,
			Aliases:     append([]string{}, t.Names...),
			Names:       append([]string{}, t.Names...),
			CreatedAt:   t.Created.UTC(),
			UpdatedAt:   t.Created.UTC(),
			BuildCount:  1,
			EnvdVersion: EnvdVersion,
		}
		if t.Ready {
			list[i].BuildStatus = control.Ready
		}
	}
	return list
}

// GetTemplateAlias says whether a template of a name or ID exists.
func (s *server) GetTemplateAlias(ctx context.Context, r control.GetTemplateAliasRequestObject) (control.GetTemplateAliasResponseObject, error) {
	all, err := s.templates(ctx)
	if err != nil {
		return nil, err
	}
	for _, t := range all {
		if t.ID == r.Alias || slices.Contains(t.Names, r.Alias) {
			return control.GetTemplateAlias200JSONResponse{TemplateID: t.ID, Public: true}, nil
		}
	}
	return nil, errs.New(errs.NotFound, "template %q doesn't exist", r.Alias)
}

// DeleteTemplate deletes a snapshot; templates that are no snapshots stay.
func (s *server) DeleteTemplate(ctx context.Context, r control.DeleteTemplateRequestObject) (control.DeleteTemplateResponseObject, error) {
	snapshots, err := s.snapshots()
	if err != nil {
		return nil, err
	}
	return control.DeleteTemplate204Response{}, snapshots.DeleteSnapshot(ctx, owner(ctx), r.TemplateID)
}
