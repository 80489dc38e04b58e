package api

import (
	"bytes"
	"encoding/json"
	"maps"
	"math"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// sandboxID reads an ID from a path or parameter, without the "-suffix" that
// old clients append.
func sandboxID(raw string) (sandbox.ID, error) {
	base, _, _ := strings.Cut(raw, "-")
	if id := sandbox.ID(base); id.Valid() {
		return id, nil
	}
	return "", errs.New(errs.NotFound, "Sandbox %q doesn't exist or you don't have access to it", raw[:min(len(raw), 64)])
}

// createRequest reads the body of a create. What the server would not honour it
// refuses, so that nobody trusts a setting that is not there.
func createRequest(b *control.NewSandbox) (sandbox.CreateRequest, error) {
	none := sandbox.CreateRequest{}
	timeout, err := seconds("timeout", b.Timeout)
	if err != nil {
		return none, err
	}
	if err := unsupported(map[string]control.Unsupported{
		"mcp": b.Mcp, "iam": b.Iam, "volumeMounts": b.VolumeMounts, "secrets": b.Secrets,
	}); err != nil {
		return none, err
	}
	if err := withMemory("autoPauseMemory", b.AutoPauseMemory); err != nil {
		return none, err
	}
	egress, err := egressOf(&b.Network)
	if err != nil {
		return none, err
	}
	egress.AllowInternetAccess = stricter(egress.AllowInternetAccess, b.AllowInternetAccess)
	mask, maskOrigin := sandbox.MaskOf(b.Network.MaskRequestHost)
	if err := sandbox.ValidMaskHost(mask); err != nil {
		return none, err
	}
	wakeOn, err := autoResumeOn(b)
	if err != nil {
		return none, err
	}
	httpsPorts, err := sandbox.ParseHTTPSPorts(b.Network.HttpsPorts)
	if err != nil {
		return none, err
	}
	sources, err := sandbox.ParseSources("network.allowIn", b.Network.AllowIn)
	if err != nil {
		return none, err
	}
	if err := validEnv(b.EnvVars); err != nil {
		return none, err
	}
	if err := sandbox.ValidLabels(b.Metadata, b.EnvVars); err != nil {
		return none, err
	}
	idle, err := seconds("idleTimeout", b.IdleTimeout)
	if err != nil {
		return none, err
	}
	req := sandbox.CreateRequest{
		Template:           b.TemplateID,
		Timeout:            timeout,
		Metadata:           b.Metadata,
		EnvVars:            b.EnvVars,
		Egress:             egress,
		AllowPublicTraffic: b.Network.AllowPublicTraffic,
		MaskRequestHost:    mask,
		MaskOrigin:         maskOrigin || b.Network.MaskOrigin,
		HTTPSPorts:         httpsPorts,
		OnTimeout:          sandbox.KillOnTimeout,
		AllowIn:            sources,
		AutoResume:         b.AutoResume.Enabled,
		AutoResumeOn:       wakeOn,
		IdleTimeout:        idle,
		Secure:             b.Secure == nil || *b.Secure,
	}
	if b.AutoPause {
		req.OnTimeout = sandbox.PauseOnTimeout
	}
	return req, nil
}

// autoResumeOn reads what resumes a sandbox, from its field or the metadata.
func autoResumeOn(b *control.NewSandbox) (sandbox.AutoResumeOn, error) {
	if b.AutoResume.On != "" {
		return sandbox.ParseAutoResumeOn("autoResume.on", b.AutoResume.On)
	}
	return sandbox.ParseAutoResumeOn("metadata."+sandbox.AutoResumeOnKey, b.Metadata[sandbox.AutoResumeOnKey])
}

// egressOf reads the egress half of network rules.
func egressOf(n *control.Network) (policy.Input, error) {
	if err := unsupported(map[string]control.Unsupported{
		"network.rules": n.Rules, "network.egressProxy": n.EgressProxy,
	}); err != nil {
		return policy.Input{}, err
	}
	// Even an empty list has a meaning: no nameserver at all.
	if n.DnsServers != nil && !bytes.Equal(n.DnsServers, []byte("null")) {
		return policy.Input{}, errs.New(errs.Unimplemented, "network.dnsServers is not supported by this server: list nameservers in network.allowOut")
	}
	if len(n.AdditionalProperties) > 0 {
		field := slices.Min(slices.Collect(maps.Keys(n.AdditionalProperties)))
		return policy.Input{}, errs.New(errs.Invalid, "network.%s is unknown: network takes allowOut, denyOut, allowPublicTraffic, maskRequestHost, maskOrigin, httpsPorts, allowIn, dns, onDeny and mode", field)
	}
	return policy.Input{
		AllowOut:            n.AllowOut,
		DenyOut:             n.DenyOut,
		AllowInternetAccess: n.AllowInternetAccess,
		DNS:                 policy.DNSMode(n.Dns),
		OnDeny:              policy.OnDeny(n.OnDeny),
		Mode:                policy.Mode(n.Mode),
	}, nil
}

// updateOf reads rules that replace those of a sandbox: egress only.
func updateOf(n *control.Network) (policy.Input, error) {
	if n.AllowPublicTraffic != nil {
		return policy.Input{}, errs.New(errs.Invalid, "allowPublicTraffic is set when the sandbox is created and cannot be changed")
	}
	if len(n.HttpsPorts) > 0 {
		return policy.Input{}, errs.New(errs.Invalid, "httpsPorts is set when the sandbox is created and cannot be changed")
	}
	if n.MaskOrigin {
		return policy.Input{}, errs.New(errs.Invalid, "maskOrigin is set when the sandbox is created and cannot be changed")
	}
	if n.MaskRequestHost != "" {
		return policy.Input{}, errs.New(errs.Invalid, "maskRequestHost is set when the sandbox is created and cannot be changed")
	}
	return egressOf(n)
}

// given reports whether the rules say anything at all.
func given(n *control.Network) bool {
	return !reflect.DeepEqual(*n, control.Network{})
}

// stricter merges two switches of which either may be absent: false wins.
func stricter(a, b *bool) *bool {
	if a == nil || b != nil && !*b {
		return b
	}
	return a
}

// unsupported refuses fields that carry anything.
func unsupported(fields map[string]control.Unsupported) error {
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		if !empty(fields[name]) {
			return errs.New(errs.Unimplemented, "%s is not supported by this server: leave it out", name)
		}
	}
	return nil
}

