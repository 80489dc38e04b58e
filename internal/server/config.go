package server

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caarlos0/env/v11"
	"go.yaml.in/yaml/v3"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/network"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/resolver"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// DefaultConfigFile is read when it exists and no other file is named.
const DefaultConfigFile = "/etc/cordon/cordon.yaml"

// Config is everything an operator can set. It is read from a YAML file, then
// from CORDON_* variables; unknown keys in the file are refused. The zero value of a
// field means its default.
type Config struct {
	// Name tells two servers on one machine apart: it is part of every link,
	// namespace, table and cgroup. At most 4 letters and digits.
	Name     string `yaml:"name" env:"NAME"`
	StateDir string `yaml:"state_dir" env:"STATE_DIR"` // records, keys, CA, snapshots
	RunDir   string `yaml:"run_dir" env:"RUN_DIR"`     // what a reboot may lose
	CacheDir string `yaml:"cache_dir" env:"CACHE_DIR"` // images; shared by all servers of a machine
	// Domain is where sandboxes are reached: <port>-<id>.<domain>.
	Domain string `yaml:"domain" env:"DOMAIN"`
	// Domains are more of them; answers of the API carry Domain.
	Domains []string `yaml:"domains" env:"DOMAINS"`

	Listen    ListenConfig  `yaml:"listen" envPrefix:"LISTEN_"`
	TLS       TLSConfig     `yaml:"tls" envPrefix:"TLS_"`
	Sandboxes SandboxConfig `yaml:"sandboxes" envPrefix:"SANDBOXES_"`
	Network   NetworkConfig `yaml:"network" envPrefix:"NETWORK_"`
	Log       LogConfig     `yaml:"log" envPrefix:"LOG_"`
}

// ListenConfig says where the server answers. Addresses are host:port.
type ListenConfig struct {
	HTTPS []string `yaml:"https" env:"HTTPS"` // sandbox URLs and the API, with TLS
	HTTP  []string `yaml:"http" env:"HTTP"`   // redirects to HTTPS
	Plain string   `yaml:"plain" env:"PLAIN"` // API and sandboxes without TLS, for SDKs set to it; keep it on loopback
	// Metrics is where Prometheus reads /metrics, without a key; "none" for nowhere.
	Metrics string `yaml:"metrics" env:"METRICS"`
	// TLSTCP ends TLS and takes the bytes to the port of a public sandbox that the
	// server name says, whatever they are.
	TLSTCP         []string `yaml:"tls_tcp" env:"TLS_TCP"`
	TrustedProxies []string `yaml:"trusted_proxies" env:"TRUSTED_PROXIES"` // whose X-Forwarded-* and PROXY headers count
	ProxyProtocol  bool     `yaml:"proxy_protocol" env:"PROXY_PROTOCOL"`   // they begin connections with a PROXY header; not on plain
	// How many connections one sandbox and one client may hold; 0: as many as the
	// process's open files let everybody have.
	PerSandbox int `yaml:"connections_per_sandbox" env:"CONNECTIONS_PER_SANDBOX"`
	PerSource  int `yaml:"connections_per_source" env:"CONNECTIONS_PER_SOURCE"`
}

// TLSConfig names certificate files; without them cordon makes its own CA.
type TLSConfig struct {
	Cert string `yaml:"cert" env:"CERT"` // PEM, for *.<domain>
	Key  string `yaml:"key" env:"KEY"`
	// Certificates are folders with fullchain.pem and privkey.pem, for further names.
	Certificates []string      `yaml:"certificates" env:"CERTIFICATES"`
	HSTS         time.Duration `yaml:"hsts" env:"HSTS"` // max-age of Strict-Transport-Security
	ACME         ACMEConfig    `yaml:"acme" envPrefix:"ACME_"`
}

// ACMEConfig is used when it names an email.
type ACMEConfig struct {
	Email         string        `yaml:"email" env:"EMAIL"`
	CA            string        `yaml:"ca" env:"CA"`           // the directory's URL
	CARoot        string        `yaml:"ca_root" env:"CA_ROOT"` // PEM file, for a CA whose server's certificate is private
	Profile       string        `yaml:"profile" env:"PROFILE"`
	RenewInterval time.Duration `yaml:"renew_interval" env:"RENEW_INTERVAL"` // how often certificates are looked at
	DNS           DNSConfig     `yaml:"dns" envPrefix:"DNS_"`
}

