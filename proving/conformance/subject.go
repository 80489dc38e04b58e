package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/conformance/probe"
	"github.com/cordonhq/cordon/proving/lab"
)

// Subject is a sandbox with the probe running in it.
type Subject struct {
	*client.Sandbox
	network client.Network
	inside  *prober
	process *client.Process

	addr     netip.Addr // its own; valid after Addr
	addr6    netip.Addr
	stale    bool    // the server was restarted: nobody hears the probe
	below    *prober // the probe in the sandbox's place, after Takeover
	takeover *lab.Cmd
}

// maxOutcome bounds one line of the probe's: it may keep a mebibyte.
const maxOutcome = 8 << 20

// guestProbe is where the probe is put.
const guestProbe = "/tmp/cordon-probe"

func (s *suite) newSubject(ctx context.Context, o client.CreateOptions) (*Subject, error) {
	sb, err := s.client.Create(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("create a sandbox: %w", err)
	}
	sub := &Subject{Sandbox: sb, network: o.Network}
	if err := sb.Files.Write(ctx, guestProbe, bytes.NewReader(s.opts.Probe)); err != nil {
		return nil, errors.Join(fmt.Errorf("put the probe into the sandbox: %w", err), sub.end(ctx))
	}
	if err := sub.startProbe(ctx); err != nil {
		return nil, errors.Join(err, sub.end(ctx))
	}
	return sub, nil
}

// startProbe starts the probe; it is done again after a resume.
func (s *Subject) startProbe(ctx context.Context) error {
	p := newProber()
	process, err := s.Commands.Start(ctx, "chmod 755 "+guestProbe+" && exec "+guestProbe, client.RunOptions{Stdin: true, Stdout: p})
	if err != nil {
		return fmt.Errorf("start the probe: %w", err)
	}
	p.send = process.Send
	go func() {
		defer close(p.ended)
		_, _ = process.Wait(context.WithoutCancel(ctx)) // however it ended
	}()
	s.inside, s.process, s.stale = p, process, false
	return nil
}

// end kills the sandbox and all that was started for it.
func (s *Subject) end(ctx context.Context) error {
	if s.takeover != nil {
		_ = s.takeover.Process.Kill() // it may have ended with its namespace
		<-s.below.ended
	}
	err := s.Kill(ctx)
	if errors.Is(err, client.ErrNotFound) {
		err = nil
	}
	if s.process != nil {
		s.process.Close()
	}
	return err
}

// Addr is the sandbox's own IPv4 address; addr6 is the other one then.
func (s *Subject) Addr(ctx context.Context) (netip.Addr, error) {
	if s.addr.IsValid() {
		return s.addr, nil
	}
	r, err := s.Commands.Run(ctx, "hostname -I", client.RunOptions{})
	if err != nil {
		return netip.Addr{}, fmt.Errorf("ask for the sandbox's address: %w", err)
	}
	for word := range strings.FieldsSeq(r.Stdout) {
		a, err := netip.ParseAddr(word)
		switch {
		case err != nil:
		case a.Is4():
			s.addr = a
		case a.IsPrivate():
			s.addr6 = a
		}
	}
	if !s.addr.IsValid() || !s.addr6.IsValid() {
		return netip.Addr{}, fmt.Errorf("the sandbox does not name its addresses: %q", r.Stdout)
	}
	return s.addr, nil
}

// prober speaks with one running probe.
type prober struct {
	send  func(context.Context, []byte) error
	ended chan struct{} // closed when the probe is gone

	mu      sync.Mutex // guards the rest
	next    int
	waiting map[int]chan probe.Outcome
	partial []byte // of a line
}

func newProber() *prober {
	return &prober{waiting: map[int]chan probe.Outcome{}, ended: make(chan struct{})}
}

