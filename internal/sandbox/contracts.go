package sandbox

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/cordonhq/cordon/internal/policy"
)

// Runtime starts and stops isolated workloads. Every runtime passes the contract
// in internal/runtime/runtimetest.
type Runtime interface {
	// Name identifies the runtime and its version; snapshots of one version are
	// refused by another. Example: "gvisor/v0.0.0-20260905035102-160fafc42237".
	Name() string
	// Create prepares a sandbox without running its first instruction.
	Create(ctx context.Context, s RuntimeSpec) error
	// Start runs a created sandbox's agent.
	Start(ctx context.Context, id ID) error
	// Pause and Resume stop and continue all processes in place, in memory. A
	// sandbox is paused or not also when the caller was killed meanwhile. Either
	// call on one that is so already is errs.Conflict.
	Pause(ctx context.Context, id ID) error
	Resume(ctx context.Context, id ID) error
	// Checkpoint writes memory, processes and the writable layer to dir, without
	// waiting for the disk. The sandbox is afterwards as it was, running or paused,
	// also when the call failed.
	Checkpoint(ctx context.Context, id ID, dir string) error
	// Restore is Create and Start from a checkpoint's dir. The agent in it goes on
	// with the command line it had. A sandbox that was paused when it was
	// checkpointed runs. When Restore returns, pages may still be read, from
	// files that may be removed by then.
	Restore(ctx context.Context, s RuntimeSpec, dir string) error
	// Restorable says why a checkpoint cannot be restored on this machine by this
	// runtime, without trying.
	Restorable(dir string) error
	// Wait blocks until the sandbox has exited and returns nil, or ErrOutOfMemory if
	// the host's kernel ended it for the memory it used, or until ctx ends.
	Wait(ctx context.Context, id ID) error
	// Stats reads the resources in use.
	Stats(ctx context.Context, id ID) (Stats, error)
	// Assign makes a sandbox that exists draw from its owner's part of the host's CPU
	// time, disk I/O and memory. It may be called again, also after a server was killed
	// meanwhile.
	Assign(ctx context.Context, id ID, owner string) error
	// Use reads what the sandboxes of an owner hold together, UseOfAll what all do.
	Use(ctx context.Context, owner string) (Use, error)
	UseOfAll(ctx context.Context) (Use, error)
	// Limit sets how much the sandboxes of an owner may hold together. What they hold
	// already is not taken away. When they want more memory, one of them ends; it is
	// none of another owner's.
	Limit(ctx context.Context, owner string, most Use) error
	// Destroy kills the sandbox and frees all it held. It is idempotent:
	// destroying an absent sandbox is not an error.
	Destroy(ctx context.Context, id ID) error
	// List returns the sandboxes that exist, also those of an earlier server process.
	List(ctx context.Context) ([]ID, error)
}

// ErrOutOfMemory says why a sandbox ended.
var ErrOutOfMemory = errors.New("the sandbox used more memory than it has, all at once, or its key's sandboxes more than their share")

// Use is what sandboxes hold of the host.
type Use struct {
	Memory  int64 // bytes, less the page cache that the kernel can drop
	Threads int64
}

// RuntimeSpec is what a runtime needs to make a sandbox.
type RuntimeSpec struct {
	ID        ID
	Owner     string // whose part of the host it draws from; "": a spare
	Rootfs    string // read-only directory shared by all sandboxes of the image
	NetNS     string // path of the network namespace, already configured
	Hostname  string
	Resources Resources
	// Args is the agent's command line; Args[0] is a path inside the sandbox.
	Args []string
	Env  []string // "K=V", for the agent
	// Binds are read-only files and directories of the host shown inside the
	// sandbox. Nothing else of the host is visible.
	Binds []Bind
}

// Bind shows a host path inside a sandbox, read-only; writes inside go to the
// sandbox's private layer.
type Bind struct {
	Host  string // absolute path on the host
	Guest string // absolute path in the sandbox
	// Sealed: there is no reason to write there, so the private layer may be
	// tiny and takes nothing from the disk quota.
	Sealed bool
}

// Resources are a sandbox's limits.
type Resources struct {
	CPUs      int   `json:"cpus"`     // whole CPUs, by cgroup quota
	MemoryMB  int64 `json:"memoryMB"` // MiB; the runtime adds its own headroom
	DiskMB    int64 `json:"diskMB"`   // MiB of writable layer
	Processes int64 `json:"processes"`
}