// empty reports whether a JSON value says nothing.
func empty(v json.RawMessage) bool {
	var compact bytes.Buffer
	if len(v) == 0 || json.Compact(&compact, v) != nil {
		return true // the decoder has accepted it, so it is not malformed
	}
	switch compact.String() {
	case "null", "{}", "[]", `""`, "false":
		return true
	}
	return false
}

// port reads a port number.
func port(n int) (uint16, error) {
	if n < 1 || n > 65535 {
		return 0, errs.New(errs.Invalid, "port is %d: use 1 to 65535", n)
	}
	return uint16(n), nil
}

// seconds reads a lifetime; absent is 0, which stands for the default.
func seconds(field string, v *int64) (time.Duration, error) {
	switch {
	case v == nil:
		return 0, nil
	case *v <= 0:
		return 0, errs.New(errs.Invalid, "%s is %d seconds, it must be at least 1", field, *v)
	}
	return time.Duration(min(*v, math.MaxInt64/int64(time.Second))) * time.Second, nil
}

// withMemory refuses a pause or resume without the memory: what it would lose
// is not this server's to choose.
func withMemory(field string, v *bool) error {
	if v != nil && !*v {
		return errs.New(errs.Unimplemented, "%s: false is not supported by this server: memory is always kept", field)
	}
	return nil
}

func validEnv(vars map[string]string) error {
	for name, value := range vars {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.Contains(value, "\x00") {
			return errs.New(errs.Invalid, "envVars has %q: a name must not be empty or contain = or NUL, a value no NUL", name)
		}
	}
	return nil
}

// metadataFilter reads the metadata parameter. The parameter's own encoding is
// gone; below it the SDKs encode the query string of pairs, and below that each
// key and value.
func metadataFilter(param string) (map[string]string, error) {
	if param == "" {
		return nil, nil
	}
	invalid := errs.New(errs.Invalid, "parameter metadata is not valid: it must be key=value&key=value, with keys and values percent-encoded")
	pairs, err := url.QueryUnescape(param)
	if err != nil {
		return nil, invalid
	}
	filter := map[string]string{}
	for pair := range strings.SplitSeq(pairs, "&") {
		key, value, found := strings.Cut(pair, "=")
		key, keyErr := url.QueryUnescape(key)
		value, valueErr := url.QueryUnescape(value)
		if !found || keyErr != nil || valueErr != nil {
			return nil, invalid
		}
		filter[key] = value
	}
	return filter, nil
}

// statesOf maps the two states clients know to those that look like them.
func statesOf(param []control.SandboxState) ([]sandbox.State, error) {
	if len(param) == 0 {
		param = []control.SandboxState{control.Running, control.Paused}
	}
	var states []sandbox.State
	for _, s := range param {
		switch s {
		case control.Running:
			states = append(states, sandbox.Running)
		case control.Paused:
			states = append(states, sandbox.Paused)
		default:
			return nil, errs.New(errs.Invalid, "parameter state has %q: use running, paused or both separated by a comma", s)
		}
	}
	return states, nil
}

// maxPage bounds every page; clients continue with the next token.
const maxPage = 1000

func pageLimit(n int) (int, error) {
	if n < 0 {
		return 0, errs.New(errs.Invalid, "parameter limit is %d, it must be at least 1", n)
	}
	return min(n, maxPage), nil
}
