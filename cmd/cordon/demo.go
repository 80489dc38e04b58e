package main

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/image"
	"github.com/cordonhq/cordon/internal/lab"
)

// demoSources are what the demo is played from and shows: the player in
// JavaScript with its lock file, and the one in Go.
//
//go:embed demo/player.mjs demo/package.json demo/package-lock.json demo_play.go
var demoSources embed.FS

// demoDomain is where the demo's sandboxes are reached, in its own internet.
const demoDomain = "cordon.test"

// The demo's clients.
const (
	clientAuto = "auto" // JavaScript if Node and the package are there, else Go
	clientJS   = "js"
	clientGo   = "go"
)

func demoCommand(a *app) *cobra.Command {
	var with string
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "See it work, in a small internet of its own",
		Long: `Start a server and a small internet in network namespaces, and play the
documentation's scenarios with the published novita-sandbox package. Nothing
leaves the machine and nothing is left behind; the image and the package are
kept for the next time.`,
		Example: `  sudo cordon demo
  sudo cordon demo --client go`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if with != clientAuto && with != clientJS && with != clientGo {
				return errs.New(errs.Invalid, "--client is %q: use auto, js or go", with)
			}
			if os.Geteuid() != 0 {
				return errNotRoot("demo")
			}
			cfg, err := a.config()
			if err != nil {
				return err
			}
			d := &demo{cache: filepath.Join(cfg.CacheDir, "demo"), images: cfg.CacheDir, path: a.environ["PATH"], with: with, screen: newScreen(a.out, a.environ)}
			began := time.Now()
			err = d.run(cmd.Context())
			if cmd.Context().Err() != nil {
				return exitError(130) // as a shell says it of Ctrl-C
			}
			if err == nil {
				d.conclude(time.Since(began))
			}
			return err
		},
	}
	cmd.Flags().StringVar(&with, "client", clientAuto, "what plays it: js (the published SDK), go (the Go client), or auto")
	return cmd
}

// demo is one showing.
type demo struct {
	cache  string // kept: the SDK package, and below it the seats
	images string // the machine's cache of images
	path   string // PATH
	with   string
	screen *screen

	seat   *seat
	server config
	lab    *lab.Lab
}

// run plays the demo and clears up.
func (d *demo) run(ctx context.Context) (err error) {
	d.screen.line("%s", d.screen.paint(bold, "cordon: sandboxes with the network under control"))
	if d.seat, err = takeSeat(d.cache); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.seat.leave()) }()
	template, err := d.prepareImage(ctx)
	if err != nil {
		return err
	}
	modules, err := d.prepareSDK(ctx)
	if err != nil {
		return err
	}
	if d.lab, err = lab.New(ctx, lab.Config{Domain: demoDomain, Dir: d.seat.dir}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.lab.Close()) }()
	stop, err := d.startServer(ctx, template)
	if err != nil {
		return err
	}
	defer stop()
	d.screen.line("A server and a small internet of web and name servers are up, in network namespaces\nwithout a link to the world: what you see below is real, and none of it leaves this machine.")
	s, err := d.play(ctx, template, modules)
	if err != nil {
		return d.explain(err)
	}
	played, failed, err := s.finish()
	if err == nil && (failed > 0 || played != len(s.story)) {
		err = d.explain(fmt.Errorf("%d of %d scenarios were played, %d facts are not as documented", played, len(s.story), failed))
	}
	return err
}