// Stats are the resources a sandbox uses.
type Stats struct {
	CPUTime     time.Duration // user and system, since start
	MemoryBytes int64
	DiskBytes   int64 // of the writable layer
}

// Network gives each sandbox its own network namespace and enforces its policy.
// A slot without an applied policy passes no packet, except answers to
// connections the host itself opens to the sandbox.
type Network interface {
	// Acquire takes a ready slot for id: a namespace with addresses and routes,
	// no policy.
	Acquire(ctx context.Context, id ID) (Lease, error)
	// Own says whose API key the sandbox in a slot is; call it before the first Apply.
	Own(l Lease, owner string) error
	// Apply puts a policy in force atomically and cuts live flows it refuses.
	// When it returns an error the former policy is still in force.
	Apply(ctx context.Context, l Lease, p *policy.Compiled) error
	// Pins returns the addresses that rules like "host:port" opened in the sandbox's
	// slot, because a name was resolved to them.
	Pins(id ID) []Pin
	// Repin opens them for a sandbox that goes on elsewhere, or for a copy of one, as
	// far as its policy, which was applied before, allows. Each name is asked for again
	// before its address is used.
	Repin(l Lease, pins []Pin) error
	// Release withdraws the policy at once, cuts all flows and frees the slot.
	// It is idempotent.
	Release(ctx context.Context, l Lease) error
	// Reconcile is called once at start with the leases that are still in use and
	// their policies: it keeps or restores exactly those and removes every other
	// slot of an earlier server process. No traffic passes meanwhile that the
	// policies refuse, and allowed flows of kept leases are not cut.
	Reconcile(ctx context.Context, inUse map[ID]Held) error
}

// Pin is an address that a name had, opened by a rule for the name and a port.
type Pin struct {
	Name     string         `json:"name"`
	Dst      netip.AddrPort `json:"dst"`
	Verified time.Time      `json:"verified"` // when the name last had it
}

// Held is a lease with the policy it is under; Policy is nil for a spare.
type Held struct {
	Lease  Lease
	Owner  string
	Policy *policy.Compiled
}

// Lease is a slot in use. It is durable: a restarted server adopts it.
type Lease struct {
	Sandbox ID           `json:"sandbox"`
	Slot    int          `json:"slot"`
	NetNS   string       `json:"netns"` // path of the namespace
	Link    string       `json:"link"`  // host side of the veth
	MAC     string       `json:"mac"`   // of the sandbox's side
	Addr4   netip.Prefix `json:"addr4"` // the sandbox's address in its link's network
	Gate4   netip.Addr   `json:"gate4"` // the host's side
	Addr6   netip.Prefix `json:"addr6"` // zero where the host has no IPv6
	Gate6   netip.Addr   `json:"gate6"`
}

// agent is how the host reaches the agent of the sandbox in the slot.
func (l Lease) agent(controlToken string) AgentAddr {
	return AgentAddr{Addr: netip.AddrPortFrom(l.Addr4.Addr(), AgentPort), Token: controlToken}
}

// Images finds the root file systems that sandboxes start from.
type Images interface {
	// Resolve returns the image behind a template's name or ID. A template that
	// exists but is not built yet is built first, which may take a minute.
	// An unknown template is errs.NotFound.
	Resolve(ctx context.Context, template string) (Image, error)
}

// Image is a template ready to run.
type Image struct {
	TemplateID string            // canonical ID
	Name       string            // the name users know: "base"
	Digest     string            // of the contents: "sha256:…"; the fingerprint for host templates
	Rootfs     string            // read-only directory
	Binds      []Bind            // read-only binds the image itself needs (the host template's /usr)
	Env        map[string]string // default environment of commands
	User       string            // default user, "user"
	Workdir    string            // default working directory
	Resources  Resources         // defaults; zero fields mean the server's defaults

	// Start is a command that runs for as long as the sandbox does: a kernel, a
	// server. Start[0] is the program. The agent starts it as User in Workdir,
	// with Env, when a sandbox of the image starts for the first time, before
	// anybody owns the sandbox: it knows nothing of an owner's variables, and has
	// no network but loopback. Empty means none.
	//
	// When it is ready the sandbox is checkpointed, and every later sandbox of
	// the image is restored from there. So what a process decided while it
	// started (the state of its own random generator, a token it made up) is the
	// same in all of them: it must do that anew with its first request.
	Start []string
	// Ready says when Start has done what users would wait for. It is asked
	// again and again until it succeeds; a sandbox that is not ready within
	// Ready.Timeout is not handed out.
	Ready Ready
}

