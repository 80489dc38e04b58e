package tlsconf

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/certmagic"
)

// ACMEConfig is what certificates from an ACME server (RFC 8555) need. Dir is
// required, and DNS unless Own is set.
type ACMEConfig struct {
	Dir   string // account, keys and certificates; readable by root only
	Email string // of the account; may be empty where the CA asks for none
	// CA is the directory's URL; empty: Let's Encrypt.
	CA string
	// Roots are trusted for the CA's own server; nil: the machine's.
	Roots   *x509.CertPool
	Profile string // of the certificates, where the CA has several; may be empty

	// Domains get a certificate for <domain> and one for *.<domain>, by DNS-01.
	Domains []string
	DNS     DNS
	// Own has the certificates of Domains from elsewhere; the CA is then asked for
	// custom domains only. May be nil.
	Own func(*tls.ClientHelloInfo) (*tls.Certificate, error)

	// Allow reports whether a name outside Domains is served here. Its certificate
	// is ordered at the first handshake, by TLS-ALPN-01 (RFC 8737) or HTTP-01, and
	// it must answer from memory. Nil: none is.
	Allow func(name string) bool
	// Proven is asked before a certificate for such a name is ordered or renewed; an
	// error says why it is not. May be nil.
	Proven func(ctx context.Context, name string) error
	// Owner tells the owners of such names apart, who share the orders fairly; it
	// must answer from memory. Nil: there is one.
	Owner func(name string) string
	// HTTPS and HTTP are where this process listens, as host:port; the CA reaches
	// them at 443 and 80. HTTP empty: no HTTP-01.
	HTTPS, HTTP string

	// Interval is how often certificates are looked at for renewal, which is due in
	// the last third of their life, or when the CA says so (RFC 9773); 0: 10 minutes.
	Interval time.Duration
	Log      *slog.Logger // nil: nothing is logged
}

// ACME has certificates from a CA and renews them. What it has it goes on serving
// whatever becomes of the CA.
type ACME struct {
	cfg    ACMEConfig
	log    *slog.Logger
	ready  chan struct{} // closed when stored certificates can be served
	orders orders

	// Set by Run before ready is closed.
	ctx     context.Context // Run's: orders end with it
	cache   *certmagic.Cache
	storage *certmagic.FileStorage
	own     *certmagic.Config // of Domains
	custom  *certmagic.Config
	http    *certmagic.ACMEIssuer // of custom
}

