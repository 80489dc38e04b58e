package agentctl

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"github.com/cordonhq/cordon/internal/agent/proof"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// met is a connection to an agent that has proved itself.
type met struct {
	conn   net.Conn
	agent  sandbox.AgentAddr
	nonces proof.Nonces
}

// errImpostor is what meet finds behind an agent's address when it is not the agent.
var errImpostor = errors.New("what listens on the agent's port does not prove that it is the sandbox's agent")

// meet connects to an agent and has it prove that it knows the control key.
func (c *Client) meet(ctx context.Context, a sandbox.AgentAddr) (m *met, err error) {
	if strings.ContainsAny(a.Token, "\r\n") {
		return nil, errors.New("the control token has a line break")
	}
	conn, err := c.dial.DialContext(ctx, "tcp", a.Addr.String())
	if err != nil {
		return nil, errs.Wrap(errs.Unavailable, err, "the sandbox's agent does not answer")
	}
	m = &met{conn: conn, agent: a}
	if !sandbox.ProvenToken(a.Token) {
		return m, nil // an agent that cannot
	}
	if err := m.challenge(ctx); err != nil {
		conn.Close()
		return nil, errs.Wrap(errs.Unavailable, err, "the sandbox's agent does not answer")
	}
	return m, nil
}

func (m *met) key() proof.Key { return sha256.Sum256([]byte(m.agent.Token)) }

func (m *met) challenge(ctx context.Context) error {
	m.nonces.Host = proof.NewNonce()
	head, err := exchange(ctx, m.conn, fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s\r\n%s: %s\r\n\r\n", proof.Path, m.agent.Addr, proof.Nonce, m.nonces.Host))
	if err != nil {
		return fmt.Errorf("ask the agent to prove itself: %w", err)
	}
	m.nonces.Agent = head.header.Get(proof.Nonce)
	if head.status != http.StatusNoContent || !proof.ValidNonce(m.nonces.Agent) || !proof.Equal(head.header.Get(proof.Header), m.key().Agent(m.nonces)) {
		return fmt.Errorf("GET %s: status %d: %w", proof.Path, head.status, errImpostor)
	}
	return nil
}

// request is the text of a request with our proof, and with more header lines.
func (m *met) request(r proof.Request, lines string) string {
	ours := proof.Header + ": " + m.key().Host(m.nonces, r)
	if !sandbox.ProvenToken(m.agent.Token) {
		ours = controlHeader + ": " + m.agent.Token
	}
	return fmt.Sprintf("%s %s HTTP/1.1\r\nHost: %s\r\n%s\r\n%s\r\n%s", r.Method, r.URI, m.agent.Addr, ours, lines, r.Body)
}

// ask sends a request and reads the answer's header. Its body has no bound.
func (m *met) ask(r proof.Request, lines string) (*http.Response, error) {
	if _, err := io.WriteString(m.conn, m.request(r, lines)); err != nil {
		return nil, err
	}
	bounded := &io.LimitedReader{R: m.conn, N: maxHead + maxAnswer + 1}
	return http.ReadResponse(bufio.NewReader(bounded), &http.Request{Method: r.Method})
}
