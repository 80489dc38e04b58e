package conntrack

import (
	"bytes"
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

func TestAnInboxTakesManyDatagramsAndCutsLongOnes(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		t.Cleanup(func() { _ = unix.Close(fd) })
	}
	const more = 6
	sent := make([][]byte, inboxPlaces+more)
	for i := range sent {
		sent[i] = bytes.Repeat([]byte{byte(i)}, 1+i*20) // the last are longer than a place
		if err := unix.Send(fds[0], sent[i], 0); err != nil {
			t.Fatalf("send datagram %d: %v", i, err)
		}
	}
	in := newInbox()
	for _, want := range []int{inboxPlaces, more} {
		k, err := in.receive(fds[1])
		if err != nil || k != want {
			t.Fatalf("received %d datagrams, %v; want %d", k, err, want)
		}
		for i := range k {
			if got, want := in.message(i), sent[i][:min(len(sent[i]), inboxPlace)]; !bytes.Equal(got, want) {
				t.Errorf("datagram %d: %d octets, want %d", i, len(got), len(want))
			}
		}
		sent = sent[k:]
	}
	if k, err := in.receive(fds[1]); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("received %d datagrams of an empty socket, %v; want EAGAIN", k, err)
	}
}
