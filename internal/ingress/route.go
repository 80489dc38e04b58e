package ingress

import (
	"net/http"
	"strings"
)

// route is where a request goes.
type route struct {
	api    bool
	shared bool // the host is of all sandboxes; headers chose this one
	id     string
	port   uint16 // 0 is the agent's, whichever that is
	host   string // name of the host asked for, lower-case, without port
	target string // request target in origin form, byte for byte
}

// route decides where a request goes by its Host, and on shared hosts by the
// routing headers. Nothing else of the request has a say.
func (in *Ingress) route(r *http.Request, mode Mode) (route, *refusal) {
	p, err := in.locate(r.Host)
	if err != nil {
		return route{}, badRequest(err.Error())
	}
	if others := r.Header["Host"]; len(others) > 0 && (len(others) > 1 || !strings.EqualFold(others[0], r.Host)) {
		return route{}, badRequest("The request names two hosts.") // HTTP/2: :authority and host
	}
	to := route{id: p.id, port: p.port, host: p.name}
	switch p.kind {
	case apiHost:
		return route{api: true}, nil
	case foreignHost:
		if mode == TLS || looksLikeSandbox(p.name) {
			return route{}, badRequest("Host " + shown(r.Host) + " is not served here. Sandboxes are at <port>-<sandboxID>." + in.cfg.Domains[0] + ".")
		}
		return route{api: true}, nil
	case sharedHost:
		id, port, refused := in.shared(r)
		if refused != nil {
			return route{}, refused
		}
		if id == "" || port == defaultAgentPort && apiPath(r.URL.Path) {
			return route{api: true}, nil
		}
		to.id, to.port, to.shared = id, port, true
	case sandboxHost:
	}
	target, ok := originForm(r)
	if !ok {
		return route{}, badRequest("The request target is not valid.")
	}
	to.target = target
	return to, nil
}

// showsItsHost reports whether a request is for the host that the TLS handshake of
// its connection named. Without TLS there is nothing to disagree with.
func showsItsHost(r *http.Request) bool {
	if r.TLS == nil {
		return true
	}
	host, _, err := splitHost(r.Host)
	return err == nil && lower(strings.TrimSuffix(host, ".")) == lower(r.TLS.ServerName)
}

// apiPath reports whether a path is the control API's. The agent has none
// like it, and one SDK sends its sandbox's routing headers to the API as well
// (novita-sandbox for Python, on connect).
func apiPath(path string) bool {
	path = strings.TrimPrefix(path, "/v2")
	return path == "/sandboxes" || strings.HasPrefix(path, "/sandboxes/")
}

// The headers by which the SDKs name a sandbox on a shared host.
var routingHeaders = [...]struct{ id, port string }{
	{"E2b-Sandbox-Id", "E2b-Sandbox-Port"},
	{"Novita-Sandbox-Id", "Novita-Sandbox-Port"},
}

// shared reads the routing headers; an empty id means that there are none.
func (in *Ingress) shared(r *http.Request) (id string, port uint16, refused *refusal) {
	for _, h := range routingHeaders {
		ids, ports := r.Header[h.id], r.Header[h.port]
		if len(ids) == 0 {
			continue
		}
		if len(ids) > 1 || len(ports) != 1 {
			return "", 0, badRequest("A request for a sandbox needs exactly one " + h.id + " and one " + h.port + " header.")
		}
		thisID, _, _ := strings.Cut(lower(ids[0]), "-")
		thisPort, ok := parsePort(ports[0])
		if !validID(thisID) {
			return "", 0, badRequest("Sandbox ID " + shown(ids[0]) + " in " + h.id + " is not valid: it consists of the letters a-z and digits.")
		}
		if !ok {
			return "", 0, badRequest("Port " + shown(ports[0]) + " in " + h.port + " is not valid: use a number from 1 to 65535 without leading zeros.")
		}
		if id != "" && (id != thisID || port != thisPort) {
			return "", 0, badRequest("The routing headers name two sandboxes.")
		}
		id, port = thisID, thisPort
	}
	if id == "" && in.cfg.BySignature != nil && r.URL.Path == "/files" {
		if signed, ok := in.cfg.BySignature(r); ok && validID(signed) {
			return signed, 0, nil
		}
	}
	return id, port, nil
}

// originForm returns the request target as the service shall see it. Bytes that
// would end it early on the wire, or that two readers see differently, are refused:
// HTTP/2 carries a path with spaces happily.
func originForm(r *http.Request) (string, bool) {
	t := r.RequestURI
	if r.Method == http.MethodConnect {
		return "", false
	}
	for i := range len(t) {
		if c := t[i]; c <= ' ' || c == 0x7f || c == '#' {
			return "", false
		}
	}
	switch {
	case strings.HasPrefix(t, "/"):
		return t, true
	case t == "*":
		return t, r.Method == http.MethodOptions
	}
	_, rest, ok := strings.Cut(t, "://") // absolute form: the server took Host from it
	if !ok {
		return "", false
	}
	i := strings.IndexAny(rest, "/?")
	switch {
	case i < 0:
		return "/", true
	case rest[i] == '?':
		return "/" + rest[i:], true
	}
	return rest[i:], true
}
