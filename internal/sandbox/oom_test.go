package sandbox

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestKillsForWantOfMemoryAreEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		m := newManager(t, w)
		runManager(t, m)
		synctest.Wait() // what exists when Run begins is watched from there, too
		rec, err := m.Create(t.Context(), CreateRequest{Timeout: 10 * time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		told := func() (out []string) {
			events, _ := fakeStore{w}.Events(t.Context())
			for _, e := range events {
				if e.Name == "oom" && e.Sandbox == rec.ID {
					out = append(out, e.Detail)
				}
			}
			return out
		}
		w.kills <- Kill{PID: 17, Command: "python3", Bytes: 480 << 20}
		synctest.Wait()
		want := []string{"out of memory: process 17 (python3) was the biggest, with 480 MiB, and was killed"}
		if got := told(); !slices.Equal(got, want) {
			t.Errorf("events: %q, want %q", got, want)
		}

		// An agent that tells of kills without end is asked ever more rarely.
		done := make(chan struct{})
		go func() {
			for {
				select {
				case w.kills <- Kill{}:
				case <-done:
					return
				}
			}
		}()
		time.Sleep(2 * time.Hour)
		close(done)
		if n := len(told()); n < 10 || n > 30 {
			t.Errorf("%d events in two hours, want the first few quickly and then six an hour", n)
		}
		if err := m.Kill(t.Context(), "", rec.ID); err != nil {
			t.Error(err)
		}
	})
}