// Ready is the sign that an image's start command is ready: the port, the
// command or both; the zero value is ready as soon as Start runs.
type Ready struct {
	Port    uint16        // a TCP port on the sandbox's loopback that accepts connections
	Command string        // a shell command of User's that ends with 0
	Timeout time.Duration // 0 means a minute
}

// Store keeps records durably. A record written is on disk when the call returns.
type Store interface {
	// Sandboxes returns every record, newest revision.
	Sandboxes(ctx context.Context) ([]Record, error)
	// PutSandbox writes r if the stored revision is still r.Revision (0: must not
	// exist) and returns the new revision; otherwise errs.Conflict.
	PutSandbox(ctx context.Context, r Record) (revision uint64, err error)
	// DeleteSandbox removes a record; removing an absent one is not an error.
	DeleteSandbox(ctx context.Context, id ID) error
	// Snapshots returns every snapshot's record, oldest first.
	Snapshots(ctx context.Context) ([]Snapshot, error)
	// PutSnapshot writes a snapshot's record, replacing one of the same ID.
	PutSnapshot(ctx context.Context, s Snapshot) error
	// DeleteSnapshot removes a record; removing an absent one is not an error.
	DeleteSnapshot(ctx context.Context, id string) error
	// AppendEvent adds a lifecycle event to the durable, bounded stream.
	AppendEvent(ctx context.Context, e Event) error
	// Events returns the kept lifecycle events, oldest first.
	Events(ctx context.Context) ([]Event, error)
}

// Agents speaks to the agent inside a sandbox.
type Agents interface {
	// WaitReady returns when the agent answers, or the context's error.
	WaitReady(ctx context.Context, a AgentAddr) error
	// Init hands the agent its sandbox's identity. It may be called again, also
	// after a restore: it then replaces what it set before.
	Init(ctx context.Context, a AgentAddr, in AgentInit) error
	// Start runs an image's start command in a sandbox that has no owner yet, and
	// returns when it is ready, or the context's error with what is amiss.
	Start(ctx context.Context, a AgentAddr, s AgentStart) error
	// Metrics reads resource use as seen inside.
	Metrics(ctx context.Context, a AgentAddr) (Metrics, error)
	// Kills returns what the agent had to kill after the kill of that number, oldest
	// first, and the number of the latest. It waits until there is one, or for minutes
	// and then returns none; with a negative number it returns only the latest's, at
	// once.
	Kills(ctx context.Context, a AgentAddr, after int64) (kills []Kill, latest int64, err error)
}

// Kill is a process that the agent killed because the sandbox ran out of memory.
type Kill struct {
	Time    time.Time
	PID     int
	Command string // its name, of a few letters
	Bytes   int64  // of memory that it used
	// Processes is how many were killed: more than one when the many of a command
	// together used the most; then PID and Command are one's.
	Processes int
}

// AgentPort is the TCP port of the agent inside each sandbox.
const AgentPort = 49983

// AgentAddr is how the host reaches one agent.
type AgentAddr struct {
	Addr  netip.AddrPort
	Token string // control token; the agent knows its SHA-256 only
}

// AgentInit is what a sandbox's agent is told when the sandbox is claimed.
type AgentInit struct {
	SandboxID      ID
	TemplateID     string
	Hostname       string
	EnvVars        map[string]string // of every command
	AccessToken    string            // what clients must show; empty means none
	DefaultUser    string
	DefaultWorkdir string
	Time           time.Time // the host's clock
	// ControlToken is what the agent answers to from then on.
	ControlToken string
}

// AgentStart is an image's start command, and what it starts with.
type AgentStart struct {
	Args    []string
	EnvVars map[string]string
	User    string
	Workdir string
	Ready   Ready
}

// Metrics is one sample of a sandbox's resources, as seen inside.
type Metrics struct {
	Time       time.Time
	CPUCount   int
	CPUUsedPct float64
	MemUsed    int64 // bytes
	MemTotal   int64
	MemCache   int64
	DiskUsed   int64
	DiskTotal  int64
}
