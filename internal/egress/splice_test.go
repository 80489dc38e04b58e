package egress

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/internal/policy"
)

// bytesRead is what this process has read by read(2) and its kin, from
// /proc/self/io; bytes moved by splice(2) are not in it.
func bytesRead(t *testing.T) int64 {
	t.Helper()
	b, err := os.ReadFile("/proc/self/io")
	if err != nil {
		t.Skip(err)
	}
	var n int64
	if _, err := fmt.Sscanf(string(b), "rchar: %d", &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestBytesMoveInsideTheKernel reads a large answer through the proxy: the
// process then reads it once, in the test's client, and not a second time.
func TestBytesMoveInsideTheKernel(t *testing.T) {
	const size = 32 << 20
	answer := func(head string) func(net.Conn) {
		return func(c net.Conn) {
			_, _ = c.Read(make([]byte, 4096))
			_, _ = io.WriteString(c, head)
			block := make([]byte, 64<<10)
			for range size / len(block) {
				if _, err := c.Write(block); err != nil {
					return
				}
			}
		}
	}
	tests := []struct{ name, dst, sent, head string }{
		{"a byte stream", "93.184.216.1:443", "\x01", ""},
		{"an HTTP body", "93.184.216.1:80", lines("GET / HTTP/1.1", "Host: a.example"), fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size)},
		{"an HTTP body until the end", "93.184.216.1:80", lines("GET / HTTP/1.1", "Host: a.example"), "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, policy.Input{})
			l.host(answer(tt.head), tt.dst)
			before := bytesRead(t)
			c := l.connect(tt.dst)
			send(t, c, tt.sent)
			if _, err := io.CopyN(io.Discard, onlyReader{c}, int64(size+len(tt.head))); err != nil {
				t.Fatal(err)
			}
			if got := bytesRead(t) - before; got > size*3/2 {
				t.Errorf("the process read %d MiB for a body of %d MiB: the proxy copies", got>>20, size>>20)
			}
		})
	}
}

// onlyReader hides what else a connection can do.
type onlyReader struct{ io.Reader }

func TestIdleFlowsHoldNoPipes(t *testing.T) {
	l := newLab(t, policy.Input{})
	l.host(func(c net.Conn) { _, _ = io.Copy(c, c) }, "93.184.216.1:443")
	pipes := func() (n int) {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Skip(err)
		}
		for _, fd := range fds {
			if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, "pipe:") {
				n++
			}
		}
		return n
	}
	before := pipes()
	for range 20 {
		c := l.connect("93.184.216.1:443")
		for range 3 {
			send(t, c, "\x01")
			if _, err := c.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
	}
	// A few are lent to bytes on their way and kept for the next.
	if n := pipes() - before; n > 12 {
		t.Errorf("20 idle flows hold %d ends of pipes", n)
	}
	l.p.cut("", ReasonKilled)
	l.awaitFlows(0)
	l.p.pipes.close()
	if n := pipes() - before; n > 2 {
		t.Errorf("%d ends of pipes are left", n)
	}
}

// tcpPair is two ends of one connection.
func tcpPair(t *testing.T) (near, far *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	a, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return a.(*net.TCPConn), c.(*net.TCPConn)
}

// TestTheLastBytesLeaveWithTheEnd: what writeLast took stays back until the direction
// ends, and is then all there.
func TestTheLastBytesLeaveWithTheEnd(t *testing.T) {
	for _, size := range []int{1, 300, 3 << 20} { // more than the socket takes at once
		near, far := tcpPair(t)
		sent := bytes.Repeat([]byte("x"), size)
		written := make(chan error, 1)
		go func() {
			n, err := writeLast(near, sent)
			if n != size {
				err = fmt.Errorf("wrote %d of %d: %w", n, size, err)
			}
			written <- err
		}()
		var got []byte
		if size > 64<<10 {
			got = make([]byte, size/2)
			if _, err := io.ReadFull(far, got); err != nil {
				t.Fatal(err)
			}
		} else {
			_ = far.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			if n, err := far.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%d bytes: read %d of them before the end, %v", size, n, err)
			}
			_ = far.SetReadDeadline(time.Time{})
		}
		rest := make(chan []byte, 1)
		go func() { b, _ := io.ReadAll(far); rest <- b }()
		if err := <-written; err != nil {
			t.Fatal(err)
		}
		near.Close()
		if got = append(got, <-rest...); !bytes.Equal(got, sent) {
			t.Errorf("%d bytes of %d came", len(got), size)
		}
		far.Close()
	}
	near, far := tcpPair(t)
	reset(far)
	for end := time.Now().Add(time.Second); time.Now().Before(end); {
		if _, err := writeLast(near, []byte("x")); err != nil {
			near.Close()
			return
		}
	}
	t.Error("writing to a connection that was reset gives no error")
}
