package conformance

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/conformance/probe"
)

func ingressCases() []Case {
	const group = "Ingress"
	return []Case{
		{ID: 66, Group: group, Title: "host confusion", Run: hostConfusion, Anywhere: true},
		{ID: 67, Group: group, Title: "reserved ports and control routes", Run: reservedPorts, Anywhere: true},
		{ID: 68, Group: group, Title: "targets of the client's choice", Run: clientTargets, Anywhere: true},
		{ID: 69, Group: group, Title: "tokens: missing, wrong, misplaced, of others, leaked", Run: tokens, Anywhere: true},
		{ID: 70, Group: group, Title: "cookies across ports and sandboxes", Run: cookies, Anywhere: true, Secure: true},
		{ID: 71, Group: group, Title: "smuggling, hop-by-hop abuse, upgrades without a token", Run: smuggling, Anywhere: true, Within: 40 * time.Second},
		{ID: 72, Group: group, Title: "slowloris, floods, wake storms", Run: floods, Anywhere: true, Within: 60 * time.Second},
		{ID: 79, Group: group, Title: "forms of other sites with a private URL's cookie, preflights without it", Run: crossSite, Anywhere: true, Secure: true},
	}
}

// echoServer answers with who it is and the request it saw.
const echoServer = `
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Echo(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do(self):
        body = b''
        if 'chunked' in (self.headers.get('Transfer-Encoding') or ''):
            while n := int(self.rfile.readline(), 16):
                body += self.rfile.read(n)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        body = body.decode('latin-1')
        out = json.dumps({'who': sys.argv[1], 'port': int(sys.argv[2]), 'path': self.path, 'headers': self.headers.items(), 'body': body}).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(out)))
        self.end_headers()
        self.wfile.write(out)
    do_GET = do_POST = do_PUT = do_HEAD = do
    def log_message(self, *a): pass
ThreadingHTTPServer.address_family = 2
ThreadingHTTPServer(('0.0.0.0', int(sys.argv[2])), Echo).serve_forever()
`

// echo is what the service saw.
type echo struct {
	Who     string      `json:"who"`
	Port    int         `json:"port"`
	Path    string      `json:"path"`
	Headers [][2]string `json:"headers"`
	Body    string      `json:"body"`
}

// The ports the service listens on.
const (
	portOne = 7007
	portTwo = 7008
)

// service returns a sandbox, public or not, with the echo service on two ports.
func (t *Trial) service(public bool, name string) *Subject {
	n := client.Network{AllowPublicTraffic: &public}
	key := fmt.Sprintf("service %v %s", public, name)
	if s, ok := t.suite.subjects[key]; ok {
		return s
	}
	s, err := t.suite.newSubject(t.ctx, client.CreateOptions{Network: n, Timeout: 10 * time.Minute})
	t.must("start a sandbox", err)
	t.suite.subjects[key] = s
	t.must("put the service into it", s.Files.Write(t.ctx, "/tmp/echo.py", strings.NewReader(echoServer)))
	for _, port := range []int{portOne, portTwo} {
		p, err := s.Commands.Start(t.ctx, fmt.Sprintf("exec python3 /tmp/echo.py %s %d", s.ID, port), client.RunOptions{})
		t.must("start the service", err)
		go p.Close() // it goes on, unwatched
	}
	for _, port := range []int{portOne, portTwo} {
		t.must("wait for the service", listens(t.ctx, s, port))
	}
	return s
}

// label is the host of a port of a sandbox, without the domain's port.
func label(s *Subject, port int) string {
	host, _, _ := strings.Cut(s.Host(port), ":")
	return host
}