// DNSConfig is how TXT records get into the zone; see tlsconf.DNS.
type DNSConfig struct {
	Provider  string   `yaml:"provider" env:"PROVIDER"`
	Server    string   `yaml:"server" env:"SERVER"`
	KeyName   string   `yaml:"key_name" env:"KEY_NAME"`
	Key       string   `yaml:"key" env:"KEY"`
	Algorithm string   `yaml:"algorithm" env:"ALGORITHM"`
	Token     string   `yaml:"token" env:"TOKEN"`
	Program   string   `yaml:"program" env:"PROGRAM"`
	Resolvers []string `yaml:"resolvers" env:"RESOLVERS"`
}

// SandboxConfig limits sandboxes.
type SandboxConfig struct {
	DefaultTemplate string         `yaml:"default_template" env:"DEFAULT_TEMPLATE"`
	HostTemplate    string         `yaml:"host_template" env:"HOST_TEMPLATE"` // on, off, or auto: on while there is one key
	CPUs            int            `yaml:"cpus" env:"CPUS"`
	MemoryMB        int64          `yaml:"memory_mb" env:"MEMORY_MB"`
	DiskMB          int64          `yaml:"disk_mb" env:"DISK_MB"`
	ReserveMemoryMB int64          `yaml:"reserve_memory_mb" env:"RESERVE_MEMORY_MB"` // of the machine, not sandboxes'; 0: an eighth
	Processes       int64          `yaml:"processes" env:"PROCESSES"`
	Max             int            `yaml:"max" env:"MAX"`
	MaxPerKey       int            `yaml:"max_per_key" env:"MAX_PER_KEY"`               // running ones of one key; a quarter of max
	MaxPaused       int            `yaml:"max_paused" env:"MAX_PAUSED"`                 // paused ones, whose memory is on the disk
	MaxPausedPerKey int            `yaml:"max_paused_per_key" env:"MAX_PAUSED_PER_KEY"` // a quarter of max_paused
	MaxSnapshots    int            `yaml:"max_snapshots" env:"MAX_SNAPSHOTS"`
	DefaultPrivate  bool           `yaml:"default_private" env:"DEFAULT_PRIVATE"`             // ports of sandboxes that do not say want a token
	DomainsFree     []string       `yaml:"domains_without_proof" env:"DOMAINS_WITHOUT_PROOF"` // custom ones that any key may bind
	MinFreeDiskMB   int64          `yaml:"min_free_disk_mb" env:"MIN_FREE_DISK_MB"`           // 0: 2 GiB, or a twentieth of a small disk
	MaxTimeout      time.Duration  `yaml:"max_timeout" env:"MAX_TIMEOUT"`
	StartTimeout    time.Duration  `yaml:"start_timeout" env:"START_TIMEOUT"` // until the agent of a new or resumed sandbox answers
	Spares          map[string]int `yaml:"spares" env:"SPARES"`               // running spares by template
	// ExtraCA is a PEM file whose certificates every sandbox trusts as well.
	ExtraCA string `yaml:"extra_ca" env:"EXTRA_CA"`
}

// NetworkConfig is the operator's layer over every sandbox's rules.
type NetworkConfig struct {
	Subnet4   netip.Prefix `yaml:"subnet4" env:"SUBNET4"` // sandbox addresses, a /30 each
	ProxyPort uint16       `yaml:"proxy_port" env:"PROXY_PORT"`
	DNSPort   uint16       `yaml:"dns_port" env:"DNS_PORT"`
	LogGroup  uint16       `yaml:"log_group" env:"LOG_GROUP"` // netlink group of the kernel's verdicts
	// SourcePorts are those that connections of sandboxes have outside.
	SourcePorts string `yaml:"source_ports" env:"SOURCE_PORTS"`
	// PublicAddresses are those of this machine that no link of it has; NAT64 are the
	// network's own prefixes that a name server does not tell.
	PublicAddresses []string     `yaml:"public_addresses" env:"PUBLIC_ADDRESSES"`
	NAT64           []string     `yaml:"nat64" env:"NAT64"`
	Upstreams       []string     `yaml:"upstreams" env:"UPSTREAMS"` // DNS servers; default: the host's
	DNSDeny         string       `yaml:"dns_deny" env:"DNS_DENY"`   // the answer for denied names: nodata, refused
	FloorOpen       []string     `yaml:"floor_open" env:"FLOOR_OPEN"`
	AlwaysAllow     []string     `yaml:"always_allow" env:"ALWAYS_ALLOW"`
	AlwaysDeny      []string     `yaml:"always_deny" env:"ALWAYS_DENY"`
	Limits          LimitsConfig `yaml:"limits" envPrefix:"LIMITS_"`
}

