package conformance

import (
	"bytes"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/cordonhq/cordon/proving/lab"
)

// wire looks at what the recorder sees between two moments.
type wire struct {
	from lab.Mark
	// What began before from, by flow: connections, whose ends may still pass, with
	// the number their last SYN had, and questions to name servers, to whose late
	// answers the host may still object.
	connections map[flow]uint32
	questions   map[flow]bool
}

// flow is one direction of a connection or exchange, away from the host.
type flow struct{ src, dst netip.AddrPort }

// begin starts a new step: what was seen so far is of the past.
func (w *wire) begin(r *lab.Recorder) {
	now := r.Mark()
	w.pass(r.Since(w.from).Packets())
	w.from = now
}

// pass makes what was seen a part of the past.
func (w *wire) pass(seen []lab.Packet) {
	if w.connections == nil {
		w.connections, w.questions = map[flow]uint32{}, map[flow]bool{}
	}
	for _, p := range seen {
		f := flow{p.Src, p.Dst}
		_, known := w.connections[f]
		switch {
		case p.Proto == lab.ProtoTCP && (p.Flags&lab.FlagSYN != 0 || !known):
			w.connections[f] = p.Seq
		case p.Proto == lab.ProtoUDP && p.Dst.Port() == 53:
			w.questions[f] = true
		}
	}
}

// since returns what left the host in this step.
func (w *wire) since(r *lab.Recorder) lab.Seen { return r.Since(w.from).Where(w.present()) }

// present tells packets, in their order, from what is left of older connections and
// exchanges. A connection between the ports of an older one is known by its own SYN.
func (w *wire) present() func(lab.Packet) bool {
	again := map[flow]bool{}
	return func(p lab.Packet) bool {
		f := flow{p.Src, p.Dst}
		if about, ok := objection(p); ok {
			return !w.questions[about]
		}
		syn, old := w.connections[f]
		if p.Proto != lab.ProtoTCP || !old || again[f] {
			return true
		}
		again[f] = p.Flags&lab.FlagSYN != 0 && p.Seq != syn
		return again[f]
	}
}

// objection returns the flow that an ICMP error is about: what it quotes came the
// other way on it.
func objection(p lab.Packet) (about flow, ok bool) {
	quoted, ok := p.Quoted()
	if !ok || quoted.Proto != lab.ProtoUDP || quoted.Src.Addr() != p.Dst.Addr() {
		return flow{}, false
	}
	return flow{quoted.Dst, quoted.Src}, true
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
		f := flow{p.Src, p.Dst}
		if about, ok := objection(p); ok {
			f = about
		}
		return !slices.Contains(l.Upstreams(), f.dst) || !asksOnly(seen, f, asked)
	})
}

// asksOnly reports whether a flow to an upstream name server is an exchange whose
// questions are all expected.
func asksOnly(seen lab.Seen, f flow, asked func(string) bool) bool {
	same := seen.Where(func(q lab.Packet) bool { return flow{q.Src, q.Dst} == f })
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