// dialFront connects to the server's front as a stranger does: with TLS in the lab.
func (s *suite) dialFront(ctx context.Context, sni string) (net.Conn, error) {
	if s.stand != nil {
		roots, err := s.stand.roots()
		if err != nil {
			return nil, err
		}
		raw, err := s.stand.lab.Host().Dial(ctx, "tcp", at(s.stand.lab.HostAddr(), 443))
		if err != nil {
			return nil, err
		}
		c := tls.Client(raw, &tls.Config{ServerName: sni, RootCAs: roots, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}})
		if err := c.HandshakeContext(ctx); err != nil {
			return nil, errors.Join(fmt.Errorf("handshake for %s: %w", sni, err), raw.Close())
		}
		return c, nil
	}
	u, err := url.Parse(s.opts.Against)
	if err != nil {
		return nil, err
	}
	address := u.Host
	if u.Port() == "" {
		address = net.JoinHostPort(u.Hostname(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
	}
	if u.Scheme == "https" {
		return (&tls.Dialer{Config: &tls.Config{ServerName: u.Hostname(), NextProtos: []string{"http/1.1"}, MinVersion: tls.VersionTLS12}}).DialContext(ctx, "tcp", address)
	}
	return (&net.Dialer{}).DialContext(ctx, "tcp", address)
}

// answer is one response of the front.
type answer struct {
	status int
	header http.Header
	body   []byte
	echo   echo // zero if the service did not answer
}

// talk sends bytes to the front and returns every response until the connection
// ends or nothing more comes for a second and a half.
func (t *Trial) talk(ctx context.Context, sni string, raw []byte) ([]answer, error) {
	c, err := t.suite.dialFront(ctx, sni)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(8 * time.Second)); err != nil {
		return nil, err
	}
	if _, err := c.Write(raw); err != nil {
		return nil, err
	}
	var out []answer
	for r := bufio.NewReader(c); ; {
		if len(out) > 0 {
			_ = c.SetDeadline(time.Now().Add(1500 * time.Millisecond)) // a dead connection shows at the next call
		}
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			return out, nil // the end, however it came
		}
		body, _ := io.ReadAll(io.LimitReader(res.Body, 1<<20)) // what came counts
		a := answer{status: res.StatusCode, header: res.Header, body: body}
		_ = json.Unmarshal(body, &a.echo) // not every answer is an echo
		out = append(out, a)
		if res.StatusCode == http.StatusSwitchingProtocols {
			return out, nil
		}
	}
}

// call is one request to the front: what is sent, and what must come of it.
type call struct {
	host  string // in Host, and in SNI if sni is empty
	sni   string
	line  string   // default "GET / HTTP/1.1"
	extra []string // more header lines
}

func (c call) bytes() []byte {
	line := c.line
	if line == "" {
		line = "GET / HTTP/1.1"
	}
	lines := append([]string{line, "Host: " + c.host}, c.extra...)
	return []byte(strings.Join(append(lines, "Connection: close", "", ""), "\r\n"))
}

// calls makes requests, one connection each, and judges the one answer of each.
func (t *Trial) calls(what string, judge func(call, answer) error, list ...call) {
	t.Try(Try{What: what, Do: func(ctx context.Context) error {
		for i, c := range list {
			sni := c.sni
			if sni == "" {
				sni = c.host
			}
			got, err := t.talk(ctx, sni, c.bytes())
			if err != nil {
				return fmt.Errorf("request %d, %q: %w", i, c.host, err)
			}
			if len(got) != 1 {
				return fmt.Errorf("request %d, %q: %d answers came", i, c.host, len(got))
			}
			if err := judge(c, got[0]); err != nil {
				return fmt.Errorf("request %d, %q: %w: %d %.200s", i, c.host, err, got[0].status, got[0].body)
			}
		}
		return nil
	}})
}

// statusIs: the answer is the front's own, with one of these.
func statusIs(codes ...int) func(call, answer) error {
	return func(_ call, a answer) error {
		if a.echo.Who != "" {
			return fmt.Errorf("the service of %s answered", a.echo.Who)
		}
		if !slices.Contains(codes, a.status) {
			return fmt.Errorf("the status is not one of %v", codes)
		}
		return nil
	}
}

// by: the service of this sandbox answered, on this port.
func by(s *Subject, port int) func(call, answer) error {
	return func(_ call, a answer) error {
		if a.status != http.StatusOK || a.echo.Who != s.ID || a.echo.Port != port {
			return fmt.Errorf("it is not port %d of %s that answered", port, s.ID)
		}
		return nil
	}
}

