// Package share divides what a server has among the API keys that use it, so that
// one key cannot use up what the others need. It computes the shares and counts what is
// used.
//
// The rule is the dynamic threshold of shared-buffer switches (Choudhury and Hahne,
// IEEE/ACM Transactions on Networking 6(2), 1998): a key may take one more as long as it
// then holds at most Alpha times what was free. A key that is alone gets Alpha/(Alpha+1)
// of the whole; n keys that want everything get Alpha/(n·Alpha+1) each, and
// 1/(n·Alpha+1) stays free for the next key that comes. There is no list of keys to keep and nothing to configure, and
// what a key does not use is lent to the others, up to what must stay free.
//
// A [Pool] counts what is held; a [Gate] also lets callers wait, in turn between the
// keys; [Rates] bounds how often a key may ask. resources.go has every resource that
// keys share: a new one is defined there and nowhere else.
package share

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/cordonhq/cordon/internal/errs"
)

// Resource is something that sandboxes of several keys draw from.
type Resource struct {
	Name   string // in metrics, lower case with underscores
	What   string // in messages, a plural: "connections through the egress proxy"
	Bytes  bool   // counted in bytes
	Alpha  int64  // how many times what is free a key may hold; at least 1
	Answer string // what happens to a request beyond the share, for the documentation

	Whole   int64 // what the server has; 0 in the definitions of resources.go
	Sandbox int64 // what one sandbox may hold at most; 0: as much as its key
}

// Of returns r with a size: whole for all keys, and at most sandbox for one sandbox,
// where 0 sets no limit but the key's.
func (r Resource) Of(whole, sandbox int64) Resource {
	r.Whole, r.Sandbox = whole, sandbox
	return r
}

// Alone is what a key may hold while no other key holds anything. It is also the
// fixed share where a limit is kept by the kernel, which counts one key at a time.
func (r Resource) Alone() int64 {
	return r.Alpha * (r.Whole + 1) / (r.Alpha + 1)
}

// Most is what a key that holds held of the used can hold while the others hold what they
// do now.
func (r Resource) Most(held, used int64) int64 {
	r.Whole = max(r.Whole-(used-held), 0)
	return r.Alone()
}

// Scope says whose limit was reached.
type Scope string

// The scopes, from the narrowest.
const (
	Sandbox Scope = "sandbox"
	Key     Scope = "key"
	Server  Scope = "server"
)

// Full is the error of a request beyond a limit.
type Full struct {
	Resource Resource
	Scope    Scope
	Limit    int64 // what the scope may hold, or for Key what it could hold at that moment
}

func (f *Full) Error() string {
	amount := fmt.Sprint(f.Limit)
	if f.Resource.Bytes {
		amount = bytes(f.Limit)
	}
	switch f.Scope {
	case Sandbox:
		return fmt.Sprintf("%s: this sandbox holds its limit of %s", f.Resource.What, amount)
	case Key:
		return fmt.Sprintf("%s: this API key holds its share of %s", f.Resource.What, amount)
	}
	return fmt.Sprintf("%s: all keys together hold the server's limit of %s", f.Resource.What, amount)
}

// Explain makes of a limit that was reached what the caller of the API sees: which, how
// much, and what to do about it. Other errors stay as they are.
func Explain(err error, fix string) error {
	var full *Full
	if !errors.As(err, &full) {
		return err
	}
	return errs.Wrap(errs.Exhausted, nil, "%s: %s", full.Error(), fix)
}

func bytes(n int64) string {
	for _, u := range []struct {
		size int64
		name string
	}{{1 << 30, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}} {
		if n >= u.size && n%u.size == 0 || n >= 10*u.size {
			return fmt.Sprintf("%d %s", n/u.size, u.name)
		}
	}
	return fmt.Sprintf("%d bytes", n)
}

// Pool counts what is held of one resource. The zero value is not usable.
type Pool struct {
	r       Resource
	refused [3]atomic.Uint64 // by scope, in the order of scopes

	mu        sync.Mutex // guards the rest
	used      int64
	keys      map[string]int64
	sandboxes map[string]int64
}

var scopes = [3]Scope{Sandbox, Key, Server}

// NewPool returns a pool of a resource that has a size.
func NewPool(r Resource) *Pool {
	if r.Whole <= 0 || r.Alpha < 1 {
		panic("share: a pool of " + r.Name + " without a size")
	}
	return &Pool{r: r, keys: map[string]int64{}, sandboxes: map[string]int64{}}
}

// Resource returns what the pool counts.
func (p *Pool) Resource() Resource {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.r
}

// Take adds n to what key and its sandbox hold, or changes nothing and returns a
// [*Full]. An empty sandbox is not counted.
func (p *Pool) Take(key, sandbox string, n int64) error {
	p.mu.Lock()
	full := p.take(key, sandbox, n)
	p.mu.Unlock()
	if full == nil {
		return nil
	}
	p.refuse(full.Scope)
	return full
}

// take needs p.mu.
func (p *Pool) take(key, sandbox string, n int64) *Full {
	held := p.keys[key]
	free := p.r.Whole - p.used
	switch {
	case sandbox != "" && p.r.Sandbox > 0 && p.sandboxes[sandbox]+n > p.r.Sandbox:
		return &Full{p.r, Sandbox, p.r.Sandbox}
	case n > free:
		return &Full{p.r, Server, p.r.Whole}
	case held+n > p.r.Alpha*(free-n+1): // each unit by itself is at most Alpha times what was free before it
		return &Full{p.r, Key, max(held, p.r.Most(held, p.used))}
	}
	p.used += n
	p.keys[key] = held + n
	if sandbox != "" {
		p.sandboxes[sandbox] += n
	}
	return nil
}

// Give takes n away from what key and its sandbox hold.
func (p *Pool) Give(key, sandbox string, n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.give(key, sandbox, n)
}

// give needs p.mu.
func (p *Pool) give(key, sandbox string, n int64) {
	p.used -= n
	if p.keys[key] -= n; p.keys[key] <= 0 {
		delete(p.keys, key)
	}
	if sandbox == "" {
		return
	}
	if p.sandboxes[sandbox] -= n; p.sandboxes[sandbox] <= 0 {
		delete(p.sandboxes, sandbox)
	}
}

// Held returns what a key holds.
func (p *Pool) Held(key string) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.keys[key]
}

// Used returns what all keys hold.
func (p *Pool) Used() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.used
}

// Refused counts a request that somebody else refused for this limit: the kernel, where
// it keeps one.
func (p *Pool) Refused(s Scope) { p.refuse(s) }

func (p *Pool) refuse(s Scope) {
	for i, scope := range scopes {
		if scope == s {
			p.refused[i].Add(1)
		}
	}
}
