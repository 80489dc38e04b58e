package client

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/cordonhq/cordon/api/gen/agent/filesystem/filesystemconnect"
	"github.com/cordonhq/cordon/api/gen/agent/process/processconnect"
	"github.com/cordonhq/cordon/api/gen/control"

	"connectrpc.com/connect"
)

// agentPort is where each sandbox's agent listens.
const agentPort = 49983

// maxMessage bounds one message of the agent's, in octets; its chunks of output
// are 32 KiB.
const maxMessage = 8 << 20

// Sandbox is a sandbox one may use. It is safe for concurrent use.
type Sandbox struct {
	ID         string
	TemplateID string
	Domain     string // with a port if that is not 443
	// AccessToken is for the agent, TrafficToken for all other ports where
	// public traffic is off; empty where none is needed.
	AccessToken, TrafficToken string

	Commands *Commands
	Files    *Files

	client *Client
}

func (cl *Client) sandbox(s control.Sandbox) *Sandbox {
	sb := &Sandbox{
		ID: s.SandboxID, TemplateID: s.TemplateID, Domain: s.Domain,
		AccessToken: s.EnvdAccessToken, TrafficToken: s.TrafficAccessToken,
		client: cl,
	}
	if cl.opts.Domain != "" {
		sb.Domain = cl.opts.Domain
	}
	base, rpc := sb.base(agentPort), agentClient{sb}
	options := []connect.ClientOption{connect.WithProtoJSON(), connect.WithReadMaxBytes(maxMessage)}
	sb.Commands = &Commands{rpc: processconnect.NewProcessClient(rpc, base, options...)}
	sb.Files = &Files{sandbox: sb, rpc: filesystemconnect.NewFilesystemClient(rpc, base, options...)}
	return sb
}

// Host returns the public host of a port, with the domain's port if it has one.
func (s *Sandbox) Host(port int) string {
	return strconv.Itoa(port) + "-" + s.ID + "." + s.Domain
}

// base is the URL below which a port answers this client.
func (s *Sandbox) base(port int) string {
	if s.client.opts.SandboxURL != "" {
		return s.client.opts.SandboxURL
	}
	return "https://" + s.Host(port)
}

// route adds what the server needs to find the port.
func (s *Sandbox) route(h http.Header, port int) {
	if s.client.opts.SandboxURL != "" {
		h.Set("E2b-Sandbox-Id", s.ID)
		h.Set("E2b-Sandbox-Port", strconv.Itoa(port))
	}
}

// NewRequest returns a request to a service in the sandbox that Do sends. The
// path begins with "/" and may have a query.
func (s *Sandbox) NewRequest(ctx context.Context, method string, port int, path string, body io.Reader) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, method, s.base(port)+path, body)
	if err != nil {
		return nil, err
	}
	s.route(req.Header, port)
	switch {
	case port == agentPort && s.AccessToken != "":
		req.Header.Set("X-Access-Token", s.AccessToken)
	case port != agentPort && s.TrafficToken != "":
		req.Header.Set("E2b-Traffic-Access-Token", s.TrafficToken)
	}
	return req, nil
}

// Do sends a request with the client's HTTP client.
func (s *Sandbox) Do(req *http.Request) (*http.Response, error) { return s.client.http.Do(req) }

// agentClient sends the RPCs: it adds to each what NewRequest adds.
type agentClient struct{ sandbox *Sandbox }

// Do implements connect.HTTPClient.
func (a agentClient) Do(req *http.Request) (*http.Response, error) {
	a.sandbox.route(req.Header, agentPort)
	if a.sandbox.AccessToken != "" {
		req.Header.Set("X-Access-Token", a.sandbox.AccessToken)
	}
	resp, err := a.sandbox.client.http.Do(req)
	if outer, ok := errors.AsType[*url.Error](err); ok {
		err = outer.Err // the RPC library would cut it out with all around it
	}
	if err != nil {
		return nil, &noAnswer{err}
	}
	return resp, nil
}

// noAnswer marks the failure to get any answer: the RPC library gives it a code
// as if the server had said something.
type noAnswer struct{ error }

func (n *noAnswer) Unwrap() error { return n.error }

// asUser names the user a call acts as; empty is the template's default.
func asUser(h http.Header, user string) {
	if user != "" {
		h.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user+":")))
	}
}

func (s *Sandbox) do(ctx context.Context, what string, c call) error {
	c.path = "/sandboxes/" + url.PathEscape(s.ID) + c.path
	if _, err := s.client.do(ctx, c); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// Info asks the server about the sandbox.
func (s *Sandbox) Info(ctx context.Context) (Info, error) {
	var out control.ListedSandbox // the part of the answer that Info has
	if err := s.do(ctx, "get sandbox", call{method: http.MethodGet, out: &out}); err != nil {
		return Info{}, err
	}
	return infoOf(&out), nil
}

// Kill ends the sandbox. Ending one that is gone is ErrNotFound.
func (s *Sandbox) Kill(ctx context.Context) error {
	return s.do(ctx, "kill sandbox", call{method: http.MethodDelete})
}

// Pause puts the sandbox to disk; Client.Connect resumes it. Pausing a paused
// one is ErrConflict.
func (s *Sandbox) Pause(ctx context.Context) error {
	return s.do(ctx, "pause sandbox", call{method: http.MethodPost, path: "/pause"})
}

// SetTimeout lets the sandbox live for d from now.
func (s *Sandbox) SetTimeout(ctx context.Context, d time.Duration) error {
	in := map[string]int64{"timeout": seconds(d)}
	return s.do(ctx, "set timeout", call{method: http.MethodPost, path: "/timeout", in: in})
}

// SetNetwork replaces all egress rules. When it returns nil they are in force,
// also for open connections; on an error the former rules are.
func (s *Sandbox) SetNetwork(ctx context.Context, n Network) error {
	return s.do(ctx, "set network", call{method: http.MethodPut, path: "/network", in: n})
}
