package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/conformance/probe"
)

func httpCases() []Case {
	const group = "HTTP/1"
	return []Case{
		{ID: 15, Group: group, Title: "a second request on the connection, for B", Run: secondRequest},
		{ID: 16, Group: group, Title: "pipelined requests", Run: pipelined},
		{ID: 17, Group: group, Title: "two Host headers", Run: twoHosts},
		{ID: 18, Group: group, Title: "absolute form against Host", Run: absoluteForm},
		{ID: 19, Group: group, Title: "folded lines, spaces, bare LF, NUL", Run: malformedHead},
		{ID: 20, Group: group, Title: "Content-Length against Transfer-Encoding, and its family", Run: framing},
		{ID: 21, Group: group, Title: "a head over the cap", Run: oversizedHead},
		{ID: 22, Group: group, Title: "HOST:, HTTP/1.0 and no Host", Run: oldHosts},
		{ID: 23, Group: group, Title: "CONNECT, spelled and placed otherwise", Run: connectVariants},
		{ID: 24, Group: group, Title: "upgrades", Run: upgrades},
		{ID: 25, Group: group, Title: "HTTP/2 with prior knowledge", Run: priorKnowledge},
		{ID: 26, Group: group, Title: "a redirect to B", Run: redirected},
	}
}

// reachesA is what arrives when A is asked on port 80.
var reachesA = []Arrival{{At: addrA, Port: 80}}

func secondRequest(t *Trial) {
	s := t.Sandbox(standard())
	turns := func(parts ...[]byte) []probe.Order {
		o := http80(addrA, parts...)
		o.Turns = true
		return []probe.Order{o}
	}
	t.Try(Try{
		What: "A, then B on the kept connection", By: s, Orders: turns(keep(nameA, "/"), get(nameB, "/canary-15")),
		Reaches: reachesA, Never: []string{nameB, "canary-15"}, Answer: thenDenied(served(addrA, nameA)),
		Log: Want{"deny", []string{"name-denied"}, nameB},
	})
	t.Try(Try{
		What: "A, A, then B's address in Host", By: s,
		Orders:  turns(keep(nameA, "/"), keep(nameA, "/"), get(addrB.String(), "/canary-15")),
		Reaches: reachesA, Never: []string{addrB.String(), "canary-15"}, Answer: thenDenied(served(addrA, nameA, nameA)),
		Log: denied("no-host"),
	})
	t.Try(Try{
		What: "control: A, then another allowed name, each at its own address", By: s,
		Orders:  turns(keep(nameA, "/"), get(nameShared, "/")),
		Reaches: []Arrival{{At: addrA, Port: 80}, {At: addrShared, Port: 80}},
		Answer:  servedEach(place{addrA, nameA}, place{addrShared, nameShared}), Log: allowed("allow-name"),
	})
}

// thenDenied: the answers are right, and the connection then ended with a 403.
func thenDenied(before func(probe.Outcome) error) func(probe.Outcome) error {
	return func(got probe.Outcome) error {
		at := bytes.LastIndex(got.Received, []byte("HTTP/1.1 403 "))
		if at < 0 || !forbidden(got.Received[at:]) || got.End != probe.EOF {
			return errors.New("the connection did not end with a 403")
		}
		got.Received = got.Received[:at]
		return before(got)
	}
}

func pipelined(t *Trial) {
	s := t.Sandbox(standard())
	post := fmt.Sprintf("POST / HTTP/1.1\r\nHost: %s\r\nContent-Length: 4\r\n\r\nbody", nameA)
	for what, first := range map[string][]byte{"GET": keep(nameA, "/"), "POST with a body": []byte(post)} {
		t.Try(Try{
			What: "A (" + what + ") and B in one segment", By: s,
			Orders:  []probe.Order{http80(addrA, append(first, get(nameB, "/canary-16")...))},
			Reaches: reachesA, Never: []string{nameB, "canary-16"}, Answer: thenDenied(served(addrA, nameA)),
			Log: Want{"deny", []string{"name-denied"}, nameB},
		})
	}
	t.Try(Try{
		What: "control: A twice in one segment", By: s,
		Orders:  []probe.Order{http80(addrA, append(keep(nameA, "/"), get(nameA, "/")...))},
		Reaches: reachesA, Answer: served(addrA, nameA, nameA), Log: allowed("allow-name"),
	})
}

