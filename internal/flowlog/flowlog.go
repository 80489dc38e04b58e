// Package flowlog keeps verdicts and hands them out: in a bounded ring for each sandbox, to
// followers, and as counters. Recording never blocks and never fails;
// under pressure entries are lost and counted.
package flowlog

import (
	"net/netip"
	"time"

	"github.com/cordonhq/cordon/internal/policy"
)

// Event is one verdict about one flow or DNS query.
type Event struct {
	Seq        uint64         `json:"seq"` // assigned by Record, increasing over the whole log
	Time       time.Time      `json:"time"`
	Sandbox    string         `json:"sandbox"`
	Generation uint64         `json:"generation"`
	Layer      Layer          `json:"layer"`
	Verdict    Verdict        `json:"verdict"`
	Rule       policy.Rule    `json:"rule"`
	Reason     policy.Reason  `json:"reason"`
	Proto      string         `json:"proto"` // "tcp", "udp", "icmp", "dns", "http", "tls"
	Src        netip.AddrPort `json:"src"`
	Dst        netip.AddrPort `json:"dst"`      // what the sandbox addressed
	Upstream   netip.AddrPort `json:"upstream"` // what the proxy dialled, if it did
	Name       string         `json:"name,omitempty"`
	Answers    []netip.Addr   `json:"answers,omitempty"` // of a DNS question: the addresses the sandbox was told
	Detail     string         `json:"detail,omitempty"`  // one line for a person: "GET /x", "A", "server_name missing"
	BytesOut   int64          `json:"bytesOut"`          // sandbox to upstream
	BytesIn    int64          `json:"bytesIn"`
	Duration   time.Duration  `json:"durationNs"`
}

// Layer says who decided.
type Layer string

// The layers.
const (
	LayerKernel   Layer = "kernel"
	LayerProxy    Layer = "proxy"
	LayerResolver Layer = "resolver"
)

// Verdict is the outcome as it is logged.
type Verdict string

// The verdicts. Observed: allowed only because the sandbox's mode is observe.
// Closed ends an allowed flow and carries its bytes and duration. Failed: allowed,
// but the upstream could not be reached.
const (
	Allowed  Verdict = "allow"
	Denied   Verdict = "deny"
	Observed Verdict = "observe"
	Closed   Verdict = "close"
	Failed   Verdict = "fail"
)

// Filter selects events; the zero value selects all.
type Filter struct {
	Sandbox string
	Verdict Verdict
	Since   uint64 // only events with Seq > Since
	Limit   int    // newest Limit events; 0 means 1000
}

// Recorder is what egress, resolver and network are handed.
type Recorder interface {
	// Record keeps e. It never blocks.
	Record(e Event)
}