// LimitsConfig is what one sandbox may use of the network.
type LimitsConfig struct {
	Connections    int   `yaml:"connections" env:"CONNECTIONS"`         // at a time
	NewConnections int   `yaml:"new_connections" env:"NEW_CONNECTIONS"` // a second, also at once; the kernel's and the proxy's are counted apart
	DNSQueries     int   `yaml:"dns_queries" env:"DNS_QUERIES"`         // a second, three times as many at once
	BytesOut       int64 `yaml:"bytes_out" env:"BYTES_OUT"`             // in all packets of one run; 0: no limit
}

type LogConfig struct {
	Level  string `yaml:"level" env:"LEVEL"`   // debug, info, warn, error
	Format string `yaml:"format" env:"FORMAT"` // text, json
	// Requests shows every request to a sandbox's ports; else they are at debug.
	Requests bool `yaml:"requests" env:"REQUESTS"`
}

// LoadConfig reads file ("" means the default file, if it exists), then the
// environment, and fills in defaults.
func LoadConfig(file string, environ map[string]string) (Config, error) {
	var c Config
	if err := c.readFile(file); err != nil {
		return c, err
	}
	if err := env.ParseWithOptions(&c, env.Options{Prefix: "CORDON_", Environment: environ}); err != nil {
		return c, errs.New(errs.Invalid, "environment: %v", err)
	}
	c.setDefaults()
	return c, c.validate()
}

func (c *Config) readFile(file string) error {
	f, err := os.Open(cmp.Or(file, DefaultConfigFile))
	if errors.Is(err, fs.ErrNotExist) && file == "" {
		return nil
	}
	if err != nil {
		return errs.Wrap(errs.Invalid, err, "configuration")
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfig))
	if err != nil {
		return errs.Wrap(errs.Invalid, err, "configuration")
	}
	dec := yaml.NewDecoder(bytes.NewReader(text))
	dec.KnownFields(true)
	if err := dec.Decode(c); err != nil && !errors.Is(err, io.EOF) {
		return errs.New(errs.Invalid, "configuration %s: %s", f.Name(), explainYAML(err, string(text)))
	}
	return nil
}

// maxConfig bounds the configuration file, in octets.
const maxConfig = 1 << 20

var (
	yamlLine    = regexp.MustCompile(`^line (\d+): (.*)$`)
	yamlUnknown = regexp.MustCompile(`^field (\S+) (?:not found in type|already set in type) \S+$`)
	yamlWrong   = regexp.MustCompile("^cannot unmarshal !!\\w+ (?:`(.*)` )?into (\\S+)$")
)

// yamlTypes are the types of the configuration's fields in an operator's words.
var yamlTypes = map[string]string{
	"int": "a whole number", "int64": "a whole number", "uint16": "a number from 0 to 65535", "string": "text",
	"[]string": "a list", "map[string]int": "templates with numbers", "time.Duration": "a duration such as 90s or 24h",
	"bool": "true or false",
}

// explainYAML says which line is wrong, quotes it and says what it should be.
func explainYAML(err error, text string) string {
	var wrong *yaml.TypeError
	if !errors.As(err, &wrong) {
		return err.Error()
	}
	lines := strings.Split(text, "\n")
	out := make([]string, len(wrong.Errors))
	for i, said := range wrong.Errors {
		out[i] = said
		m := yamlLine.FindStringSubmatch(said)
		if m == nil {
			continue
		}
		n, _ := strconv.Atoi(m[1]) // digits
		if n < 1 || n > len(lines) {
			continue
		}
		what := m[2]
		if u := yamlUnknown.FindStringSubmatch(what); u != nil {
			what = u[1] + " is no key, or is there twice: docs/operations.md lists the keys"
		} else if w := yamlWrong.FindStringSubmatch(what); w != nil {
			what = "use " + cmp.Or(yamlTypes[w[2]], w[2])
		}
		out[i] = fmt.Sprintf("line %d, %q: %s", n, strings.TrimSpace(lines[n-1]), what)
	}
	return strings.Join(out, "; ")
}