func hostConfusion(t *Trial) {
	public, private := t.service(true, "one"), t.service(false, "one")
	here, there := label(public, portOne), label(private, portOne)
	suffix := strings.TrimPrefix(here, fmt.Sprintf("%d-%s", portOne, public.ID))
	t.calls("control: its own host, in capitals, with a dot, with a port", by(public, portOne),
		call{host: here}, call{host: strings.ToUpper(here), sni: here}, call{host: here + ".", sni: here}, call{host: here + ":443", sni: here})
	t.calls("names that begin, end or look like it", statusIs(400),
		call{host: here + ".attacker.test", sni: here}, call{host: fmt.Sprintf("%d-%s.attacker.test", portOne, public.ID), sni: here},
		call{host: here + "@attacker.test", sni: here}, call{host: "attacker.test@" + here, sni: here}, call{host: here + "/", sni: here},
		call{host: "x." + here, sni: here}, call{host: here + "\x00", sni: here}, call{host: here + ":x", sni: here}, call{host: "", sni: here},
		call{host: strings.Replace(here, "-", "--", 1), sni: here}, call{host: fmt.Sprintf("%d%s", portOne, suffix), sni: here})
	t.calls("two Hosts", statusIs(400), call{host: here, extra: []string{"Host: " + there}}, call{host: there, extra: []string{"Host: " + here}})
	t.calls("the private one in Host, the public one in SNI", statusIs(403), call{host: there, sni: here})
	t.calls("the private one in an absolute target, the public one in Host", statusIs(400, 403), call{host: here, line: "GET http://" + there + "/ HTTP/1.1"})
	t.calls("routing and forwarding headers beside a host of its own: ignored", by(public, portOne), call{host: here, extra: []string{
		"E2b-Sandbox-Id: " + private.ID, "E2b-Sandbox-Port: 7007", "Novita-Sandbox-Id: " + private.ID, "X-Forwarded-Host: " + there,
		"X-Original-Host: " + there, "Forwarded: host=" + there, "X-Host: " + there,
	}})
	t.calls("sandboxes that are not there", statusIs(502), call{host: fmt.Sprintf("%d-%s%s", portOne, strings.Repeat("x", len(public.ID)), suffix), sni: here},
		call{host: fmt.Sprintf("%d-%s%s", portOne, public.ID[:len(public.ID)-1], suffix), sni: here})
	if t.suite.stand != nil {
		frontedSelf(t, public, private)
	}
}

// frontedSelf: a sandbox that may reach one public URL does not reach another by
// hiding its name inside the TLS connection to the first.
func frontedSelf(t *Trial, listed, other *Subject) {
	second := t.service(true, "two")
	here := label(listed, portOne)
	s := t.Sandbox(only(here))
	inside := func(host string) []probe.Order {
		return []probe.Order{https(addrAttacker, here, get(host, "/"))}
	}
	echoes := func(id string) func(probe.Outcome) error {
		return func(got probe.Outcome) error {
			if bytes.Contains(got.Received, []byte(`"who": "`)) != (id != "") || id != "" && !bytes.Contains(got.Received, []byte(id)) {
				return errors.New("another service answered than should")
			}
			return nil
		}
	}
	t.Try(Try{
		What: "from a sandbox that may reach one public URL, another inside it", By: s,
		Orders: append(inside(label(second, portOne)), inside(label(other, portOne))...), Answer: echoes(""), Log: allowed("allow-name"),
	})
	t.Try(Try{What: "control: that URL itself", By: s, Orders: inside(here), Answer: echoes(listed.ID), Log: allowed("allow-name")})
}

func reservedPorts(t *Trial) {
	s := t.service(true, "one")
	host := func(port string) string { return strings.Replace(label(s, portOne), fmt.Sprint(portOne), port, 1) }
	agent := host("49983")
	var list []call
	for _, path := range []string{
		"/init", "/INIT", "//init", "/./init", "/x/../init", "/%69nit", "/%2569nit", "/init/", "/init?x", "/init;x", "/init%20", `/\init`, "/freeze", "/unfreeze", "/cordon/",
	} {
		for _, method := range []string{"GET", "POST"} {
			list = append(list, call{host: agent, line: method + " " + path + " HTTP/1.1"})
		}
	}
	t.calls("the agent's control routes, however written", statusIs(404, 400, 405), list...)
	t.calls("the agent without its access token", statusIs(401, 403, 404, 415),
		call{host: agent, line: "POST /process.Process/List HTTP/1.1", extra: []string{"Content-Type: application/json", "Content-Length: 0"}},
		call{host: agent, line: "GET /files?path=/etc/passwd HTTP/1.1"})
	t.calls("ports that are none", statusIs(400), call{host: host("0"), sni: label(s, portOne)}, call{host: host("65536"), sni: label(s, portOne)},
		call{host: host("07007"), sni: label(s, portOne)}, call{host: host("+7007"), sni: label(s, portOne)}, call{host: host("7007x"), sni: label(s, portOne)})
	t.calls("ports where nothing listens in it, though something does on the host", statusIs(502), call{host: host("3900")}, call{host: host("15001")}, call{host: host("443")})
	t.calls("control: a port where its service listens", by(s, portOne), call{host: label(s, portOne)})
}