// prepareImage builds the base image if this is the first time. Where it cannot be
// built, the machine's own /usr will do.
func (d *demo) prepareImage(ctx context.Context) (template string, err error) {
	images, err := image.New(image.Config{
		Dir: filepath.Join(d.images, "images"), StateDir: filepath.Join(d.seat.dir, "state", "images"),
		Progress: indented{d.screen}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return "", err
	}
	defer images.Close()
	if _, err := images.Build(ctx, "base"); err != nil {
		if ctx.Err() != nil {
			return "", err
		}
		d.screen.line("The base image cannot be built, so the sandboxes show this machine's own /usr:\n  %v", err)
		return "host", nil
	}
	return "base", nil
}

// indented shows a build's steps.
type indented struct{ screen *screen }

func (i indented) Write(b []byte) (int, error) {
	for line := range strings.Lines(string(b)) {
		i.screen.line("  %s", i.screen.paint(dim, strings.TrimSpace(line)))
	}
	return len(b), nil
}

// prepareSDK returns the folder with the SDK's package, installed if this is the
// first time; "" means that the Go client plays.
func (d *demo) prepareSDK(ctx context.Context) (modules string, err error) {
	if d.with == clientGo {
		return "", nil
	}
	modules, err = d.installSDK(ctx)
	if err == nil {
		return modules, nil
	}
	if d.with == clientJS || ctx.Err() != nil {
		return "", err
	}
	d.screen.line("Played with the Go client: %v.", err)
	return "", nil
}

// sdkPackage is the published SDK, whose version demo/package.json pins.
const sdkPackage = "novita-sandbox"

func (d *demo) installSDK(ctx context.Context) (modules string, err error) {
	if _, err := exec.LookPath("node"); err != nil {
		return "", errors.New("no Node.js is installed")
	}
	var known []string
	if program, err := os.Executable(); err == nil { // a checkout's, which its tests installed
		known = append(known, filepath.Join(filepath.Dir(program), "../test/sdk/js/node_modules"))
	}
	own := filepath.Join(d.cache, "js")
	for _, dir := range append(known, filepath.Join(own, "node_modules")) {
		if samePackage(dir) {
			return dir, nil
		}
	}
	d.screen.line("Installing the npm package %s, once.", sdkPackage)
	if err := os.MkdirAll(own, 0o755); err != nil {
		return "", err
	}
	for _, name := range []string{"package.json", "package-lock.json"} {
		b, err := demoSources.ReadFile("demo/" + name)
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(own, name), b, 0o644); err != nil {
			return "", err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	npm := exec.CommandContext(ctx, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")
	npm.Dir, npm.WaitDelay = own, time.Second
	if out, err := npm.CombinedOutput(); err != nil {
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		return "", fmt.Errorf("npm cannot install %s: %w: %s", sdkPackage, err, lines[len(lines)-1])
	}
	return filepath.Join(own, "node_modules"), nil
}

// samePackage reports whether a folder has the SDK in the version that is pinned.
func samePackage(modules string) bool {
	b, err := os.ReadFile(filepath.Join(modules, sdkPackage, "package.json"))
	if err != nil {
		return false
	}
	var have struct {
		Version string `json:"version"`
	}
	var want struct {
		Dependencies map[string]string `json:"dependencies"`
	}
	pinned, err := demoSources.ReadFile("demo/package.json")
	return err == nil && json.Unmarshal(b, &have) == nil && json.Unmarshal(pinned, &want) == nil &&
		have.Version == want.Dependencies[sdkPackage]
}

// startServer starts a server of this program in the lab's host and waits until
// it answers. stop ends it.
func (d *demo) startServer(ctx context.Context, template string) (stop func(), err error) {
	d.server = config{
		Name: d.seat.name, StateDir: filepath.Join(d.seat.dir, "state"), RunDir: filepath.Join(d.seat.dir, "run"), CacheDir: d.images,
		Domain:  demoDomain,
		Network: networkConfig{Upstreams: []string{"8.8.8.8", "1.1.1.1"}},
		Sandboxes: sandboxConfig{
			DefaultTemplate: template, ExtraCA: d.lab.CAFile(), Spares: map[string]int{template: 2},
		},
	}
	d.server.setDefaults()
	text, err := yaml.Marshal(&d.server)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(d.seat.dir, "cordon.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return nil, err
	}
	log, err := os.Create(d.logFile())
	if err != nil {
		return nil, err
	}
	defer log.Close()
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	// It is ended by stop, and by the lab's end: not by the terminal's Ctrl-C.
	server := d.lab.HostCommand(context.WithoutCancel(ctx), program, "--config", file, "serve")
	server.Env = []string{"PATH=" + d.path}
	server.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	server.Stdout, server.Stderr = log, log
	if err := server.Start(); err != nil {
		return nil, err
	}
	if err := d.answers(ctx, server); err != nil {
		return nil, d.explain(err)
	}
	return func() {
		_ = server.Process.Signal(syscall.SIGTERM)
		timer := time.AfterFunc(10*time.Second, func() { _ = server.Process.Kill() })
		defer timer.Stop()
		_ = server.Wait() // what it did not end, the lab does
	}, nil
}

func (d *demo) logFile() string { return filepath.Join(d.seat.dir, "server.log") }

// answers waits until the server's API does.
func (d *demo) answers(ctx context.Context, server *lab.Cmd) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- server.Wait() }()
	web := d.client(nil)
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, d.server.apiURL()+"/health", nil)
		if err != nil {
			return err
		}
		if res, err := web.Do(req); err == nil {
			res.Body.Close()
			return nil
		}
		select {
		case err := <-ended:
			return fmt.Errorf("the server ended: %w", err)
		case <-ctx.Done():
			return fmt.Errorf("the server does not answer: %w", ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// client is an HTTP client on the lab's host.
func (d *demo) client(transport *http.Transport) *http.Client {
	if transport == nil {
		transport = &http.Transport{}
	}
	transport.DialContext, transport.DisableKeepAlives = d.lab.Dial, true
	return &http.Client{Transport: transport}
}

// play has the acts played, by Node if there are modules.
func (d *demo) play(ctx context.Context, template, modules string) (*stage, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	key, err := readAdminKey(&d.server)
	if err != nil {
		return nil, err
	}
	tlsConfig, err := d.server.clientTLS()
	if err != nil {
		return nil, err
	}
	web := d.client(&http.Transport{TLSClientConfig: tlsConfig})
	cordon, err := client.New(client.Options{APIURL: d.server.apiURL(), APIKey: key, HTTPClient: web})
	if err != nil {
		return nil, err
	}
	s := &stage{story: tellStory(), recorder: d.lab.Recorder(), cordon: cordon, screen: d.screen}
	source := "demo_play.go"
	if modules != "" {
		source = "demo/player.mjs"
	}
	text, err := demoSources.ReadFile(source)
	if err != nil {
		return nil, err
	}
	keys := make([]string, len(s.story))
	for i, a := range s.story {
		keys[i] = a.key
	}
	s.code = excerpts(string(text), keys)
	if modules == "" {
		return s, (&goPlayer{stage: s, cordon: cordon, web: web}).play(ctx)
	}
	return s, d.playJS(ctx, s, jsPlay{source: text, modules: modules, key: key, template: template})
}

// jsPlay is what the player in JavaScript needs.
type jsPlay struct {
	source                 []byte
	modules, key, template string
}

// playJS runs the player in the lab's host, as a user's program on the server's
// machine would run.
func (d *demo) playJS(ctx context.Context, s *stage, p jsPlay) error {
	l, err := d.lab.Host().Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: s, ReadHeaderTimeout: 5 * time.Second, BaseContext: func(net.Listener) context.Context { return ctx }}
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	facts, err := json.Marshal(map[string]any{"stage": "http://" + l.Addr().String(), "template": p.template, "commands": s.commands()})
	if err != nil {
		return err
	}
	// Node looks for packages next to the program.
	file := filepath.Join(d.seat.dir, "player.mjs")
	if err := errors.Join(os.WriteFile(file, p.source, 0o644), os.Symlink(p.modules, filepath.Join(d.seat.dir, "node_modules"))); err != nil {
		return err
	}
	node := d.lab.HostCommand(ctx, "node", file)
	node.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	node.Dir = d.seat.dir
	node.Env = []string{
		"PATH=" + d.path, "HOME=" + d.seat.dir, "CORDON_DEMO=" + string(facts),
		"NOVITA_API_URL=" + d.server.apiURL(), "NOVITA_DOMAIN=" + d.server.publicDomain(), "NOVITA_API_KEY=" + p.key,
		"NODE_EXTRA_CA_CERTS=" + filepath.Join(d.server.caDir(), "ca.pem"),
	}
	if out, err := node.CombinedOutput(); err != nil {
		return fmt.Errorf("node: %w\n%s", err, bytes.TrimSpace(out))
	}
	return nil
}

// explain adds the end of the server's log to what went wrong.
func (d *demo) explain(err error) error {
	b, readErr := os.ReadFile(d.logFile())
	if readErr != nil || len(b) == 0 {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return fmt.Errorf("%w\nthe server's last words:\n%s", err, strings.Join(lines[max(0, len(lines)-15):], "\n"))
}

func (d *demo) conclude(took time.Duration) {
	d.screen.line("\n%s All scenarios behaved as documented, in %.1f s. Nothing is left behind.\n", d.screen.paint(green, "✓"), took.Seconds())
	d.screen.line(`Next, your own:
  sudo bin/cordon doctor    is this machine ready?
  sudo bin/cordon serve     run the server; it prints how to point your SDK at it
  docs/network.md           every rule, exactly`)
}

var _ io.Writer = indented{}