func (c *Config) setDefaults() {
	c.Name = cmp.Or(c.Name, "0")
	c.StateDir = cmp.Or(c.StateDir, "/var/lib/cordon")
	c.RunDir = cmp.Or(c.RunDir, "/run/cordon-"+c.Name)
	c.CacheDir = cmp.Or(c.CacheDir, "/var/cache/cordon")
	c.Domain = strings.ToLower(cmp.Or(c.Domain, "cordon.localhost"))
	for i, d := range c.Domains {
		c.Domains[i] = strings.ToLower(d)
	}
	c.TLS.ACME.RenewInterval = cmp.Or(c.TLS.ACME.RenewInterval, 10*time.Minute)
	c.Listen.setDefaults(c.Domain)
	s := &c.Sandboxes
	s.DefaultTemplate = cmp.Or(s.DefaultTemplate, "base")
	s.HostTemplate = cmp.Or(s.HostTemplate, "auto")
	s.CPUs = cmp.Or(s.CPUs, 2)
	s.MemoryMB = cmp.Or(s.MemoryMB, 512)
	s.DiskMB = cmp.Or(s.DiskMB, 10<<10)
	s.Processes = cmp.Or(s.Processes, 4096)
	s.Max = cmp.Or(s.Max, 1000)
	s.MaxPerKey = cmp.Or(s.MaxPerKey, max(1, s.Max/4))
	s.MaxPaused = cmp.Or(s.MaxPaused, 400)
	s.MaxPausedPerKey = cmp.Or(s.MaxPausedPerKey, max(1, s.MaxPaused/4))
	s.MaxSnapshots = cmp.Or(s.MaxSnapshots, 400)
	s.MaxTimeout = cmp.Or(s.MaxTimeout, 24*time.Hour)
	s.StartTimeout = cmp.Or(s.StartTimeout, 30*time.Second)
	if s.Spares == nil {
		s.Spares = map[string]int{s.DefaultTemplate: 2}
	}
	n := &c.Network
	n.Subnet4 = cmp.Or(n.Subnet4, netip.MustParsePrefix("10.223.0.0/16"))
	n.ProxyPort = cmp.Or(n.ProxyPort, 15001)
	n.DNSPort = cmp.Or(n.DNSPort, 15053)
	n.LogGroup = cmp.Or(n.LogGroup, 5223)
	n.DNSDeny = cmp.Or(n.DNSDeny, string(resolver.DenialNoData))
	n.SourcePorts = cmp.Or(n.SourcePorts, network.DefaultSourcePorts.String())
	n.Limits.Connections = cmp.Or(n.Limits.Connections, 8192)
	n.Limits.NewConnections = cmp.Or(n.Limits.NewConnections, 10_000)
	n.Limits.DNSQueries = cmp.Or(n.Limits.DNSQueries, 100)
	c.Log.Level = cmp.Or(c.Log.Level, "info")
	c.Log.Format = cmp.Or(c.Log.Format, "text")
}

// setDefaults listens on both loopbacks for a .localhost domain, which only this
// machine resolves, and on every address for a real one.
func (l *ListenConfig) setDefaults(domain string) {
	at := func(port string) []string {
		if domain == "localhost" || strings.HasSuffix(domain, ".localhost") {
			return []string{net.JoinHostPort("127.0.0.1", port), net.JoinHostPort("::1", port)}
		}
		return []string{":" + port}
	}
	if l.HTTPS == nil {
		l.HTTPS = at("443")
	}
	if l.HTTP == nil {
		l.HTTP = at("80")
	}
	l.Plain = cmp.Or(l.Plain, "127.0.0.1:3900")
	if l.Metrics = cmp.Or(l.Metrics, "127.0.0.1:3901"); l.Metrics == "none" {
		l.Metrics = ""
	}
}

var nameForm = regexp.MustCompile(`^[a-z0-9]{1,4}$`)

