package ingress

import (
	"bytes"
	"crypto/sha256"
	_ "embed" // the error page
	"encoding/base64"
	"encoding/json"
	"html/template"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/cordonhq/cordon/internal/share"
)

// refusal is an answer of ours in a service's place. The order of the fields is
// the order on the wire.
type refusal struct {
	Sandbox string `json:"sandboxId,omitempty"`
	Message string `json:"message"`
	Port    uint16 `json:"port,omitempty"`
	Limit   int    `json:"limit,omitempty"`
	Code    int    `json:"code"`

	title string // of the page for people
	hint  string // what they can do
	retry time.Duration
}

func badRequest(sentence string) *refusal {
	return &refusal{Code: http.StatusBadRequest, Message: sentence, title: "This address is not valid",
		hint: "Check the address. Sandboxes are reached at <port>-<sandboxID> followed by the domain."}
}

// misdirected makes a client that reuses connections try again on one of its own
// for this host (RFC 9110 section 15.5.20).
func misdirected() *refusal {
	return &refusal{Code: http.StatusMisdirectedRequest, Message: "The request is for another host than its connection was opened for.",
		title: "Wrong connection", hint: "Open a connection for each host: the sandbox's network rules are applied to the name that a connection shows."}
}

func notFound(id string) *refusal {
	return &refusal{Code: http.StatusBadGateway, Sandbox: id, Message: "The sandbox was not found", title: "Sandbox not found",
		hint: "It may have been stopped or have reached the end of its time. Start it again, or check the address."}
}

func portClosed(id string, port uint16) *refusal {
	return &refusal{Code: http.StatusBadGateway, Sandbox: id, Port: port, Message: "The sandbox is running but port is not open",
		title: "Nothing answers on port " + strconv.Itoa(int(port)),
		hint:  "The sandbox is running. Start a service on this port in it, then try again."}
}

func badAnswer(id string, port uint16) *refusal {
	return &refusal{Code: http.StatusBadGateway, Sandbox: id, Port: port, Message: "The service in the sandbox did not answer in HTTP, or broke its answer off",
		title: "The service did not answer properly",
		hint:  "It does not speak HTTP, or broke its answer off. If it speaks HTTPS, create the sandbox with the port in network.httpsPorts. Its own log may tell more."}
}

func noTLS(id string, port uint16) *refusal {
	return &refusal{Code: http.StatusBadGateway, Sandbox: id, Port: port, Message: "The port is in network.httpsPorts, but the service on it did not complete a TLS handshake",
		title: "The service does not speak TLS",
		hint:  "The sandbox was created with this port among its network.httpsPorts. Start a service that speaks HTTPS on it, or leave the port out of that list."}
}

// noAnswer says whose refusal it is. Servers of WebSockets, Next.js among them, end
// the connection like that when they do not like where the request comes from.
func noAnswer(id string, port uint16, upgrade bool) *refusal {
	f := &refusal{Code: http.StatusBadGateway, Sandbox: id, Port: port, Message: "The service in the sandbox closed the connection without an answer",
		title: "The service closed the connection",
		hint:  "The request reached the service, which closed the connection without an answer. Its own log in the sandbox may tell why."}
	if upgrade {
		f.Message += "; development servers do so for an Origin they do not allow"
		f.hint = "The request reached the service, which closed the connection without an answer. Development servers do so for an Origin they do not allow: " +
			"look into the service's log in the sandbox, and allow this address in its settings."
	}
	return f
}

func forbidden(id, message string) *refusal {
	return &refusal{Code: http.StatusForbidden, Sandbox: id, Message: message, title: "This sandbox is private",
		hint: "Open it with a link that contains a token, or send the token in the header e2b-traffic-access-token."}
}

func badMask(id string) *refusal {
	return &refusal{Code: http.StatusBadGateway, Sandbox: id, Message: "The sandbox's maskRequestHost is not a valid host", title: "Sandbox not reachable",
		hint: "Its setting maskRequestHost is not a valid host. Set it to a host name, optionally with a port."}
}

func tooMany(id string, limit int) *refusal {
	return &refusal{Code: http.StatusTooManyRequests, Sandbox: id, Limit: limit, Message: "The sandbox has too many open connections",
		title: "Too many connections", hint: "The sandbox serves " + strconv.Itoa(limit) + " connections at a time. Try again in a moment."}
}

// noShare says whose limit is reached, the key's or the server's.
func noShare(id string, full *share.Full) *refusal {
	return &refusal{Code: http.StatusTooManyRequests, Sandbox: id, Limit: int(full.Limit), Message: "Too many open connections: " + full.Error(),
		title: "Too many connections", hint: "The server's connections to sandboxes are shared out among the keys that use it. Try again in a moment."}
}

func tooManyOfSource(id string, limit int) *refusal {
	return &refusal{Code: http.StatusTooManyRequests, Sandbox: id, Limit: limit, Message: "Your address has too many open connections to the sandbox",
		title: "Too many connections", hint: "One address may hold " + strconv.Itoa(limit) + " connections to the sandbox at a time. Try again in a moment."}
}

func headsFull(whose string, limit int64) *refusal {
	return &refusal{Code: http.StatusTooManyRequests, Limit: int(limit), Message: "The headers of requests under way from " + whose + " are too large",
		title: "Too many requests", hint: "Send fewer requests at a time, or smaller headers."}
}

