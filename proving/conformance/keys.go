package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/conformance/probe"
)

func keyCases() []Case {
	return []Case{
		{ID: 81, Group: "Keys", Title: "one key takes all it can, another goes on", Run: oneKeyTakesAll, Within: 90 * time.Second},
	}
}

// keyPatience is what anything of a key may take while another takes all it can, on a
// machine that does other things too. test/shares measures it.
const keyPatience = 15 * time.Second

// oneKeyTakesAll has one key begin sandboxes, lists and changes of rules without end.
// Another key's sandbox, rules and traffic must not fail meanwhile.
func oneKeyTakesAll(t *Trial) {
	hostile, err := t.suite.stand.newKey(t.ctx, "hostile")
	t.must("make another key", err)
	s := t.Fresh(standard())
	theirs, err := hostile.Create(t.ctx, client.CreateOptions{Timeout: 5 * time.Minute})
	t.must("start a sandbox of another key", err)
	begun, stop := besiege(t.ctx, hostile, theirs)
	defer stop()
	time.Sleep(500 * time.Millisecond)
	for _, do := range []struct {
		what string
		run  func(context.Context) error
	}{
		{"create and kill a sandbox", func(ctx context.Context) error {
			sb, err := t.suite.client.Create(ctx, client.CreateOptions{Timeout: time.Minute})
			if err != nil {
				return err
			}
			return sb.Kill(ctx)
		}},
		{"change a sandbox's rules", func(ctx context.Context) error { return s.SetNetwork(ctx, standard()) }},
		{"run a command", func(ctx context.Context) error {
			_, err := s.Commands.Run(ctx, "true", client.RunOptions{})
			return err
		}},
	} {
		ctx, cancel := context.WithTimeout(t.ctx, keyPatience)
		step := Step{Tried: do.what, Arrived: "-", Logged: "-"}
		if err := do.run(ctx); err != nil {
			step.Problems = []string{err.Error()}
		}
		cancel()
		t.add(step)
	}
	t.Try(Try{
		What: "a request through the proxy", By: s, Orders: []probe.Order{http80(addrA, get(nameA, "/canary-81"))},
		Reaches: []Arrival{{At: addrA, Port: 80, Text: "canary-81"}}, Log: allowed("allow-name"),
	})
	stop()
	if n := begun(); n < 30 {
		t.fail("the other key's load", fmt.Errorf("it began %d things only: the case shows nothing", n))
	}
	t.must("end the other key's sandbox", theirs.Kill(t.ctx))
}

// besiege has a key ask for all it can until stop is called.
func besiege(ctx context.Context, c *client.Client, box *client.Sandbox) (begun func() int64, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	var n atomic.Int64
	rules := everything()
	for i := range 500 {
		rules.DenyOut = append(rules.DenyOut, fmt.Sprintf("203.0.%d.%d", i>>8, i&255))
	}
	for _, do := range []func(){
		func() {
			if sb, err := c.Create(ctx, client.CreateOptions{Timeout: time.Minute}); err == nil {
				_ = sb.Kill(context.WithoutCancel(ctx))
			}
		},
		func() { _, _ = c.List(ctx, client.ListOptions{}) },
		func() { _ = box.SetNetwork(ctx, rules) },
	} {
		for range 6 {
			wg.Go(func() {
				for ctx.Err() == nil {
					n.Add(1)
					do()
				}
			})
		}
	}
	return n.Load, sync.OnceFunc(func() { cancel(); wg.Wait() })
}

// newKey makes an API key and returns a client with it.
func (s *stand) newKey(ctx context.Context, name string) (*client.Client, error) {
	admin, err := os.ReadFile(filepath.Join(s.dir, "state", "admin.key"))
	if err != nil {
		return nil, err
	}
	url := "http://" + plain
	body := fmt.Appendf(nil, `{"name": %q}`, name)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/keys", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("X-API-KEY", strings.TrimSpace(string(admin)))
	req.Header.Set("Content-Type", "application/json")
	res, err := s.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	var made struct{ Key string }
	if err := json.NewDecoder(res.Body).Decode(&made); err != nil || made.Key == "" {
		return nil, fmt.Errorf("make a key: status %d, %w", res.StatusCode, err)
	}
	return client.New(client.Options{APIURL: url, APIKey: made.Key, SandboxURL: url, HTTPClient: s.http})
}
