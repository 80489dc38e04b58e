package conformance

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"

	"github.com/cordonhq/cordon/proving/conformance/probe"
	"github.com/cordonhq/cordon/proving/lab"
)

// accessDenied is the fatal TLS alert of a denial (RFC 8446 section 6.2).
var accessDenied = []byte{21, 3, 3, 0, 2, 2, 49}

// forbidden reports whether b is exactly the answer of a denial over HTTP.
func forbidden(b []byte) bool {
	r := bufio.NewReader(bytes.NewReader(b))
	res, err := http.ReadResponse(r, nil)
	if err != nil || res.Status != "403 Denied by egress policy" || res.Header.Get("X-Cordon-Deny") == "" {
		return false
	}
	body, err := io.ReadAll(res.Body)
	return err == nil && bytes.HasPrefix(body, []byte("# denied by egress policy: ")) && bytes.Count(body, []byte("\n")) == 1 && r.Buffered() == 0
}

// cut: the connection ended with no answer but the alert or the 403 of a denial.
func cut(got probe.Outcome) error {
	switch {
	case got.Secured:
		return errors.New("a TLS handshake completed")
	case bytes.Equal(got.Received, accessDenied), forbidden(got.Received):
		return nil
	case len(got.Received) > 0:
		return errors.New("somebody answered")
	case got.End == probe.Timeout:
		return errors.New("it was left hanging")
	}
	return nil
}

// alerted: cut, and told by the alert.
func alerted(got probe.Outcome) error {
	if err := cut(got); err != nil {
		return err
	}
	if !bytes.Equal(got.Received, accessDenied) && got.End != "remote error: tls: access denied" {
		return errors.New("no access_denied alert came")
	}
	return nil
}

// reset: cut by RST, with no byte of an answer.
func reset(got probe.Outcome) error {
	if err := cut(got); err != nil {
		return err
	}
	if got.End != probe.Reset || len(got.Received) > 0 {
		return errors.New("it was not reset")
	}
	return nil
}

// refused: no connection came about, and that was told at once.
func refused(got probe.Outcome) error {
	if got.Connected || got.End != probe.Refused {
		return errors.New("it was not refused")
	}
	return nil
}

// unanswered: nothing came back but the 403 of a denial. UDP and ICMP denials are told by ICMP errors,
// which are limited in rate, so silence is as good.
func unanswered(got probe.Outcome) error {
	if len(got.Replies) > 0 || len(got.Received) > 0 && !forbidden(got.Received) {
		return errors.New("somebody answered")
	}
	return nil
}

// answered: bytes came back.
func answered(got probe.Outcome) error {
	if len(got.Replies) == 0 && len(got.Received) == 0 {
		return errors.New("nobody answered")
	}
	return nil
}

// echoed: exactly the bytes sent came back.
func echoed(want []byte) func(probe.Outcome) error {
	return func(got probe.Outcome) error {
		if !bytes.Equal(got.Received, want) && !(len(got.Replies) > 0 && bytes.Equal(got.Replies[0], want)) {
			return errors.New("the bytes did not come back as sent")
		}
		return nil
	}
}

// serverHello: a TLS server answered the hello with a handshake message.
func serverHello(got probe.Outcome) error {
	if len(got.Received) < 6 || got.Received[0] != 22 || got.Received[5] != 2 {
		return errors.New("no ServerHello came")
	}
	return nil
}

// responses parses the HTTP responses that came.
func responses(got probe.Outcome) ([]*http.Response, []lab.Page, error) {
	var all []*http.Response
	var pages []lab.Page
	r := bufio.NewReader(bytes.NewReader(got.Received))
	for {
		if _, err := r.Peek(1); err != nil {
			return all, pages, nil
		}
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			return all, pages, fmt.Errorf("read response %d: %w", len(all)+1, err)
		}
		body, err := io.ReadAll(res.Body)
		if err != nil {
			return all, pages, fmt.Errorf("read the body of response %d: %w", len(all)+1, err)
		}
		var p lab.Page
		_ = json.Unmarshal(body, &p) // not every answer is a page
		all, pages = append(all, res), append(pages, p)
	}
}

// place is a server and the Host it was shown.
type place struct {
	at   netip.Addr // or its IPv6 twin
	host string
}

// servedEach: the answers are exactly one page of each place, in order.
func servedEach(places ...place) func(probe.Outcome) error {
	return func(got probe.Outcome) error {
		_, pages, err := responses(got)
		if err != nil {
			return err
		}
		if len(pages) != len(places) {
			return fmt.Errorf("%d answers came, not %d", len(pages), len(places))
		}
		for i, p := range pages {
			server, err := netip.ParseAddrPort(p.Server)
			want := places[i]
			if err != nil || server.Addr() != want.at && !(want.at.Is4() && server.Addr() == twin(want.at)) {
				return fmt.Errorf("the answer is from %q, not from %s", p.Server, want.at)
			}
			if p.Host != want.host {
				return fmt.Errorf("the server saw Host %q, not %q", p.Host, want.host)
			}
		}
		return nil
	}
}

// served: servedEach, all by one server.
func served(at netip.Addr, hosts ...string) func(probe.Outcome) error {
	places := make([]place, len(hosts))
	for i, h := range hosts {
		places[i] = place{at, h}
	}
	return servedEach(places...)
}

// twin is the lab's IPv6 address of the server at an IPv4 address.
func twin(a netip.Addr) netip.Addr {
	b, v4 := netip.MustParseAddr("2001:db8:80::").As16(), a.As4()
	copy(b[12:], v4[:])
	return netip.AddrFrom16(b)
}