func requestsFull(limit int64) *refusal {
	return &refusal{Code: http.StatusTooManyRequests, Limit: int(limit), Message: "Your address has too many requests under way",
		title: "Too many requests", hint: "Send fewer requests at a time."}
}

func wakeBusy(id string, limit int) *refusal {
	return &refusal{Code: http.StatusTooManyRequests, Sandbox: id, Limit: limit, Message: "Too many sandboxes are being resumed",
		title: "Busy", hint: "Other sandboxes are being resumed. Try again in a moment."}
}

// wakeFull says which limit is reached, in the words of who keeps it.
func wakeFull(id, limit string) *refusal {
	return &refusal{Code: http.StatusTooManyRequests, Sandbox: id, Message: "The sandbox is paused and cannot be resumed: " + limit,
		title: "No room to resume", hint: "The sandbox is paused, and as many run as may. End or pause another, then try again."}
}

func wakeFailed(id string, retry time.Duration) *refusal {
	return &refusal{Code: http.StatusServiceUnavailable, Sandbox: id, Message: "The sandbox is paused and could not be resumed", retry: retry,
		title: "The sandbox could not be resumed", hint: "It is paused and kept as it was. Try again in a moment."}
}

// asleep says what would wake the sandbox.
func asleep(id string, on WakeOn) *refusal {
	f := &refusal{Code: http.StatusServiceUnavailable, Sandbox: id, Message: "The sandbox is paused, and only requests with the header Cordon-Wake resume it", title: "The sandbox is paused",
		hint: "Its owner chose that ordinary requests do not resume it. Resume it, or send the header Cordon-Wake."}
	if on == OnRequests {
		f.Message = "The sandbox is paused, and upgrades such as WebSockets do not resume it"
		f.hint = "Its owner chose that only requests resume it. Load the page again."
	}
	return f
}

func notListed(id string) *refusal {
	return &refusal{Code: http.StatusForbidden, Sandbox: id, Message: "The sandbox accepts requests from listed addresses only, and yours is not in network.allowIn",
		title: "Your address is not allowed", hint: "The sandbox answers only clients in its list of addresses. Ask its owner to add yours."}
}

func linkOver(id, message, title string) *refusal {
	return &refusal{Code: http.StatusForbidden, Sandbox: id, Message: message, title: title,
		hint: "Ask whoever sent you the link for a new one."}
}

// withdrawn answers who was let in and is not any more, before anything was sent.
func withdrawn(id string) *refusal {
	return &refusal{Code: http.StatusForbidden, Sandbox: id, Message: "Access to the sandbox was withdrawn", title: "Access was withdrawn",
		hint: "Ask whoever sent you here for a new link."}
}

//go:embed page.html
var pageSource string

// pages renders refusals for people.
type pages struct {
	tmpl *template.Template
	csp  string
}

func newPages() (*pages, error) {
	tmpl, err := template.New("page").Parse(pageSource)
	if err != nil {
		return nil, err
	}
	_, style, _ := strings.Cut(pageSource, "<style>")
	style, _, _ = strings.Cut(style, "</style>")
	sum := sha256.Sum256([]byte(style))
	return &pages{tmpl: tmpl, csp: "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) +
		"'; base-uri 'none'; form-action 'none'"}, nil
}

// navigates reports whether a browser loads the answer into a window or frame.
func navigates(r *http.Request) bool {
	if r.Method != http.MethodGet && r.Method != http.MethodHead || r.Header.Get("Upgrade") != "" {
		return false
	}
	if mode := r.Header.Get("Sec-Fetch-Mode"); mode != "" {
		return mode == "navigate"
	}
	return strings.Contains(r.Header.Get("Accept"), "text/html")
}

// refuse answers in the service's place: a page for people, JSON for programs.
func (v *visit) refuse(f *refusal) {
	if v.info.http1 != nil {
		v.info.http1.hasten()
	}
	h := v.w.Header()
	body, err := json.Marshal(f)
	if err != nil {
		body = []byte(`{"message":"internal error","code":500}`)
	}
	h.Set("Content-Type", "application/json")
	if navigates(v.r) && f.title != "" {
		var page bytes.Buffer
		if err := v.in.pages.tmpl.Execute(&page, pageData{f, f.title, f.hint}); err == nil {
			body = page.Bytes()
			h.Set("Content-Type", "text/html; charset=utf-8")
			h.Set("Content-Security-Policy", v.in.pages.csp)
			h.Set("Referrer-Policy", "no-referrer")
		}
	}
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	h.Set("Access-Control-Allow-Origin", "*") // programs in a browser may read why
	h.Set("Vary", "Accept, Sec-Fetch-Mode")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if f.Code == http.StatusTooManyRequests || f.retry > 0 {
		h.Set("Retry-After", strconv.Itoa(max(1, int(math.Ceil(f.retry.Seconds())))))
	}
	if v.r.ProtoMajor == 1 && v.r.ContentLength != 0 {
		h.Set("Connection", "close") // a part of the body may be unread: it must not become a request
	}
	v.code = f.Code
	v.w.WriteHeader(f.Code)
	v.w.Write(body) //nolint:errcheck // the client is gone
}

type pageData struct {
	*refusal
	Title, Hint string
}
