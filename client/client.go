// Package client is the Go client of cordon: it starts sandboxes, runs commands
// and moves files in them, reaches their ports, and reads what their network
// rules decided. It speaks two protocols for that: the control API and the
// agent's RPCs.
//
//	c, err := client.New(client.Options{APIURL: "http://127.0.0.1:3000", APIKey: key})
//	...
//	sb, err := c.Create(ctx, client.CreateOptions{
//		Network: client.Network{AllowOut: []string{"example.com"}, DenyOut: []string{client.AllTraffic}},
//	})
//	...
//	defer sb.Kill(context.WithoutCancel(ctx))
//	result, err := sb.Commands.Run(ctx, "curl -sS https://example.com", client.RunOptions{})
package client

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/cordonhq/cordon/api/gen/control"
)

// AllTraffic in Network.DenyOut denies every destination, IPv6 included.
const AllTraffic = "0.0.0.0/0"

// maxAnswer bounds an answer of the control API, in octets.
const maxAnswer = 32 << 20

// Options say where the server is.
type Options struct {
	// APIURL is the control API's: "http://127.0.0.1:3000". Required.
	APIURL string
	// APIKey is sent with every call to it. Required.
	APIKey string
	// SandboxURL, if set, is where agents and ports of all sandboxes are reached,
	// told apart by headers; otherwise each has a host name below the domain.
	SandboxURL string
	// Domain replaces the one that the server names; with a port if that is not 443.
	Domain string
	// HTTPClient is for servers with certificates of their own and the like. The
	// default has no timeout, as contexts have, and follows no redirects, which
	// would take the tokens along.
	HTTPClient *http.Client
}

// Client is a user of one server. It is safe for concurrent use.
type Client struct {
	opts Options
	http *http.Client
}

// New returns a client; it sends nothing.
func New(o Options) (*Client, error) {
	for name, raw := range map[string]string{"APIURL": o.APIURL, "SandboxURL": o.SandboxURL} {
		u, err := url.Parse(raw)
		if raw == "" && name == "SandboxURL" {
			continue
		}
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			return nil, fmt.Errorf("%s is %q, it must be like http://127.0.0.1:3000", name, raw)
		}
	}
	if o.APIKey == "" {
		return nil, errors.New("APIKey is empty: make a key on the server")
	}
	o.APIURL = strings.TrimRight(o.APIURL, "/")
	o.SandboxURL = strings.TrimRight(o.SandboxURL, "/")
	return &Client{opts: o, http: cmp.Or(o.HTTPClient, defaultHTTP())}, nil
}

