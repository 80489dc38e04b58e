package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/cordonhq/cordon/client"
)

// goPlayer plays the demo's acts with the Go client, where there is no Node. It is
// the twin of player.mjs: what stands between "show" and "end" is what the
// demo prints, and what it runs.
type goPlayer struct {
	stage  *stage
	cordon *client.Client
	web    *http.Client // somebody's outside

	act     string
	began   time.Time
	sandbox *client.Sandbox
}

func (p *goPlayer) acts() map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"hello": p.hello, "offline": p.offline, "addresses": p.addresses, "names": p.names, "forged": p.forged,
		"live": p.live, "url": p.url, "mask": p.mask, "private": p.private, "kill": p.kill,
	}
}

// play plays all acts in the story's order.
func (p *goPlayer) play(ctx context.Context) error {
	acts := p.acts()
	for _, a := range p.stage.story {
		if err := p.stage.begin(a.key); err != nil {
			return err
		}
		p.act, p.began, p.sandbox = a.key, time.Now(), nil
		err := acts[a.key](ctx)
		if p.sandbox != nil {
			_ = p.sandbox.Kill(ctx) // the last act's is gone; the lab ends what is left
		}
		if err != nil {
			return fmt.Errorf("%s: %w", a.title, err)
		}
	}
	return nil
}

func (p *goPlayer) hello(ctx context.Context) error {
	cordon := p.cordon
	// show
	sandbox, err := cordon.Create(ctx, client.CreateOptions{})
	// end
	return p.see(ctx, sandbox, err, "web", "metadata")
}

func (p *goPlayer) offline(ctx context.Context) error {
	cordon := p.cordon
	// show
	no := false
	sandbox, err := cordon.Create(ctx, client.CreateOptions{
		Network: client.Network{AllowInternetAccess: &no},
	})
	// end
	return p.see(ctx, sandbox, err, "connect", "name")
}

func (p *goPlayer) addresses(ctx context.Context) error {
	cordon := p.cordon
	// show
	sandbox, err := cordon.Create(ctx, client.CreateOptions{Network: client.Network{
		DenyOut:  []string{"0.0.0.0/0"},
		AllowOut: []string{"1.1.1.1", "8.8.8.0/24"},
	}})
	// end
	return p.see(ctx, sandbox, err, "address", "range", "denied")
}

func (p *goPlayer) names(ctx context.Context) error {
	cordon := p.cordon
	// show
	sandbox, err := cordon.Create(ctx, client.CreateOptions{Network: client.Network{
		DenyOut:  []string{"0.0.0.0/0"},
		AllowOut: []string{"example.com", "*.github.com"},
	}})
	// end
	return p.see(ctx, sandbox, err, "name", "wildcard", "sni", "host", "lookup")
}

func (p *goPlayer) forged(ctx context.Context) error {
	cordon := p.cordon
	// show
	sandbox, err := cordon.Create(ctx, client.CreateOptions{Network: client.Network{
		DenyOut:  []string{"0.0.0.0/0"},
		AllowOut: []string{"example.com"},
	}})
	// end
	if err := p.created(ctx, sandbox, err); err != nil {
		return err
	}
	// show
	_, err = sandbox.Commands.Run(ctx, "echo '198.51.100.66 example.com' | sudo tee -a /etc/hosts", client.RunOptions{})
	// end
	return p.see(ctx, sandbox, err, "owner")
}

func (p *goPlayer) live(ctx context.Context) error {
	cordon := p.cordon
	// show
	sandbox, err := cordon.Create(ctx, client.CreateOptions{})
	// end
	if err := p.created(ctx, sandbox, err); err != nil {
		return err
	}
	begun := make(firstWrite, 1)
	// show
	download, err := sandbox.Commands.Start(ctx, "curl -sN 'https://example.com/slow?n=300&every=50ms'", client.RunOptions{Stdout: begun})
	// end
	if err != nil {
		return err
	}
	select {
	case <-begun:
	case <-time.After(10 * time.Second):
	}
	start := time.Now()
	// show
	err = sandbox.SetNetwork(ctx, client.Network{DenyOut: []string{"0.0.0.0/0"}, AllowOut: []string{"1.1.1.1"}})
	// end
	if err != nil {
		return err
	}
	if err := p.saw(ctx, "set", "in force", time.Since(start)); err != nil {
		return err
	}
	ended, err := download.Wait(ctx)
	if err != nil {
		return err
	}
	if err := p.saw(ctx, "cut", fmt.Sprintf("curl ended with %d", ended.ExitCode), time.Since(start)); err != nil {
		return err
	}
	return p.see(ctx, sandbox, nil, "after", "allowed")
}

func (p *goPlayer) url(ctx context.Context) error {
	cordon := p.cordon
	// show
	sandbox, err := cordon.Create(ctx, client.CreateOptions{})
	// end
	if err := p.created(ctx, sandbox, err); err != nil {
		return err
	}
	// show
	_, err = sandbox.Commands.Start(ctx, "python -m http.server 3000", client.RunOptions{})
	url := "https://" + sandbox.Host(3000)
	// end
	if err := p.listens(ctx, err); err != nil {
		return err
	}
	if err := p.saw(ctx, "url", url, 0); err != nil {
		return err
	}
	if err := p.open(ctx, "open", url, status); err != nil {
		return err
	}
	return p.open(ctx, "closed", "https://"+sandbox.Host(3001), statusAndMessage)
}

