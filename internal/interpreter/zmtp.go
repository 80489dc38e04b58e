package interpreter

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// ZMTP 3.0 with the NULL mechanism (https://rfc.zeromq.org/spec/23/), the client's
// side of it over one connection: enough to speak to a kernel, and bounded, which
// the kernel, that runs the user's code, may not be relied on to be.

// Limits on what a kernel can make us hold. A frame past them is skipped.
const (
	maxMessage = 32 << 20
	maxFrames  = 64 // of one message
	greeting   = 64 // bytes

	handshakeTimeout = 5 * time.Second
	sendTimeout      = 30 * time.Second
)

// The bits of a frame's first byte.
const (
	flagMore    = 1 << 0
	flagLong    = 1 << 1
	flagCommand = 1 << 2
)

// socketKind is a ZeroMQ socket type.
type socketKind string

const (
	dealer    socketKind = "DEALER"
	subscribe socketKind = "SUB"
)

// socket is one connection to a kernel's ZeroMQ socket.
type socket struct {
	conn net.Conn
	r    *bufio.Reader

	mu sync.Mutex // serialises senders
}

// frames is a message. A frame that was too large is nil, and its bytes are
// counted in skipped.
type frames struct {
	parts   [][]byte
	skipped int64
}

// dialSocket connects to a unix socket and shakes hands. A subscriber subscribes
// to everything.
func dialSocket(ctx context.Context, path string, kind socketKind) (_ *socket, err error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connect to the kernel: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("greet the kernel: %w", err), conn.Close())
		}
	}()
	s := &socket{conn: conn, r: bufio.NewReaderSize(conn, 64<<10)}
	if err := conn.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return nil, err
	}
	if err := s.handshake(kind); err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	if kind == subscribe {
		return s, s.send([]byte{1}) // of ZMTP 3.0: 1 and a prefix, here none
	}
	return s, nil
}

func (s *socket) close() { s.conn.Close() }

// handshake exchanges greetings and READY commands.
func (s *socket) handshake(kind socketKind) error {
	hello := make([]byte, greeting)
	hello[0], hello[9] = 0xff, 0x7f
	hello[10], hello[11] = 3, 0
	copy(hello[12:], "NULL")
	property := func(name, value string) []byte {
		b := append([]byte{byte(len(name))}, name...)
		return append(binary.BigEndian.AppendUint32(b, uint32(len(value))), value...)
	}
	ready := append([]byte("\x05READY"), property("Socket-Type", string(kind))...)
	ready = append(ready, property("Identity", "")...)
	if _, err := s.conn.Write(append(appendFrame(hello, flagCommand, ready), []byte{}...)); err != nil {
		return err
	}
	var theirs [greeting]byte
	if _, err := io.ReadFull(s.r, theirs[:]); err != nil {
		return err
	}
	if theirs[0] != 0xff || theirs[9] != 0x7f || theirs[10] < 3 {
		return errors.New("it does not speak ZMTP 3")
	}
	for {
		flags, _, _, err := readFrame(s.r, maxMessage)
		if err != nil {
			return err
		}
		if flags&flagCommand != 0 {
			return nil // READY; an ERROR is followed by the end of the connection
		}
	}
}

// send writes one message.
func (s *socket) send(parts ...[]byte) error {
	var b []byte
	for i, p := range parts {
		flags := byte(0)
		if i < len(parts)-1 {
			flags = flagMore
		}
		b = appendFrame(b, flags, p)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.conn.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return fmt.Errorf("send to the kernel: %w", err)
	}
	if _, err := s.conn.Write(b); err != nil {
		return fmt.Errorf("send to the kernel: %w", err)
	}
	return nil
}

// receive waits for the next message.
func (s *socket) receive() (frames, error) { return readMessage(s.r) }

func appendFrame(b []byte, flags byte, body []byte) []byte {
	if len(body) > 255 {
		b = append(b, flags|flagLong)
		b = binary.BigEndian.AppendUint64(b, uint64(len(body)))
	} else {
		b = append(b, flags, byte(len(body)))
	}
	return append(b, body...)
}

// readMessage reads frames up to the last of a message; commands between messages
// mean nothing to us.
func readMessage(r *bufio.Reader) (frames, error) {
	var m frames
	room := int64(maxMessage)
	for {
		flags, body, skipped, err := readFrame(r, room)
		if err != nil {
			return frames{}, err
		}
		if flags&flagCommand != 0 {
			continue
		}
		if len(m.parts) == maxFrames {
			return frames{}, fmt.Errorf("a message of over %d frames", maxFrames)
		}
		m.parts = append(m.parts, body)
		m.skipped += skipped
		room -= int64(len(body))
		if flags&flagMore == 0 {
			return m, nil
		}
	}
}

// readFrame reads a frame. The body of one that has no room is read and dropped;
// then skipped is its size.
func readFrame(r *bufio.Reader, room int64) (flags byte, body []byte, skipped int64, err error) {
	flags, err = r.ReadByte()
	if err != nil {
		return 0, nil, 0, err
	}
	if flags&^(flagMore|flagLong|flagCommand) != 0 {
		return 0, nil, 0, fmt.Errorf("a frame with unknown flags %#x", flags)
	}
	var head [8]byte
	at := head[7:]
	if flags&flagLong != 0 {
		at = head[:]
	}
	if _, err := io.ReadFull(r, at); err != nil {
		return 0, nil, 0, fmt.Errorf("read a frame's size: %w", err)
	}
	size := binary.BigEndian.Uint64(head[:])
	if size > 1<<62 {
		return 0, nil, 0, fmt.Errorf("a frame of %d bytes", size)
	}
	if int64(size) > room {
		n, err := io.CopyN(io.Discard, r, int64(size))
		if err != nil {
			return 0, nil, 0, fmt.Errorf("skip a frame: %w", err)
		}
		return flags, nil, n, nil
	}
	// What it holds decides how much is allocated, not what it says.
	body, err = io.ReadAll(io.LimitReader(r, int64(size)))
	if err != nil {
		return 0, nil, 0, fmt.Errorf("read a frame: %w", err)
	}
	if uint64(len(body)) < size {
		return 0, nil, 0, fmt.Errorf("read a frame: %w", io.ErrUnexpectedEOF)
	}
	return flags, body, 0, nil
}
