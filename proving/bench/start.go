package bench

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/lab"
)

// startTable measures a live server in a small internet by its Go client, which
// speaks to it as the SDKs do: cold with no spares, then from a pool of them.
func startTable(ctx context.Context, r *run) error {
	s := &starts{run: r, took: map[string][]float64{}}
	for _, phase := range []struct {
		spares int
		run    func(context.Context, *stand) error
	}{{0, s.cold}, {r.Burst, s.warm}} {
		st, err := r.newStand(ctx, phase.spares)
		if err == nil {
			err = phase.run(ctx, st)
		}
		if cerr := st.close(); err == nil {
			err = cerr
		}
		if err != nil {
			return fmt.Errorf("%w\nthe server said:\n%s", err, st.lastWords())
		}
	}
	s.print()
	return nil
}

// starts collects milliseconds by what took them.
type starts struct {
	*run
	took    map[string][]float64
	figures []figure // what is not in milliseconds
	goals   []string
	remarks []string
}

const (
	coldAnswer, warmAnswer = "create answered, cold", "create answered, warm"
	coldOutput, warmOutput = "create to first output, cold", "create to first output, warm"
	roundTrip              = `commands.run("true") in a live sandbox`
	pauseTook, resumeTook  = "pause, 100 MB in use", "resume to first output"
)

// began notes how long it took since a moment.
func (s *starts) began(what string, at time.Time) {
	s.took[what] = append(s.took[what], float64(time.Since(at).Nanoseconds())/1e6)
}

// one starts a sandbox and runs its first command.
func (s *starts) one(ctx context.Context, st *stand, answer, output string) error {
	at := time.Now()
	sb, err := st.create(ctx)
	if err != nil {
		return err
	}
	s.began(answer, at)
	if err := say(ctx, sb, "echo hello"); err != nil {
		return err
	}
	s.began(output, at)
	return sb.Kill(ctx)
}

// say runs a command and demands that it succeeds.
func say(ctx context.Context, sb *client.Sandbox, command string) error {
	res, err := sb.Commands.Run(ctx, command, client.RunOptions{})
	if err == nil && res.ExitCode != 0 {
		err = fmt.Errorf("%s: exit code %d: %s", command, res.ExitCode, res.Stderr)
	}
	return err
}

func (s *starts) cold(ctx context.Context, st *stand) error {
	if sb, err := st.create(ctx); err != nil { // the first one fills caches
		return err
	} else if err := sb.Kill(ctx); err != nil {
		return err
	}
	others, missing, err := s.containers()
	if err != nil {
		return err
	}
	s.remarks = append(s.remarks, missing...)
	for range s.Starts {
		if err := s.one(ctx, st, coldAnswer, coldOutput); err != nil {
			return err
		}
		for _, c := range others {
			if err := s.container(ctx, c); err != nil {
				return err
			}
		}
	}
	before, err := everybody()
	if err != nil {
		return err
	}
	all, err := s.burst(ctx, st, "cold", 10)
	if err != nil {
		return err
	}
	time.Sleep(time.Second) // what starting needed goes
	after, err := everybody()
	if err != nil {
		return err
	}
	s.figures = append(s.figures, figure{name: "memory of an idle sandbox, all its processes", unit: "MiB", most: 16, quantile: 0.5,
		values: []float64{float64(after-before) / float64(len(all)) / (1 << 20)}})
	if err := killAll(ctx, all); err != nil {
		return err
	}
	return s.code(ctx, st)
}

func (s *starts) warm(ctx context.Context, st *stand) error {
	if err := st.full(ctx); err != nil {
		return err
	}
	for range s.Starts {
		if err := s.one(ctx, st, warmAnswer, warmOutput); err != nil {
			return err
		}
		if err := st.full(ctx); err != nil {
			return err
		}
	}
	all, err := s.burst(ctx, st, "from a pool", 60)
	if err != nil {
		return err
	}
	if err := killAll(ctx, all[1:]); err != nil {
		return err
	}
	if err := st.full(ctx); err != nil { // and nothing starts meanwhile
		return err
	}
	for range s.Starts * 7 {
		at := time.Now()
		if err := say(ctx, all[0], "true"); err != nil {
			return err
		}
		s.began(roundTrip, at)
	}
	return s.pauses(ctx, st, all[0])
}