func clientTargets(t *Trial) {
	s := t.service(true, "one")
	here := label(s, portOne)
	t.calls("absolute targets elsewhere", statusIs(400, 401, 403, 404), call{host: here, line: "GET http://169.254.169.254/latest/ HTTP/1.1"},
		call{host: here, line: "GET http://127.0.0.1:3901/metrics HTTP/1.1"}, call{host: here, line: "GET http://attacker.test/ HTTP/1.1"},
		call{host: here, line: "GET http://10.223.0.2:49983/init HTTP/1.1"})
	t.calls("CONNECT", statusIs(400, 401, 405), call{host: here, line: "CONNECT 127.0.0.1:3901 HTTP/1.1"}, call{host: here, line: "CONNECT attacker.test:443 HTTP/1.1"},
		call{host: here, line: "CONNECT / HTTP/1.1"})
	shared := "localhost"
	if t.suite.stand != nil {
		shared = "sandbox." + domain
	}
	route := func(id, port string) call {
		return call{host: shared, sni: here, extra: []string{"E2b-Sandbox-Id: " + id, "E2b-Sandbox-Port: " + port}}
	}
	t.calls("routing headers that hold addresses and paths", statusIs(400), route("127.0.0.1", "3900"), route("../../x", "7007"), route(s.ID+"@127.0.0.1", "7007"),
		route(s.ID, "7007@127.0.0.1:3900"), route(s.ID, "0"), route(s.ID, "99999"), route(s.ID, ""), route("localhost:3900", "3900"))
	t.calls("routing headers that disagree", statusIs(400), call{host: shared, sni: here, extra: []string{
		"E2b-Sandbox-Id: " + s.ID, "E2b-Sandbox-Port: 7007", "Novita-Sandbox-Id: " + strings.Repeat("x", 20), "Novita-Sandbox-Port: 7007",
	}}, call{host: shared, sni: here, extra: []string{"E2b-Sandbox-Id: " + s.ID, "E2b-Sandbox-Id: x", "E2b-Sandbox-Port: 7007"}})
	t.calls("rewriting headers: ignored", func(c call, a answer) error {
		if a.echo.Path != "/" {
			return fmt.Errorf("the service saw path %q", a.echo.Path)
		}
		return by(s, portOne)(c, a)
	}, call{host: here, extra: []string{"X-Original-URL: /admin", "X-Rewrite-URL: /admin", "X-HTTP-Method-Override: DELETE", "X-Forwarded-Prefix: /admin"}})
	t.calls("control: routing headers on the shared host", by(s, portOne), route(s.ID, "7007"))
}

