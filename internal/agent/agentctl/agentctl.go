// Package agentctl is the host's client of the agents inside its sandboxes: it knows the
// routes, the control token, and how long a starting sandbox may take.
//
// Every answer comes from inside a sandbox and is not to be trusted: sizes and
// times are bounded, redirects are not followed, connections are not reused, so
// that an address handed to another sandbox never meets an old connection. Before
// anything but /health is asked, the agent must prove that it is the agent.
package agentctl

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"strings"
	"time"
	"unicode"

	"github.com/cordonhq/cordon/internal/agent/proof"
	"github.com/cordonhq/cordon/internal/agent/wire"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

var _ sandbox.Agents = (*Client)(nil)

const (
	controlHeader  = "X-Cordon-Control" // for agents of older versions
	tunnelProtocol = "cordon-tunnel"
	tunnelReason   = "X-Cordon-Tunnel"

	maxAnswer = 64 << 10 // bytes of an answer's body
	maxHead   = 16 << 10 // bytes of an answer's header
	maxKills  = 64       // of one answer
	killsWait = 10 * time.Minute
)

// Config sets a client's patience. Zero fields mean the defaults.
type Config struct {
	// DialTimeout bounds connecting to an agent; 2 s.
	DialTimeout time.Duration
	// CallTimeout bounds one whole exchange with an agent; 5 s.
	CallTimeout time.Duration
	// ProbeTimeout bounds one attempt of WaitReady at first; 20 ms. A packet sent before
	// the sandbox has a network is lost, and TCP repeats it only after a second.
	ProbeTimeout time.Duration
}

// Client speaks to agents. It holds no connections.
type Client struct {
	cfg  Config
	dial *net.Dialer
}

// New returns a client.
func New(cfg Config) *Client {
	if cfg.DialTimeout <= 0 {
		cfg.DialTimeout = 2 * time.Second
	}
	if cfg.CallTimeout <= 0 {
		cfg.CallTimeout = 5 * time.Second
	}
	if cfg.ProbeTimeout <= 0 {
		cfg.ProbeTimeout = 20 * time.Millisecond
	}
	return &Client{cfg: cfg, dial: &net.Dialer{Timeout: cfg.DialTimeout, KeepAlive: -1}}
}

// WaitReady polls the agent until it answers or ctx ends; then its error says
// what the last attempt saw.
func (c *Client) WaitReady(ctx context.Context, a sandbox.AgentAddr) error {
	const slowest = 8 * time.Millisecond
	began, pause := time.Now(), 500*time.Microsecond
	var last error
	for {
		// A machine that takes long to start a sandbox takes long to answer as well.
		err := c.probe(ctx, a, max(c.cfg.ProbeTimeout, time.Since(began)/8))
		if err == nil {
			return nil
		}
		var timeout net.Error
		if last == nil || !errors.As(err, &timeout) || !timeout.Timeout() { // a timeout says the least
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the agent at %s: %w (last attempt: %w)", a.Addr, ctx.Err(), last)
		case <-time.After(pause):
		}
		pause = min(2*pause, slowest)
	}
}

// probe connects with little patience, and asks with more: once connected,
// nothing gets lost any more, the sandbox is only busy starting.
func (c *Client) probe(ctx context.Context, a sandbox.AgentAddr, patience time.Duration) error {
	dialing, cancel := context.WithTimeout(ctx, patience)
	conn, err := c.dial.DialContext(dialing, "tcp", a.Addr.String())
	cancel()
	if err != nil {
		return err
	}
	defer conn.Close()
	asking, cancel := context.WithTimeout(ctx, 10*patience)
	defer cancel()
	head, err := exchange(asking, conn, "GET /health HTTP/1.1\r\nHost: "+a.Addr.String()+"\r\nConnection: close\r\n\r\n")
	if err != nil {
		return err
	}
	if head.status != http.StatusNoContent {
		return fmt.Errorf("GET /health: the agent answered %d", head.status)
	}
	return nil
}

