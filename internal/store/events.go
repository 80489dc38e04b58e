package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
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
		// The history keeps below these by what each key may keep.
		MaxMsgs:  2 * cfg.MaxEvents,
		MaxBytes: 2 * cfg.MaxEventBytes,
		MaxAge:   cfg.MaxEventAge,

		MaxMsgsPerSubject: cfg.MaxSandboxEvents,
	})
	if err != nil {
		return nil, fmt.Errorf("open events: %w", err)
	}
	return s, nil
}

// eventSubject is where an event is published; all of a key's have one prefix.
func eventSubject(e *sandbox.Event) string {
	return eventStream + "." + eventKey(e.Owner) + "." + string(e.Sandbox)
}

// eventKey is a key's part of a subject.
func eventKey(owner string) string {
	if !validKey(owner) {
		return "-"
	}
	return owner
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
	ack, err := s.eng.js.Publish(ctx, eventSubject(&e), data)
	if err != nil {
		return fmt.Errorf("append event: %w", err)
	}
	dropped := s.history.add(keptEvent{Event: e, seq: ack.Sequence, size: int64(len(data)) + eventOverhead}, time.Now())
	return s.dropEvents(ctx, dropped)
}

// dropEvents removes events from the stream: of each key those up to the last, and those
// of earlier versions one by one.
func (s *Store) dropEvents(ctx context.Context, dropped map[string][]keptEvent) error {
	for owner, events := range dropped {
		last := events[len(events)-1].seq
		err := s.events.Purge(ctx, jetstream.WithPurgeSubject(eventStream+"."+eventKey(owner)+".>"), jetstream.WithPurgeSequence(last+1))
		for _, e := range events {
			if e.former {
				err = errors.Join(err, s.events.DeleteMsg(ctx, e.seq))
			}
		}
		if err != nil {
			return fmt.Errorf("drop a key's oldest events: %w", err)
		}
	}
	return nil
}

// Events implements sandbox.Store. It answers from memory.
func (s *Store) Events(ctx context.Context) ([]sandbox.Event, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return s.history.all(time.Now()), nil
}

// loadEvents reads the stream into memory.
func (s *Store) loadEvents(ctx context.Context) error {
	s.history = newHistory(s.cfg)
	c, err := s.events.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverAllPolicy})
	if err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	left := c.CachedInfo().NumPending
	if left == 0 {
		return nil
	}
	msgs, err := c.Messages()
	if err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	defer msgs.Stop()
	now, dropped := time.Now(), map[string][]keptEvent{}
	for left > 0 {
		e, pending, err := nextEvent(ctx, msgs)
		if err != nil {
			return fmt.Errorf("read events: %w", err)
		}
		for key, events := range s.history.add(e, now) {
			dropped[key] = append(dropped[key], events...)
		}
		// Old events may age out while we read: they must not make us wait for ever.
		left = min(left-1, pending)
	}
	return s.dropEvents(ctx, dropped)
}

func nextEvent(ctx context.Context, msgs jetstream.MessagesContext) (keptEvent, uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, eventWait)
	defer cancel()
	m, err := msgs.Next(jetstream.NextContext(ctx))
	if err != nil {
		return keptEvent{}, 0, err
	}
	meta, err := m.Metadata()
	if err != nil {
		return keptEvent{}, 0, err
	}
	e, err := decode[sandbox.Event](m.Data())
	if err != nil {
		return keptEvent{}, 0, err
	}
	if e == nil {
		return keptEvent{}, 0, errors.New("event without content")
	}
	return keptEvent{
		Event: *e, seq: meta.Sequence.Stream, size: int64(len(m.Data())) + eventOverhead,
		former: strings.Count(m.Subject(), ".") == 1,
	}, meta.NumPending, nil
}
