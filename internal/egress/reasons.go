package egress

import "github.com/cordonhq/cordon/internal/policy"

// The reasons the proxy adds to those of package policy.
const (
	ReasonBadHello         policy.Reason = "bad-hello"         // a ClientHello that is malformed or ambiguous
	ReasonBadRequest       policy.Reason = "bad-request"       // an HTTP request that is malformed, ambiguous or never passed on
	ReasonBadName          policy.Reason = "bad-name"          // the name shown is no domain name
	ReasonPortMismatch     policy.Reason = "port-mismatch"     // Host names another port than the one connected to
	ReasonSniffTimeout     policy.Reason = "sniff-timeout"     // no name within the deadline
	ReasonSniffTooBig      policy.Reason = "sniff-too-big"     // no name within the size cap
	ReasonNoSNI            policy.Reason = "no-sni"            // TLS without server_name, and the address is denied
	ReasonNoHost           policy.Reason = "no-host"           // HTTP without a name in Host, and the address is denied
	ReasonProtocolMismatch policy.Reason = "protocol-mismatch" // not the protocol of the port, and the address is denied
	ReasonNoBytes          policy.Reason = "no-bytes"          // the client left before it showed a name
	ReasonPinned           policy.Reason = "pinned"            // no name was shown where a rule names the port; the address is the one the resolver answered
	ReasonBudget           policy.Reason = "budget"            // a limit of this sandbox or of the proxy
	ReasonResolve          policy.Reason = "resolve"           // allowed, but the name has no usable address
	ReasonUpstream         policy.Reason = "upstream"          // allowed, but the upstream could not be reached
	ReasonBadResponse      policy.Reason = "bad-response"      // the upstream's answer is not HTTP/1
	ReasonRevoked          policy.Reason = "revoked"           // cut by a policy update
	ReasonKilled           policy.Reason = "killed"            // cut because the sandbox ended
	ReasonShutdown         policy.Reason = "shutdown"          // cut because the proxy ends
)

// proxyRule stands for what the proxy refuses on its own, whatever the policy.
var proxyRule = policy.Rule{ID: "proxy", Text: "what the proxy cannot judge"}

// sniffError says why no name could be read.
type sniffError struct {
	reason policy.Reason
	detail string
}

func (e *sniffError) Error() string { return string(e.reason) + ": " + e.detail }

func badHello(detail string) error   { return &sniffError{ReasonBadHello, detail} }
func badRequest(detail string) error { return &sniffError{ReasonBadRequest, detail} }
