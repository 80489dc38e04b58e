package api

import (
	"context"
	"time"
	"unicode/utf8"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/internal/auth"
	"github.com/cordonhq/cordon/internal/errs"
)

const (
	maxKeyName  = 100 // characters
	maxKeyLimit = 1_000_000
)

func keyOf(k *auth.Key) control.Key {
	return control.Key{Id: k.ID, Name: k.Name, Admin: k.Admin, Hint: k.Hint, Created: k.Created, MaxSandboxes: k.MaxSandboxes, MaxPaused: k.MaxPaused}
}

// ListKeys lists the keys without their secrets.
func (s *server) ListKeys(ctx context.Context, _ control.ListKeysRequestObject) (control.ListKeysResponseObject, error) {
	if err := adminOnly(ctx); err != nil {
		return nil, err
	}
	keys, err := s.Keys.Keys(ctx)
	if err != nil {
		return nil, err
	}
	list := make(control.ListKeys200JSONResponse, len(keys))
	for i := range keys {
		list[i] = keyOf(&keys[i])
	}
	return list, nil
}

// CreateKey makes a key and shows its secret this once.
func (s *server) CreateKey(ctx context.Context, r control.CreateKeyRequestObject) (control.CreateKeyResponseObject, error) {
	if err := adminOnly(ctx); err != nil {
		return nil, err
	}
	if n := utf8.RuneCountInString(r.Body.Name); n == 0 || n > maxKeyName {
		return nil, errs.New(errs.Invalid, "name has %d characters, it must have 1 to %d", n, maxKeyName)
	}
	for field, n := range map[string]int{"maxSandboxes": r.Body.MaxSandboxes, "maxPaused": r.Body.MaxPaused} {
		if n < 0 || n > maxKeyLimit {
			return nil, errs.New(errs.Invalid, "%s is %d, it must be 1 to %d, or 0 for the server's default", field, n, maxKeyLimit)
		}
	}
	key, secret := auth.NewKey(r.Body.Name, r.Body.Admin, time.Now())
	key.MaxSandboxes, key.MaxPaused = r.Body.MaxSandboxes, r.Body.MaxPaused
	if err := s.Keys.PutKey(ctx, key); err != nil {
		return nil, err
	}
	s.Log.Info("key created", "key", key.ID, "by", callerOf(ctx).ID, "admin", key.Admin)
	out := keyOf(&key)
	out.Key = secret
	return control.CreateKey201JSONResponse(out), nil
}

// DeleteKey revokes a key.
func (s *server) DeleteKey(ctx context.Context, r control.DeleteKeyRequestObject) (control.DeleteKeyResponseObject, error) {
	if err := adminOnly(ctx); err != nil {
		return nil, err
	}
	keys, err := s.Keys.Keys(ctx)
	if err != nil {
		return nil, err
	}
	var found *auth.Key
	admins := 0
	for i := range keys {
		if keys[i].ID == r.KeyID {
			found = &keys[i]
		}
		if keys[i].Admin {
			admins++
		}
	}
	switch {
	case found == nil:
		return nil, errs.New(errs.NotFound, "key %q doesn't exist", r.KeyID)
	case found.Admin && admins == 1:
		return nil, errs.New(errs.Conflict, "key %q is the last admin key: make another first", r.KeyID)
	}
	if err := s.Keys.DeleteKey(ctx, r.KeyID); err != nil {
		return nil, err
	}
	s.Log.Info("key deleted", "key", r.KeyID, "by", callerOf(ctx).ID)
	return control.DeleteKey204Response{}, nil
}
