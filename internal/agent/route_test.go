package agent

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// pipeListener hands out one connection.
type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *pipeListener) Close() error   { close(l.done); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

// overPipe serves a handler on one connection in a bubble of fake time. got
// carries the handler's findings to the client.
func overPipe(t *testing.T, handler func(w http.ResponseWriter, r *http.Request, got chan<- error), client func(c net.Conn, got <-chan error)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		got := make(chan error, 1)
		h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handler(w, r, got) })
		ln := &pipeListener{conns: make(chan net.Conn, 1), done: make(chan struct{})}
		near, far := net.Pipe()
		ln.conns <- far
		srv := &http.Server{Handler: steady(h), ReadHeaderTimeout: headerTimeout}
		served := make(chan struct{})
		go func() { defer close(served); srv.Serve(ln) }()
		client(near, got)
		near.Close()
		srv.Close()
		<-served
	})
}

func TestASenderThatStallsIsLetGo(t *testing.T) {
	overPipe(t, func(_ http.ResponseWriter, r *http.Request, got chan<- error) {
		_, err := io.Copy(io.Discard, r.Body)
		got <- err
	}, func(c net.Conn, got <-chan error) {
		fmt.Fprint(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
		for range 5 { // slow, but alive
			fmt.Fprint(c, "0123456789")
			time.Sleep(stallTimeout - time.Second)
		}
		began := time.Now()
		go io.Copy(io.Discard, c)
		if err := <-got; !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) > stallTimeout {
			t.Errorf("after %v: %v, want the deadline", time.Since(began), err)
		}
	})
}

func TestAReaderThatStallsIsLetGo(t *testing.T) {
	overPipe(t, func(w http.ResponseWriter, _ *http.Request, got chan<- error) {
		for {
			if _, err := w.Write(make([]byte, 8<<10)); err != nil {
				got <- err
				return
			}
		}
	}, func(c net.Conn, got <-chan error) {
		fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		began := time.Now()
		buf := make([]byte, 1<<10)
		for range 5 {
			if _, err := io.ReadFull(c, buf); err != nil {
				t.Error(err)
			}
			time.Sleep(10 * time.Second)
		}
		if err := <-got; err == nil || time.Since(began) > 2*stallTimeout {
			t.Errorf("after %v: %v, want the deadline", time.Since(began), err)
		}
	})
}

func TestAConnectionKeptOpenAnswersLongAfterTheLastDeadline(t *testing.T) {
	overPipe(t, func(w http.ResponseWriter, _ *http.Request, _ chan<- error) { w.WriteHeader(http.StatusNoContent) }, func(c net.Conn, _ <-chan error) {
		in := bufio.NewReader(c)
		for range 3 {
			fmt.Fprint(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi")
			resp, err := http.ReadResponse(in, nil)
			if err != nil || resp.StatusCode != 204 {
				t.Errorf("%v %v", resp, err)
				return
			}
			time.Sleep(3 * stallTimeout)
		}
	})
}

func TestSendingFilesKeepsTheirLength(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 50_000) // several pieces
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int64{0, 1, 256 << 10, 256<<10 + 1, int64(len(content)), int64(len(content)) + 10} {
		var out bytes.Buffer
		w := &steadyWriter{ResponseWriter: fromReader{&out}, rc: http.NewResponseController(fromReader{&out})}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			t.Fatal(err)
		}
		got, err := w.ReadFrom(io.LimitReader(f, n))
		if want := min(n, int64(len(content))); err != nil || got != want || !bytes.Equal(out.Bytes(), content[:want]) {
			t.Errorf("limit %d: %d bytes, %v, want %d", n, got, err, want)
		}
	}
}

// fromReader is a response writer that, like the server's, has a ReadFrom.
type fromReader struct{ *bytes.Buffer }

func (fromReader) Header() http.Header { return http.Header{} }
func (fromReader) WriteHeader(int)     {}
