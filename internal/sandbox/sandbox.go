// Package sandbox makes, changes and ends sandboxes: the states they may be in, the order
// of steps when one changes, and what is undone when a step fails. It owns the interfaces that runtimes, networks, images and stores implement.
package sandbox

import (
	"cmp"
	"net/netip"
	"time"

	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandboxid"
)

// ID names a sandbox.
type ID = sandboxid.ID

// State is what a sandbox is, as its record says: a change between the two is recorded when
// it is complete.
type State string

// The states.
const (
	Running State = "running"
	Paused  State = "paused"
)

// OnTimeout says what happens when a sandbox's time is over.
type OnTimeout string

// The actions.
const (
	KillOnTimeout  OnTimeout = "kill"
	PauseOnTimeout OnTimeout = "pause"
)

// Record is everything that is durable about a sandbox. Whatever is needed to
// re-adopt it is stored before create returns.
type Record struct {
	Revision uint64 `json:"-"` // of the store; 0 for a record never stored

	ID         ID                `json:"id"`
	Owner      string            `json:"owner"` // ID of the key that created it
	TemplateID string            `json:"templateID"`
	Template   string            `json:"template"`        // the name asked for
	Image      string            `json:"image,omitempty"` // the template of ImageRef, where Template is a snapshot
	ImageRef   string            `json:"imageRef"`        // Image.Digest it runs from
	Runtime    string            `json:"runtime"`         // Runtime.Name it runs on
	State      State             `json:"state"`
	Checkpoint string            `json:"checkpoint,omitempty"` // of a paused one: its name in the snapshot directory
	Metadata   map[string]string `json:"metadata,omitempty"`
	EnvVars    map[string]string `json:"envVars,omitempty"`
	Created    time.Time         `json:"created"`
	Started    time.Time         `json:"started"`
	Expires    time.Time         `json:"expires"`
	OnTimeout  OnTimeout         `json:"onTimeout"`
	AutoResume bool              `json:"autoResume"`
	// AutoResumeOn is what resumes it; empty is AnyTraffic.
	AutoResumeOn AutoResumeOn `json:"autoResumeOn,omitempty"`
	// Timeout is the lifetime it was made with, and gets when traffic resumes it; 0 in
	// old records.
	Timeout time.Duration `json:"timeout,omitempty"`
	// IdleTimeout is how long it lives from its last traffic on; 0: traffic changes nothing.
	IdleTimeout time.Duration `json:"idleTimeout,omitempty"`
	Resources   Resources     `json:"resources"`

	Egress             policy.Input   `json:"egress"`
	Generation         uint64         `json:"generation"`     // of Egress
	Pins               []Pin          `json:"pins,omitempty"` // of a paused one
	AllowPublicTraffic *bool          `json:"allowPublicTraffic,omitempty"`
	MaskRequestHost    string         `json:"maskRequestHost,omitempty"`
	MaskOrigin         bool           `json:"maskOrigin,omitempty"`
	HTTPSPorts         []uint16       `json:"httpsPorts,omitempty"`
	TrafficToken       string         `json:"trafficToken,omitempty"` // issued when public traffic is off
	AllowIn            []netip.Prefix `json:"allowIn,omitzero"`       // who may reach its ports; nil: every source, empty: none
	LinkKey            string         `json:"linkKey,omitempty"`      // signs its URLs; made with the first
	Links              []Link         `json:"links,omitempty"`        // signed URLs in force
	AccessToken        string         `json:"accessToken,omitempty"`  // of the agent; empty when not secured
	ControlToken       string         `json:"controlToken"`           // host to agent
	Lease              Lease          `json:"lease"`
	Domains            []Domain       `json:"domains,omitempty"` // custom ones; see Manager.Bind
}

// Agent is how the host reaches the sandbox's agent.
func (r *Record) Agent() AgentAddr { return r.Lease.agent(r.ControlToken) }

// image is the template whose image the sandbox runs from.
func (r *Record) image() string { return cmp.Or(r.Image, r.Template) }

// Public reports whether the sandbox's ports answer without a traffic token.
func (r *Record) Public() bool { return r.AllowPublicTraffic == nil || *r.AllowPublicTraffic }

// Event is one step in a sandbox's life, for /sandboxes/events.
type Event struct {
	ID       string    `json:"id"`
	Time     time.Time `json:"time"`
	Sandbox  ID        `json:"sandbox"`
	Owner    string    `json:"owner"`
	Template string    `json:"template"`
	// Name is what happened: "create", "pause", "resume", "fork" (it was made as a
	// copy), "reset", "snapshot", "network", "oom", and last "kill", "expire" or
	// "exit" (it ended by itself, or could not be kept).
	Name   string `json:"name"`
	State  State  `json:"state"`
	Detail string `json:"detail,omitempty"`
	// By is the request that resumed it; nil where an API call did.
	By *Waker `json:"by,omitempty"`
}

// Waker is a request that resumes a sandbox.
type Waker struct {
	Method  string     `json:"method"`
	Path    string     `json:"path"` // without the query, which may hold tokens
	Source  netip.Addr `json:"source"`
	Port    uint16     `json:"port"`
	Upgrade bool       `json:"upgrade,omitempty"` // to a protocol such as WebSocket
}