func tokens(t *Trial) {
	s, other := t.service(false, "one"), t.service(false, "two")
	here := label(s, portOne)
	with := func(lines ...string) call { return call{host: here, extra: lines} }
	header := "e2b-traffic-access-token: "
	t.calls("no token", statusIs(403), call{host: here}, call{host: label(s, portTwo)})
	t.calls("wrong ones: empty, cut, longer, another sandbox's, the agent's", statusIs(403), with(header), with(header+s.TrafficToken[1:]),
		with(header+s.TrafficToken+"x"), with(header+other.TrafficToken), with(header+"agent"+s.AccessToken), with(header+strings.ToUpper(s.TrafficToken)+"x"))
	t.calls("the right one in the wrong place", statusIs(403, 400), with("Authorization: Bearer "+s.TrafficToken), with("X-Access-Token: "+s.TrafficToken),
		with("Cookie: e2b-traffic-access-token="+s.TrafficToken), with("Cookie: __Host-cordon-token="+s.TrafficToken),
		call{host: here, line: "GET /?e2b-traffic-access-token=" + s.TrafficToken + " HTTP/1.1"}, call{host: here, line: "GET /#cordon_token=" + s.TrafficToken + " HTTP/1.1"})
	t.calls("the right one and a wrong one", statusIs(403, 400), with(header+s.TrafficToken, header+"x"), with(header+"x", header+s.TrafficToken),
		call{host: here, line: "GET /?cordon_token=" + s.TrafficToken + " HTTP/1.1", extra: []string{header + "x"}})
	clean := func(c call, a answer) error {
		if err := by(s, portOne)(c, a); err != nil {
			return err
		}
		if bytes.Contains(bytes.ToLower(a.body), []byte(strings.ToLower(s.TrafficToken))) {
			return errors.New("the service saw the token")
		}
		return nil
	}
	t.calls("control: the right one, which the service does not see", clean, with(header+s.TrafficToken),
		call{host: here, line: "GET /?a=b&cordon_token=" + s.TrafficToken + " HTTP/1.1"})
	t.calls("on another private sandbox", statusIs(403), call{host: label(other, portOne), extra: []string{header + s.TrafficToken}},
		call{host: label(other, portOne), line: "GET /?cordon_token=" + s.TrafficToken + " HTTP/1.1"})
}

func cookies(t *Trial) {
	s, other := t.service(false, "one"), t.service(false, "two")
	here := label(s, portOne)
	cookie := t.cookieOf(s)
	if cookie == "" {
		return // said by the control
	}
	with := func(host, value string) call {
		return call{host: host, extra: []string{"Cookie: a=b; " + value + "; c=d"}}
	}
	t.calls("control: it opens that host, and the service does not see it", func(c call, a answer) error {
		_, value, _ := strings.Cut(cookie, "=")
		if bytes.Contains(a.body, []byte(value)) || !bytes.Contains(a.body, []byte("a=b")) {
			return errors.New("the service saw it, or lost its own cookies")
		}
		return by(s, portOne)(c, a)
	}, with(here, cookie))
	t.calls("on another port, on another sandbox", statusIs(403), with(label(s, portTwo), cookie), with(label(other, portOne), cookie))
	name, value, _ := strings.Cut(cookie, "=")
	t.calls("changed: another expiry, another link, a cut signature, another name", statusIs(403), with(here, name+"="+strings.Replace(value, ".", ".9", 1)),
		with(here, name+"="+strings.Replace(value, "..", ".link.", 1)), with(here, name+"="+value[:len(value)-2]), with(here, strings.TrimPrefix(name, "__Host-")+"="+value), with(here, name+"="))
}

// cookieOf returns the cookie that a browser is given for the sandbox's token at its
// first port, "" when a step failed.
func (t *Trial) cookieOf(s *Subject) (cookie string) {
	here := label(s, portOne)
	t.calls("control: a browser is given a cookie for its token, bound to the host", func(_ call, a answer) error {
		set := a.header.Get("Set-Cookie")
		if a.status < 300 || a.status > 399 || strings.Contains(a.header.Get("Location"), s.TrafficToken) {
			return errors.New("it was not sent back without the token")
		}
		for _, want := range []string{"__Host-", "; Path=/", "; HttpOnly", "; Secure"} {
			if !strings.Contains(set, want) {
				return fmt.Errorf("the cookie %q lacks %q", set, want)
			}
		}
		if strings.Contains(strings.ToLower(set), "domain=") || strings.Contains(set, s.TrafficToken) {
			return fmt.Errorf("the cookie %q is for a domain, or holds the token", set)
		}
		cookie, _, _ = strings.Cut(set, ";")
		return nil
	}, call{host: here, line: "GET /?cordon_token=" + s.TrafficToken + " HTTP/1.1", extra: []string{"Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document", "Accept: text/html"}})
	return cookie
}