// defaultHTTP finds *.localhost on this machine, which RFC 6761 asks of
// resolvers and Go's does not do.
func defaultHTTP() *http.Client {
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	transport := &http.Transport{
		Proxy:             http.ProxyFromEnvironment,
		ForceAttemptHTTP2: true,
		IdleConnTimeout:   90 * time.Second,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if host, port, err := net.SplitHostPort(addr); err == nil && strings.HasSuffix(host, ".localhost") {
				addr = net.JoinHostPort("127.0.0.1", port)
			}
			return dialer.DialContext(ctx, network, addr)
		},
	}
	return &http.Client{
		Transport: transport,
		// A redirect would take the tokens along.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// The errors to test for with errors.Is.
var (
	ErrInvalid      = errors.New("invalid request")
	ErrUnauthorized = errors.New("unauthorized")
	ErrNotFound     = errors.New("not found")
	ErrConflict     = errors.New("conflict")
	ErrExhausted    = errors.New("limit reached")
	ErrUnavailable  = errors.New("unavailable")
	ErrUnsupported  = errors.New("not supported by the server")
)

// Error is an answer that is none: what the server said.
type Error struct {
	Status  int // HTTP's, also for the agent's RPCs
	Message string
}

func (e *Error) Error() string { return fmt.Sprintf("%d: %s", e.Status, e.Message) }

// Is lets errors.Is match the errors of this package.
func (e *Error) Is(target error) bool {
	switch e.Status {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge:
		return target == ErrInvalid
	case http.StatusUnauthorized, http.StatusForbidden:
		return target == ErrUnauthorized
	case http.StatusNotFound:
		return target == ErrNotFound
	case http.StatusConflict:
		return target == ErrConflict
	case http.StatusTooManyRequests:
		return target == ErrExhausted
	case http.StatusBadGateway, http.StatusServiceUnavailable:
		return target == ErrUnavailable
	case http.StatusNotImplemented:
		return target == ErrUnsupported
	}
	return false
}

// call is one request to the control API.
type call struct {
	method, path string
	in, out      any // JSON; nil: none
	header       http.Header
}

// do sends c and decodes the answer.
func (cl *Client) do(ctx context.Context, c call) (http.Header, error) {
	resp, err := cl.send(ctx, c)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if c.out == nil {
		return resp.Header, nil
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(c.out); err != nil {
		return nil, fmt.Errorf("%s %s: decode answer: %w", c.method, c.path, err)
	}
	return resp.Header, nil
}

// send returns an answer of 2xx, whose body the caller closes.
func (cl *Client) send(ctx context.Context, c call) (*http.Response, error) {
	var body io.Reader
	if c.in != nil {
		text, err := json.Marshal(c.in)
		if err != nil {
			return nil, fmt.Errorf("%s %s: encode: %w", c.method, c.path, err)
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, c.method, cl.opts.APIURL+c.path, body)
	if err != nil {
		return nil, err
	}
	maps.Copy(req.Header, c.header)
	req.Header.Set("X-API-KEY", cl.opts.APIKey)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := cl.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close()
		return nil, errorOf(resp)
	}
	return resp, nil
}

// errorOf reads what the server says is wrong, in either plane's form.
func errorOf(resp *http.Response) error {
	text, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return fmt.Errorf("read answer of status %d: %w", resp.StatusCode, err)
	}
	var said struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(text, &said) != nil || said.Message == "" {
		said.Message = strings.TrimSpace(string(text[:min(len(text), 500)]))
	}
	return &Error{Status: resp.StatusCode, Message: cmp.Or(said.Message, http.StatusText(resp.StatusCode))}
}

// Network is what a sandbox may reach and who may reach it. The zero value
// allows every public destination.
type Network struct {
	// AllowOut lists addresses, CIDRs, domains, "*.domain" and "preset:name"; allow
	// wins over deny.
	AllowOut []string `json:"allowOut,omitempty"`
	// DenyOut lists addresses and CIDRs. AllTraffic is everything, and is needed
	// where AllowOut has a domain.
	DenyOut []string `json:"denyOut,omitempty"`
	// AllowInternetAccess false is DenyOut AllTraffic; true changes nothing.
	AllowInternetAccess *bool `json:"allow_internet_access,omitempty"`
	// AllowPublicTraffic false demands the traffic token of who calls the
	// sandbox's ports. At create only.
	AllowPublicTraffic *bool `json:"allowPublicTraffic,omitempty"`
	// MaskRequestHost is the Host that services in the sandbox see; "${PORT}"
	// stands for the port. At create only.
	MaskRequestHost string `json:"maskRequestHost,omitempty"`
	// MaskOrigin makes services see an Origin and a Referer of their own public URL
	// as those of the masked host, and no X-Forwarded-Host. At create only.
	MaskOrigin bool `json:"maskOrigin,omitempty"`
	// HTTPSPorts are those whose services speak HTTPS themselves; their certificates
	// are not verified. At create only.
	HTTPSPorts []int `json:"httpsPorts,omitempty"`
	// AllowIn lists the only addresses and CIDRs that may reach the sandbox's ports.
	// Nil is every address at create and no change in SetNetwork; empty is nobody.
	AllowIn []string `json:"allowIn,omitzero"`
	DNS     string   `json:"dns,omitempty"`    // "open", "strict" or empty
	OnDeny  string   `json:"onDeny,omitempty"` // "explain", "reset" or empty
	Mode    string   `json:"mode,omitempty"`   // "enforce", "observe" or empty
}

// CreateOptions describe a new sandbox. The zero value is the default template
// for five minutes.
type CreateOptions struct {
	Template string
	Timeout  time.Duration // whole seconds; 0: the server's default
	Metadata map[string]string
	Env      map[string]string // of every command
	Network  Network
	// AutoPause pauses rather than kills when the time is over; AutoResume then
	// resumes when a request arrives.
	AutoPause, AutoResume bool
	// AutoResumeOn says what resumes it: "any" or empty, "requests" (no upgrades), or
	// "header" (requests with the header Cordon-Wake).
	AutoResumeOn string
	// IdleTimeout makes every request move the end of the sandbox's life to at least
	// so long from then; whole seconds. 0: only Timeout counts.
	IdleTimeout time.Duration
}

// Create starts a sandbox and returns when it runs and its rules are in force.
func (cl *Client) Create(ctx context.Context, o CreateOptions) (*Sandbox, error) {
	type autoResume struct {
		Enabled bool   `json:"enabled"`
		On      string `json:"on,omitempty"`
	}
	in := struct {
		TemplateID string            `json:"templateID,omitempty"`
		Timeout    int64             `json:"timeout,omitempty"`
		Metadata   map[string]string `json:"metadata,omitempty"`
		EnvVars    map[string]string `json:"envVars,omitempty"`
		Network    Network           `json:"network"`
		AutoPause  bool              `json:"autoPause"`
		AutoResume autoResume        `json:"autoResume"`
		Idle       int64             `json:"idleTimeout,omitempty"`
	}{o.Template, seconds(o.Timeout), o.Metadata, o.Env, o.Network, o.AutoPause, autoResume{o.AutoResume, o.AutoResumeOn}, seconds(o.IdleTimeout)}
	var out control.Sandbox
	if _, err := cl.do(ctx, call{method: http.MethodPost, path: "/v2/sandboxes", in: in, out: &out}); err != nil {
		return nil, fmt.Errorf("create sandbox: %w", err)
	}
	return cl.sandbox(out), nil
}

// seconds rounds up, as a shorter life than asked for would surprise.
func seconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }

