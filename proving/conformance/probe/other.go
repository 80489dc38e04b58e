package probe

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// datagram sends the parts from one socket and keeps the replies.
func datagram(ctx context.Context, o Order) (got Outcome) {
	c, err := (&net.Dialer{}).DialContext(ctx, "udp", o.To)
	if err != nil {
		got.End = ending(err)
		return got
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	_ = c.SetDeadline(deadline) // a socket cannot be gone here
	for i, part := range o.Parts {
		if i > 0 {
			time.Sleep(o.Gap)
		}
		n, err := c.Write(part)
		if got.Sent += n; err != nil {
			got.End = ending(err)
			return got
		}
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := c.Read(buf)
		if err != nil {
			got.End = ending(err)
			return got
		}
		got.Replies = append(got.Replies, append([]byte{}, buf[:n]...))
		if o.Want > 0 && len(got.Replies) >= o.Want {
			got.End = Wanted
			return got
		}
	}
}

// listen keeps what arrives on a port, TCP and UDP, until the time is over.
func listen(ctx context.Context, o Order) (got Outcome) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", o.To)
	if err != nil {
		got.End = ending(err)
		return got
	}
	defer l.Close()
	u, err := (&net.ListenConfig{}).ListenPacket(ctx, "udp", o.To)
	if err != nil {
		got.End = ending(err)
		return got
	}
	defer u.Close()
	stop := context.AfterFunc(ctx, func() { l.Close(); u.Close() })
	defer stop()
	var mu sync.Mutex // guards got.Replies
	keep := func(b []byte) {
		mu.Lock()
		defer mu.Unlock()
		if len(got.Replies) < 1000 {
			got.Replies = append(got.Replies, append([]byte{}, b...))
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(500 * time.Millisecond)) // fresh, so it holds
				b, _ := io.ReadAll(io.LimitReader(c, 64<<10))             // what came before the end counts
				keep(append([]byte("tcp "+c.RemoteAddr().String()+" "), b...))
			})
		}
	})
	wg.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			n, from, err := u.ReadFrom(buf)
			if err != nil {
				return
			}
			keep(append([]byte("udp "+from.String()+" "), buf[:n]...))
		}
	})
	wg.Wait()
	got.End = Timeout
	return got
}

// frames sends whole frames on a link, past the network stack of this machine,
// and keeps what comes back on the link.
func frames(o Order) (got Outcome) {
	link, err := net.InterfaceByName(o.To)
	if err != nil {
		got.End = err.Error()
		return got
	}
	const all = 0x0300 // ETH_P_ALL in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all)
	if err != nil {
		got.End = ending(err)
		return got
	}
	defer unix.Close(fd)
	to := &unix.SockaddrLinklayer{Ifindex: link.Index, Protocol: all}
	if err := unix.Bind(fd, to); err != nil {
		got.End = ending(err)
		return got
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
		got.End = ending(err)
		return got
	}
	for i, frame := range o.Parts {
		if i > 0 {
			time.Sleep(o.Gap)
		}
		if len(frame) >= 14 && [6]byte(frame[6:12]) == [6]byte{} {
			copy(frame[6:12], link.HardwareAddr) // the link's own, unless the frame has one
		}
		if err := unix.Sendto(fd, frame, 0, to); err != nil {
			got.End = ending(err)
			return got
		}
		got.Sent += len(frame)
	}
	got.Replies, err = incoming(fd, time.Now().Add(o.Within), o.Want)
	got.End = ending(err)
	return got
}

// incoming reads frames until there are as many as wanted, or the time is over.
func incoming(fd int, deadline time.Time, want int) (replies [][]byte, err error) {
	buf := make([]byte, 64<<10)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return replies, os.ErrDeadlineExceeded
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if errors.Is(err, unix.EINTR) || err == nil && n == 0 {
			continue
		}
		if err != nil {
			return replies, err
		}
		if n, _, err = unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT); err != nil {
			return replies, err
		}
		replies = append(replies, append([]byte{}, buf[:n]...))
		if want > 0 && len(replies) >= want {
			return replies, errWanted
		}
	}
}