// crossSite: to a browser that another site leads to a private URL the cookie goes
// along. A link may open it; a form may not make its service do something. What a
// browser asks beforehand is answered without a token, and opens nothing.
func crossSite(t *Trial) {
	s := t.service(false, "one")
	here := label(s, portOne)
	cookie := t.cookieOf(s)
	if cookie == "" {
		return // said by the control
	}
	from := func(method, site, mode, origin string) call {
		c := call{host: here, line: method + " /canary-79 HTTP/1.1", extra: []string{"Cookie: " + cookie, "Sec-Fetch-Dest: document"}}
		for name, value := range map[string]string{"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Origin": origin} {
			if value != "" {
				c.extra = append(c.extra, name+": "+value)
			}
		}
		if method == "POST" || method == "PUT" {
			c.extra = append(c.extra, "Content-Length: 0")
		}
		return c
	}
	const other = "https://attacker.test"
	t.calls("control: its own form, and a link of another site", by(s, portOne), from("POST", "same-origin", "navigate", "https://"+here), from("GET", "cross-site", "navigate", ""))
	t.calls("a form of another site, with its origin, without, in a browser that says no more", statusIs(403), from("POST", "cross-site", "navigate", other),
		from("POST", "cross-site", "navigate", "null"), from("POST", "cross-site", "navigate", ""), from("POST", "", "", other), from("PUT", "cross-site", "navigate", other))
	ask := []string{"Origin: " + other, "Access-Control-Request-Method: PUT", "Access-Control-Request-Headers: e2b-traffic-access-token"}
	t.calls("a preflight without a token: answered, and not by the service", func(c call, a answer) error {
		if a.header.Get("Access-Control-Allow-Credentials") != "" || a.header.Get("Access-Control-Allow-Methods") != "PUT" {
			return fmt.Errorf("it permits %v", a.header)
		}
		return statusIs(204)(c, a)
	}, call{host: here, line: "OPTIONS / HTTP/1.1", extra: ask})
	t.calls("the request behind it without a token", statusIs(403), call{host: here, line: "PUT / HTTP/1.1", extra: []string{"Origin: " + other, "Content-Length: 0"}})
}

func smuggling(t *Trial) {
	public, private := t.service(true, "one"), t.service(false, "one")
	here, there := label(public, portOne), label(private, portOne)
	hidden := "GET /canary-71 HTTP/1.1\r\nHost: " + there + "\r\n\r\n"
	post := "POST / HTTP/1.1\r\nHost: " + here + "\r\n"
	family := []string{
		post + "Content-Length: 0\r\nContent-Length: 60\r\n\r\n" + hidden,
		post + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + hidden,
		post + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + hidden,
		post + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + hidden,
		post + "Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + hidden,
		post + "Content-Length: +0\r\n\r\n" + hidden,
		post + "Content-Length: 0x0\r\n\r\n" + hidden,
		"GET / HTTP/1.1\r\nHost: " + here + "\r\nX: y\x00\r\n\r\n" + hidden,
	}
	t.Try(Try{What: "framing of two meanings: refused, and the connection is over", Slow: 20 * time.Second, Do: func(ctx context.Context) error {
		return concurrently(family, func(i int, raw string) error {
			got, err := t.talk(ctx, here, []byte(raw))
			if err != nil || len(got) != 1 || got[0].status != 400 && got[0].status != 501 {
				return fmt.Errorf("request %d: not one answer 400: %v %w", i, got, err)
			}
			return nil
		})
	}})
	bothFramings(t, public, here, post, hidden)
	t.Try(Try{What: "control: a request in a body is a body", Do: func(ctx context.Context) error {
		got, err := t.talk(ctx, here, fmt.Appendf(nil, "%sConnection: close\r\nContent-Length: %d\r\n\r\n%s", post, len(hidden), hidden))
		if err != nil || len(got) != 1 || got[0].echo.Body != hidden {
			return fmt.Errorf("the service did not get it: %+v %w", got, err)
		}
		return nil
	}})
	hopByHop(t, public, here, there)
}

