package sandbox

import (
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
)

// DefaultTimeout is how long a sandbox lives when its creator named no time.
const DefaultTimeout = 300 * time.Second

// CreateRequest is what a user asks a new sandbox to be.
type CreateRequest struct {
	Owner              string // ID of the key that asks
	Template           string // name or ID; empty means the server's default
	Timeout            time.Duration
	Metadata           map[string]string
	EnvVars            map[string]string
	Egress             policy.Input
	AllowPublicTraffic *bool          // nil means true
	MaskRequestHost    string         // already checked with ValidMaskHost
	MaskOrigin         bool           // MaskRequestHost counts for Origin and Referer too
	HTTPSPorts         []uint16       // whose services speak TLS; of ParseHTTPSPorts
	AllowIn            []netip.Prefix // of ParseSources; nil: every source
	OnTimeout          OnTimeout
	AutoResume         bool
	AutoResumeOn       AutoResumeOn
	IdleTimeout        time.Duration // 0: traffic does not move the end of its life
	Secure             bool          // whether the agent demands an access token
}

// ListRequest selects sandboxes. The zero value selects all, newest start first.
type ListRequest struct {
	Owner        string            // empty: of every owner
	Metadata     map[string]string // all pairs must be present
	States       []State           // empty: running and paused
	Template     string            // name or ID
	StartedAfter time.Time
	Ascending    bool
	Limit        int    // 0: the Manager's own page size
	Cursor       string // from the page before; empty for the first
}

// EventsRequest selects lifecycle events.
type EventsRequest struct {
	Owner     string // empty: of every owner
	Sandbox   ID
	Template  string
	Names     []string // Event.Name; empty: all
	States    []State
	From, To  time.Time // zero: unbounded
	Ascending bool
	Offset    int
	Limit     int // 0: the Manager's own page size
}

// Quota is what an owner may use and what is in use. A zero limit means none.
type Quota struct {
	MaxSandboxes int
	MaxPaused    int
	MaxCPUs      int
	MaxMemoryMB  int64
	MaxLifetime  time.Duration
	PerSandbox   Resources // the largest one sandbox may be

	Sandboxes int
	Paused    int
	CPUs      int
	MemoryMB  int64
}

// NetworkUpdate replaces a sandbox's network rules.
type NetworkUpdate struct {
	Egress policy.Input
	// AllowIn is who may reach the sandbox's ports, of ParseSources; nil: unchanged.
	AllowIn []netip.Prefix
}

// SnapshotsRequest selects snapshots, newest first.
type SnapshotsRequest struct {
	Owner   string
	Sandbox ID
	Name    string
	Limit   int
	Cursor  string
}

// ForkRequest asks for copies of a running sandbox.
type ForkRequest struct {
	Count   int
	Timeout time.Duration // 0: DefaultTimeout
	// Strict means all or none: when one copy cannot be started, the others are
	// destroyed and the call fails.
	Strict bool
}

// Forked is one copy, or why there is none.
type Forked struct {
	Record Record
	Err    error
}

// ResetRequest asks for a sandbox to start over from its template under its own ID.
type ResetRequest struct {
	Timeout            time.Duration // 0: DefaultTimeout
	Resume             bool          // start a paused sandbox; otherwise paused is errs.Conflict
	AllowPublicTraffic *bool         // nil: unchanged
}

// Template is what the service can start sandboxes from.
type Template struct {
	ID        string
	Names     []string
	Resources Resources
	Created   time.Time
	Ready     bool // its image is built
}

// The limits of a sandbox's metadata and environment, in octets: it is kept in
// memory and written at every change.
const (
	maxMetadata      = 100 // pairs
	maxMetadataKey   = 256
	maxMetadataValue = 8 << 10
	maxMetadataTotal = 64 << 10
	maxEnv           = 1000 // variables
	maxEnvTotal      = 256 << 10
)