// heads makes one order on port 80 for each head. In it {A} and {B} stand for
// the names, a line feed for CRLF, and "␊" for a bare one.
func heads(to netip.Addr, texts ...string) []probe.Order {
	short := strings.NewReplacer("{A}", nameA, "{B}", nameB, "\n", "\r\n", "␊", "\n")
	return each(texts, func(text string) probe.Order { return http80(to, []byte(short.Replace(text))) })
}

// refuseHeads tries heads that must be denied before a byte of them leaves.
func refuseHeads(t *Trial, what string, log Want, texts ...string) {
	t.Try(Try{
		What: what, By: t.Sandbox(standard()), Orders: heads(addrA, texts...),
		Never: []string{nameB, "canary"}, Answer: cut, Log: log,
	})
}

// acceptHeads tries heads that A must get, one answer each.
func acceptHeads(t *Trial, what string, texts ...string) {
	t.Try(Try{
		What: "control: " + what, By: t.Sandbox(standard()), Orders: heads(addrB, texts...),
		Reaches: reachesA, Answer: served(addrA, nameA), Log: allowed("allow-name"),
	})
}

func twoHosts(t *Trial) {
	refuseHeads(t, "A and B, B and A, A and A, A and an empty one", denied("bad-request"),
		"GET /canary HTTP/1.1\nHost: {A}\nHost: {B}\n\n",
		"GET /canary HTTP/1.1\nHost: {B}\nHost: {A}\n\n",
		"GET /canary HTTP/1.1\nHost: {A}\nHost: {A}\n\n",
		"GET /canary HTTP/1.1\nHost: {A}\nX: y\nhOST:\n\n")
	refuseHeads(t, "a list, and Host dropped by Connection", denied("bad-request", "bad-name"),
		"GET /canary HTTP/1.1\nHost: {A}, {B}\n\n",
		"GET /canary HTTP/1.1\nHost: {A} {B}\n\n",
		"GET /canary HTTP/1.1\nHost: {A}\nConnection: host, close\n\n")
	acceptHeads(t, "one Host", "GET / HTTP/1.1\nHost: {A}\nConnection: close\n\n")
}

func absoluteForm(t *Trial) {
	refuseHeads(t, "a target that is not the Host", denied("bad-request"),
		"GET http://{B}/canary HTTP/1.1\nHost: {A}\n\n",
		"GET http://{A}/canary HTTP/1.1\nHost: {B}\n\n",
		"GET http://{A}:8080/canary HTTP/1.1\nHost: {A}\n\n",
		"GET http://198.51.100.20/canary HTTP/1.1\nHost: {A}\n\n")
	refuseHeads(t, "other schemes, userinfo, no authority", denied("bad-request", "bad-name"),
		"GET https://{A}/canary HTTP/1.1\nHost: {A}\n\n",
		"GET ftp://{A}/canary HTTP/1.1\nHost: {A}\n\n",
		"GET http://{A}@{B}/canary HTTP/1.1\nHost: {A}\n\n",
		"GET http:///canary HTTP/1.1\nHost: {A}\n\n",
		"GET {B}/canary HTTP/1.1\nHost: {A}\n\n")
	refuseHeads(t, "B both times", Want{"deny", []string{"name-denied"}, nameB},
		"GET http://{B}/canary HTTP/1.1\nHost: {B}\n\n")
	acceptHeads(t, "A both times; a query is no authority",
		"GET http://{A}/ HTTP/1.1\nHost: {A}\nConnection: close\n\n",
		"GET HTTP://{A} HTTP/1.1\nHost: {A}\nConnection: close\n\n",
		"GET /?http://{B}/ HTTP/1.1\nHost: {A}\nConnection: close\n\n")
}

