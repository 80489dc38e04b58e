// Package lab makes a small internet: public web servers, name servers, mail,
// echo and attackers at real-looking addresses, and a machine connected to it, all
// inside network namespaces without any link to the world. Tests, the conformance
// suite and the demo run against it.
//
// Two namespaces are joined by one wire. The host is where the server under test
// and its clients run; the internet owns every public address of the lab. Nothing
// is forwarded and no other link exists, so no packet can leave the machine. The
// namespaces have no names and are held by this process alone: killed or not, it
// leaves nothing behind.
package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Config says what a lab should have. The zero value is a lab with IPv4.
type Config struct {
	// Domain, and every name below it, resolves to the host: the domain of the
	// server under test, e.g. "sbx.test". Empty: none.
	Domain string
	// IPv6 gives the host an IPv6 address and route, and every server a second
	// address.
	IPv6 bool
	// Dir is where the certificate files are written; it must exist. Empty: a
	// temporary folder that Close removes, or, after a kill, the next lab.
	Dir string
	// Names are further names and their addresses. An address that the internet
	// does not own yet gets all its servers, except those of the host.
	Names map[string][]netip.Addr
	// Log receives what servers complain about. Nil: nothing is logged.
	Log *slog.Logger
}

// Lab is a running internet.
type Lab struct {
	cfg      Config
	host     *Netns
	internet *Netns
	hostSide *hostSide
	ca       *CA
	zone     *zone
	journal  *Journal
	recorder *Recorder
	services *services
	undo     []func() error // in the order of acquisition
}

// New builds a lab and starts its servers; it needs root. Like a test server of
// net/http/httptest it runs from the moment it exists, because a namespace cannot
// be held without a process in it. ctx ends the building, not the lab: Close does.
func New(ctx context.Context, cfg Config) (_ *Lab, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("the lab needs root: it creates network and mount namespaces")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	l := &Lab{cfg: cfg, journal: &Journal{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"certificates", l.makeCA},
		{"names", l.makeZone},
		{"namespaces", l.makeNetwork},
		{"recorder", l.makeRecorder},
		{"addresses", l.makeAddresses},
		{"servers", l.makeServices},
		{"host", l.makeHost},
	} {
		if cerr := ctx.Err(); cerr != nil {
			return nil, fmt.Errorf("build the lab's %s: %w", step.name, cerr)
		}
		if serr := step.do(); serr != nil {
			return nil, fmt.Errorf("build the lab's %s: %w", step.name, serr)
		}
	}
	return l, nil
}

func (l *Lab) makeCA() (err error) {
	if l.cfg.Dir == "" {
		remove, err := l.makeDir()
		if err != nil {
			return err
		}
		l.undo = append(l.undo, remove)
	}
	if l.cfg.Dir, err = filepath.Abs(l.cfg.Dir); err != nil {
		return fmt.Errorf("find the folder for certificates: %w", err)
	}
	if l.ca, err = newCA(); err != nil {
		return err
	}
	bundle, _ := l.ca.bundle()
	return errors.Join(
		os.WriteFile(l.CAFile(), l.ca.PEM(), 0o644),
		os.WriteFile(l.BundleFile(), bundle, 0o644))
}

// dirPattern names the temporary folders of labs. Each is locked by its lab, so
// that one whose lock is free was left by a lab that was killed.
const dirPattern = "cordon-lab-"

// makeDir creates a temporary folder, after removing those of labs that were killed.
func (l *Lab) makeDir() (remove func() error, err error) {
	sweepDirs()
	dir, err := os.MkdirTemp("", dirPattern)
	if err != nil {
		return nil, fmt.Errorf("create a folder: %w", err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	l.cfg.Dir = dir
	return func() error { return errors.Join(os.RemoveAll(dir), lock.Close()) }, nil
}

// lockDir locks a folder for as long as the file stays open.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("open the folder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), f.Close())
	}
	return f, nil
}

func sweepDirs() {
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), dirPattern+"*"))
	if err != nil {
		return
	}
	for _, dir := range dirs {
		// A new one may not be locked yet.
		if info, err := os.Lstat(dir); err != nil || time.Since(info.ModTime()) < time.Minute {
			continue
		}
		if lock, err := lockDir(dir); err == nil {
			_ = os.RemoveAll(dir) // what cannot be removed harms nobody
			lock.Close()
		}
	}
}

func (l *Lab) makeZone() (err error) {
	l.zone, err = newZone(l.cfg, l.journal)
	return err
}

