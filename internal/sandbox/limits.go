package sandbox

import "github.com/cordonhq/cordon/internal/errs"

// Allowance is how many sandboxes one owner may have. 0 is no limit but the server's.
type Allowance struct {
	Sandboxes int // that run
	Paused    int
}

// The limits of what a sandbox's creator hangs on it, in octets: it is kept in
// memory and written at every change.
const (
	maxMetadata      = 100 // pairs
	maxMetadataKey   = 256
	maxMetadataValue = 8 << 10
	maxMetadataTotal = 64 << 10
	maxEnv           = 1000 // variables
	maxEnvTotal      = 256 << 10
)

// ValidLabels checks the sizes of metadata and environment.
func ValidLabels(metadata, env map[string]string) error {
	if len(metadata) > maxMetadata {
		return errs.New(errs.Invalid, "metadata has %d pairs, it may have %d", len(metadata), maxMetadata)
	}
	total := 0
	for k, v := range metadata {
		if len(k) > maxMetadataKey || len(v) > maxMetadataValue {
			return errs.New(errs.Invalid, "metadata[%q] is %d bytes with a key of %d: a key may have %d, a value %d", k[:min(len(k), 64)], len(v), len(k), maxMetadataKey, maxMetadataValue)
		}
		total += len(k) + len(v)
	}
	if total > maxMetadataTotal {
		return errs.New(errs.Invalid, "metadata is %d bytes, it may have %d", total, maxMetadataTotal)
	}
	if len(env) > maxEnv {
		return errs.New(errs.Invalid, "envVars has %d variables, it may have %d", len(env), maxEnv)
	}
	total = 0
	for k, v := range env {
		total += len(k) + len(v)
	}
	if total > maxEnvTotal {
		return errs.New(errs.Invalid, "envVars is %d bytes, it may have %d: write files instead", total, maxEnvTotal)
	}
	return nil
}

// census counts sandboxes and the places held for those that are about to be.
type census struct {
	total, mine int
}

// reservation is a place held for a sandbox until it is there, or never will be.
type reservation struct {
	m      *Manager
	held   map[string]int
	owner  string
	closed bool // guarded by m.mu
}

// release gives the place back; again is nothing.
func (r *reservation) release() {
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	r.drop()
}

// drop needs m.mu.
func (r *reservation) drop() {
	if r == nil || r.closed {
		return
	}
	r.closed = true
	if r.held[r.owner]--; r.held[r.owner] == 0 {
		delete(r.held, r.owner)
	}
}

// count needs m.mu. held are the places for more in that state, by owner.
func (m *Manager) count(owner string, in State, held map[string]int) (c census) {
	for _, e := range m.live {
		if rec := &e.view.Load().rec; rec.State == in {
			c.total++
			if rec.Owner == owner {
				c.mine++
			}
		}
	}
	for who, n := range held {
		c.total += n
		if who == owner {
			c.mine += n
		}
	}
	return c
}

// reserve holds a place for a sandbox that is to run.
func (m *Manager) reserve(owner string) (*reservation, error) {
	allowed := m.cfg.Allowance(owner) // before the lock: it is somebody else's
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.count(owner, Running, m.reserved)
	switch {
	case c.total >= m.cfg.MaxSandboxes:
		return nil, errs.New(errs.Exhausted, "this server runs its limit of %d sandboxes: kill one, or raise sandboxes.max in the server's configuration", m.cfg.MaxSandboxes)
	case allowed.Sandboxes > 0 && c.mine >= allowed.Sandboxes:
		return nil, errs.New(errs.Exhausted, "this API key runs its limit of %d sandboxes: kill or pause one, or use a key that may have more (cordon key create --max-sandboxes)", allowed.Sandboxes)
	}
	m.reserved[owner]++
	return &reservation{m: m, held: m.reserved, owner: owner}, nil
}

// reservePaused holds a place for a sandbox that is to be paused: it leaves the
// memory, and goes to the disk.
func (m *Manager) reservePaused(owner string) (*reservation, error) {
	allowed := m.cfg.Allowance(owner)
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.count(owner, Paused, m.pausing)
	switch {
	case m.cfg.MaxPaused > 0 && c.total >= m.cfg.MaxPaused:
		return nil, errs.New(errs.Exhausted, "this server keeps its limit of %d paused sandboxes: kill one, or raise sandboxes.max_paused in the server's configuration", m.cfg.MaxPaused)
	case allowed.Paused > 0 && c.mine >= allowed.Paused:
		return nil, errs.New(errs.Exhausted, "this API key keeps its limit of %d paused sandboxes: kill one, or use a key that may have more (cordon key create --max-paused)", allowed.Paused)
	}
	m.pausing[owner]++
	return &reservation{m: m, held: m.pausing, owner: owner}, nil
}

// reserveSnapshot holds a place for one more snapshot; one that is paused takes as much.
func (m *Manager) reserveSnapshot(owner string) (*reservation, error) {
	allowed := m.cfg.Allowance(owner)
	m.mu.Lock()
	defer m.mu.Unlock()
	c := census{total: len(m.snapshots), mine: m.keeping[owner]}
	for _, s := range m.snapshots {
		if s.Owner == owner {
			c.mine++
		}
	}
	for _, n := range m.keeping {
		c.total += n
	}
	switch {
	case allowed.Paused > 0 && c.mine >= allowed.Paused:
		return nil, errs.New(errs.Exhausted, "this API key keeps its limit of %d snapshots: delete one, or use a key that may have more (cordon key create --max-paused)", allowed.Paused)
	case c.total >= m.cfg.MaxSnapshots:
		return nil, errs.New(errs.Exhausted, "this server keeps its limit of %d snapshots: delete one, or raise sandboxes.max_snapshots in the server's configuration", m.cfg.MaxSnapshots)
	}
	m.keeping[owner]++
	return &reservation{m: m, held: m.keeping, owner: owner}, nil
}

// limited is the lower of two limits, of which 0 is none.
func limited(a, b int) int {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}
