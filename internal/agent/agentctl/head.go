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
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// exchange sends a request and reads the answer's header, but no byte behind it:
// after an upgrade these belong to whoever gets the connection.
func exchange(ctx context.Context, conn net.Conn, request string) (head, error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	got, err := func() (head, error) {
		if _, err := io.WriteString(conn, request); err != nil {
			return head{}, err
		}
		raw, err := readHead(conn)
		if err != nil {
			return head{}, err
		}
		return parseHead(raw)
	}()
	if !stop() { // the deadline is set, or being set: the connection is spoilt
		return head{}, errors.Join(ctx.Err(), err)
	}
	return got, err
}

// head is an answer without its body.
type head struct {
	status int
	header http.Header
}

// parseHead reads a complete header.
func parseHead(raw []byte) (head, error) {
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(raw)), nil)
	if err != nil {
		return head{}, fmt.Errorf("the agent's answer is not HTTP: %w", err)
	}
	defer resp.Body.Close() // there is none in raw
	return head{resp.StatusCode, resp.Header}, nil
}

// headEnd ends an HTTP/1 header (RFC 9112, section 2.1).
var headEnd = []byte("\r\n\r\n")

// readHead reads up to the header's end. It looks at what has arrived before
// taking it, so a connection is not read byte by byte.
func readHead(conn net.Conn) ([]byte, error) {
	var have []byte
	window := make([]byte, 2<<10)
	for len(have) < maxHead {
		n, err := peek(conn, window)
		if err != nil {
			return nil, err
		}
		take := n
		if i := bytes.Index(append(slices.Clip(have), window[:n]...), headEnd); i >= 0 {
			take = i + len(headEnd) - len(have)
		}
		if _, err := io.ReadFull(conn, window[:take]); err != nil {
			return nil, err
		}
		have = append(have, window[:take]...)
		if bytes.HasSuffix(have, headEnd) {
			return have, nil
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
