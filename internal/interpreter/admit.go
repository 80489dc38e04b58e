package interpreter

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

const (
	agentTimeout = 10 * time.Second
	maxEnvs      = 4 << 20 // bytes of the agent's answer
)

// identity is what the agent tells about the sandbox.
type identity struct{ vars map[string]string }

// sandbox is the sandbox's ID.
func (w identity) sandbox() string { return w.vars["E2B_SANDBOX_ID"] }

// admit asks the agent whether it admits a request's token, and for the variables
// of the sandbox, which only those learn whom it admits. So the interpreter keeps no
// secret, and a token that was replaced is refused at once.
func (i *Interpreter) admit(ctx context.Context, token string) (identity, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, i.cfg.Agent+"/envs", nil)
	if err != nil {
		return identity{}, fmt.Errorf("ask the agent: %w", err)
	}
	if token != "" {
		req.Header.Set("X-Access-Token", token)
	}
	res, err := i.agent.Do(req)
	if err != nil {
		return identity{}, fmt.Errorf("ask the agent: %w", err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxEnvs))
	switch {
	case err != nil:
		return identity{}, fmt.Errorf("ask the agent: %w", err)
	case res.StatusCode == http.StatusUnauthorized:
		return identity{}, fault{http.StatusUnauthorized, "unauthorized access, please provide a valid access token"}
	case res.StatusCode == http.StatusServiceUnavailable:
		return identity{}, fault{http.StatusServiceUnavailable, "this sandbox is not claimed yet"}
	case res.StatusCode != http.StatusOK:
		return identity{}, fmt.Errorf("ask the agent: it answered %d", res.StatusCode)
	}
	who := identity{}
	if err := json.Unmarshal(body, &who.vars); err != nil {
		return identity{}, fmt.Errorf("the agent's variables: %w", err)
	}
	for name, value := range who.vars { // the agent checks them too
		if !validVariable(name, value) {
			delete(who.vars, name)
		}
	}
	i.known.Store(&who)
	return who, nil
}

// validVariable reports whether an environment can hold it.
func validVariable(name, value string) bool {
	return name != "" && !strings.ContainsAny(name, "=\x00") && !strings.ContainsRune(value, 0)
}
