package network

import (
	"fmt"

	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/share"
)

// Queries of all sandboxes wait in one socket until the resolver reads them, and what
// finds it full is lost, of all keys. So what a sandbox and a key send beyond a rate
// is dropped before it gets there: datagrams, as a flood of them needs one flow only.
// The rates are far above what the resolver's own budgets let through, as answers that
// it has kept cost nothing there.

// DefaultQueries is how many datagrams in a second a sandbox may send to the resolver. All
// together may send serverQueries times as many.
const (
	DefaultQueries = 2000
	serverQueries  = 5
)

// ReasonQueries is the resolver's reason for too many queries in a second.
const ReasonQueries policy.Reason = "budget-queries"

func newQueries(sandbox uint32) *share.Pool {
	return share.NewPool(share.DNSDatagrams.Of(serverQueries*int64(sandbox), int64(sandbox)))
}

// overQueries names the rate behind a refusal; false when it was none.
func (s *shares) overQueries(out *flowlog.Event, c nft.Class) bool {
	r := s.queries.Resource()
	scope, most := share.Sandbox, r.Sandbox
	switch c {
	case nft.ClassQueries:
	case nft.ClassKeyQueries:
		scope, most = share.Key, r.Alone()
	default:
		return false
	}
	s.queries.Refused(scope)
	whose := "sandbox"
	if scope == share.Key {
		whose = "API key"
	}
	out.Rule = policy.Rule{ID: "limit." + r.Name + "." + string(scope), Text: fmt.Sprintf("%s of one %s: %d", r.What, whose, most)}
	out.Reason = ReasonQueries
	return true
}
