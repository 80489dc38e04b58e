package conformance

import (
	"bytes"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/cordonhq/cordon/internal/lab"
)

// wire looks at what the recorder sees between two moments.
type wire struct {
	from lab.Mark
	old  map[tcpFlow]bool // connections that began before from: their ends may still pass
}

type tcpFlow struct{ src, dst netip.AddrPort }

// begin starts a new step: what was seen so far is of the past.
func (w *wire) begin(r *lab.Recorder) {
	if w.old == nil {
		w.old = map[tcpFlow]bool{}
	}
	now := r.Mark()
	for _, p := range r.Since(w.from).Packets() {
		if p.Proto == lab.ProtoTCP {
			w.old[tcpFlow{p.Src, p.Dst}] = true
		}
	}
	w.from = now
}

// since returns what left the host in this step, without the ends of older
// connections.
func (w *wire) since(r *lab.Recorder) lab.Seen {
	return r.Since(w.from).Where(func(p lab.Packet) bool {
		return p.Proto != lab.ProtoTCP || !w.old[tcpFlow{p.Src, p.Dst}]
	})
}

// Arrival is something that must reach the internet in a step.
type Arrival struct {
	At   netip.Addr // or the IPv6 twin of it
	Port uint16     // 0: any
	Text string     // carried in the clear; empty: anything
}

// stray returns what arrived that nobody expects: packets to addresses that no
// arrival names, and questions for names that may not be asked.
func stray(seen lab.Seen, l *lab.Lab, arrivals []Arrival, asked func(name string) bool) lab.Seen {
	return seen.Where(func(p lab.Packet) bool {
		for _, a := range arrivals {
			if (p.Dst.Addr() == a.At || a.At.Is4() && p.Dst.Addr() == l.Twin6(a.At)) && (a.Port == 0 || p.Dst.Port() == a.Port) {
				return false
			}
		}
		upstream := slices.Contains(l.Upstreams(), p.Dst)
		return !upstream || !asksOnly(seen, p, asked)
	})
}

// asksOnly reports whether a packet to an upstream name server is part of an
// exchange whose questions are all expected.
func asksOnly(seen lab.Seen, p lab.Packet, asked func(string) bool) bool {
	same := seen.Where(func(q lab.Packet) bool { return q.Src == p.Src && q.Dst == p.Dst && q.Proto == p.Proto })
	questions := same.Questions()
	for _, q := range questions {
		if !asked(q.Name) {
			return false
		}
	}
	return len(questions) > 0
}

// carries reports whether a text left the host in any form it may have: as bytes
// in any case, or as a name in a DNS question.
func carries(seen lab.Seen, text string) bool {
	low := []byte(strings.ToLower(text))
	if bytes.Contains(bytes.ToLower(seen.Payload()), low) {
		return true
	}
	var asDNS []byte
	for label := range strings.SplitSeq(text, ".") {
		asDNS = append(append(asDNS, byte(len(label))), strings.ToLower(label)...)
	}
	return strings.Contains(text, ".") && bytes.Contains(bytes.ToLower(seen.Payload()), asDNS) || seen.AskedFor(text)
}

// summary says what arrived, for the table.
func summary(seen lab.Seen) string {
	bytesTo := map[string]int{}
	for _, p := range seen.Packets() {
		if p.Dst.Port() == 53 {
			continue
		}
		to := p.Dst.String()
		switch p.Proto {
		case lab.ProtoTCP:
		case lab.ProtoUDP:
			to += "/udp"
		default:
			to = fmt.Sprintf("%s/ip-%d", p.Dst.Addr(), p.Proto)
		}
		bytesTo[to] += len(p.Payload)
	}
	var out []string
	for _, to := range slices.Sorted(maps.Keys(bytesTo)) {
		out = append(out, fmt.Sprintf("%s %d B", to, bytesTo[to]))
	}
	names := map[string]bool{}
	for _, q := range seen.Questions() {
		names[q.Name] = true
	}
	if len(names) > 3 {
		out = append(out, fmt.Sprintf("%d names asked", len(names)))
	} else if len(names) > 0 {
		out = append(out, "asked "+strings.Join(slices.Sorted(maps.Keys(names)), " "))
	}
	if len(out) == 0 {
		return "nothing"
	}
	if len(out) > 4 {
		out = append(out[:3], fmt.Sprintf("and %d more", len(out)-3))
	}
	return strings.Join(out, ", ")
}