// hopByHop: a client cannot take fields of ours away, nor switch protocols past
// the token, nor ride on a connection that was opened for another host.
func hopByHop(t *Trial, public *Subject, here, there string) {
	t.calls("Connection cannot take our fields away, nor a client make them", func(c call, a answer) error {
		for _, h := range a.echo.Headers {
			if strings.Contains(h[1], "198.51.100.99") || strings.EqualFold(h[0], "X-Forwarded-Proto") && h[1] == "gopher" {
				return fmt.Errorf("the service saw %v", h)
			}
		}
		if !slices.ContainsFunc(a.echo.Headers, func(h [2]string) bool { return strings.EqualFold(h[0], "X-Forwarded-For") }) {
			return errors.New("the service does not learn the client's address")
		}
		return by(public, portOne)(c, a)
	}, call{host: here, extra: []string{"Connection: X-Forwarded-For, Host", "X-Forwarded-For: 198.51.100.99"}},
		call{host: here, extra: []string{"X-Forwarded-For: 198.51.100.99", "X-Forwarded-Proto: gopher", "X-Real-Ip: ::1", "Forwarded: for=198.51.100.99"}})
	handshake := []string{"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="}
	t.Try(Try{What: "a WebSocket to a private sandbox without a token, hop-by-hop or not", Do: func(ctx context.Context) error {
		for _, extra := range [][]string{handshake, append([]string{"Connection: e2b-traffic-access-token"}, handshake...)} {
			raw := strings.Join(append([]string{"GET / HTTP/1.1", "Host: " + there}, extra...), "\r\n") + "\r\n\r\n"
			got, err := t.talk(ctx, there, []byte(raw))
			if err != nil || len(got) != 1 || got[0].status != 403 {
				return fmt.Errorf("not one answer 403: %+v %w", got, err)
			}
		}
		return nil
	}})
	t.Try(Try{What: "a second request for the private one on the public one's connection", Do: func(ctx context.Context) error {
		raw := "GET / HTTP/1.1\r\nHost: " + here + "\r\n\r\nGET / HTTP/1.1\r\nHost: " + there + "\r\nConnection: close\r\n\r\n"
		got, err := t.talk(ctx, here, []byte(raw))
		if err != nil || len(got) != 2 || got[0].echo.Who != public.ID || got[1].status != 403 {
			return fmt.Errorf("not 200 and 403: %+v %w", got, err)
		}
		return nil
	}})
}

// bothFramings: a length beside chunked coding is dropped, not refused (RFC 9112
// section 6.3 leaves the choice). What is promised is that front and service read
// the same: the service gets a chunked body without a length, and what follows is
// a request of its own, judged by its own Host.
func bothFramings(t *Trial, public *Subject, here, post, hidden string) {
	t.Try(Try{What: "a length and chunked coding: one meaning for front and service", Do: func(ctx context.Context) error {
		for _, fields := range []string{"Content-Length: 6\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 6"} {
			got, err := t.talk(ctx, here, []byte(post+fields+"\r\n\r\n0\r\n\r\n"+hidden))
			switch {
			case err != nil || len(got) == 0:
				return fmt.Errorf("no answer: %w", err)
			case len(got) == 1 && got[0].status == 400:
				continue
			case got[0].echo.Who != public.ID || got[0].echo.Body != "":
				return fmt.Errorf("the service read a body: %s", got[0].body)
			case slices.ContainsFunc(got[0].echo.Headers, func(h [2]string) bool { return strings.EqualFold(h[0], "Content-Length") }):
				return fmt.Errorf("the service was told both: %s", got[0].body)
			case len(got) > 1 && got[1].status != 403:
				return fmt.Errorf("the second request was not judged by its own Host: %d %s", got[1].status, got[1].body)
			}
		}
		return nil
	}})
}

