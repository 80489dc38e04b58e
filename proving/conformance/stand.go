package conformance

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/lab"
)

// Where the throw-away server is found, in the lab.
const (
	domain = "sbx.test"
	plain  = "127.0.0.1:3900"
)

// stand is a lab with a server in it.
type stand struct {
	opts   Options
	lab    *lab.Lab
	dir    string
	name   string   // of the server, no other's on this machine
	lock   *os.File // tells other runs that this one lives
	config string
	probe  string // path of the probe on this machine
	server *lab.Cmd
	ended  chan error   // the server's end
	log    *os.File     // what the server says
	http   *http.Client // to its plain listener, from inside the lab's host
}

// newStand builds the base image if this machine has none, which the lab without
// a link to the world could not, then the lab, then the server.
func newStand(ctx context.Context, o Options) (_ *stand, err error) {
	s := &stand{opts: o}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.dir, s.name, s.lock, err = newFolder(); err != nil {
		return nil, err
	}
	s.config = filepath.Join(s.dir, "cordon.yaml")
	s.probe = filepath.Join(s.dir, "cordon-probe")
	if err := os.WriteFile(s.probe, o.Probe, 0o755); err != nil {
		return nil, err
	}
	s.lab, err = lab.New(ctx, lab.Config{Domain: domain, IPv6: true, Dir: s.dir, Names: map[string][]netip.Addr{
		unicodeName: {addrUnicode}, longLabel + ".test": {addrA}, longName: {addrA}, nameForbidden: {addrForbidden},
	}})
	if err != nil {
		return nil, fmt.Errorf("start the lab: %w", err)
	}
	s.http = &http.Client{
		Transport:     &http.Transport{DialContext: s.lab.Host().Dial, MaxIdleConnsPerHost: 8, IdleConnTimeout: time.Minute},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	if s.log, err = os.Create(cmp.Or(o.ServerLog, filepath.Join(s.dir, "server.log"))); err != nil {
		return nil, err
	}
	if err := s.writeConfig(); err != nil {
		return nil, err
	}
	if out, err := exec.CommandContext(ctx, o.Binary, "--config", s.config, "image", "build", "base").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the base image: %w: %s", err, bytes.TrimSpace(out))
	}
	if err := s.start(ctx); err != nil {
		return nil, fmt.Errorf("start the server: %w\n%s", err, s.logTail(20))
	}
	return s, nil
}

// writeConfig sets what differs from a user's machine: folders of its own, the
// lab's domain, name servers and CA.
func (s *stand) writeConfig() error {
	var upstreams []string
	for _, up := range s.lab.Upstreams() {
		upstreams = append(upstreams, up.Addr().String())
	}
	text := fmt.Sprintf(`name: %[6]s
state_dir: %[1]s/state
run_dir: %[1]s/run
domain: %[2]s
listen:
  https: ["0.0.0.0:443"]
  http: ["0.0.0.0:80"]
  plain: %[3]s
network:
  upstreams: [%[4]s]
  public_addresses: [%[7]s]
  nat64: ["2001:db8:64::/96"]
  always_deny: [%[8]s, "*.forbidden.test"]
sandboxes:
  extra_ca: %[5]s
  spares: {base: 2}
log: {level: debug}
`, s.dir, domain, plain, strings.Join(upstreams, ", "), s.lab.CAFile(), s.name,
		addrHairpin, addrForbidden)
	return os.WriteFile(s.config, []byte(text), 0o600)
}

// start starts the server and waits until its API answers.
func (s *stand) start(ctx context.Context) error {
	// The server's life is ended by stop, not by the caller's context.
	s.server = s.lab.HostCommand(context.WithoutCancel(ctx), s.opts.Binary, "--config", s.config, "serve")
	s.server.Stdout, s.server.Stderr = s.log, s.log
	if err := s.server.Start(); err != nil {
		s.server = nil
		return err
	}
	s.ended = make(chan error, 1)
	go func(c *lab.Cmd, ended chan<- error) { ended <- c.Wait() }(s.server, s.ended)
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+plain+"/health", nil)
		if err != nil {
			return err
		}
		if res, err := s.http.Do(req); err == nil {
			res.Body.Close()
			return nil
		}
		select {
		case err := <-s.ended:
			s.server = nil
			return fmt.Errorf("it ended: %w", err)
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	return errors.New("it does not answer")
}

// stop ends the server with a signal and waits for it.
func (s *stand) stop(sig syscall.Signal) error {
	if s.server == nil {
		return nil
	}
	err := s.server.Process.Signal(sig)
	select {
	case ended := <-s.ended:
		if sig != syscall.SIGKILL {
			err = errors.Join(err, ended)
		}
	case <-time.After(30 * time.Second):
		err = errors.Join(err, errors.New("the server does not end"), s.server.Process.Kill())
		<-s.ended
	}
	s.server = nil
	return err
}

func (s *stand) close() error {
	err := s.stop(syscall.SIGTERM)
	if s.lab != nil {
		err = errors.Join(err, s.lab.Close())
	}
	if s.log != nil {
		err = errors.Join(err, s.log.Close())
	}
	if s.lock != nil {
		err = errors.Join(err, removeCgroups(s.name), os.RemoveAll(s.dir), s.lock.Close())
	}
	return err
}

// client is a client with the admin key, which the server keeps in a file.
func (s *stand) client() (*client.Client, error) {
	key, err := os.ReadFile(filepath.Join(s.dir, "state", "admin.key"))
	if err != nil {
		return nil, err
	}
	url := "http://" + plain
	return client.New(client.Options{APIURL: url, APIKey: strings.TrimSpace(string(key)), SandboxURL: url, HTTPClient: s.http})
}

// roots trusts the server's own CA.
func (s *stand) roots() (*x509.CertPool, error) {
	bundle, err := os.ReadFile(filepath.Join(s.dir, "state", "ca", "bundle.pem"))
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(bundle) {
		return nil, errors.New("the server's CA bundle has no certificate")
	}
	return pool, nil
}

// link is the sandbox's link as the host sees it.
type link struct {
	netns string           // file of the sandbox's namespace
	mac   net.HardwareAddr // of the host's end, which the sandbox's packets go to
	gate  netip.Prefix     // the host's address on it
}

// links returns every link of the server to a sandbox or a slot in waiting.
func (s *stand) links() (out []link, err error) {
	err = s.lab.Host().Do(func() error {
		all, err := net.Interfaces()
		if err != nil {
			return err
		}
		for _, l := range all {
			if !strings.HasPrefix(l.Name, "cd"+s.name+"-") {
				continue // not a sandbox's
			}
			file := filepath.Join(s.dir, "run", "netns", l.Name)
			addrs, err := l.Addrs()
			if err != nil {
				return err
			}
			for _, b := range addrs {
				if p, err := netip.ParsePrefix(b.String()); err == nil && p.Addr().Is4() {
					out = append(out, link{netns: file, mac: l.HardwareAddr, gate: p})
				}
			}
		}
		return nil
	})
	return out, err
}

// linkOf finds the link whose network holds a sandbox's address.
func (s *stand) linkOf(a netip.Addr) (link, error) {
	all, err := s.links()
	if err != nil {
		return link{}, err
	}
	for _, l := range all {
		if l.gate.Contains(a) {
			return l, nil
		}
	}
	return link{}, fmt.Errorf("no link leads to %s", a)
}

// guest is the sandbox's address on the link: the other one of a /30.
func (l link) guest() netip.Addr { return l.gate.Addr().Next() }

// logTail returns the server's last words.
func (s *stand) logTail(n int) string {
	b, err := os.ReadFile(s.log.Name())
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
