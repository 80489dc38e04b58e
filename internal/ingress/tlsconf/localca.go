package tlsconf

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/cordonhq/cordon/internal/statefile"
)

// Lifetimes. Clients refuse leaves of more than 398 days (CA/Browser Forum
// Baseline Requirements, section 6.3.2).
const (
	caLife     = 10 * 365 * 24 * time.Hour
	leafLife   = 397 * 24 * time.Hour
	leafRenew  = 60 * 24 * time.Hour // left when a leaf is replaced
	clockSlack = time.Hour           // certificates are valid since a little before they were made
)

// LocalCA returns a configuration with a certificate for every domain,
// *.<domain>, localhost, 127.0.0.1 and ::1, signed by an authority that lives in
// dir, and the path of the authority's certificate for clients to trust.
//
// The authority is made at the first call and lasts ten years. It may sign for
// these names only (RFC 5280, section 4.2.1.10, critical): whoever trusts it does
// not trust it for the rest of the web, not even when its key gets lost. So other
// domains need a new authority; one that does not cover them is replaced, and the
// log says so. The leaf is renewed during operation.
func LocalCA(dir string, domains []string, log *slog.Logger) (cfg *tls.Config, caFile string, err error) {
	if len(domains) == 0 {
		return nil, "", errors.New("local authority: no domain to sign for")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, "", fmt.Errorf("local authority: %w", err)
	}
	a := &authority{dir: dir, domains: domains, log: log}
	if err := a.open(); err != nil {
		return nil, "", fmt.Errorf("local authority: %w", err)
	}
	if _, err := a.get(nil); err != nil {
		return nil, "", fmt.Errorf("local authority: %w", err)
	}
	return config(a.get), a.path("ca.pem"), nil
}

// authority is a certificate authority and the one leaf it has in use.
type authority struct {
	dir     string
	domains []string
	log     *slog.Logger
	cert    *x509.Certificate
	key     crypto.Signer

	mu   sync.Mutex       // guards leaf
	leaf *tls.Certificate // Leaf is parsed
}

func (a *authority) path(name string) string { return filepath.Join(a.dir, name) }

// names are all that a leaf must be good for.
func (a *authority) names() (dns []string, ips []net.IP) {
	for _, d := range a.domains {
		dns = append(dns, d, "*."+d)
	}
	if !slices.Contains(dns, "localhost") {
		dns = append(dns, "localhost")
	}
	return dns, []net.IP{net.IPv4(127, 0, 0, 1).To4(), net.IPv6loopback}
}

// open reads the authority, or makes one.
func (a *authority) open() error {
	pair, err := tls.LoadX509KeyPair(a.path("ca.pem"), a.path("ca.key"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("read %s: %w (remove ca.pem and ca.key to make a new authority)", a.dir, err)
	default:
		key, ok := pair.PrivateKey.(crypto.Signer)
		if ok && a.covers(pair.Leaf) {
			a.cert, a.key = pair.Leaf, key
			return os.Chmod(a.path("ca.key"), 0o600)
		}
		a.log.Warn("local authority replaced: clients must trust the new one", "file", a.path("ca.pem"))
	}
	return a.create()
}

// covers reports whether an authority may sign for all our names for the time of a leaf.
func (a *authority) covers(ca *x509.Certificate) bool {
	if time.Until(ca.NotAfter) < leafLife {
		return false
	}
	for _, d := range append([]string{"localhost"}, a.domains...) {
		if !slices.Contains(ca.PermittedDNSDomains, d) {
			return false
		}
	}
	return true
}

func (a *authority) create() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make key: %w", err)
	}
	now := time.Now()
	permitted := slices.Clone(a.domains)
	if !slices.Contains(permitted, "localhost") {
		permitted = append(permitted, "localhost")
	}
	host, err := os.Hostname()
	if err != nil {
		host = "this machine"
	}
	tmpl := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: "cordon local authority on " + host},
		NotBefore:             now.Add(-clockSlack),
		NotAfter:              now.Add(caLife),
		IsCA:                  true,
		BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage:                    x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		PermittedDNSDomainsCritical: true,
		PermittedDNSDomains:         permitted,
		PermittedIPRanges:           []*net.IPNet{loopback4(), loopback6()},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return fmt.Errorf("sign authority: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("parse authority: %w", err)
	}
	if err := a.store("ca", der, key); err != nil {
		return err
	}
	a.cert, a.key = cert, key
	return nil
}

func loopback4() *net.IPNet {
	return &net.IPNet{IP: net.IPv4(127, 0, 0, 0).To4(), Mask: net.CIDRMask(8, 32)}
}

func loopback6() *net.IPNet { return &net.IPNet{IP: net.IPv6loopback, Mask: net.CIDRMask(128, 128)} }

func serial() *big.Int {
	var b [16]byte
	rand.Read(b[:])
	b[0] &= 0x7f // positive, and 127 random bits
	return new(big.Int).SetBytes(b[:])
}

// get returns the leaf, renewed when it is time.
func (a *authority) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.leaf == nil {
		a.leaf = a.storedLeaf()
	}
	if a.leaf != nil && time.Until(a.leaf.Leaf.NotAfter) > leafRenew {
		return a.leaf, nil
	}
	leaf, err := a.sign()
	if err != nil {
		if a.leaf != nil {
			a.log.Error("certificate not renewed", "err", err)
			return a.leaf, nil
		}
		return nil, err
	}
	a.leaf = leaf
	return leaf, nil
}

// storedLeaf returns the leaf of a former run when it still serves, else nil.
func (a *authority) storedLeaf() *tls.Certificate {
	pair, err := tls.LoadX509KeyPair(a.path("leaf.pem"), a.path("leaf.key"))
	if err != nil {
		return nil
	}
	dns, ips := a.names()
	slices.Sort(dns)
	have := slices.Sorted(slices.Values(pair.Leaf.DNSNames))
	if pair.Leaf.CheckSignatureFrom(a.cert) != nil || !slices.Equal(have, dns) || len(pair.Leaf.IPAddresses) != len(ips) {
		return nil
	}
	return &pair
}

func (a *authority) sign() (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	now := time.Now()
	dns, ips := a.names()
	end := now.Add(leafLife - clockSlack)
	if end.After(a.cert.NotAfter) {
		end = a.cert.NotAfter
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: a.domains[0]},
		NotBefore: now.Add(-clockSlack), NotAfter: end,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		DNSNames:              dns, IPAddresses: ips,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, fmt.Errorf("sign leaf: %w", err)
	}
	if err := a.store("leaf", der, key); err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse leaf: %w", err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, nil
}

// store writes <name>.key, which only root reads, and <name>.pem for everyone.
func (a *authority) store(name string, cert []byte, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode key: %w", err)
	}
	if err := statefile.Replace(a.path(name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		return err
	}
	return statefile.Replace(a.path(name+".pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o644)
}