func malformedHead(t *Trial) {
	refuseHeads(t, "a folded Host, a folded field before it", denied("bad-request"),
		"GET /canary HTTP/1.1\nHost:\n {A}\n\n",
		"GET /canary HTTP/1.1\nHost: {A}\n {B}\n\n",
		"GET /canary HTTP/1.1\nX: y\n Host: {B}\nHost: {A}\n\n",
		"GET /canary HTTP/1.1\n Host: {B}\nHost: {A}\n\n")
	refuseHeads(t, "spaces around the name of the field", denied("bad-request"),
		"GET /canary HTTP/1.1\nHost : {A}\n\n",
		"GET /canary HTTP/1.1\nHost\t: {A}\n\n",
		"GET /canary HTTP/1.1\nHost: {A}\nHost : {B}\n\n",
		"GET  /canary HTTP/1.1\nHost: {A}\n\n",
		"GET /canary  HTTP/1.1\nHost: {A}\n\n")
	refuseHeads(t, "bare LF and bare CR", denied("bad-request", "bad-name"),
		"GET /canary HTTP/1.1␊Host: {A}␊␊",
		"GET /canary HTTP/1.1\nHost: {A}␊Host: {B}\n\n",
		"GET /canary HTTP/1.1\nX: y\rHost: {B}\nHost: {A}\n\n")
	refuseHeads(t, "NUL and other controls", denied("bad-request", "bad-name", "protocol-mismatch"),
		"GET /canary HTTP/1.1\nHost: {A}\x00.{B}\n\n",
		"GET /canary HTTP/1.1\nHo\x00st: {A}\nHost: {A}\n\n",
		"GET /canary\x00 HTTP/1.1\nHost: {A}\n\n",
		"GET /canary HTTP/1.1\nHost: {A}\nX: \x0b\n\n",
		"GET /canary HTTP/1.1\nHost: {A}\x7f\n\n")
	refuseHeads(t, "versions that are none", denied("bad-request", "protocol-mismatch"),
		"GET /canary HTTP/1.10\nHost: {A}\n\n", "GET /canary HTTP/2.0\nHost: {A}\n\n",
		"GET /canary http/1.1\nHost: {A}\n\n", "GET /canary\nHost: {A}\n\n")
	acceptHeads(t, "the same head, well formed", "GET / HTTP/1.1\nX: y\nHost:\t{A} \nConnection: close\n\n")
}

