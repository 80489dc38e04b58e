// Package api serves the control API over HTTP: it decodes requests, authenticates
// them, calls the sandbox manager and encodes what it returns. Status codes exist only here. The API itself is api/openapi.yaml.
package api

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"github.com/cordonhq/cordon/api/gen/control"
	"github.com/cordonhq/cordon/internal/auth"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// EnvdVersion is what sandboxes' agents claim to be able to do: clients switch
// features on by it (0.6.4 is the last step they know).
const EnvdVersion = "0.6.13"

// clientID is what clients of 2024 append to a sandbox's ID, after a "-", in
// host names and paths; both sides of this server ignore it there. It is not
// empty, because a label that ends in "-" does not resolve.
const clientID = "cordon"

// Sandboxes is what the API calls. An empty owner stands for any. A sandbox that
// does not exist or is another owner's is errs.NotFound.
type Sandboxes interface {
	Create(ctx context.Context, req sandbox.CreateRequest) (sandbox.Record, error)
	Get(ctx context.Context, owner string, id sandbox.ID) (sandbox.Record, error)
	// List returns a page and the cursor of the next one, empty on the last.
	List(ctx context.Context, req sandbox.ListRequest) (page []sandbox.Record, next string, err error)
	// Connect makes sure the sandbox runs for at least timeout from now (0: the
	// default), resuming it when it is paused. It never shortens the time left.
	Connect(ctx context.Context, owner string, id sandbox.ID, timeout time.Duration) (rec sandbox.Record, resumed bool, err error)
	SetTimeout(ctx context.Context, owner string, id sandbox.ID, d time.Duration) error
	SetNetwork(ctx context.Context, owner string, id sandbox.ID, in sandbox.NetworkUpdate) error
	// Pause returns errs.Conflict for a sandbox that is paused already.
	Pause(ctx context.Context, owner string, id sandbox.ID) error
	Kill(ctx context.Context, owner string, id sandbox.ID) error
	Metrics(ctx context.Context, owner string, id sandbox.ID) ([]sandbox.Metrics, error)
	// Events returns a page and how many events match in all.
	Events(ctx context.Context, req sandbox.EventsRequest) (page []sandbox.Event, total int, err error)
	Quota(ctx context.Context, owner string) (sandbox.Quota, error)
	// Bind makes a custom domain lead to a port of the sandbox, and returns it in
	// canonical form; Unbind ends that.
	Bind(ctx context.Context, owner string, id sandbox.ID, d sandbox.Domain) (sandbox.Domain, error)
	Unbind(ctx context.Context, owner string, id sandbox.ID, name string) error
	// CreateLink returns the record with the key to sign the link's URL with.
	CreateLink(ctx context.Context, owner string, id sandbox.ID, req sandbox.LinkRequest) (sandbox.Record, sandbox.Link, error)
	Links(ctx context.Context, owner string, id sandbox.ID) ([]sandbox.Link, error)
	// RevokeLinks takes one link back, or all when link is empty.
	RevokeLinks(ctx context.Context, owner string, id sandbox.ID, link string) error
	// Policy returns the rules in force.
	Policy(id sandbox.ID) (*policy.Compiled, bool)
}

// Snapshots copies sandboxes. Where it is absent, its calls answer 501.
type Snapshots interface {
	CreateSnapshot(ctx context.Context, owner string, id sandbox.ID, name string) (sandbox.Snapshot, error)
	ListSnapshots(ctx context.Context, req sandbox.SnapshotsRequest) (page []sandbox.Snapshot, next string, err error)
	DeleteSnapshot(ctx context.Context, owner, snapshotID string) error
	Fork(ctx context.Context, owner string, id sandbox.ID, req sandbox.ForkRequest) ([]sandbox.Forked, error)
	Reset(ctx context.Context, owner string, id sandbox.ID, req sandbox.ResetRequest) (sandbox.Record, error)
}