// wrong is the error for a setting.
func wrong(field string, value any, fix string) error {
	return errs.New(errs.Invalid, "configuration: %s is %v: %s", field, value, fix)
}

func (c *Config) validate() error {
	if !nameForm.MatchString(c.Name) {
		return wrong("name", c.Name, "use 1 to 4 lower-case letters and digits")
	}
	for _, check := range []func() error{c.validDomains, c.TLS.validate, c.Listen.validate, c.validNumbers, c.Network.validate} {
		if err := check(); err != nil {
			return err
		}
	}
	for _, d := range []struct{ field, dir string }{{"state_dir", c.StateDir}, {"run_dir", c.RunDir}, {"cache_dir", c.CacheDir}} {
		if !filepath.IsAbs(d.dir) {
			return wrong(d.field, d.dir, "use an absolute path")
		}
	}
	return nil
}

func (c *Config) validDomains() error {
	for i, d := range c.allDomains() {
		field := "domain"
		if i > 0 {
			field = "domains"
		}
		if name, ok := policy.PublicName(d); !ok || name != d {
			return wrong(field, d, "use a domain name such as sandbox.example.com, without port or scheme")
		}
		if slices.Contains(c.allDomains()[:i], d) {
			return wrong(field, d, "it is named twice")
		}
	}
	return nil
}

// hostTemplate says why no sandbox is made of the machine's own /usr, where several
// keys may not see what only root may read there.
func (c *Config) hostTemplate(keys int) error {
	switch {
	case c.Sandboxes.HostTemplate == "on" || c.Sandboxes.HostTemplate == "auto" && keys <= 1:
		return nil
	case c.Sandboxes.HostTemplate == "off":
		return errs.New(errs.Forbidden, "template 'host' is off on this server (sandboxes.host_template): use another")
	}
	return errs.New(errs.Forbidden, "template 'host' shows this machine's /usr, with files that only root may read, so it is off while there are %d API keys: use another, or have the operator set sandboxes.host_template to on", keys)
}

// validNumbers refuses what no number may be.
func (c *Config) validNumbers() error {
	if !slices.Contains([]string{"auto", "on", "off"}, c.Sandboxes.HostTemplate) {
		return wrong("sandboxes.host_template", c.Sandboxes.HostTemplate, "use auto, on or off")
	}
	l, nl := c.Sandboxes, c.Network.Limits
	for _, n := range []struct {
		field string
		value int64
	}{
		{"sandboxes.cpus", int64(l.CPUs)}, {"sandboxes.memory_mb", l.MemoryMB}, {"sandboxes.disk_mb", l.DiskMB},
		{"sandboxes.reserve_memory_mb", l.ReserveMemoryMB}, {"sandboxes.processes", l.Processes}, {"sandboxes.max", int64(l.Max)},
		{"sandboxes.max_per_key", int64(l.MaxPerKey)}, {"sandboxes.max_paused", int64(l.MaxPaused)}, {"sandboxes.max_paused_per_key", int64(l.MaxPausedPerKey)},
		{"sandboxes.max_snapshots", int64(l.MaxSnapshots)},
		{"sandboxes.max_timeout", int64(l.MaxTimeout)}, {"sandboxes.start_timeout", int64(l.StartTimeout)},
		{"network.limits.connections", int64(nl.Connections)}, {"network.limits.new_connections", int64(nl.NewConnections)},
		{"network.limits.dns_queries", int64(nl.DNSQueries)}, {"network.limits.bytes_out", nl.BytesOut},
		{"listen.connections_per_sandbox", int64(c.Listen.PerSandbox)}, {"listen.connections_per_source", int64(c.Listen.PerSource)},
	} {
		if n.value < 0 {
			return wrong(n.field, n.value, "use a positive number")
		}
	}
	return nil
}

func (l *ListenConfig) validate() error {
	if _, err := l.proxies(); err != nil {
		return wrong("listen.trusted_proxies", err, "use addresses or CIDRs")
	}
	if l.ProxyProtocol && len(l.TrustedProxies) == 0 {
		return wrong("listen.proxy_protocol", true, "name the proxies in listen.trusted_proxies, from no other is it believed")
	}
	return nil
}