// NewACME checks cfg. Nothing is asked of the CA before Run.
func NewACME(cfg ACMEConfig) (*ACME, error) {
	if cfg.Own == nil {
		if len(cfg.Domains) == 0 {
			return nil, errors.New("acme: no domain to get certificates for")
		}
		if err := cfg.DNS.Check(); err != nil {
			return nil, fmt.Errorf("acme: dns: %w", err)
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Allow == nil {
		cfg.Allow = func(string) bool { return false }
	}
	if cfg.Owner == nil {
		cfg.Owner = func(string) string { return "" }
	}
	cfg.CA = cmp.Or(cfg.CA, certmagic.LetsEncryptProductionCA)
	cfg.Interval = cmp.Or(cfg.Interval, certmagic.DefaultRenewCheckInterval)
	return &ACME{cfg: cfg, log: cfg.Log, ready: make(chan struct{}), orders: newOrders()}, nil
}

// TLS is the configuration that serves the certificates. Handshakes wait for Run
// to have read what is stored.
func (a *ACME) TLS() *tls.Config {
	c := config(a.get)
	c.NextProtos = []string{"h2", "http/1.1", tlsALPN}
	return c
}

// tlsALPN is the protocol of TLS-ALPN-01 validations (RFC 8737, section 6.2).
const tlsALPN = "acme-tls/1"

// Run gets and renews certificates until ctx ends. A CA that does not answer is no
// error: it is asked again, for a month, at growing intervals.
func (a *ACME) Run(ctx context.Context) error {
	a.ctx = ctx
	defer a.orders.wait()
	zl := zapOn(a.log)
	a.storage = &certmagic.FileStorage{Path: a.cfg.Dir}
	a.cache = certmagic.NewCache(certmagic.CacheOptions{
		RenewCheckInterval: a.cfg.Interval, Logger: zl,
		GetConfigForCert: func(c certmagic.Certificate) (*certmagic.Config, error) {
			if len(c.Names) > 0 && !a.isOwn(c.Names[0]) {
				return a.custom, nil
			}
			return a.own, nil
		},
	})
	defer a.cache.Stop()
	base := certmagic.Config{
		Storage: a.storage, Logger: zl, OnEvent: a.event,
		OCSP: certmagic.OCSPConfig{DisableStapling: true},
	}
	if len(a.cfg.Domains) > 0 {
		base.DefaultServerName = a.cfg.Domains[0] // clients without SNI
	}
	a.own = certmagic.New(a.cache, base)
	issuer := a.issuer()
	issuer.DNS01Solver = &certmagic.DNS01Solver{DNSManager: certmagic.DNSManager{
		DNSProvider: a.cfg.DNS.provider(), Resolvers: a.cfg.DNS.Resolvers, TTL: 2 * time.Minute, Logger: zl,
	}}
	a.own.Issuers = []certmagic.Issuer{certmagic.NewACMEIssuer(a.own, issuer)}
	a.custom = certmagic.New(a.cache, base)
	a.http = certmagic.NewACMEIssuer(a.custom, a.customIssuer())
	a.custom.Issuers = []certmagic.Issuer{a.http}
	return a.manage(ctx)
}

// manage serves what is stored at once and has the rest ordered.
func (a *ACME) manage(ctx context.Context) error {
	var names []string
	if a.cfg.Own == nil {
		for _, d := range a.cfg.Domains {
			names = append(names, "*."+d, d)
		}
	}
	for _, n := range names {
		if _, err := a.own.CacheManagedCertificate(ctx, n); err != nil && !errors.Is(err, fs.ErrNotExist) {
			a.log.Error("stored certificate not read, a new one is ordered", "host", n, "err", err)
		}
	}
	close(a.ready)
	for _, n := range names {
		// One that is in memory already is renewed by the cache's own watch; Manage
		// looks at those that are missing.
		if err := a.own.ManageAsync(ctx, []string{n}); err != nil {
			return fmt.Errorf("acme: manage %s: %w", n, err)
		}
	}
	if err := a.cache.RenewManagedCertificates(ctx); err != nil {
		a.log.Error("certificates not looked at for renewal", "err", err)
	}
	a.tidy(ctx)
	return nil
}

// expiredFor is how long an expired certificate is kept in the folder.
const expiredFor = 14 * 24 * time.Hour

// tidy forgets what is no longer wanted, until ctx ends.
func (a *ACME) tidy(ctx context.Context) {
	tick := time.NewTicker(a.cfg.Interval)
	defer tick.Stop()
	for cleaned := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, name := range a.orders.forget(a.cfg.Allow) {
			a.cache.RemoveManaged([]certmagic.SubjectIssuer{{Subject: name}})
		}
		if time.Since(cleaned) < 24*time.Hour {
			continue
		}
		cleaned = time.Now()
		if err := certmagic.CleanStorage(ctx, a.storage, certmagic.CleanStorageOptions{
			Logger: zapOn(a.log), ExpiredCerts: true, ExpiredCertGracePeriod: expiredFor,
		}); err != nil {
			a.log.Warn("expired certificates not removed", "err", err)
		}
	}
}

// issuer is what both kinds of order have in common.
func (a *ACME) issuer() certmagic.ACMEIssuer {
	return certmagic.ACMEIssuer{
		CA: a.cfg.CA, Email: a.cfg.Email, Agreed: true, Profile: a.cfg.Profile, TrustedRoots: a.cfg.Roots, Logger: zapOn(a.log),
	}
}

// customIssuer proves names on our own listeners. The library opens a listener
// only where nobody listens yet, so it is told where we do.
func (a *ACME) customIssuer() certmagic.ACMEIssuer {
	i := a.issuer()
	var port string
	i.ListenHost, port, _ = net.SplitHostPort(a.cfg.HTTPS)
	i.AltTLSALPNPort, _ = strconv.Atoi(port)
	host, port, err := net.SplitHostPort(a.cfg.HTTP)
	i.AltHTTPPort, _ = strconv.Atoi(port)
	i.DisableHTTPChallenge = err != nil || host != i.ListenHost
	return i
}

// isOwn reports whether a name is one of Domains, or below one.
func (a *ACME) isOwn(name string) bool {
	for _, d := range a.cfg.Domains {
		if name == d || strings.HasSuffix(name, "."+d) {
			return true
		}
	}
	return false
}

func (a *ACME) get(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	select {
	case <-a.ready:
	case <-hello.Context().Done():
		return nil, hello.Context().Err()
	}
	name := strings.ToLower(strings.TrimSuffix(hello.ServerName, "."))
	switch {
	case name != "" && !a.isOwn(name) && name != "localhost":
		return a.getCustom(name, hello)
	case a.cfg.Own != nil:
		return a.cfg.Own(hello)
	case name == "localhost": // no CA signs for it, and this machine's clients may still want to see what we have
		asked := *hello
		asked.ServerName = ""
		hello = &asked
	}
	return a.own.GetCertificate(hello)
}

// HTTPChallenge answers a request of HTTP-01 (RFC 8555, section 8.3) that belongs to
// an order under way, and reports whether it did.
func (a *ACME) HTTPChallenge(w http.ResponseWriter, r *http.Request) bool {
	if !certmagic.LooksLikeHTTPChallenge(r) {
		return false
	}
	select {
	case <-a.ready:
	default:
		return false
	}
	host, _, err := net.SplitHostPort(r.Host)
	if err != nil {
		host = r.Host
	}
	return a.cfg.Allow(strings.ToLower(host)) && a.http.HandleHTTPChallenge(w, r)
}

// event is told of what becomes of an order; an error stops one that begins.
func (a *ACME) event(ctx context.Context, event string, data map[string]any) error {
	name, _ := data["identifier"].(string)
	renewal, _ := data["renewal"].(bool)
	switch event {
	case "cert_obtaining":
		if !a.isOwn(strings.TrimPrefix(name, "*.")) && !a.cfg.Allow(name) {
			return certmagic.ErrNoRetry{Err: fmt.Errorf("%s is not bound to a sandbox", name)}
		}
		if !a.isOwn(strings.TrimPrefix(name, "*.")) && a.cfg.Proven != nil {
			if err := a.cfg.Proven(ctx, name); err != nil {
				return certmagic.ErrNoRetry{Err: err}
			}
		}
	case "cert_obtained":
		a.log.Info("certificate obtained", "host", name, "renewal", renewal)
	case "cert_failed":
		err, _ := data["error"].(error)
		a.log.Error("certificate not obtained, it is tried again", "host", name, "renewal", renewal, "ca", a.cfg.CA, "err", err)
		a.orders.failed(name, err)
	}
	return nil
}