// Init tells the agent whose sandbox it is in.
func (c *Client) Init(ctx context.Context, a sandbox.AgentAddr, in sandbox.AgentInit) error {
	claim := wire.Claim{
		SandboxID: string(in.SandboxID), TemplateID: in.TemplateID, Hostname: in.Hostname, EnvVars: in.EnvVars, AccessToken: in.AccessToken,
		DefaultUser: in.DefaultUser, DefaultWorkdir: in.DefaultWorkdir, Time: in.Time,
	}
	if in.ControlToken != "" {
		sum := sha256.Sum256([]byte(in.ControlToken))
		claim.ControlHash = hex.EncodeToString(sum[:])
	}
	body, err := json.Marshal(claim)
	if err != nil {
		return fmt.Errorf("encode the claim: %w", err)
	}
	_, err = c.call(ctx, a, http.MethodPost, wire.ClaimPath, body)
	return err
}

// readyPause is how long Start waits before it asks again.
const readyPause = 50 * time.Millisecond

// Start implements sandbox.Agents.
func (c *Client) Start(ctx context.Context, a sandbox.AgentAddr, s sandbox.AgentStart) error {
	start := wire.Start{Args: s.Args, EnvVars: s.EnvVars, User: s.User, Workdir: s.Workdir}
	body, err := json.Marshal(start)
	if err != nil {
		return fmt.Errorf("encode the start command: %w", err)
	}
	if _, err := c.call(ctx, a, http.MethodPost, wire.StartPath, body); err != nil {
		return fmt.Errorf("start command: %w", err)
	}
	start.Args = nil
	body, err = json.Marshal(wire.Ready{Start: start, Port: s.Ready.Port, Command: s.Ready.Command})
	if err != nil {
		return fmt.Errorf("encode the ready command: %w", err)
	}
	for {
		_, err := c.call(ctx, a, http.MethodPost, wire.ReadyPath, body)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the start command: %w (last answer: %w)", ctx.Err(), err)
		case <-time.After(readyPause):
		}
	}
}

// Metrics reads resource use as the sandbox sees it.
func (c *Client) Metrics(ctx context.Context, a sandbox.AgentAddr) (sandbox.Metrics, error) {
	raw, err := c.call(ctx, a, http.MethodGet, "/metrics", nil)
	if err != nil {
		return sandbox.Metrics{}, err
	}
	return parseMetrics(raw)
}