func (n *NetworkConfig) validate() error {
	if !n.Subnet4.Addr().Is4() || n.Subnet4.Bits() > 24 {
		return wrong("network.subnet4", n.Subnet4, "use an IPv4 network of /24 or larger")
	}
	if _, err := resolver.ParseDenial(n.DNSDeny); err != nil {
		return wrong("network.dns_deny", n.DNSDeny, `use "nodata" or "refused"`)
	}
	if ports, err := network.ParseSourcePorts(n.SourcePorts); err != nil {
		return wrong("network.source_ports", n.SourcePorts, err.Error())
	} else if ports.Has(n.ProxyPort) || ports.Has(n.DNSPort) {
		return wrong("network.source_ports", n.SourcePorts, "network.proxy_port and network.dns_port must be outside of it")
	}
	for _, text := range n.PublicAddresses {
		if _, err := addressRange(text); err != nil {
			return wrong("network.public_addresses", text, "use an IP address or a range such as 203.0.113.0/28")
		}
	}
	for _, text := range n.NAT64 {
		if p, err := netip.ParsePrefix(text); err != nil || !policy.IsNAT64(p) {
			return wrong("network.nat64", text, "use an IPv6 prefix of 32, 40, 48, 56, 64 or 96 bits")
		}
	}
	for _, up := range n.Upstreams {
		if _, err := upstream(up); err != nil {
			return wrong("network.upstreams", up, "use an IP address, with :port if it is not 53")
		}
	}
	for _, l := range []struct {
		field string
		list  policy.Operator
	}{{"floor_open", policy.Operator{FloorOpen: n.FloorOpen}}, {"always_allow", policy.Operator{AlwaysAllow: n.AlwaysAllow}}, {"always_deny", policy.Operator{AlwaysDeny: n.AlwaysDeny}}} {
		if _, err := policy.Compile(policy.Input{}, &l.list, 0); err != nil {
			return errs.Wrap(errs.Invalid, err, "configuration: network.%s", l.field)
		}
	}
	return nil
}

// proxies are the trusted ones as networks. The error is the first that is none.
func (l *ListenConfig) proxies() ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range l.TrustedProxies {
		if addr, err := netip.ParseAddr(s); err == nil {
			out = append(out, netip.PrefixFrom(addr, addr.BitLen()))
			continue
		}
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, errors.New(s)
		}
		out = append(out, p.Masked())
	}
	return out, nil
}

// addressRange reads an address or a range.
func addressRange(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		return netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	return p.Masked(), err
}

// Public are the addresses that validate has checked.
func (n *NetworkConfig) Public() (out []netip.Prefix) {
	for _, text := range n.PublicAddresses {
		if p, err := addressRange(text); err == nil {
			out = append(out, p)
		}
	}
	return out
}

// nat64 are the prefixes that validate has checked.
func (n *NetworkConfig) nat64() (out []netip.Prefix) {
	for _, text := range n.NAT64 {
		if p, err := netip.ParsePrefix(text); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}

// upstream parses a DNS server's address; the port is 53 unless given.
func upstream(s string) (netip.AddrPort, error) {
	if addr, err := netip.ParseAddr(s); err == nil {
		return netip.AddrPortFrom(addr, 53), nil
	}
	return netip.ParseAddrPort(s)
}

// resources are the default limits of a sandbox.
func (c *Config) resources() sandbox.Resources {
	s := c.Sandboxes
	return sandbox.Resources{CPUs: s.CPUs, MemoryMB: s.MemoryMB, DiskMB: s.DiskMB, Processes: s.Processes}
}

// PublicDomain is the domain as clients must write it: with the HTTPS port if it
// is not 443.
func (c *Config) PublicDomain() string {
	if len(c.Listen.HTTPS) == 0 {
		return c.Domain
	}
	_, port, err := net.SplitHostPort(c.Listen.HTTPS[0])
	if err != nil || port == "443" {
		return c.Domain
	}
	return net.JoinHostPort(c.Domain, port)
}

// APIURL is the plain address of the API on this machine.
func (c *Config) APIURL() string { return "http://" + c.Listen.Plain }

func (c *Config) AdminKeyFile() string { return filepath.Join(c.StateDir, "admin.key") }

func (c *Config) ImagesDir() string { return filepath.Join(c.CacheDir, "images") }

func (c *Config) caDir() string { return filepath.Join(c.StateDir, "ca") }
