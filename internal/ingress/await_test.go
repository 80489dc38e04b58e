package ingress

import (
	"context"
	"errors"
	"net"
	"net/http/httptest"
	"net/netip"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cordonhq/cordon/internal/share"
)

// starter is a sandbox whose ports open when they are told to, at the clock of a
// synctest bubble.
type starter struct {
	*backend
	begun time.Time
	opens map[uint16]time.Duration // after begun; absent: never
	tries int
}

func newStarter() *starter {
	return &starter{
		backend: &backend{
			in:     &Ingress{exchanges: share.NewPool(share.Exchanges.Of(100, 0))},
			target: &Target{Done: make(chan struct{})},
		}, begun: time.Now(), opens: map[uint16]time.Duration{},
	}
}

// command is started now and ends when the returned function is called.
func (s *starter) command() (end func()) {
	g := &guest{started: time.Now()}
	s.guests.mu.Lock()
	if g.next = s.guests.head; g.next != nil {
		g.next.prev = g
	}
	s.guests.head = g
	s.guests.mu.Unlock()
	s.started.Store(g.started.UnixNano())
	s.occupy(netip.Addr{})
	return func() { s.depart(g) }
}

// ask dials a port and returns how long that took and whether it was open.
func (s *starter) ask(ctx context.Context, port uint16) (took time.Duration, open bool) {
	asked := time.Now()
	c, err := s.await(ctx, port, func(context.Context, uint16) (net.Conn, error) {
		s.tries++
		if at, ok := s.opens[port]; !ok || time.Since(s.begun) < at {
			return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
		}
		near, far := net.Pipe()
		far.Close()
		return near, nil
	})
	if err == nil {
		c.Close()
	}
	return time.Since(asked), err == nil
}

func TestAPortIsWaitedForOnlyWhileACommandStarts(t *testing.T) {
	ms := func(n int) time.Duration { return time.Duration(n) * time.Millisecond }
	for _, tc := range []struct {
		name  string
		do    func(s *starter)
		opens int // ms after the beginning; -1: never
		open  bool
		least time.Duration
		most  time.Duration
	}{
		{"nothing was started", func(*starter) {}, -1, false, 0, 0},
		{"nothing was started and the port opens soon", func(*starter) {}, 30, false, 0, 0},
		{"a command was started and opens the port", func(s *starter) { s.command() }, 300, true, ms(300), ms(400)},
		{"a command was started and opens none", func(s *starter) { s.command() }, -1, false, ms(900), ms(1100)},
		{"a command has ended", func(s *starter) { s.command()() }, -1, false, 0, 0},
		{"a command ends meanwhile", func(s *starter) { end := s.command(); time.AfterFunc(ms(200), end) }, -1, false, ms(200), ms(300)},
		{"a command runs for long", func(s *starter) { s.command(); time.Sleep(startPatience) }, -1, false, 0, 0},
		{"a command has opened another port", func(s *starter) {
			s.command()
			s.opens[1] = ms(100)
			s.ask(context.Background(), 1)
		}, -1, false, 0, 0},
		{"one of two commands has opened another port", func(s *starter) {
			s.command()
			s.command()
			s.opens[1] = ms(100)
			s.ask(context.Background(), 1)
			s.ask(context.Background(), 1)
		}, 400, true, ms(200), ms(400)},
		{"the sandbox ends meanwhile", func(s *starter) {
			done := make(chan struct{})
			s.target.Done = done
			s.command()
			time.AfterFunc(ms(100), func() { close(done) })
		}, -1, false, ms(100), ms(100)},
		{"too many wait already", func(s *starter) { s.command(); s.awaiting.Add(awaitMax) }, -1, false, 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStarter()
				if tc.opens >= 0 {
					s.opens[8000] = ms(tc.opens)
				}
				tc.do(s)
				took, open := s.ask(t.Context(), 8000)
				if open != tc.open || took < tc.least || took > tc.most {
					t.Errorf("open %v after %v; want %v between %v and %v", open, took, tc.open, tc.least, tc.most)
				}
				if s.tries > 40 {
					t.Errorf("dialled %d times", s.tries)
				}
				if n := s.awaiting.Load(); n != 0 && n != awaitMax {
					t.Errorf("%d wait afterwards", n)
				}
				time.Sleep(time.Minute) // what was put off is over
			})
		})
	}
}

func TestAClientThatLeavesWaitsForNoPort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStarter()
		s.command()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if took, open := s.ask(ctx, 8000); open || took != 100*time.Millisecond {
			t.Errorf("open %v after %v", open, took)
		}
	})
}

func TestOtherFailuresThanARefusalAreNotWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStarter()
		s.command()
		broken := errors.New("no route")
		began := time.Now()
		_, err := s.await(t.Context(), 8000, func(context.Context, uint16) (net.Conn, error) { return nil, broken })
		if !errors.Is(err, broken) || time.Since(began) != 0 {
			t.Errorf("%v after %v", err, time.Since(began))
		}
	})
}

// Only who may start commands makes others wait.
func TestStrangersStartNothing(t *testing.T) {
	target := &Target{ID: idA, AccessToken: "right", Done: make(chan struct{})}
	for _, tc := range []struct {
		name, method, target, token string
		port                        uint16
		want                        bool
	}{
		{"the owner", "POST", "/process.Process/Start", "right", defaultAgentPort, true},
		{"a stranger", "POST", "/process.Process/Start", "wrong", defaultAgentPort, false},
		{"nobody", "POST", "/process.Process/Start", "", defaultAgentPort, false},
		{"a question", "POST", "/process.Process/List", "right", defaultAgentPort, false},
		{"another method", "GET", "/process.Process/Start", "right", defaultAgentPort, false},
		{"a service of its own", "POST", "/process.Process/Start", "right", 3000, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := httptest.NewRequest(tc.method, tc.target, nil)
			if tc.token != "" {
				r.Header.Set("X-Access-Token", tc.token)
			}
			in := &Ingress{}
			b := &backend{in: in, target: target}
			v := &visit{in: in, w: httptest.NewRecorder(), r: r, info: &connInfo{}}
			g, ok := v.enter(b, target, route{id: idA, port: tc.port, target: tc.target}, ticket{})
			if !ok || g.started.IsZero() == tc.want || b.starting(8000) != tc.want {
				t.Errorf("entered %v, started %v, starting %v; want %v", ok, g.started, b.starting(8000), tc.want)
			}
		})
	}
}
