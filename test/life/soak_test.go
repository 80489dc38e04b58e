package life

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/stand"
)

// soakWorkers use sandboxes at the same time.
const soakWorkers = 4

// TestSoak creates, uses, pauses, resumes, forks and kills sandboxes in random
// order, and then finds the machine as it was. SOAK says how long ("20m"), and
// SOAK_SANDBOXES how many are alive; the defaults fit into a run of all tests.
func TestSoak(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and many sandboxes")
	}
	lasts, alive := 15*time.Second, 6
	if v := os.Getenv("SOAK"); v != "" {
		d, err := time.ParseDuration(v)
		must(t, err)
		lasts, alive = d, 30
	}
	if v := os.Getenv("SOAK_SANDBOXES"); v != "" {
		n, err := strconv.Atoi(v)
		must(t, err)
		alive = n
	}
	s := stand.New(t, stand.Options{LogLevel: "info"})
	must(t, s.Start(t.Context()))
	liveOnce(t, s)
	k := &soak{user: s.User(t), alive: alive, sandboxes: map[string]*client.Sandbox{}, done: map[string]int{}}
	k.run(t, 10*time.Second) // the server grows to its working size before it is measured
	k.killAll(t)
	before, size := settled(t, s), sizeOf(t, s)
	t.Logf("before: %v; the server %v", kinds(before), size)
	k.run(t, lasts)
	t.Logf("done: %v", k.done)
	k.killAll(t)
	after := sizeOf(t, s)
	t.Logf("after: %v; the server %v", kinds(look(t, s)), after)
	if after.descriptors > size.descriptors+20 {
		t.Errorf("the server had %d descriptors and has %d", size.descriptors, after.descriptors)
	}
	if after.resident > size.resident*3/2+64<<10 {
		t.Errorf("the server had %d KiB and has %d", size.resident, after.resident)
	}
	same(t, s, before)
}

// kinds counts what look lists, by kind.
func kinds(lines []string) map[string]int {
	out := map[string]int{}
	for _, l := range lines {
		kind, _, _ := strings.Cut(l, " ")
		out[kind]++
	}
	return out
}

// size is what a process takes.
type size struct {
	resident    int // KiB
	descriptors int
	threads     int
	disk        string // of the server's folders
}

// sizeOf waits a moment for what ends by itself, such as idle connections.
func sizeOf(t *testing.T, s *stand.Stand) size {
	t.Helper()
	time.Sleep(3 * time.Second)
	proc := fmt.Sprintf("/proc/%d/", s.PID())
	var z size
	f, err := os.Open(proc + "status")
	must(t, err)
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		switch key, value, _ := strings.Cut(lines.Text(), ":"); key {
		case "VmRSS":
			z.resident, err = strconv.Atoi(strings.Fields(value)[0])
		case "Threads":
			z.threads, err = strconv.Atoi(strings.TrimSpace(value))
		}
		must(t, err)
	}
	fds, err := os.ReadDir(proc + "fd")
	must(t, err)
	z.descriptors = len(fds)
	out, err := exec.CommandContext(t.Context(), "du", "-sk", filepath.Join(s.Dir, "state"), filepath.Join(s.Dir, "run")).Output()
	must(t, err)
	z.disk = strings.Join(strings.Fields(strings.ReplaceAll(string(out), s.Dir, "")), " ")
	return z
}

// soak is a crowd of sandboxes and what was done with them.
type soak struct {
	user  *client.Client
	alive int

	mu        sync.Mutex                 // guards what follows
	sandboxes map[string]*client.Sandbox // that nobody works with at the moment
	busy      int                        // that somebody does
	done      map[string]int
}

// run lets the workers act for a while.
func (k *soak) run(t *testing.T, lasts time.Duration) {
	t.Helper()
	until := time.Now().Add(lasts)
	var g errgroup.Group
	for i := range soakWorkers {
		random := rand.New(rand.NewPCG(uint64(i), 1))
		g.Go(func() error {
			for time.Now().Before(until) {
				if err := k.act(t.Context(), random); err != nil {
					return err
				}
			}
			return nil
		})
	}
	must(t, g.Wait())
}

// act does one thing, with a sandbox of nobody's else at the time.
func (k *soak) act(ctx context.Context, random *rand.Rand) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	s := k.take(random)
	if s == nil {
		return k.count("create", k.create(ctx, random))
	}
	switch p := random.IntN(100); {
	case p < 50:
		return k.count("use", k.use(ctx, s))
	case p < 70:
		return k.count("pause and resume", k.pause(ctx, s))
	case p < 80:
		return k.count("fork", k.fork(ctx, s))
	default:
		k.drop()
		return k.count("kill", s.Kill(ctx))
	}
}

// take picks a sandbox; nil asks for a new one.
func (k *soak) take(random *rand.Rand) *client.Sandbox {
	k.mu.Lock()
	defer k.mu.Unlock()
	ids := slices.Sorted(maps.Keys(k.sandboxes))
	k.busy++
	if len(ids)+k.busy <= k.alive || len(ids) == 0 {
		return nil
	}
	s := k.sandboxes[ids[random.IntN(len(ids))]]
	delete(k.sandboxes, s.ID)
	return s
}

// put gives a sandbox back, or adds one.
func (k *soak) put(s *client.Sandbox) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sandboxes[s.ID] = s
}

// drop ends the work with a sandbox.
func (k *soak) drop() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.busy--
}

func (k *soak) count(what string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.done[what]++
	return nil
}

func (k *soak) create(ctx context.Context, random *rand.Rand) error {
	defer k.drop()
	rules := []client.Network{
		{},
		{DenyOut: []string{client.AllTraffic}},
		{DenyOut: []string{client.AllTraffic}, AllowOut: []string{"example.com", "1.1.1.1", "example.com:8443"}},
	}
	s, err := k.user.Create(ctx, client.CreateOptions{Timeout: time.Hour, Network: rules[random.IntN(len(rules))]})
	if err != nil {
		return err
	}
	k.put(s)
	return nil
}

func (k *soak) use(ctx context.Context, s *client.Sandbox) error {
	defer k.drop()
	defer k.put(s)
	r, err := s.Commands.Run(ctx, "curl -s --max-time 2 https://example.com >f; dd if=/dev/zero of=g bs=1M count=5 status=none; echo done", client.RunOptions{})
	if err == nil && r.Stdout != "done\n" {
		err = fmt.Errorf("the command printed %q", r.Stdout)
	}
	return err
}

func (k *soak) pause(ctx context.Context, s *client.Sandbox) error {
	defer k.drop()
	if err := s.Pause(ctx); err != nil {
		return err
	}
	again, err := k.user.Connect(ctx, s.ID, time.Hour)
	if err != nil {
		return err
	}
	k.put(again)
	return nil
}

// fork adds a copy and kills the original, so that the crowd does not grow.
func (k *soak) fork(ctx context.Context, s *client.Sandbox) error {
	defer k.drop()
	copies, err := s.Fork(ctx, 1, time.Hour)
	for _, c := range copies {
		k.put(c)
	}
	return errors.Join(err, s.Kill(ctx))
}

func (k *soak) killAll(t *testing.T) {
	t.Helper()
	for id, s := range k.sandboxes {
		must(t, s.Kill(t.Context()))
		delete(k.sandboxes, id)
	}
}
