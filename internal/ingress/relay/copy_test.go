package relay

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// gathering holds back what is written until it is let go in one piece.
type gathering struct {
	net.Conn
	held  bytes.Buffer
	holds bool
}

func (g *gathering) Write(b []byte) (int, error) {
	if g.holds {
		return g.held.Write(b)
	}
	return g.Conn.Write(b)
}

// letGo sends n octets of what was held back, all of them for -1.
func (g *gathering) letGo(t *testing.T, n int) {
	t.Helper()
	if n < 0 {
		n = g.held.Len()
	}
	if _, err := g.Conn.Write(g.held.Next(n)); err != nil {
		t.Fatal(err)
	}
}

// loopback returns both ends of a connection.
func loopback(t *testing.T) (ours, theirs net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if theirs, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if ours, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	for _, c := range []net.Conn{ours, theirs} {
		c.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return ours, theirs
}

func certificate(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// asking tells how much was last asked for.
type asking struct {
	net.Conn
	size atomic.Int64
}

func (a *asking) Read(b []byte) (int, error) {
	a.size.Store(int64(len(b)))
	return a.Conn.Read(b)
}

// Whoever fills the small buffer to its last octet, or the large one, and stops
// leaves nobody waiting with a large one.
func TestNobodyWaitsWithALargeBuffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		a := &asking{Conn: server}
		over := make(chan int64, 1)
		go func() {
			n, err := copyIdle(io.Discard, a)
			if err != nil {
				t.Error(err)
			}
			over <- n
		}()
		sent := 0
		for _, size := range []int{1, 512, 3, 32 << 10, 512 + 32<<10, 100_000} {
			client.Write(make([]byte, size))
			sent += size
			time.Sleep(time.Second)
			if n := a.size.Load(); n > 512 {
				t.Errorf("after %d octets: waits with room for %d", size, n)
			}
		}
		client.Close()
		if n := <-over; n != int64(sent) {
			t.Errorf("copied %d of %d octets", n, sent)
		}
	})
}

// TestTunnelWaitsOnTheSocket: a tunnel waits on the socket below TLS, where what TLS
// has taken off it already does not show.
func TestTunnelWaitsOnTheSocket(t *testing.T) {
	ours, theirs := loopback(t)
	service, far := loopback(t)
	wire := &gathering{Conn: theirs}
	client := tls.Client(wire, &tls.Config{InsecureSkipVerify: true})
	server := tls.Server(ours, &tls.Config{Certificates: []tls.Certificate{certificate(t)}})
	p := NewPool(Config{Dial: func(context.Context, uint16) (net.Conn, error) { return service, nil }})
	defer p.Close()
	over := make(chan error, 1)
	greeted := make(chan error, 1)
	go func() { greeted <- client.Handshake() }()
	if err := server.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-greeted; err != nil {
		t.Fatal(err)
	}
	arrives := func(want string) {
		t.Helper()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(far, got); err != nil || string(got) != want {
			t.Fatalf("got %q, %v; want %q", got, err, want)
		}
	}
	say := func(words ...string) {
		for _, w := range words {
			io.WriteString(client, w)
		}
	}
	wire.holds = true
	// Before the tunnel: one record that is asked for, and more behind it on the wire.
	say("a", "b", "c")
	wire.letGo(t, -1)
	var first [1]byte
	if _, err := server.Read(first[:]); err != nil || first[0] != 'a' {
		t.Fatal(first, err)
	}
	go func() {
		_, err := p.Carry(t.Context(), server, 1)
		over <- err
	}()
	arrives("bc")
	say("d", "e", "f")
	wire.letGo(t, -1)
	arrives("def")
	say("g", "half")
	wire.letGo(t, wire.held.Len()-3)
	arrives("g")
	wire.letGo(t, -1)
	arrives("half")
	big := string(bytes.Repeat([]byte("0123456789abcdef"), 10<<10))
	say("h", big, "i")
	held := bytes.NewReader(bytes.Clone(wire.held.Bytes()))
	wire.held.Reset()
	go io.Copy(theirs, held)
	arrives("h" + big + "i")
	io.WriteString(far, "back")
	got := make([]byte, 4)
	if _, err := io.ReadFull(client, got); err != nil || string(got) != "back" {
		t.Fatalf("got %q, %v", got, err)
	}
	// The end comes in the piece that the last words come in.
	say("j")
	client.CloseWrite()
	theirs.SetDeadline(time.Now().Add(20 * time.Second)) // CloseWrite lets nothing more be written
	wire.letGo(t, -1)
	arrives("j")
	if n, err := far.Read(got); err != io.EOF {
		t.Errorf("after the end: %q, %v", got[:n], err)
	}
	far.Close()
	if err := <-over; err != nil {
		t.Error(err)
	}
}