func (l *Lab) makeNetwork() (err error) {
	for _, n := range []**Netns{&l.host, &l.internet} {
		if *n, err = newNetns(); err != nil {
			return err
		}
		l.undo = append(l.undo, (*n).Close)
		if err := loopbackUp(*n); err != nil {
			return err
		}
	}
	return wire(l.host, l.internet)
}

func (l *Lab) makeRecorder() error {
	in, err := interfaceIndex(l.internet, internetLink)
	if err != nil {
		return err
	}
	out, err := interfaceIndex(l.host, hostLink)
	if err != nil {
		return err
	}
	if l.recorder, err = newRecorder(l.internet, l.host, in, out); err != nil {
		return err
	}
	go l.recorder.run()
	l.undo = append(l.undo, l.recorder.close)
	return nil
}

func (l *Lab) makeAddresses() error {
	host := end{
		ns: l.host, link: hostLink, addrs: []netip.Prefix{hostAddr4},
		routes: []netip.Prefix{defaultRoute4}, gateway: []netip.Addr{gatewayAddr4.Addr()},
	}
	internet := end{ns: l.internet, link: internetLink, addrs: []netip.Prefix{gatewayAddr4}}
	prefixes := append(slices.Clone(localPrefixes), l.zone.prefixes()...)
	if l.cfg.IPv6 {
		host.addrs = append(host.addrs, hostAddr6)
		host.routes = append(host.routes, defaultRoute6)
		host.gateway = append(host.gateway, gatewayAddr6.Addr())
		internet.addrs = append(internet.addrs, gatewayAddr6)
		prefixes = append(prefixes, localPrefixes6...)
		prefixes = append(prefixes, l.named6()...)
	}
	if err := ownAddresses(l.internet, prefixes); err != nil {
		return err
	}
	if err := unreachable(l.internet); err != nil {
		return err
	}
	// The internet's end first: then the host's default route has a carrier.
	if err := internet.configure(); err != nil {
		return err
	}
	return host.configure()
}

// named6 are the IPv6 addresses of the configuration's own names.
func (l *Lab) named6() []netip.Prefix {
	var out []netip.Prefix
	for _, addrs := range l.cfg.Names {
		for _, a := range addrs {
			if a.Is6() && owned(a) {
				out = append(out, netip.PrefixFrom(a, 128))
			}
		}
	}
	return out
}

func (l *Lab) makeServices() error {
	ctx, cancel := context.WithCancel(context.Background())
	s := &services{
		ctx: ctx, ns: l.internet, ca: l.ca, journal: l.journal, log: l.cfg.Log, ipv6: l.cfg.IPv6,
		conns: map[net.Conn]struct{}{},
	}
	l.services = s
	l.undo = append(l.undo, func() error {
		cancel()
		return s.close()
	})
	if err := s.serveDNS(l.zone); err != nil {
		return err
	}
	if err := s.serveWeb(l.zone); err != nil {
		return err
	}
	return s.serveRaw()
}

func (l *Lab) makeHost() (err error) {
	bundle, below := l.ca.bundle()
	l.hostSide, err = newHostSide(l.host, hostFiles{
		"resolv.conf":   "nameserver 8.8.8.8\noptions timeout:2 attempts:2\n",
		"hosts":         "127.0.0.1 localhost\n::1 localhost\n",
		"nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nprotocols: files\nservices: files\n",
		below:           string(bundle),
	})
	if err != nil {
		return err
	}
	l.undo = append(l.undo, l.hostSide.close)
	return nil
}

// Close ends every program started in the host, the servers and the namespaces.
// It may be called again.
func (l *Lab) Close() error {
	var err error
	for _, undo := range slices.Backward(l.undo) {
		err = errors.Join(err, undo())
	}
	l.undo = nil
	return err
}

// Run keeps the lab until ctx ends, then closes it.
func (l *Lab) Run(ctx context.Context) error {
	<-ctx.Done()
	return l.Close()
}

// Host is the namespace of the machine: the server under test and its clients.
func (l *Lab) Host() *Netns { return l.host }

// Internet is the namespace of the servers, to add one of a test's own. It must
// listen on 0.0.0.0 or on an address that Owns reports.
func (l *Lab) Internet() *Netns { return l.internet }

// HostAddr is the host's public address.
func (l *Lab) HostAddr() netip.Addr { return hostAddr4.Addr() }

// HostAddr6 is the host's public IPv6 address. The second result is false
// without Config.IPv6.
func (l *Lab) HostAddr6() (netip.Addr, bool) { return hostAddr6.Addr(), l.cfg.IPv6 }

