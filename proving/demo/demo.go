// Package demo plays the documentation's scenarios with a server in a small
// internet of its own, and shows of each what was written, what came of it, and
// what the flow log and the wire say.
package demo

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/lab"
)

// sources are what the demo is played from and shows: the player in JavaScript
// with its lock file, and the one in Go.
//
//go:embed player.mjs package.json package-lock.json play.go
var sources embed.FS

// Where the demo's server is found, in its own internet.
const (
	domain = "cordon.test"
	plain  = "127.0.0.1:3900"
	apiURL = "http://" + plain
)

// The demo's clients.
const (
	Auto = "auto" // JavaScript if Node and the package are there, else Go
	JS   = "js"   // the published SDK
	Go   = "go"   // the Go client
)

// Options say how the demo is played. Binary and CacheDir are required.
type Options struct {
	Binary   string // the cordon program that serves
	CacheDir string // the machine's images; the demo keeps the SDK's package below it
	Client   string // Auto, JS or Go; empty means Auto
	Environ  map[string]string
	Out      *os.File
}

// Run plays the demo. It needs root, and leaves nothing behind but the image and
// the SDK's package.
func Run(ctx context.Context, o Options) error {
	d := &demo{
		binary: o.Binary, cache: filepath.Join(o.CacheDir, "demo"), images: o.CacheDir, path: o.Environ["PATH"],
		with: cmp.Or(o.Client, Auto), screen: newScreen(o.Out, o.Environ),
	}
	began := time.Now()
	err := d.run(ctx)
	if err == nil {
		d.conclude(time.Since(began))
	}
	return err
}

// demo is one showing.
type demo struct {
	binary string
	cache  string // kept: the SDK package, and below it the seats
	images string // the machine's cache of images
	path   string // PATH
	with   string
	screen *screen

	seat *seat
	lab  *lab.Lab
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
	if d.lab, err = lab.New(ctx, lab.Config{Domain: domain, Dir: d.seat.dir}); err != nil {
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
	if err := d.configure("base", ""); err != nil {
		return "", err
	}
	build := exec.CommandContext(ctx, d.binary, "--config", d.configFile(), "image", "build", "base")
	build.Stderr = indented{d.screen}
	build.Cancel = func() error { return build.Process.Signal(syscall.SIGTERM) } // it clears away what is half made
	build.WaitDelay = 20 * time.Second
	if err := build.Run(); err != nil {
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		d.screen.line("The base image cannot be built, so the sandboxes show this machine's own /usr.")
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
	if d.with == Go {
		return "", nil
	}
	modules, err = d.installSDK(ctx)
	if err == nil {
		return modules, nil
	}
	if d.with == JS || ctx.Err() != nil {
		return "", err
	}
	d.screen.line("Played with the Go client: %v.", err)
	return "", nil
}

// sdkPackage is the published SDK, whose version package.json pins.
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
		b, err := sources.ReadFile(name)
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
	pinned, err := sources.ReadFile("package.json")
	return err == nil && json.Unmarshal(b, &have) == nil && json.Unmarshal(pinned, &want) == nil &&
		have.Version == want.Dependencies[sdkPackage]
}

func (d *demo) configFile() string { return filepath.Join(d.seat.dir, "cordon.yaml") }

func (d *demo) stateDir() string { return filepath.Join(d.seat.dir, "state") }

// configure writes what differs from a user's server: folders and a name of its
// own, the lab's domain, name servers and CA (a PEM file; none yet: "").
func (d *demo) configure(template, ca string) error {
	text := fmt.Sprintf(`name: %[1]s
state_dir: %[2]q
run_dir: %[3]q
cache_dir: %[4]q
domain: %[5]s
listen: {plain: %[6]q}
network: {upstreams: [8.8.8.8, 1.1.1.1]}
sandboxes: {default_template: %[7]s, extra_ca: %[8]q, spares: {%[7]s: 2}}
`, d.seat.name, d.stateDir(), filepath.Join(d.seat.dir, "run"), d.images, domain, plain, template, ca)
	return os.WriteFile(d.configFile(), []byte(text), 0o600)
}

// startServer starts a server in the lab's host and waits until it answers. stop
// ends it.
func (d *demo) startServer(ctx context.Context, template string) (stop func(), err error) {
	if err := d.configure(template, d.lab.CAFile()); err != nil {
		return nil, err
	}
	log, err := os.Create(d.logFile())
	if err != nil {
		return nil, err
	}
	defer log.Close()
	// It is ended by stop, and by the lab's end: not by the terminal's Ctrl-C.
	server := d.lab.HostCommand(context.WithoutCancel(ctx), d.binary, "--config", d.configFile(), "serve")
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
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, apiURL+"/health", nil)
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

// caFile is the certificate of the CA that the server made for itself.
func (d *demo) caFile() string { return filepath.Join(d.stateDir(), "ca", "ca.pem") }

// clientTLS trusts the server's own CA.
func (d *demo) clientTLS() (*tls.Config, error) {
	pem, err := os.ReadFile(d.caFile())
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s has no certificate", d.caFile())
	}
	return &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, nil
}

// play has the acts played, by Node if there are modules.
func (d *demo) play(ctx context.Context, template, modules string) (*stage, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	admin, err := os.ReadFile(filepath.Join(d.stateDir(), "admin.key"))
	if err != nil {
		return nil, err
	}
	key := strings.TrimSpace(string(admin))
	tlsConfig, err := d.clientTLS()
	if err != nil {
		return nil, err
	}
	web := d.client(&http.Transport{TLSClientConfig: tlsConfig})
	cordon, err := client.New(client.Options{APIURL: apiURL, APIKey: key, HTTPClient: web})
	if err != nil {
		return nil, err
	}
	s := &stage{story: tellStory(), recorder: d.lab.Recorder(), cordon: cordon, screen: d.screen}
	source := "play.go"
	if modules != "" {
		source = "player.mjs"
	}
	text, err := sources.ReadFile(source)
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
		"NOVITA_API_URL=" + apiURL, "NOVITA_DOMAIN=" + domain, "NOVITA_API_KEY=" + p.key,
		"NODE_EXTRA_CA_CERTS=" + d.caFile(),
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