// framing: what two readers could cut in different places is refused, so that no
// request for B hides in a body for A.
func framing(t *Trial) {
	const post = "POST / HTTP/1.1\nHost: {A}\n"
	const hidden = "GET /canary HTTP/1.1\nHost: {B}\n\n"
	refuseHeads(t, "both, twice, disagreeing", denied("bad-request"),
		post+"Content-Length: 6\nTransfer-Encoding: chunked\n\n0\n\n"+hidden,
		post+"Transfer-Encoding: chunked\nContent-Length: 6\n\n0\n\n"+hidden,
		post+"Content-Length: 0\nContent-Length: 44\n\n"+hidden,
		post+"Content-Length: 0\nContent-Length: 0\n\n"+hidden,
		post+"Content-Length: 0, 0\n\n"+hidden,
		post+"Transfer-Encoding: chunked\nTransfer-Encoding: identity\n\n0\n\n"+hidden)
	refuseHeads(t, "lengths that are not plain digits", denied("bad-request"),
		post+"Content-Length: +0\n\n"+hidden, post+"Content-Length: -1\n\n"+hidden, post+"Content-Length: 0x0\n\n"+hidden,
		post+"Content-Length: 0 0\n\n"+hidden, post+"Content-Length:\n\n"+hidden, post+"Content-Length: 99999999999999999999\n\n"+hidden)
	refuseHeads(t, "codings that are not exactly chunked", denied("bad-request"),
		post+"Transfer-Encoding: xchunked\n\n0\n\n"+hidden, post+"Transfer-Encoding: chunked, identity\n\n0\n\n"+hidden,
		post+"Transfer-Encoding: identity\n\n"+hidden, post+"Transfer-Encoding: \"chunked\"\n\n0\n\n"+hidden,
		post+"Transfer-Encoding: chunked\x0b\n\n0\n\n"+hidden, post+"Transfer-Encoding : chunked\n\n0\n\n"+hidden,
		post+"Transfer-Encoding:\n chunked\n\n0\n\n"+hidden,
		"POST / HTTP/1.0\nHost: {A}\nTransfer-Encoding: chunked\n\n0\n\n"+hidden)
	s := t.Sandbox(standard())
	const chunked = post + "Transfer-Encoding: chunked\n\n"
	t.Try(Try{
		What: "chunks that are malformed: A gets a part of the body, B nothing", By: s,
		Orders: heads(addrA, chunked+"0x5\nhello\n0\n\n"+hidden, chunked+"5 \nhello\n0\n\n"+hidden, chunked+"5\nhelloX\n0\n\n"+hidden,
			chunked+"5\nhello\n0␊␊"+hidden, chunked+"-1\n\n"+hidden, chunked+"fffffffffffffffff\n"+hidden, chunked+"5;a=␊\nhello\n0\n\n"+hidden),
		Reaches: reachesA, Never: []string{nameB, "canary"}, Answer: noneOf(nameB), Log: denied("bad-request"),
	})
	t.Try(Try{
		What: "a body that ends, and then B", By: s,
		Orders:  heads(addrA, chunked+"5\nhello\n0\n\n"+hidden, post+"Content-Length: 5\n\nhello"+hidden),
		Reaches: reachesA, Never: []string{nameB, "canary"}, Answer: thenDenied(served(addrA, nameA)),
		Log: Want{"deny", []string{"name-denied"}, nameB},
	})
	t.Try(Try{
		What: "control: the same request inside a body is a body", By: s,
		Orders:  heads(addrA, fmt.Sprintf("%sConnection: close\nContent-Length: %d\n\n%s", post, len("GET /canary HTTP/1.1\r\nHost: \r\n\r\n")+len(nameB), hidden)),
		Reaches: []Arrival{{At: addrA, Port: 80, Text: "canary"}}, Answer: served(addrA, nameA), Log: allowed("allow-name"),
	})
}

// noneOf: whatever was answered, no page is for the host.
func noneOf(host string) func(probe.Outcome) error {
	return func(got probe.Outcome) error {
		_, pages, _ := responses(got) // the last may be cut
		for _, p := range pages {
			if p.Host == host {
				return fmt.Errorf("%s was reached", host)
			}
		}
		if got.End == probe.Timeout {
			return errors.New("it was left hanging")
		}
		return nil
	}
}

func oversizedHead(t *Trial) {
	refuseHeads(t, "a head of 40 KiB, a target of 40 KiB, 300 fields", denied("sniff-too-big", "bad-request"),
		"GET /canary HTTP/1.1\nHost: {A}\nX: "+strings.Repeat("x", 40<<10)+"\n\n",
		"GET /canary"+strings.Repeat("x", 40<<10)+" HTTP/1.1\nHost: {A}\n\n",
		"GET /canary HTTP/1.1\nHost: {A}\n"+strings.Repeat("X: y\n", 300)+"\n")
	refuseHeads(t, "a Host of 5 KiB, with A at either end", denied("bad-name", "bad-request"),
		"GET /canary HTTP/1.1\nHost: "+strings.Repeat("x", 5<<10)+".{A}\n\n",
		"GET /canary HTTP/1.1\nHost: {A}"+strings.Repeat(".", 5<<10)+"\n\n")
	refuseHeads(t, "B's Host behind 5 KiB of other fields", Want{"deny", []string{"name-denied"}, nameB},
		"GET /canary HTTP/1.1\nX: "+strings.Repeat("x", 5<<10)+"\nHost: {B}\n\n")
	acceptHeads(t, "A's Host behind 5 KiB, before 20 KiB",
		"GET / HTTP/1.1\nConnection: close\nX: "+strings.Repeat("x", 5<<10)+"\nHost: {A}\n\n",
		"GET / HTTP/1.1\nHost: {A}\nConnection: close\nX: "+strings.Repeat("x", 20<<10)+"\n\n")
}