// Twin6 returns the IPv6 address of the server that has an IPv4 address.
func (l *Lab) Twin6(a netip.Addr) netip.Addr { return twin6(a) }

// Upstreams are the lab's DNS servers.
func (l *Lab) Upstreams() []netip.AddrPort {
	return []netip.AddrPort{netip.MustParseAddrPort("8.8.8.8:53"), netip.MustParseAddrPort("1.1.1.1:53")}
}

// Recorder has every packet that reached the internet.
func (l *Lab) Recorder() *Recorder { return l.recorder }

// Journal has every request the internet's servers understood.
func (l *Lab) Journal() *Journal { return l.journal }

// CA signs the certificates of the lab.
func (l *Lab) CA() *CA { return l.ca }

// CAFile is the CA's certificate as PEM, for NODE_EXTRA_CA_CERTS.
func (l *Lab) CAFile() string { return filepath.Join(l.cfg.Dir, "ca.pem") }

// BundleFile has the machine's trusted certificates and the lab's, for SSL_CERT_FILE.
func (l *Lab) BundleFile() string { return filepath.Join(l.cfg.Dir, "bundle.pem") }

// Dial connects from the host to an address that may hold a name of the lab. The
// addresses of a name are tried in turn, IPv4 first.
func (l *Lab) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", address, err)
	}
	addrs := l.Lookup(host)
	if a, err := netip.ParseAddr(host); err == nil {
		addrs = []netip.Addr{a}
	}
	err = fmt.Errorf("dial %s: the lab has no such name", address)
	for _, a := range addrs {
		var c net.Conn
		if c, err = l.host.Dial(ctx, network, net.JoinHostPort(a.String(), port)); err == nil {
			return c, nil
		}
	}
	return nil, err
}

// Client returns an HTTP client that works from the host, trusts the lab's
// certificates only and does not follow redirects.
func (l *Lab) Client() *http.Client {
	return &http.Client{
		Timeout: 30 * time.Second,
		Transport: &http.Transport{
			DialContext:       l.Dial,
			TLSClientConfig:   l.ca.clientConfig(),
			ForceAttemptHTTP2: true,
			DisableKeepAlives: true, // no idle connection outlives a test
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// Describe tells a person what is in the lab.
func (l *Lab) Describe() string {
	var b strings.Builder
	b.WriteString("A small internet without a link to the world.\n\n")
	fmt.Fprintf(&b, "host      %s, default route by %s\n", hostAddr4, gatewayAddr4.Addr())
	if l.cfg.IPv6 {
		fmt.Fprintf(&b, "          %s, default route by %s\n", hostAddr6, gatewayAddr6.Addr())
	}
	if l.cfg.Domain != "" {
		fmt.Fprintf(&b, "          %s and *.%s resolve to it\n", l.cfg.Domain, l.cfg.Domain)
	}
	fmt.Fprintf(&b, "trust     %s (alone), %s (with the machine's)\n", l.CAFile(), l.BundleFile())
	b.WriteString(`
Every address answers:
  53        DNS over UDP and TCP; 853 DNS over TLS; https://…/dns-query
  80, 8080  HTTP, and HTTP/2 without TLS;  443, 8443  HTTPS with HTTP/1.1 and HTTP/2
            /  who asked for what, as JSON      /bytes/N  N bytes
            /slow, /sse  ?n=10&every=100ms      /ws  WebSocket echo
            /echo  the body back                /status/N, /redirect?to=URL
  22        a banner first;  25, 587  SMTP with STARTTLS
  7, 4000   echo over TCP and UDP;  123  echo over UDP;  443 over UDP  recorded only

`)
	names := make([]string, 0, len(l.zone.records))
	for name := range l.zone.records {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int { return strings.Compare(reversed(a), reversed(b)) })
	for _, name := range names {
		describeName(&b, strings.TrimSuffix(name, "."), l.Lookup(name))
	}
	b.WriteString("  flip, rotate, slow, silent, servfail, refused, big .test behave as they are called\n")
	return b.String()
}

func describeName(w io.Writer, name string, addrs []netip.Addr) {
	shown := make([]string, len(addrs))
	for i, a := range addrs {
		shown[i] = a.String()
	}
	fmt.Fprintf(w, "  %-32s %s\n", name, strings.Join(shown, " "))
}

// reversed orders names by domain.
func reversed(name string) string {
	labels := strings.Split(name, ".")
	slices.Reverse(labels)
	return strings.Join(labels, ".")
}
