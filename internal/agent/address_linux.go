package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// AddLocal makes an address one of this machine's own, on the loopback interface
// (rtnetlink(7), RTM_NEWADDR).
func AddLocal(ip netip.Addr) error {
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Sendto(fd, newAddress(ip, lo.Index), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("sendto", err)
	}
	answer := make([]byte, 4<<10)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return os.NewSyscallError("recvfrom", err)
	}
	if n < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return errors.New("netlink's answer is none to the request")
	}
	if code := int32(binary.NativeEndian.Uint32(answer[unix.SizeofNlMsghdr:])); code != 0 {
		return fmt.Errorf("add address %s: %w", ip, unix.Errno(-code))
	}
	return nil
}

// newAddress is the request: a header, an ifaddrmsg and two attributes.
func newAddress(ip netip.Addr, index int) []byte {
	family, raw := uint8(unix.AF_INET), ip.AsSlice()
	if ip.Is6() {
		family = unix.AF_INET6
	}
	attribute := func(kind uint16) []byte {
		b := binary.NativeEndian.AppendUint16(nil, uint16(unix.SizeofRtAttr+len(raw)))
		return append(binary.NativeEndian.AppendUint16(b, kind), raw...)
	}
	body := []byte{family, uint8(ip.BitLen()), 0, unix.RT_SCOPE_HOST}
	body = binary.NativeEndian.AppendUint32(body, uint32(index))
	body = append(append(body, attribute(unix.IFA_LOCAL)...), attribute(unix.IFA_ADDRESS)...)
	out := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	out = binary.NativeEndian.AppendUint16(out, unix.RTM_NEWADDR)
	out = binary.NativeEndian.AppendUint16(out, unix.NLM_F_REQUEST|unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	out = binary.NativeEndian.AppendUint32(out, 1)
	out = binary.NativeEndian.AppendUint32(out, 0)
	return append(out, body...)
}
