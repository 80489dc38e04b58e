// Package wire defines the JSON that the host sends to a sandbox's agent, for both
// sides. It hides the names of its fields. An agent outlives the server that started it, so
// fields are added and never renamed.
package wire

import "time"

// The paths of the host's requests.
const (
	ClaimPath = "/init"         // with a Claim
	StartPath = "/cordon/start" // with a Start
	ReadyPath = "/cordon/ready" // with a Ready
)

// Claim tells the agent which sandbox it is in. A later claim replaces it whole.
type Claim struct {
	SandboxID      string            `json:"sandboxID"`
	TemplateID     string            `json:"templateID"`
	Hostname       string            `json:"hostname"`
	EnvVars        map[string]string `json:"envVars"`
	AccessToken    string            `json:"accessToken"` // empty: the sandbox is open
	DefaultUser    string            `json:"defaultUser"`
	DefaultWorkdir string            `json:"defaultWorkdir"`
	Time           time.Time         `json:"time"` // the host's clock; seeds randomness
	// ControlHash is the SHA-256, in hex, of the control token from now on: copies
	// of one checkpoint must not share one. Empty keeps the one the agent started with.
	ControlHash string `json:"controlHash,omitempty"`
}

// Start is a template's start command, before the sandbox has an owner.
type Start struct {
	Args    []string          `json:"args,omitempty"`
	EnvVars map[string]string `json:"envVars"`
	User    string            `json:"user"`
	Workdir string            `json:"workdir"`
}

// Ready asks whether a start command is ready: the port accepts connections, and Command,
// which runs as the start command does, ends with 0. The zero value of either asks nothing.
type Ready struct {
	Start
	Port    uint16 `json:"port,omitempty"`
	Command string `json:"command,omitempty"`
}
