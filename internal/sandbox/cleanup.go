package sandbox

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// Cleanup is the list of things to undo, pushed as soon as something is
// acquired and run in reverse. The zero value is empty and ready to use.
type Cleanup struct {
	steps []step
}

type step struct {
	name string
	undo func(context.Context) error
}

// Add pushes an undo; name says what is undone, for the error.
func (c *Cleanup) Add(name string, undo func(context.Context) error) {
	c.steps = append(c.steps, step{name, undo})
}

// Run undoes everything, last first, and goes on after an error: what can be
// freed is freed. It empties the list.
func (c *Cleanup) Run(ctx context.Context) error {
	var errs []error
	for _, step := range slices.Backward(c.steps) {
		if err := step.undo(ctx); err != nil {
			errs = append(errs, fmt.Errorf("undo %s: %w", step.name, err))
		}
	}
	c.steps = nil
	return errors.Join(errs...)
}

// OnError undoes everything if *err is set, also when ctx has ended, and joins to *err
// what could not be undone. Functions whose steps are undone together defer it first.
func (c *Cleanup) OnError(ctx context.Context, err *error) {
	if *err != nil {
		*err = errors.Join(*err, c.Run(context.WithoutCancel(ctx)))
	}
}