// ValidLabels checks the sizes of metadata and environment.
func ValidLabels(metadata, env map[string]string) error {
	if len(metadata) > maxMetadata {
		return errs.New(errs.Invalid, "metadata has %d pairs, it may have %d", len(metadata), maxMetadata)
	}
	total := 0
	for k, v := range metadata {
		if len(k) > maxMetadataKey || len(v) > maxMetadataValue {
			return errs.New(errs.Invalid, "metadata[%q] is %d bytes with a key of %d: a key may have %d, a value %d", k[:min(len(k), 64)], len(v), len(k), maxMetadataKey, maxMetadataValue)
		}
		total += len(k) + len(v)
	}
	if total > maxMetadataTotal {
		return errs.New(errs.Invalid, "metadata is %d bytes, it may have %d", total, maxMetadataTotal)
	}
	if len(env) > maxEnv {
		return errs.New(errs.Invalid, "envVars has %d variables, it may have %d", len(env), maxEnv)
	}
	total = 0
	for k, v := range env {
		total += len(k) + len(v)
	}
	if total > maxEnvTotal {
		return errs.New(errs.Invalid, "envVars is %d bytes, it may have %d: write files instead", total, maxEnvTotal)
	}
	return nil
}

// maxHTTPSPorts bounds a list that each connection to a service is compared with.
const maxHTTPSPorts = 64

// ParseHTTPSPorts checks the ports whose services speak TLS themselves. The agent's
// does not.
func ParseHTTPSPorts(ports []int) ([]uint16, error) {
	if len(ports) > maxHTTPSPorts {
		return nil, errs.New(errs.Invalid, "network.httpsPorts lists %d ports, at most %d are possible", len(ports), maxHTTPSPorts)
	}
	var out []uint16
	for _, p := range ports {
		switch {
		case p < 1 || p > 65535:
			return nil, errs.New(errs.Invalid, "network.httpsPorts: %d is not a port: use 1 to 65535", p)
		case p == AgentPort:
			return nil, errs.New(errs.Invalid, "network.httpsPorts: %d is the agent's port and cannot be listed", p)
		}
		out = append(out, uint16(p))
	}
	return out, nil
}

// AutoResumeOn is what resumes a sandbox by itself.
type AutoResumeOn string

// What may resume a sandbox.
const (
	AnyTraffic    AutoResumeOn = ""         // also "any"
	PlainRequests AutoResumeOn = "requests" // no upgrades, no tunnels
	MarkedOnly    AutoResumeOn = "header"   // requests that say so
)

// AutoResumeOnKey is where clients whose create call has no field for it say what
// resumes a sandbox, in its metadata.
const AutoResumeOnKey = "cordon.autoResumeOn"

// ParseAutoResumeOn reads what a user wrote in field.
func ParseAutoResumeOn(field, s string) (AutoResumeOn, error) {
	switch on := AutoResumeOn(s); on {
	case AnyTraffic, PlainRequests, MarkedOnly:
		return on, nil
	case "any":
		return AnyTraffic, nil
	}
	return "", errs.New(errs.Invalid, "%s is %q: use any, requests or header", field, s)
}

// MaskOf separates the host of a mask from the "http://" in front of it by which
// clients that know no field for it ask that Origin and Referer are masked too.
func MaskOf(mask string) (host string, origin bool) { return strings.CutPrefix(mask, "http://") }

// ValidMaskHost checks the host name that sandboxed services are to see in
// place of their public one: an ASCII host name or IP address with an optional
// port, where "${PORT}" stands for the real port. Empty is valid and means none.
func ValidMaskHost(mask string) error {
	if mask == "" {
		return nil
	}
	// What is checked is what would be sent, so "${PORT}" may stand anywhere.
	host := strings.ReplaceAll(mask, "${PORT}", "80")
	name := host
	if h, port, err := net.SplitHostPort(host); err == nil {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return errInvalidMask(mask)
		}
		name = h
		if strings.HasPrefix(host, "[") {
			return maskLiteral(mask, name)
		}
	} else if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
		return maskLiteral(mask, host[1:len(host)-1])
	}
	if len(mask) > 253 || !hostForm(name) {
		return errInvalidMask(mask)
	}
	return nil
}

func maskLiteral(mask, inner string) error {
	if a, err := netip.ParseAddr(inner); err != nil || !a.Is6() || a.Zone() != "" {
		return errInvalidMask(mask)
	}
	return nil
}

// hostForm reports whether name is dot-separated labels of letters, digits,
// "-" and "_" (seen in container networks), 63 octets each.
func hostForm(name string) bool {
	for label := range strings.SplitSeq(strings.TrimSuffix(name, "."), ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return false
			}
		}
	}
	return true
}

func errInvalidMask(mask string) error {
	return errs.New(errs.Invalid, "mask request host is not valid: %s", mask)
}
