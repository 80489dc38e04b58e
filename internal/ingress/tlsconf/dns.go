package tlsconf

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/libdns/cloudflare"
	"github.com/libdns/libdns"
	"github.com/libdns/rfc2136"
)

// DNS says how TXT records for DNS-01 challenges (RFC 8555, section 8.4) get into
// the zone. A wildcard certificate can be had in no other way.
type DNS struct {
	Provider string // "rfc2136", "cloudflare" or "exec"

	// RFC 2136: a name server that takes updates signed with a key (RFC 8945).
	Server    string // host or host:port
	KeyName   string
	Key       string // base64
	Algorithm string // empty: hmac-sha256

	Token string // Cloudflare: an API token that may edit the zone

	// Program, for exec: an absolute path. It is called with "present" or
	// "cleanup", the record's name and its value, and has two minutes.
	Program string

	// Resolvers find the zone and see whether the record has arrived; empty: the
	// machine's. Host or host:port.
	Resolvers []string
}

// Check says what is missing, naming the field.
func (d *DNS) Check() error {
	need := map[string][][2]string{
		"rfc2136":    {{"server", d.Server}, {"key_name", d.KeyName}, {"key", d.Key}},
		"cloudflare": {{"token", d.Token}},
		"exec":       {{"program", d.Program}},
	}
	fields, known := need[d.Provider]
	if !known {
		return fmt.Errorf("provider is %q: use rfc2136, cloudflare or exec", d.Provider)
	}
	for _, f := range fields {
		if f[1] == "" {
			return fmt.Errorf("%s is missing: provider %s needs it", f[0], d.Provider)
		}
	}
	if d.Program != "" && !filepath.IsAbs(d.Program) {
		return fmt.Errorf("program is %q: use an absolute path", d.Program)
	}
	return nil
}

func (d *DNS) provider() certmagic.DNSProvider {
	switch d.Provider {
	case "rfc2136":
		server := d.Server
		if _, _, err := net.SplitHostPort(server); err != nil {
			server = net.JoinHostPort(strings.Trim(server, "[]"), "53")
		}
		alg := d.Algorithm
		if alg == "" {
			alg = "hmac-sha256"
		}
		return &rfc2136.Provider{Server: server, KeyName: d.KeyName, Key: d.Key, KeyAlg: alg}
	case "cloudflare":
		return &cloudflare.Provider{APIToken: d.Token}
	}
	return hook(d.Program)
}

// hook is a program that edits the zone.
type hook string

var _ certmagic.DNSProvider = hook("")

const (
	hookTime   = 2 * time.Minute
	hookOutput = 4 << 10 // octets of what it prints that an error shows
)

// AppendRecords implements libdns.RecordAppender.
func (h hook) AppendRecords(ctx context.Context, zone string, recs []libdns.Record) ([]libdns.Record, error) {
	return recs, h.each(ctx, "present", zone, recs)
}

// DeleteRecords implements libdns.RecordDeleter.
func (h hook) DeleteRecords(ctx context.Context, zone string, recs []libdns.Record) ([]libdns.Record, error) {
	return recs, h.each(ctx, "cleanup", zone, recs)
}

func (h hook) each(ctx context.Context, what, zone string, recs []libdns.Record) error {
	var failed []error
	for _, rec := range recs {
		rr := rec.RR()
		failed = append(failed, h.run(ctx, what, strings.TrimSuffix(libdns.AbsoluteName(rr.Name, zone), "."), rr.Data))
	}
	return errors.Join(failed...)
}

func (h hook) run(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, hookTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, string(h), args...)
	cmd.WaitDelay = time.Second // for what it left running with our pipe
	var said tail
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", h, strings.Join(args, " "), err, bytes.TrimSpace(said))
	}
	return nil
}

// tail keeps the end of what is written to it.
type tail []byte

func (t *tail) Write(b []byte) (int, error) {
	*t = append(*t, b...)
	if over := len(*t) - hookOutput; over > 0 {
		*t = append((*t)[:0], (*t)[over:]...)
	}
	return len(b), nil
}