func oldHosts(t *Trial) {
	refuseHeads(t, "no Host in HTTP/1.1", denied("bad-request"), "GET /canary HTTP/1.1\n\n", "GET /canary HTTP/1.1\nX-Host: {A}\n\n")
	refuseHeads(t, "no Host in HTTP/1.0, an empty Host", denied("no-host"),
		"GET /canary HTTP/1.0\n\n", "GET /canary HTTP/1.0\nHost:\n\n", "GET /canary HTTP/1.1\nHost:\n\n")
	refuseHeads(t, "HTTP/0.9", denied("bad-request", "protocol-mismatch"), "GET /canary\n\n")
	refuseHeads(t, "B as HOST:", Want{"deny", []string{"name-denied"}, nameB}, "GET /canary HTTP/1.1\nHOST: {B}\n\n", "GET /canary HTTP/1.0\nhost: {B}\n\n")
	acceptHeads(t, "A as HOST: and in HTTP/1.0",
		"GET / HTTP/1.1\nHOST: {A}\nConnection: close\n\n", "GET / HTTP/1.1\nhOsT:{A}\nConnection: close\n\n", "GET / HTTP/1.0\nHost: {A}\n\n")
}

func connectVariants(t *Trial) {
	refuseHeads(t, "on port 80, whatever the target", denied("bad-request"),
		"CONNECT {A}:80 HTTP/1.1\nHost: {A}\n\nGET /canary HTTP/1.1\nHost: {B}\n\n",
		"CONNECT / HTTP/1.1\nHost: {A}\n\n", "CONNECT http://{A}/ HTTP/1.1\nHost: {A}\n\n",
		"connect {B}:443 HTTP/1.1\nHost: {A}\n\n")
	s := t.Sandbox(standard())
	t.Try(Try{
		What: "as the second request", By: s,
		Orders:  []probe.Order{http80(addrA, append(keep(nameA, "/"), "CONNECT "+nameB+":443 HTTP/1.1\r\nHost: "+nameA+"\r\n\r\ncanary"...))},
		Reaches: reachesA, Never: []string{nameB, "canary"}, Answer: thenDenied(served(addrA, nameA)), Log: denied("bad-request"),
	})
}

