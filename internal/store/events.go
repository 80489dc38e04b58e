package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// eventWait is how long a read of the stream waits for the next event that is
// known to be there.
const eventWait = 5 * time.Second

// openEvents opens the bounded stream of lifecycle events.
func (e *engine) openEvents(ctx context.Context, cfg Config) (jetstream.Stream, error) {
	if _, err := e.recovered(ctx, eventStream, eventStream); err != nil {
		return nil, err
	}
	s, err := e.js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
		Name:      eventStream,
		Subjects:  []string{eventStream + ".>"},
		Retention: jetstream.LimitsPolicy,
		Discard:   jetstream.DiscardOld,
		Storage:   jetstream.FileStorage,
		MaxMsgs:   cfg.MaxEvents,
		MaxBytes:  cfg.MaxEventBytes,
		MaxAge:    cfg.MaxEventAge,

		MaxMsgsPerSubject: cfg.MaxSandboxEvents,
	})
	if err != nil {
		return nil, fmt.Errorf("open events: %w", err)
	}
	return s, nil
}

// AppendEvent implements sandbox.Store.
func (s *Store) AppendEvent(ctx context.Context, e sandbox.Event) error {
	if !e.Sandbox.Valid() {
		return errs.New(errs.Invalid, "event names sandbox %q, which is no sandbox ID", e.Sandbox)
	}
	data, err := encode(&e)
	if err != nil {
		return fmt.Errorf("encode event: %w", err)
	}
	if _, err := s.eng.js.Publish(ctx, eventStream+"."+string(e.Sandbox), data); err != nil {
		return fmt.Errorf("append event: %w", err)
	}
	return nil
}

// Events implements sandbox.Store.
func (s *Store) Events(ctx context.Context) ([]sandbox.Event, error) {
	c, err := s.events.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverAllPolicy})
	if err != nil {
		return nil, fmt.Errorf("read events: %w", err)
	}
	left := c.CachedInfo().NumPending
	out := make([]sandbox.Event, 0, left)
	if left == 0 {
		return out, nil
	}
	msgs, err := c.Messages()
	if err != nil {
		return nil, fmt.Errorf("read events: %w", err)
	}
	defer msgs.Stop()
	for left > 0 {
		e, pending, err := nextEvent(ctx, msgs)
		if err != nil {
			return nil, fmt.Errorf("read events: %w", err)
		}
		out = append(out, e)
		// Old events may age out and new ones arrive while we read: neither may
		// make us wait for ever.
		left = min(left-1, pending)
	}
	return out, nil
}

func nextEvent(ctx context.Context, msgs jetstream.MessagesContext) (sandbox.Event, uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, eventWait)
	defer cancel()
	m, err := msgs.Next(jetstream.NextContext(ctx))
	if err != nil {
		return sandbox.Event{}, 0, err
	}
	meta, err := m.Metadata()
	if err != nil {
		return sandbox.Event{}, 0, err
	}
	e, err := decode[sandbox.Event](m.Data())
	if err != nil {
		return sandbox.Event{}, 0, err
	}
	if e == nil {
		return sandbox.Event{}, 0, errors.New("event without content")
	}
	return *e, meta.NumPending, nil
}
