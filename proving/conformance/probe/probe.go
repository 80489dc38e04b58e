// Package probe carries out the orders of the conformance suite on the network, from
// wherever it runs, inside a sandbox or in its place, and reports what it saw without
// judging it. Orders say which bytes leave in
// which portions; nothing here decides what is an evasion.
package probe

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// Kind says what an order does.
type Kind string

// The kinds of orders.
const (
	Stream   Kind = "stream"   // connect over TCP, send, read
	Datagram Kind = "datagram" // send over UDP, read replies
	Listen   Kind = "listen"   // accept TCP and UDP on a port and keep what comes
	Frames   Kind = "frames"   // send whole Ethernet frames on a link; needs CAP_NET_RAW
)

// Order is one thing to do.
type Order struct {
	ID   int
	Kind Kind
	To   string // "ip:port"; of Listen ":port"; of Frames the name of the link
	// Parts are sent one write each, Gap apart. With Turns, each but the first
	// waits until an answer to the one before it has begun. Of Frames: the frames.
	Parts [][]byte
	Gap   time.Duration
	Turns bool
	// Segment, if not 0, cuts what is sent into TCP segments of so many bytes.
	Segment int
	// TLS, if not nil, has a handshake done first; Parts are then sent in it.
	TLS *TLS
	// Want ends the reading after so many bytes (of Datagram: replies); 0 reads to
	// the end. Within bounds the whole order; 0 is eight seconds.
	Want   int
	Within time.Duration
	// Repeat sends the Parts again and again, Gap apart, until something ends it.
	Repeat bool
	// HalfClose ends the sending direction after the last part.
	HalfClose bool
}

// TLS describes a client's hello and how its bytes are cut.
type TLS struct {
	Name    string // server_name, and the name the certificate must be for
	Padding int    // the hello is made at least this large, by ALPN names nobody speaks
	Record  int    // the hello is cut into records of so many bytes; 0: one record
	// ECH is a list of encrypted-hello configurations; Name is then the hidden name.
	ECH []byte
}

// How an order ended.
const (
	EOF         = "eof"         // the other side closed
	Wanted      = "wanted"      // Want was reached
	Refused     = "refused"     // RST to the SYN, or port unreachable
	Reset       = "reset"       // RST later
	Timeout     = "timeout"     // Within passed
	Unreachable = "unreachable" // any other ICMP error, or no route
	Forbidden   = "forbidden"   // the kernel does not let us
)

// Outcome is what was seen.
type Outcome struct {
	ID        int
	Connected bool          // TCP: the handshake completed
	Secured   bool          // TLS: the handshake completed and the certificate is the name's
	Sent      int           // bytes the kernel took
	Received  []byte        // the beginning of what came, up to 1 MiB
	Replies   [][]byte      // of Datagram and Listen: one by one
	End       string        // one of the above, or the error's text
	Took      time.Duration // to the end
}

const (
	maxReceived = 1 << 20
	defaultTime = 8 * time.Second
	maxOrder    = 16 << 20 // octets of one order's JSON
)

// Serve reads one order a line from in, carries out each in a goroutine of its
// own, and writes one outcome a line to out, in the order they end. It returns
// when in ends, after the last outcome.
func Serve(ctx context.Context, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	var mu sync.Mutex // guards out
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 0, 64<<10), maxOrder)
	for lines.Scan() {
		var o Order
		if err := json.Unmarshal(lines.Bytes(), &o); err != nil {
			return fmt.Errorf("read an order: %w", err)
		}
		wg.Go(func() {
			line, err := json.Marshal(Do(ctx, o))
			if err != nil {
				return // strings and bytes always marshal
			}
			mu.Lock()
			defer mu.Unlock()
			_, _ = out.Write(append(line, '\n')) // nobody listens any more: in ends as well
		})
	}
	return lines.Err()
}

// Do carries out one order.
func Do(ctx context.Context, o Order) Outcome {
	if o.Within == 0 {
		o.Within = defaultTime
	}
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, o.Within)
	defer cancel()
	var got Outcome
	switch o.Kind {
	case Stream:
		got = stream(ctx, o)
	case Datagram:
		got = datagram(ctx, o)
	case Listen:
		got = listen(ctx, o)
	case Frames:
		got = frames(o)
	default:
		got.End = fmt.Sprintf("kind %q is not known", o.Kind)
	}
	got.ID, got.Took = o.ID, time.Since(began)
	return got
}

// errWanted ends a reading that has what it wants.
var errWanted = errors.New("wanted")