// parseMetrics bounds what a sandbox claims to use.
func parseMetrics(raw []byte) (sandbox.Metrics, error) {
	var m struct {
		Time       int64   `json:"ts"`
		CPUCount   int     `json:"cpu_count"`
		CPUUsedPct float64 `json:"cpu_used_pct"`
		MemTotal   int64   `json:"mem_total"`
		MemUsed    int64   `json:"mem_used"`
		MemCache   int64   `json:"mem_cache"`
		DiskUsed   int64   `json:"disk_used"`
		DiskTotal  int64   `json:"disk_total"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return sandbox.Metrics{}, fmt.Errorf("the agent's metrics: %w", err)
	}
	pct := min(max(m.CPUUsedPct, 0), 100)
	if math.IsNaN(pct) {
		pct = 0
	}
	const year9999 = 253402300799 // the last second that JSON and RFC 3339 can write
	return sandbox.Metrics{
		Time:       time.Unix(min(max(m.Time, 0), year9999), 0).UTC(),
		CPUCount:   min(max(m.CPUCount, 0), 1<<16),
		CPUUsedPct: pct,
		MemUsed:    max(m.MemUsed, 0),
		MemTotal:   max(m.MemTotal, 0),
		MemCache:   max(m.MemCache, 0),
		DiskUsed:   max(m.DiskUsed, 0),
		DiskTotal:  max(m.DiskTotal, 0),
	}, nil
}

// Kills implements sandbox.Agents. The agent answers within killsWait.
func (c *Client) Kills(ctx context.Context, a sandbox.AgentAddr, after int64) ([]sandbox.Kill, int64, error) {
	ctx, cancel := context.WithTimeout(ctx, killsWait+c.cfg.CallTimeout)
	defer cancel()
	raw, err := c.patient(ctx, a, http.MethodGet, fmt.Sprintf("/cordon/kills?after=%d&wait=%d", after, int(killsWait.Seconds())), nil)
	if err != nil {
		return nil, 0, err
	}
	return parseKills(raw)
}

// parseKills bounds what a sandbox says was killed.
func parseKills(raw []byte) (kills []sandbox.Kill, latest int64, err error) {
	var in struct {
		Latest int64 `json:"latest"`
		Kills  []struct {
			Time      time.Time `json:"time"`
			PID       int32     `json:"pid"`
			Command   string    `json:"command"`
			Bytes     int64     `json:"bytes"`
			Processes int32     `json:"processes"`
		} `json:"kills"`
	}
	if err := json.Unmarshal(raw, &in); err != nil {
		return nil, 0, fmt.Errorf("the agent's kills: %w", err)
	}
	for _, k := range in.Kills[:min(len(in.Kills), maxKills)] {
		printable := strings.Map(func(r rune) rune {
			if !unicode.IsPrint(r) {
				return -1
			}
			return r
		}, strings.ToValidUTF8(k.Command, ""))
		const long = 64 // the kernel keeps 15 octets
		if len(printable) > long {
			printable = strings.ToValidUTF8(printable[:long], "")
		}
		kills = append(kills, sandbox.Kill{Time: k.Time, PID: int(max(k.PID, 0)), Command: printable, Bytes: max(k.Bytes, 0), Processes: int(max(k.Processes, 1))})
	}
	return kills, max(in.Latest, 0), nil
}

// call makes one request with the control token and returns a successful
// answer's body.
func (c *Client) call(ctx context.Context, a sandbox.AgentAddr, method, path string, body []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.CallTimeout)
	defer cancel()
	return c.patient(ctx, a, method, path, body)
}

// patient is call with the context's deadline alone.
func (c *Client) patient(ctx context.Context, a sandbox.AgentAddr, method, path string, body []byte) ([]byte, error) {
	m, err := c.meet(ctx, a)
	if err != nil {
		return nil, err
	}
	defer m.conn.Close()
	defer context.AfterFunc(ctx, func() { _ = m.conn.SetDeadline(time.Unix(1, 0)) })()
	head := "Connection: close\r\n"
	if body != nil {
		head += fmt.Sprintf("Content-Type: application/json\r\nContent-Length: %d\r\n", len(body))
	}
	resp, err := m.ask(proof.Request{Method: method, URI: path, Body: body}, head)
	if err != nil {
		return nil, errs.Wrap(errs.Unavailable, errors.Join(ctx.Err(), err), "the sandbox's agent does not answer")
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, errs.Wrap(errs.Unavailable, errors.Join(ctx.Err(), err), "the sandbox's agent broke off its answer")
	}
	if resp.StatusCode/100 != 2 {
		return nil, fmt.Errorf("%s %s: the agent answered %d: %s", method, path, resp.StatusCode, quote(raw))
	}
	return raw, nil
}

// quote shortens a sandbox's words for an error.
func quote(raw []byte) string {
	var e struct {
		Message string `json:"message"`
	}
	text := string(raw)
	if json.Unmarshal(raw, &e) == nil && e.Message != "" {
		text = e.Message
	}
	if len(text) > 300 {
		text = text[:300] + "…"
	}
	return fmt.Sprintf("%q", text)
}

// DialPort connects to a port on the sandbox's loopback. The connection is a
// plain *net.TCPConn whose first byte is the service's. Nothing listening there
// is an error that wraps ErrRefused.
func (c *Client) DialPort(ctx context.Context, a sandbox.AgentAddr, port uint16) (_ net.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.CallTimeout)
	defer cancel()
	m, err := c.meet(ctx, a)
	if err != nil {
		return nil, err
	}
	conn := m.conn
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	head, err := exchange(ctx, conn, m.request(
		proof.Request{Method: http.MethodGet, URI: fmt.Sprintf("/cordon/tunnel?port=%d", port)},
		"Connection: Upgrade\r\nUpgrade: "+tunnelProtocol+"\r\n"))
	switch {
	case err != nil:
		return nil, errs.Wrap(errs.Unavailable, err, "the sandbox's agent opened no tunnel")
	case head.status == http.StatusBadGateway && head.header.Get(tunnelReason) == "refused":
		return nil, fmt.Errorf("port %d: %w", port, ErrRefused)
	case head.status != http.StatusSwitchingProtocols || !strings.EqualFold(head.header.Get("Upgrade"), tunnelProtocol):
		return nil, errs.Wrap(errs.Unavailable, fmt.Errorf("the agent answered %d", head.status), "no tunnel to port %d of the sandbox", port)
	}
	if tcp, ok := conn.(*net.TCPConn); ok { // probing was not worth keep-alives, a user's connection is
		if err := tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true}); err != nil {
			return nil, fmt.Errorf("keep the tunnel alive: %w", err)
		}
	}
	return conn, nil
}

// ErrRefused says that nothing listens on the port of the sandbox's loopback.
var ErrRefused = errs.New(errs.NotFound, "nothing listens on this port")
