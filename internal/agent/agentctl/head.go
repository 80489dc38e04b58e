package agentctl

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// exchange sends a request and reads the answer's header, but no byte behind it:
// after an upgrade these belong to whoever gets the connection.
func exchange(ctx context.Context, conn net.Conn, request string) (*http.Response, error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	head, err := func() (*http.Response, error) {
		if _, err := io.WriteString(conn, request); err != nil {
			return nil, err
		}
		raw, err := readHead(conn)
		if err != nil {
			return nil, err
		}
		return parseHead(raw)
	}()
	if !stop() { // the deadline is set, or being set: the connection is spoilt
		return nil, errors.Join(ctx.Err(), err)
	}
	return head, err
}

// parseHead reads a complete header.
func parseHead(raw []byte) (*http.Response, error) {
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(raw)), nil)
	if err != nil {
		return nil, fmt.Errorf("the agent's answer is not HTTP: %w", err)
	}
	resp.Body.Close() // there is none in raw
	return resp, nil
}

// headEnd ends an HTTP/1 header (RFC 9112, section 2.1).
var headEnd = []byte("\r\n\r\n")

// readHead reads up to the header's end. It looks at what has arrived before
// taking it, so a connection is not read byte by byte.
func readHead(conn net.Conn) ([]byte, error) {
	var head []byte
	window := make([]byte, 2<<10)
	for len(head) < maxHead {
		n, err := peek(conn, window)
		if err != nil {
			return nil, err
		}
		take := n
		if i := bytes.Index(append(head[:len(head):len(head)], window[:n]...), headEnd); i >= 0 {
			take = i + len(headEnd) - len(head)
		}
		if _, err := io.ReadFull(conn, window[:take]); err != nil {
			return nil, err
		}
		head = append(head, window[:take]...)
		if bytes.HasSuffix(head, headEnd) {
			return head, nil
		}
	}
	return nil, fmt.Errorf("the agent's answer has a header over %d bytes", maxHead)
}

// peek waits for bytes and returns them without taking them.
func peek(conn net.Conn, into []byte) (n int, err error) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return 0, fmt.Errorf("%T has no descriptor to look into", conn)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0, err
	}
	var sysErr error
	err = raw.Read(func(fd uintptr) bool {
		n, _, sysErr = unix.Recvfrom(int(fd), into, unix.MSG_PEEK)
		return !errors.Is(sysErr, unix.EAGAIN)
	})
	switch {
	case err != nil:
		return 0, err
	case sysErr != nil:
		return 0, fmt.Errorf("receive: %w", sysErr)
	case n == 0:
		return 0, io.ErrUnexpectedEOF
	}
	return n, nil
}