// Write takes the probe's output and hands outcomes to who waits for them.
func (p *prober) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.partial)+len(b) > maxOutcome {
		return 0, errors.New("an outcome is longer than any can be")
	}
	p.partial = append(p.partial, b...)
	for {
		line, rest, ok := bytes.Cut(p.partial, []byte("\n"))
		if !ok {
			return len(b), nil
		}
		var got probe.Outcome
		if err := json.Unmarshal(line, &got); err != nil {
			return 0, fmt.Errorf("read an outcome: %w", err)
		}
		p.partial = rest
		if c, ok := p.waiting[got.ID]; ok {
			c <- got // it has room for one
			delete(p.waiting, got.ID)
		}
	}
}

var _ io.Writer = (*prober)(nil)

// begin hands over an order and returns where its outcome will come.
func (p *prober) begin(ctx context.Context, o probe.Order) (<-chan probe.Outcome, error) {
	c, err := p.beginAll(ctx, []probe.Order{o})
	if err != nil {
		return nil, err
	}
	return c[0], nil
}

// beginAll hands over orders together: one message each would spread them over
// seconds on a busy machine.
func (p *prober) beginAll(ctx context.Context, orders []probe.Order) ([]<-chan probe.Outcome, error) {
	pending := make([]<-chan probe.Outcome, len(orders))
	var lines []byte
	for i, o := range orders {
		p.mu.Lock()
		p.next++
		o.ID = p.next
		c := make(chan probe.Outcome, 1)
		p.waiting[o.ID] = c
		p.mu.Unlock()
		line, err := json.Marshal(o)
		if err != nil {
			return nil, err
		}
		pending[i], lines = c, append(append(lines, line...), '\n')
	}
	if err := p.send(ctx, lines); err != nil {
		return nil, fmt.Errorf("hand orders to the probe: %w", err)
	}
	return pending, nil
}

// errProbeGone: the probe ended, or what it ran in did.
var errProbeGone = errors.New("the probe is gone")

// do carries out orders at the same time and returns their outcomes in order.
func (p *prober) do(ctx context.Context, orders []probe.Order) ([]probe.Outcome, error) {
	pending, err := p.beginAll(ctx, orders)
	if err != nil {
		return nil, err
	}
	out := make([]probe.Outcome, len(orders))
	for i, c := range pending {
		select {
		case out[i] = <-c:
		case <-p.ended:
			return nil, errProbeGone
		case <-ctx.Done():
			return nil, fmt.Errorf("the probe did not end: %w", ctx.Err())
		}
	}
	return out, nil
}

// Takeover starts the probe in the sandbox's network namespace, beside the
// runtime and on the same link: as somebody who broke out of the runtime, but not
// of the namespace, can send any frame there. It is how the rules are tested
// where the runtime would not let a packet out in the first place.
func (s *Subject) Takeover(ctx context.Context, t *Trial) (link, error) {
	addr, err := s.Addr(ctx)
	if err != nil {
		return link{}, err
	}
	at, err := t.suite.stand.linkOf(addr)
	if err != nil || s.below != nil {
		return at, err
	}
	s.below, s.takeover, err = t.suite.stand.probeIn(at.netns)
	return at, err
}

// probeIn starts a probe in a network namespace of the lab's host.
func (s *stand) probeIn(netns string) (*prober, *lab.Cmd, error) {
	cmd := s.lab.HostCommand(context.Background(), "nsenter", "--net="+netns, s.probe) // ended by Kill, or with the lab
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, err
	}
	p := newProber()
	p.send = func(_ context.Context, b []byte) error {
		_, err := in.Write(b)
		if errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrClosed) {
			err = errProbeGone // nsenter found no namespace any more
		}
		return err
	}
	cmd.Stdout = p
	if err := cmd.Start(); err != nil {
		return nil, nil, fmt.Errorf("start the probe in %s: %w", netns, err)
	}
	go func() {
		defer close(p.ended)
		_ = cmd.Wait() // killed, or never begun
	}()
	return p, cmd, nil
}
