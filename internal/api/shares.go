package api

import (
	"context"
	"errors"
	"math"
	"net/http"
	"runtime"
	"strconv"
	"time"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/share"
)

// Shares divide the API among its keys: how often each may ask, how many requests of it
// are under way, and whose turn it is to have a long answer computed.
type Shares struct {
	rate    *share.Rates
	under   *share.Pool
	queries *share.Gate
}

// The limits of requests. One of a key is answered in some 0.2 ms.
const (
	requestRate  = 500  // of one key in a second
	requestBurst = 1000 // at once
	underWay     = 4096 // of all keys; a body of 4 MiB may wait 30 s for its end
	queryQueue   = 256  // of one key
	queryWait    = 20 * time.Second
)

// NewShares returns the shares of one server's API.
func NewShares() *Shares {
	return &Shares{
		rate:    share.NewRates(share.Requests.Of(requestRate, 0), requestBurst),
		under:   share.NewPool(share.RequestsUnderWay.Of(underWay, 0)),
		queries: share.NewGate(share.Queries.Of(int64(max(3, runtime.NumCPU()+1)), 0), queryQueue, queryWait),
	}
}

// Pools are the counts behind the shares, for metrics.
func (s *Shares) Pools() []*share.Pool {
	return []*share.Pool{s.rate.Pool(), s.under, s.queries.Pool()}
}

// queries are the operations that look through everything a key has, or more.
var queries = map[string]bool{
	"ListRunningSandboxes": true, "ListSandboxes": true, "ListEvents": true, "ListSnapshots": true,
	"GetSandboxLogs": true, "GetSandboxLogsV2": true, "ListNetworkEvents": true, "ExplainNetwork": true, "GetMetrics": true, "ListKeys": true, "GetQuota": true,
}

// shared counts the requests of each key, before their bodies are read.
func (s *server) shared(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key := callerOf(r.Context()).ID
		if key == "" { // /health
			next.ServeHTTP(w, r)
			return
		}
		if wait, err := s.Shares.rate.Allow(key, 1); err != nil {
			w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
			s.fail(w, r, err)
			return
		}
		if err := s.Shares.under.Take(key, "", 1); err != nil {
			s.fail(w, r, err)
			return
		}
		defer s.Shares.under.Give(key, "", 1)
		next.ServeHTTP(w, r)
	})
}

// inTurn lets each key compute one long answer after another, in turn with the others.
func (s *server) inTurn(next control.StrictHandlerFunc, operation string) control.StrictHandlerFunc {
	if !queries[operation] {
		return next
	}
	return func(ctx context.Context, w http.ResponseWriter, r *http.Request, request any) (any, error) {
		leave, err := s.Shares.queries.Enter(ctx, callerOf(ctx).ID, "")
		if err != nil {
			return nil, err
		}
		defer leave()
		return next(ctx, w, r, request)
	}
}

// asRefusal makes an error of a share one that says so to the caller.
func asRefusal(err error) error {
	var known *errs.Error
	var full *share.Full
	if errors.As(err, &known) || !errors.As(err, &full) {
		return err
	}
	return errs.New(errs.Exhausted, "%s: try again, or do less at a time", full.Error())
}