// Keys holds the API keys. Keys is called for every request, so it must answer
// from memory.
type Keys interface {
	Keys(ctx context.Context) ([]auth.Key, error)
	PutKey(ctx context.Context, k auth.Key) error
	DeleteKey(ctx context.Context, id string) error
}

// Flows is the record of network verdicts.
type Flows interface {
	Events(f flowlog.Filter) []flowlog.Event
	Follow(ctx context.Context, f flowlog.Filter) <-chan flowlog.Event
}

var _ Flows = (*flowlog.Log)(nil)

// Config is what the API is built from.
type Config struct {
	Sandboxes Sandboxes
	Snapshots Snapshots // nil: not supported
	// Templates lists what sandboxes can be started from; nil: not supported.
	Templates func(ctx context.Context) ([]sandbox.Template, error)
	Keys      Keys
	Flows     Flows
	Operator  *policy.Operator // for rules that are explained before they are in force
	// Domain is told to clients as where sandboxes' ports are; with a port when
	// that is not 443: "cordon.localhost:8443".
	Domain  string
	Version string
	// Forward carries TCP to a port of a sandbox in a WebSocket until it ends, for a
	// caller who may; an error means that nothing was answered yet. Nil: not supported.
	Forward func(w http.ResponseWriter, r *http.Request, id string, port uint16) error
	// Ready returns why the server cannot start sandboxes now; nil: it can.
	Ready func() error
	// Shares divide the API among its keys; nil: shares of this handler alone.
	Shares *Shares
	Log    *slog.Logger
}

// server implements the generated interface; its methods are the operations.
type server struct {
	Config
	streams streams
}

var _ control.StrictServerInterface = (*server)(nil)

// New returns the handler of the control API.
func New(c Config) http.Handler {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Shares == nil {
		c.Shares = NewShares()
	}
	s := &server{Config: c}
	mux := http.NewServeMux()
	mux.HandleFunc("/", s.noRoute)
	for pattern, what := range notSupported {
		mux.HandleFunc(pattern, s.refuse(what))
	}
	strict := control.NewStrictHandlerWithOptions(s, []control.StrictMiddlewareFunc{s.inTurn}, control.StrictHTTPServerOptions{
		RequestErrorHandlerFunc:  s.badBody,
		ResponseErrorHandlerFunc: s.fail,
	})
	control.HandlerWithOptions(strict, control.StdHTTPServerOptions{
		BaseRouter:       mux,
		ErrorHandlerFunc: s.badParameter,
	})
	return s.recovered(s.tunnels(s.authenticated(s.shared(s.bodied(mux)))))
}

// notSupported are paths of the dialect that this server answers with 501, and
// what they are about. They are less specific than the API's own patterns.
var notSupported = map[string]string{
	"/volumes":                           "volumes",
	"/volumes/":                          "volumes",
	"/volumecontent/":                    "volumes",
	"/secrets":                           "secrets",
	"/secrets/":                          "secrets",
	"POST /templates":                    "template builds",
	"/templates/":                        "template builds and tags",
	"/v2/templates/":                     "template builds",
	"/v3/templates":                      "template builds",
	"/v3/templates/":                     "template builds",
	"/nodes":                             "nodes",
	"/nodes/":                            "nodes",
	"POST /sandboxes/{sandboxID}/commit": "commits: take a snapshot",
	"POST /sandboxes/{sandboxID}/hotplug-memory": "changing a running sandbox's memory",
	"/sandboxes/{sandboxID}/volume-mounts":       "volumes",
}

// GetHealth says whether the server can start sandboxes.
func (s *server) GetHealth(context.Context, control.GetHealthRequestObject) (control.GetHealthResponseObject, error) {
	if s.Ready != nil {
		if err := s.Ready(); err != nil {
			return nil, err
		}
	}
	return control.GetHealth200JSONResponse{Status: control.Ok, Version: s.Version}, nil
}
