package conntrack

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An event of the tracker is a datagram of some 250 octets. One that is longer than
// a place is cut, and parsed as far as it goes: attributes that are cut off are missing.
const (
	inboxPlaces = 64
	inboxPlace  = 1 << 10
)

// inbox is where recvmmsg(2) puts many datagrams at a time. It must not be copied:
// the headers point into it.
type inbox struct {
	headers [inboxPlaces]mmsghdr
	vectors [inboxPlaces]unix.Iovec
	places  [inboxPlaces][inboxPlace]byte
}

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	unix.Msghdr
	size uint32
}

func newInbox() *inbox {
	in := new(inbox)
	for i := range in.headers {
		in.vectors[i].Base = &in.places[i][0]
		in.vectors[i].SetLen(inboxPlace)
		in.headers[i].Iov = &in.vectors[i]
		in.headers[i].SetIovlen(1)
	}
	return in
}

// receive takes what waits in a socket that does not block, and returns how many
// datagrams that was.
func (in *inbox) receive(fd int) (int, error) {
	n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&in.headers[0])), inboxPlaces, 0, 0, 0)
	runtime.KeepAlive(in)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// message is the i-th datagram that was received.
func (in *inbox) message(i int) []byte {
	return in.places[i][:min(in.headers[i].size, inboxPlace)]
}
