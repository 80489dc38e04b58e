package network

import (
	"fmt"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/policy"
)

// The reasons of Config.MaxBytesOut and Config.MaxNewFlows.
const (
	ReasonBytesOut policy.Reason = "budget-bytes-out"
	ReasonNewFlows policy.Reason = "budget-new-flows"
)

// overBudget names the budget behind a refusal; false when it was none.
func (s *shares) overBudget(out *flowlog.Event, c nft.Class) bool {
	switch c {
	case nft.ClassBytesOut:
		out.Rule, out.Reason = policy.Rule{ID: "limit", Text: fmt.Sprintf("%d bytes out of one sandbox", s.conf.MaxBytesOut)}, ReasonBytesOut
	case nft.ClassNewFlows:
		out.Rule, out.Reason = policy.Rule{ID: "limit", Text: fmt.Sprintf("%d new flows of one sandbox in a second", s.conf.MaxNewFlows)}, ReasonNewFlows
	default:
		return false
	}
	return true
}