// pauses measures a sandbox that holds 100 MB.
func (s *starts) pauses(ctx context.Context, st *stand, sb *client.Sandbox) error {
	p, err := sb.Commands.Start(ctx, `exec python3 -c 'import time; x = bytearray(b"x" * 100_000_000); time.sleep(600)'`, client.RunOptions{})
	if err != nil {
		return err
	}
	defer p.Close()
	time.Sleep(time.Second)
	for range min(s.Starts, 5) {
		at := time.Now()
		if err := sb.Pause(ctx); err != nil {
			return err
		}
		s.began(pauseTook, at)
		at = time.Now()
		if sb, err = st.client.Connect(ctx, sb.ID, time.Minute); err != nil {
			return err
		}
		if err := say(ctx, sb, "echo hello"); err != nil {
			return err
		}
		s.began(resumeTook, at)
	}
	return sb.Kill(ctx)
}

// burst starts many sandboxes, ten at a time.
func (s *starts) burst(ctx context.Context, st *stand, how string, least float64) ([]*client.Sandbox, error) {
	all := make([]*client.Sandbox, s.Burst)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(10)
	at := time.Now()
	for i := range all {
		g.Go(func() (err error) {
			all[i], err = st.create(gctx)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	rate := float64(len(all)) / time.Since(at).Seconds()
	name := fmt.Sprintf("%d sandboxes, ten at a time, %s", len(all), how)
	s.figures = append(s.figures, figure{name: name, unit: "/s", values: []float64{rate}})
	s.goals = append(s.goals, judge(name+", /s", rate, least, 0))
	return all, nil
}

func killAll(ctx context.Context, all []*client.Sandbox) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(10)
	for _, sb := range all {
		g.Go(func() error { return sb.Kill(ctx) })
	}
	return g.Wait()
}

func (s *starts) print() {
	fmt.Fprintf(s.out, "\nSandboxes of template %s, one at a time but where it says otherwise\n\n", s.Template)
	most := map[string]float64{warmAnswer: 15, warmOutput: 30, coldOutput: 130, roundTrip: 6, pauseTook: 300, resumeTook: 200, codeAnswer: 400}
	var figures []figure
	for _, what := range []string{warmAnswer, warmOutput, coldAnswer, coldOutput, roundTrip, pauseTook, resumeTook, codeAnswer, codeAgain} {
		figures = append(figures, figure{what, "ms", s.took[what], most[what], 0.5})
		delete(s.took, what)
	}
	figures = append(figures, figure{warmAnswer + " (tail)", "ms", figures[0].values, 60, 0.99})
	for what, v := range s.took {
		figures = append(figures, figure{what + ", to first output", "ms", v, 0, 0.5})
		for _, f := range []figure{figures[1], figures[3]} {
			mid, _, _ := spread(compare(unit{}, f.values, v))
			s.remarks = append(s.remarks, fmt.Sprintf("%s takes %.2f of %s", f.name, mid, what))
		}
	}
	printFigures(s.out, append(figures, s.figures...))
	slices.Sort(s.remarks)
	for _, line := range append(s.goals, s.remarks...) {
		fmt.Fprintln(s.out, line)
	}
}

// stand is a server in a lab.
type stand struct {
	r      *run
	lab    *lab.Lab
	server *lab.Cmd
	client *client.Client
	dir    string
	spares int
	log    *os.File
	idle   []func()
}

const standDomain, standAPI = "sbx.test", "http://127.0.0.1:3900"

func (r *run) newStand(ctx context.Context, spares int) (st *stand, err error) {
	st = &stand{r: r, spares: spares}
	if st.dir, err = r.folder("server"); err != nil {
		return st, err
	}
	if st.log, err = os.Create(filepath.Join(st.dir, "log")); err != nil {
		return st, err
	}
	if st.lab, err = lab.New(ctx, lab.Config{Domain: standDomain, Dir: st.dir}); err != nil {
		return st, err
	}
	config := filepath.Join(st.dir, "cordon.yaml")
	text := fmt.Sprintf(`
name: bnch
state_dir: %[1]s/state
run_dir: %[1]s/run
cache_dir: %[2]s
domain: %[3]s
listen: {https: ["0.0.0.0:443"], http: ["0.0.0.0:80"], plain: 127.0.0.1:3900}
network: {upstreams: [8.8.8.8]}
sandboxes: {default_template: %[4]s, spares: {%[4]s: %[5]d}}
`, st.dir, r.CacheDir, standDomain, r.Template, spares)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return st, err
	}
	st.server = st.lab.HostCommand(context.WithoutCancel(ctx), r.Server[0], append(r.Server[1:len(r.Server):len(r.Server)], "--config", config, "serve")...)
	st.server.Stdout, st.server.Stderr = st.log, st.log
	if err := st.server.Start(); err != nil {
		return st, err
	}
	return st, st.connect(ctx)
}

// dial reaches the server by whatever name a URL has.
func (st *stand) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	return st.lab.Host().Dial(ctx, network, net.JoinHostPort("127.0.0.1", port))
}

