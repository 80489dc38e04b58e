package probe

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// listenEcho returns the address of a server that sends back what it gets.
func listenEcho(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); io.Copy(c, c) }()
		}
	}()
	return l.Addr().String()
}

func TestOrders(t *testing.T) {
	echo := listenEcho(t)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	for name, tt := range map[string]struct {
		order    Order
		end      string
		received string
	}{
		"parts come back in order":       {Order{Kind: Stream, To: echo, Parts: [][]byte{[]byte("ab"), []byte("cd")}, Want: 4}, Wanted, "abcd"},
		"turns wait for answers":         {Order{Kind: Stream, To: echo, Parts: [][]byte{[]byte("ab"), []byte("cd")}, Turns: true, Want: 4}, Wanted, "abcd"},
		"one byte a segment":             {Order{Kind: Stream, To: echo, Parts: [][]byte{[]byte("abcd")}, Segment: 1, Want: 4}, Wanted, "abcd"},
		"a half-closed stream ends":      {Order{Kind: Stream, To: echo, Parts: [][]byte{[]byte("ab")}, HalfClose: true}, EOF, "ab"},
		"nobody listens":                 {Order{Kind: Stream, To: closed.Addr().String()}, Refused, ""},
		"silence ends with the time":     {Order{Kind: Stream, To: echo, Within: 50 * time.Millisecond}, Timeout, ""},
		"a handshake with no TLS server": {Order{Kind: Stream, To: echo, TLS: &TLS{Name: "x.test"}, Within: time.Second}, "", ""},
		"a kind that is none":            {Order{Kind: "dance"}, `kind "dance" is not known`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got := Do(t.Context(), tt.order)
			if tt.end != "" && got.End != tt.end || string(got.Received) != tt.received {
				t.Errorf("it ended by %q with %q, want %q with %q", got.End, got.Received, tt.end, tt.received)
			}
			if got.Secured {
				t.Error("an echo was taken for a TLS server")
			}
		})
	}
}

func TestServeAnswersEveryOrder(t *testing.T) {
	echo := listenEcho(t)
	var in, out bytes.Buffer
	for id := range 20 {
		line, err := json.Marshal(Order{ID: id, Kind: Stream, To: echo, Parts: [][]byte{[]byte("x")}, Want: 1})
		if err != nil {
			t.Fatal(err)
		}
		in.Write(append(line, '\n'))
	}
	if err := Serve(t.Context(), &in, &out); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out.String(), "\n"); n != 20 {
		t.Errorf("%d outcomes, want 20", n)
	}
}

// FuzzServe feeds lines that are no orders. Kinds that would touch the network
// are not among them.
func FuzzServe(f *testing.F) {
	f.Add([]byte("{\"ID\":1,\"Kind\":\"dance\"}\n"))
	f.Add([]byte("{\"ID\":1,\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		for _, kind := range []Kind{Stream, Datagram, Listen, Frames} {
			if bytes.Contains(bytes.ToLower(in), []byte(kind)) || bytes.Contains(in, []byte(`\`)) {
				t.Skip()
			}
		}
		_ = Serve(t.Context(), bytes.NewReader(in), io.Discard) // any error, no panic
	})
}