func (p *goPlayer) mask(ctx context.Context) error {
	cordon := p.cordon
	// show
	sandbox, err := cordon.Create(ctx, client.CreateOptions{
		Network: client.Network{MaskRequestHost: "localhost:${PORT}"},
	})
	// end
	if err := p.created(ctx, sandbox, err); err != nil {
		return err
	}
	_, err = sandbox.Commands.Start(ctx, p.stage.command(p.act, "host"), client.RunOptions{})
	if err := p.listens(ctx, err); err != nil {
		return err
	}
	return p.open(ctx, "host", "https://"+sandbox.Host(3000), func(res *http.Response) (string, error) {
		b, err := io.ReadAll(io.LimitReader(res.Body, 1<<10))
		return string(b), err
	})
}

func (p *goPlayer) private(ctx context.Context) error {
	cordon := p.cordon
	// show
	no := false
	sandbox, err := cordon.Create(ctx, client.CreateOptions{
		Network: client.Network{AllowPublicTraffic: &no},
	})
	// end
	if err := p.created(ctx, sandbox, err); err != nil {
		return err
	}
	// show
	_, err = sandbox.Commands.Start(ctx, "python -m http.server 3000", client.RunOptions{})
	header := http.Header{"E2b-Traffic-Access-Token": {sandbox.TrafficToken}}
	// end
	if err := p.listens(ctx, err); err != nil {
		return err
	}
	url := "https://" + sandbox.Host(3000)
	if err := p.open(ctx, "without", url, status); err != nil {
		return err
	}
	return p.openWith(ctx, "with", url, header, status)
}

func (p *goPlayer) kill(ctx context.Context) error {
	cordon := p.cordon
	// show
	sandbox, err := cordon.Create(ctx, client.CreateOptions{})
	// end
	if err := p.created(ctx, sandbox, err); err != nil {
		return err
	}
	// show
	err = sandbox.Kill(ctx)
	// end
	if err != nil {
		return err
	}
	return p.open(ctx, "gone", "https://"+sandbox.Host(3000), statusAndMessage)
}

// created reports a sandbox that was created: this long after the act began.
func (p *goPlayer) created(ctx context.Context, s *client.Sandbox, err error) error {
	if err != nil {
		return err
	}
	p.sandbox = s
	return p.saw(ctx, "created", "running", time.Since(p.began))
}

func (p *goPlayer) saw(ctx context.Context, fact, value string, took time.Duration) error {
	return p.stage.saw(ctx, observation{Fact: fact, Value: value, MS: float64(took) / 1e6, Sandbox: p.sandbox.ID})
}

// see runs the story's commands in the sandbox, which is reported first if it
// was not yet; each prints the seconds it took and what it saw.
func (p *goPlayer) see(ctx context.Context, s *client.Sandbox, err error, facts ...string) error {
	if err != nil {
		return err
	}
	if p.sandbox == nil {
		if err := p.created(ctx, s, nil); err != nil {
			return err
		}
	}
	for _, fact := range facts {
		res, err := s.Commands.Run(ctx, p.stage.command(p.act, fact), client.RunOptions{Timeout: time.Minute})
		if err != nil {
			return err
		}
		first, value, _ := strings.Cut(strings.TrimSpace(res.Stdout), " ")
		seconds, err := strconv.ParseFloat(first, 64)
		if err != nil {
			return fmt.Errorf("%s printed %q and %q", fact, res.Stdout, res.Stderr)
		}
		if err := p.saw(ctx, fact, value, time.Duration(seconds*1e9)); err != nil {
			return err
		}
	}
	return nil
}

// listens waits until the service that was just started listens on port 3000.
func (p *goPlayer) listens(ctx context.Context, err error) error {
	if err != nil {
		return err
	}
	res, err := p.sandbox.Commands.Run(ctx, `for i in $(seq 200); do (: </dev/tcp/127.0.0.1/3000) 2>/dev/null && exit; sleep 0.02; done; exit 1`, client.RunOptions{})
	if err == nil && res.ExitCode != 0 {
		return fmt.Errorf("nothing listens on port 3000")
	}
	return err
}

// open fetches from outside, as a browser would, and reports what read makes of it.
func (p *goPlayer) open(ctx context.Context, fact, url string, read func(*http.Response) (string, error)) error {
	return p.openWith(ctx, fact, url, nil, read)
}

func (p *goPlayer) openWith(ctx context.Context, fact, url string, header http.Header, read func(*http.Response) (string, error)) error {
	start := time.Now()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	if header != nil {
		req.Header = header
	}
	res, err := p.web.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	value, err := read(res)
	if err != nil {
		return err
	}
	return p.saw(ctx, fact, value, time.Since(start))
}

func status(res *http.Response) (string, error) { return strconv.Itoa(res.StatusCode), nil }

func statusAndMessage(res *http.Response) (string, error) {
	var said struct {
		Message string `json:"message"`
	}
	err := json.NewDecoder(io.LimitReader(res.Body, 1<<16)).Decode(&said)
	return strconv.Itoa(res.StatusCode) + " " + said.Message, err
}

// firstWrite has a value once something was written to it.
type firstWrite chan struct{}

func (f firstWrite) Write(b []byte) (int, error) {
	select {
	case f <- struct{}{}:
	default:
	}
	return len(b), nil
}