// connect waits until the server answers and makes a client of it.
func (st *stand) connect(ctx context.Context) error {
	plain := &http.Client{Timeout: time.Second, Transport: &http.Transport{DialContext: st.dial, DisableKeepAlives: true}}
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		res, err := plain.Get(standAPI + "/health")
		if err == nil {
			res.Body.Close()
			break
		}
		if ctx.Err() != nil || time.Now().After(end) {
			return fmt.Errorf("the server does not answer: %w", err)
		}
	}
	key, err := os.ReadFile(filepath.Join(st.dir, "state/admin.key"))
	if err != nil {
		return err
	}
	ca, err := os.ReadFile(filepath.Join(st.dir, "state/ca/ca.pem"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	t := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, ForceAttemptHTTP2: true, MaxIdleConnsPerHost: 16, DialContext: st.dial,
	}
	st.idle = append(st.idle, t.CloseIdleConnections)
	st.client, err = client.New(client.Options{
		APIURL: standAPI, APIKey: strings.TrimSpace(string(key)), HTTPClient: &http.Client{Transport: t, Timeout: time.Minute},
	})
	return err
}

func (st *stand) create(ctx context.Context) (*client.Sandbox, error) {
	return st.client.Create(ctx, client.CreateOptions{Timeout: 10 * time.Minute})
}

// full waits until the pool of spares is full: as many sentries run beside the
// sandboxes in use as there shall be, and for a moment nothing changes.
func (st *stand) full(ctx context.Context) error {
	list, err := st.client.List(ctx, client.ListOptions{})
	if err != nil {
		return err
	}
	want, calm := st.spares+len(list), 0
	for end := time.Now().Add(2 * time.Minute); calm < 5; time.Sleep(20 * time.Millisecond) {
		n := sentries()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case time.Now().After(end):
			return fmt.Errorf("the pool has %d sandboxes after two minutes, want %d", n-len(list), st.spares)
		case n == want:
			calm++
		default:
			calm = 0
		}
	}
	return nil
}

// sentries counts the sandboxes that run.
func sentries() (n int) {
	lists, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range lists {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), "runsc-sandbox\x00") {
			n++
		}
	}
	return n
}

// everybody is the memory of all processes here but this one, in octets.
func everybody() (sum int64, err error) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		var pid int
		if _, err := fmt.Sscanf(filepath.Base(dir), "%d", &pid); err != nil || pid == os.Getpid() {
			continue
		}
		n, err := proportional(pid)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ESRCH) {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

func (st *stand) lastWords() string {
	b, _ := os.ReadFile(filepath.Join(st.dir, "log"))
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}

// close ends the server, then the lab and with it whatever still runs.
func (st *stand) close() error {
	var err error
	for _, f := range st.idle {
		f()
	}
	if st.server != nil && st.server.Process != nil {
		_ = st.server.Process.Signal(syscall.SIGTERM)
		late := time.AfterFunc(20*time.Second, func() { _ = st.server.Process.Kill() })
		err = st.server.Wait()
		late.Stop()
	}
	if st.lab != nil {
		err = errors.Join(err, st.lab.Close())
	}
	if st.log != nil {
		err = errors.Join(err, st.log.Close())
	}
	// What the server's parent cgroup is called; empty by now, or it stays.
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*/cordon/bnch")
	for _, dir := range append(dirs, "/sys/fs/cgroup/cordon/bnch") {
		_ = os.Remove(dir)
	}
	return err
}