// Connect returns a sandbox that exists, resumed if it was paused, with at least
// timeout to live (0: the server's default).
func (cl *Client) Connect(ctx context.Context, id string, timeout time.Duration) (*Sandbox, error) {
	in := struct {
		Timeout int64 `json:"timeout,omitempty"`
	}{seconds(timeout)}
	var out control.Sandbox
	if _, err := cl.do(ctx, call{method: http.MethodPost, path: "/v2/sandboxes/" + url.PathEscape(id) + "/connect", in: in, out: &out}); err != nil {
		return nil, fmt.Errorf("connect to sandbox: %w", err)
	}
	return cl.sandbox(out), nil
}

// Info is what the server tells about a sandbox.
type Info struct {
	ID, TemplateID, Template string
	State                    string // "running" or "paused"
	Started, Ends            time.Time
	Metadata                 map[string]string
	CPUs                     int
	MemoryMB, DiskMB         int64
}

// ListOptions select sandboxes; the zero value selects all.
type ListOptions struct {
	Metadata map[string]string // all of these
	State    string            // "running", "paused" or empty
	Template string
}

// List returns the sandboxes that match, newest first.
func (cl *Client) List(ctx context.Context, o ListOptions) ([]Info, error) {
	query := url.Values{}
	if o.State != "" {
		query.Set("state", o.State)
	}
	if o.Template != "" {
		query.Set("template", o.Template)
	}
	if len(o.Metadata) > 0 {
		pairs := url.Values{}
		for k, v := range o.Metadata {
			pairs.Set(url.QueryEscape(k), url.QueryEscape(v))
		}
		query.Set("metadata", pairs.Encode())
	}
	listed, err := pages[control.ListedSandbox](ctx, cl, "/v2/sandboxes", query)
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	var all []Info
	for i := range listed {
		all = append(all, infoOf(&listed[i]))
	}
	return all, nil
}

// pages collects a list that the server hands out in pages.
func pages[T any](ctx context.Context, cl *Client, path string, query url.Values) ([]T, error) {
	var all []T
	for {
		var page []T
		header, err := cl.do(ctx, call{method: http.MethodGet, path: path + "?" + query.Encode(), out: &page})
		if err != nil {
			return nil, err
		}
		all = append(all, page...)
		next := header.Get("X-Next-Token")
		if next == "" {
			return all, nil
		}
		query.Set("nextToken", next)
	}
}

func infoOf(s *control.ListedSandbox) Info {
	return Info{
		ID: s.SandboxID, TemplateID: s.TemplateID, Template: s.Alias, State: string(s.State),
		Started: s.StartedAt, Ends: s.EndAt, Metadata: s.Metadata,
		CPUs: s.CpuCount, MemoryMB: s.MemoryMB, DiskMB: s.DiskSizeMB,
	}
}
