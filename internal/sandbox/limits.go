package sandbox

// Allowance is how many sandboxes one owner may have. 0 is no limit but the server's.
type Allowance struct {
	Sandboxes int // that run
	Paused    int
}

// reserve keeps room for a sandbox that is about to run or to be paused: a paused one
// leaves the memory, and goes to the disk.
func (m *Manager) reserve(owner string, in State) (*reservation, error) {
	allowed := m.cfg.Allowance(owner)
	most := limits{
		server: m.cfg.MaxSandboxes, serverFull: "this server runs its limit of %d sandboxes: kill one, or raise sandboxes.max in the server's configuration",
		owner: allowed.Sandboxes, ownerFull: "this API key runs its limit of %d sandboxes: kill or pause one, or use a key that may have more (cordon key create --max-sandboxes)",
	}
	if in == Paused {
		most = limits{
			server: m.cfg.MaxPaused, serverFull: "this server keeps its limit of %d paused sandboxes: kill one, or raise sandboxes.max_paused in the server's configuration",
			owner: allowed.Paused, ownerFull: "this API key keeps its limit of %d paused sandboxes: kill one, or use a key that may have more (cordon key create --max-paused)",
		}
	}
	return m.table.reserve(owner, in, most)
}

// limited is the lower of two limits, of which 0 is none.
func limited(a, b int) int {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}
