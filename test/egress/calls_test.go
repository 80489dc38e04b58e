package egress_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/cordonhq/cordon/client"
)

// calls are requests as a client of gRPC without TLS sends them, one after the other on
// one connection. Each is a message there and back, twice, on an open stream, and ends
// with trailers.
type calls struct {
	Addr  string   // "name:port"
	Names []string // the :authority of each
}

// makeCalls says for each call "ok", the status it was answered with, or the error.
func makeCalls(ctx context.Context, c calls) (out []string, err error) {
	tr := &http.Transport{Protocols: new(http.Protocols)}
	tr.Protocols.SetUnencryptedHTTP2(true)
	cc, err := tr.NewClientConn(ctx, "http", c.Addr)
	if err != nil {
		return nil, err
	}
	defer cc.Close()
	for _, name := range c.Names {
		how, err := makeCall(ctx, cc, name)
		if err != nil {
			how = failed(err).Class
		}
		out = append(out, how)
	}
	return out, nil
}

func makeCall(ctx context.Context, cc *http.ClientConn, authority string) (string, error) {
	body, w := io.Pipe()
	defer w.Close()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+authority+"/pkg.Service/Chat", body)
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("TE", "trailers")
	res, err := cc.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	if status := res.Header.Get("Grpc-Status"); status != "" || res.StatusCode != http.StatusOK {
		return strings.TrimSpace(res.Header.Get("Grpc-Status") + " " + res.Header.Get("Grpc-Message")), nil
	}
	for _, msg := range []string{"one", "two, which is longer"} {
		if _, err := io.WriteString(w, msg); err != nil {
			return "", err
		}
		got := make([]byte, len(msg))
		if _, err := io.ReadFull(res.Body, got); err != nil {
			return "", err
		}
		if string(got) != msg {
			return "", fmt.Errorf("%q came back for %q", got, msg)
		}
	}
	w.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return "", err
	}
	if res.Trailer.Get("Grpc-Status") != "0" {
		return "", errors.New("no trailers")
	}
	return "ok", nil
}

// chat is the service that makeCall calls.
func chat(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/grpc")
	w.Header().Set("Trailer", "Grpc-Status")
	rc := http.NewResponseController(w)
	_ = rc.Flush()
	b := make([]byte, 4096)
	for {
		n, err := r.Body.Read(b)
		_, _ = w.Write(b[:n])
		_ = rc.Flush()
		if err != nil {
			break
		}
	}
	w.Header().Set("Grpc-Status", "0")
}

func (y try) on(port int) try {
	y.Addr = fmt.Sprintf("%s:%d", hostOf(y.Addr), port)
	return y
}

// testCalls is gRPC without TLS: it works where a rule names the port, for the name of
// the rule alone.
func testCalls(t *testing.T, s *live) {
	const one, other = "grpc.wild.test", "more.wild.test"
	for _, name := range []string{one, other} {
		s.lab.Site(name, http.HandlerFunc(chat))
	}
	g := s.guest(t, client.Network{DenyOut: all, AllowOut: []string{one + ":8080"}})
	mark, since := s.lab.Journal().Mark(), g.lastSeq()
	got := ask[[]string](g, "/calls", calls{one + ":8080", []string{one + ":8080", one, other + ":8080"}})
	if len(got) != 3 || got[0] != "ok" || got[1] != "ok" || got[2] == "ok" || got[2] == "timeout" {
		t.Errorf("the calls ended with %q, want ok, ok and a refusal", got)
	}
	for _, r := range s.lab.Journal().Since(mark, nil) {
		if strings.HasPrefix(r.Host, other) {
			t.Errorf("the call for another name reached the server: %+v", r)
		}
	}
	g.logged(since, check{get(one, one).on(8080), "", verdict{"allow", "allow[0]", "allow-name"}, ""})
	g.logged(since, check{get(other, other).on(8080), "", verdict{"deny", "deny[0]", "name-denied"}, ""})

	g.rules(client.Network{DenyOut: all, AllowOut: []string{one}})
	if out, err := askErr[[]string](g, "/calls", calls{one + ":8080", []string{one}}); err == nil && out[0] == "ok" {
		t.Error("it works without a rule for the port")
	}
	g.rules(client.Network{DenyOut: all, AllowOut: []string{one, one + ":80"}})
	if out, err := askErr[[]string](g, "/calls", calls{one + ":80", []string{one}}); err == nil && out[0] == "ok" {
		t.Error("it works on port 80")
	}
}