func upgrades(t *Trial) {
	const get = "GET /canary HTTP/1.1\nHost: {A}\nConnection: close, Upgrade"
	acceptHeads(t, "offers of HTTP/2 and TLS, and choices, are dropped; others are A's to decline",
		get+", HTTP2-Settings\nUpgrade: h2c\nHTTP2-Settings: AAMAAABkAAQAAP__\n\n", get+"\nUpgrade: h2c\n\n",
		get+"\nUpgrade: websocket, tcp\n\n", get+"\nUpgrade: websocket\nUpgrade: h2c\n\n", get+"\nUpgrade: TLS/1.2\n\n",
		get+"\nUpgrade: CONNECT-UDP\n\n", get+"\nUpgrade: tcp\nContent-Length: 6\n\ncanary")
	refuseHeads(t, "WebSocket to B, an offer that is no token", denied("bad-request", "name-denied"),
		get+"\nUpgrade: web socket\n\n",
		"GET /canary HTTP/1.1\nHost: {B}\nConnection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\n\n")
	handshake := []byte("GET /ws HTTP/1.1\r\nHost: " + nameA + "\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
	frame := func(opcode byte, text string) []byte { // masked by zeros: RFC 6455 section 5.2
		return append([]byte{0x80 | opcode, 0x80 | byte(len(text)), 0, 0, 0, 0}, text...)
	}
	s := t.Sandbox(standard())
	ws := func(parts ...[]byte) []probe.Order {
		o := http80(addrA, append([][]byte{handshake}, parts...)...)
		o.Turns = true
		return []probe.Order{o}
	}
	t.Try(Try{
		What: "control: WebSocket at A echoes", By: s, Orders: ws(frame(1, "canary"), frame(8, "")), Reaches: reachesA,
		Answer: func(got probe.Outcome) error {
			if !bytes.Contains(got.Received, []byte("canary")) {
				return errors.New("no echo came")
			}
			return nil
		}, Log: allowed("allow-name"),
	})
	t.Try(Try{
		What: "a request for B after the upgrade is A's to read", By: s,
		Orders: ws([]byte("GET /canary HTTP/1.1\r\nHost: " + nameB + "\r\n\r\n")), Reaches: reachesA,
		Answer: noneOf(nameB), Log: allowed("allow-name"),
	})
}

func priorKnowledge(t *Trial) {
	const preface = "PRI * HTTP/2.0\n\nSM\n\n" // RFC 9113 section 3.4
	settings := "\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	refuseHeads(t, "the preface, and PRI with a Host", denied("bad-request", "protocol-mismatch"),
		preface+settings, "PRI / HTTP/1.1\nHost: {A}\n\n")
	s := t.Sandbox(standard())
	t.Try(Try{
		What: "the preface as the second request", By: s,
		Orders:  heads(addrA, "GET / HTTP/1.1\nHost: {A}\n\n"+preface+settings+"canary"),
		Reaches: reachesA, Never: []string{"PRI * HTTP", "canary"}, Answer: thenDenied(served(addrA, nameA)), Log: denied("bad-request"),
	})
}

// redirected: a client that follows is judged again.
func redirected(t *Trial) {
	s := t.Sandbox(standard())
	curl := func(url string) func(context.Context) error {
		return func(ctx context.Context) error {
			r, err := s.Commands.Run(ctx, "curl -fsSL --max-time 5 '"+url+"'", client.RunOptions{})
			if err == nil && r.ExitCode == 0 {
				err = fmt.Errorf("curl got %q", r.Stdout)
			}
			return err
		}
	}
	t.Try(Try{
		What: "to B's name", By: s, Do: curl("http://" + nameA + "/redirect?to=http://" + nameB + "/"), Reaches: reachesA,
		Log: Want{"deny", []string{"name-denied"}, nameB},
	})
	t.Try(Try{
		What: "to B's address, by HTTP and HTTPS", By: s, LogOnce: true,
		Do: func(ctx context.Context) error {
			return errors.Join(curl("http://"+nameA+"/redirect?to=http://"+addrB.String()+"/")(ctx),
				curl("http://"+nameA+"/redirect?to=https://"+addrB.String()+"/")(ctx))
		},
		Reaches: reachesA, Log: denied("no-host"),
	})
	t.Try(Try{
		What: "control: to another allowed name", By: s,
		Do: func(ctx context.Context) error {
			r, err := s.Commands.Run(ctx, "curl -sSL --max-time 5 'http://"+nameA+"/redirect?to=http://"+nameShared+"/'", client.RunOptions{})
			if err == nil && !strings.Contains(r.Stdout, nameShared) {
				err = fmt.Errorf("curl got %q %q", r.Stdout, r.Stderr)
			}
			return err
		},
		Reaches: []Arrival{{At: addrA, Port: 80}, {At: addrShared, Port: 80}}, Log: allowed("allow-name"),
	})
}
