package sandbox

import (
	"context"
	"fmt"
	"time"
)

// A sandbox is not believed: however often its agent says that something was
// killed, or answers without waiting, the server must not be kept busy, nor the
// events of other sandboxes drown in its own.
const (
	killPause    = 500 * time.Millisecond // between questions; doubled after each kill
	killPauseMax = 10 * time.Minute
)

// reportKills makes what a sandbox's agent kills for want of memory events of its
// life, until this run of the sandbox ends or ctx does. What is killed while no
// server runs is not reported.
func reportKills(ctx context.Context, agents Agents, to *events, v *view) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-v.done:
			cancel()
		case <-stop:
		}
	}()
	pause, seen := killPause, int64(-1)
	for ctx.Err() == nil {
		asked := time.Now()
		kills, latest, err := agents.Kills(ctx, v.rec.Agent(), seen)
		switch {
		case len(kills) > 0:
			reportKill(ctx, to, v, kills)
			pause = min(2*pause, killPauseMax)
		case err != nil || time.Since(asked) < killPauseMax/2:
			pause = min(2*pause, killPauseMax)
		default: // it was quiet for long
			pause = killPause
		}
		if err == nil {
			seen = latest
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// reportKill makes one event of some kills.
func reportKill(ctx context.Context, to *events, v *view, kills []Kill) {
	last := kills[len(kills)-1]
	detail := fmt.Sprintf("out of memory: process %d (%s) was the biggest, with %d MiB, and was killed", last.PID, last.Command, last.Bytes>>20)
	if last.Processes > 1 {
		detail = fmt.Sprintf("out of memory: the %d processes of a command, one of them %d (%s), were the biggest and were killed", last.Processes, last.PID, last.Command)
	}
	if n := len(kills) - 1; n > 0 {
		detail += fmt.Sprintf("; so were %d before it", n)
	}
	to.log.Warn("process of a sandbox killed, memory is short", "sandbox", v.rec.ID, "pid", last.PID, "command", last.Command, "bytes", last.Bytes)
	to.add(ctx, &v.rec, Event{Name: "oom", Detail: detail})
}