// concurrently runs f for each of the things and returns the errors.
func concurrently[T any](things []T, f func(int, T) error) error {
	errs := make([]error, len(things))
	var wg sync.WaitGroup
	for i, thing := range things {
		wg.Go(func() { errs[i] = f(i, thing) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func floods(t *Trial) {
	s := t.service(true, "one")
	here := label(s, portOne)
	t.Try(Try{What: "forty heads that never end: cut within fifteen seconds, others served meanwhile", Slow: 40 * time.Second, Do: func(ctx context.Context) error {
		slow := make(chan error, 1)
		go func() {
			slow <- concurrently(make([]struct{}, 40), func(int, struct{}) error { return t.slowloris(ctx, here) })
		}()
		time.Sleep(500 * time.Millisecond)
		for range 10 {
			began := time.Now()
			got, err := t.talk(ctx, here, call{host: here}.bytes())
			if err != nil || len(got) != 1 || got[0].echo.Who != s.ID {
				return fmt.Errorf("a good request was not served: %+v %w", got, err)
			}
			if took := time.Since(began); took > 5*time.Second { // a third of what the slow ones get
				return fmt.Errorf("a good request took %s", took)
			}
		}
		return <-slow
	}})
	t.Try(Try{What: "150 requests at once: every one is answered", Slow: 40 * time.Second, Do: func(ctx context.Context) error {
		return concurrently(make([]struct{}, 150), func(int, struct{}) error { return t.answeredSoon(ctx, here, http.StatusOK, http.StatusTooManyRequests) })
	}})
	t.Try(Try{What: "100 requests at once for a sandbox that is not there", Slow: 40 * time.Second, Do: func(ctx context.Context) error {
		gone := strings.Replace(here, s.ID, strings.Repeat("x", len(s.ID)), 1)
		return concurrently(make([]struct{}, 100), func(int, struct{}) error { return t.answeredSoon(ctx, gone, http.StatusBadGateway) })
	}})
	wakeStorm(t)
}

// slowloris sends one byte of a head a second until the connection is cut.
func (t *Trial) slowloris(ctx context.Context, host string) error {
	c, err := t.suite.dialFront(ctx, host)
	if err != nil {
		return err
	}
	defer c.Close()
	began := time.Now()
	head := []byte("GET / HTTP/1.1\r\nHost: " + host + "\r\nX: " + strings.Repeat("x", 60))
	for i := range head {
		if _, err := c.Write(head[i : i+1]); err != nil {
			return nil // cut
		}
		if err := c.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			return err
		}
		var timeout net.Error
		if _, err := c.Read(make([]byte, 512)); err == nil || !errors.As(err, &timeout) || !timeout.Timeout() {
			return nil // answered, or cut
		}
		if time.Since(began) > 15*time.Second {
			return errors.New("a head that never ends is still waited for")
		}
	}
	return errors.New("a head that never ends was taken")
}

// answeredSoon makes one request, which must be answered with one of the codes
// within ten seconds.
func (t *Trial) answeredSoon(ctx context.Context, host string, codes ...int) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	c, err := t.suite.dialFront(ctx, host)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(15 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write(call{host: host}.bytes()); err != nil {
		return err
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if !slices.Contains(codes, res.StatusCode) {
		return fmt.Errorf("the status is %s", res.Status)
	}
	return nil
}

// wakeStorm: many requests for a paused sandbox wake it once, and all are
// answered; one that is not to be woken stays asleep.
func wakeStorm(t *Trial) {
	make := func(resume bool) *client.Sandbox {
		sb, err := t.suite.client.Create(t.ctx, client.CreateOptions{Timeout: 5 * time.Minute, AutoPause: true, AutoResume: resume})
		t.must("start a sandbox", err)
		t.fresh = append(t.fresh, &Subject{Sandbox: sb})
		t.must("pause it", sb.Pause(t.ctx))
		return sb
	}
	host := func(sb *client.Sandbox) string {
		h, _, _ := strings.Cut(sb.Host(portOne), ":")
		return h
	}
	waking, sleeping := make(true), make(false)
	t.Try(Try{What: "100 requests at once for a paused sandbox that traffic wakes", Slow: 40 * time.Second, Do: func(ctx context.Context) error {
		err := concurrently(slices.Repeat([]struct{}{{}}, 100), func(int, struct{}) error { // nothing listens in it
			return t.answeredSoon(ctx, host(waking), http.StatusBadGateway, http.StatusTooManyRequests)
		})
		info, ierr := waking.Info(ctx)
		if ierr == nil && info.State != "running" {
			ierr = fmt.Errorf("it is %s", info.State)
		}
		return errors.Join(err, ierr)
	}})
	t.Try(Try{What: "100 requests at once for one that it does not wake", Slow: 40 * time.Second, Do: func(ctx context.Context) error {
		err := concurrently(slices.Repeat([]struct{}{{}}, 100), func(int, struct{}) error {
			return t.answeredSoon(ctx, host(sleeping), http.StatusBadGateway, http.StatusConflict, http.StatusTooManyRequests)
		})
		info, ierr := sleeping.Info(ctx)
		if ierr == nil && info.State != "paused" {
			ierr = fmt.Errorf("it is %s", info.State)
		}
		return errors.Join(err, ierr)
	}})
}
