package lab

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

const (
	recorderSocket = 64 << 20  // bytes of packets the kernel keeps for the reader
	recorderMemory = 256 << 20 // bytes of payload kept; the oldest go first
	syncTimeout    = 10 * time.Second
)

// Recorder keeps every packet that arrives at the internet, before any filter
// there sees it: what is not in it was not sent. Losses are counted, so that an
// assertion never rests on a packet that was not looked at.
type Recorder struct {
	in      *os.File // AF_PACKET socket on the internet's end of the wire
	out     *os.File // AF_PACKET socket on the host's end, for sentinels
	stopped chan struct{}

	mu       sync.Mutex // guards all below
	packets  []Packet
	first    Mark // number of packets[0]
	bytes    int
	lost     uint64
	sentinel uint64                   // last one sent
	awaited  map[uint64]chan struct{} // sentinels on their way
}

// Mark is a moment between two packets.
type Mark uint64

func newRecorder(internet, host *Netns, inIndex, outIndex int) (*Recorder, error) {
	in, err := packetSocket(internet, inIndex, unix.ETH_P_ALL)
	if err != nil {
		return nil, err
	}
	out, err := packetSocket(host, outIndex, 0)
	if err != nil {
		return nil, errors.Join(err, in.Close())
	}
	return &Recorder{in: in, out: out, stopped: make(chan struct{}), awaited: map[uint64]chan struct{}{}}, nil
}

// packetSocket opens a socket that sees the arriving frames of a link that are of
// a protocol, none if that is 0. Frames sent through it pass no filter.
func packetSocket(n *Netns, index int, protocol uint16) (*os.File, error) {
	var f *os.File
	err := n.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("open a packet socket: %w", err)
		}
		f = os.NewFile(uintptr(fd), "packet socket")
		// The socket hears nothing before it is bound to a protocol, so it never
		// holds packets from before these options.
		return errors.Join(
			os.NewSyscallError("SO_RCVBUFFORCE", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, recorderSocket)),
			os.NewSyscallError("PACKET_IGNORE_OUTGOING", unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)),
			os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(protocol), Ifindex: index})),
		)
	})
	if err != nil && f != nil {
		err = errors.Join(err, f.Close())
	}
	return f, err
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// run reads until the socket is closed.
func (r *Recorder) run() {
	defer close(r.stopped)
	raw, err := r.in.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, 256<<10) // larger than any offloaded packet
	for {
		n := 0
		var rerr error
		err := raw.Read(func(fd uintptr) bool {
			n, _, rerr = unix.Recvfrom(int(fd), buf, 0)
			return !errors.Is(rerr, unix.EAGAIN)
		})
		if err != nil {
			return
		}
		switch {
		case rerr == nil:
			r.keep(buf[:n])
		case errors.Is(rerr, unix.EINTR), errors.Is(rerr, unix.ENETDOWN):
			// ENETDOWN only tells that the link was, or went, down.
		default:
			r.countLoss(1)
		}
	}
}

func (r *Recorder) keep(frame []byte) {
	etherType, p, ok := decode(frame)
	if !ok {
		r.countLoss(1)
		return
	}
	if etherType == etherLab {
		r.arrived(p.Payload)
		return
	}
	p.Time = time.Now()
	p.Payload = bytes.Clone(p.Payload)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.packets = append(r.packets, p)
	r.bytes += len(p.Payload) + 64
	drop := 0
	for r.bytes > recorderMemory {
		r.bytes -= len(r.packets[drop].Payload) + 64
		drop++
	}
	r.packets = slices.Delete(r.packets, 0, drop)
	r.first += Mark(drop)
}

func (r *Recorder) countLoss(n uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lost += n
}

// arrived wakes whoever waits for a sentinel.
func (r *Recorder) arrived(payload []byte) {
	if len(payload) < 8 {
		return
	}
	number := binary.BigEndian.Uint64(payload)
	r.mu.Lock()
	defer r.mu.Unlock()
	if c, ok := r.awaited[number]; ok {
		close(c)
		delete(r.awaited, number)
	}
}

// sync returns when everything that was on its way has been recorded. A packet
// waits in the backlog of the processor that sent it, once for each virtual wire it
// goes over, and a processor without time leaves it there while others go on: so a
// sentinel frame goes behind it on every processor, once for the sandbox's wire
// and once for the lab's.
func (r *Recorder) sync() error {
	for range 2 {
		if err := r.roundTrips(); err != nil {
			return err
		}
	}
	return nil
}

// roundTrips sends a sentinel from every processor that programs here may run on.
func (r *Recorder) roundTrips() error {
	ended := make(chan error, 1)
	go func() { // a thread that cannot be moved back ends with it
		runtime.LockOSThread()
		var all unix.CPUSet
		if err := unix.SchedGetaffinity(0, &all); err != nil {
			ended <- os.NewSyscallError("sched_getaffinity", err)
			return
		}
		err := r.roundTripFrom(all)
		if berr := unix.SchedSetaffinity(0, &all); berr == nil {
			runtime.UnlockOSThread()
		}
		ended <- err
	}()
	return <-ended
}

// roundTripFrom moves this thread to each of the processors and sends a sentinel.
func (r *Recorder) roundTripFrom(all unix.CPUSet) error {
	for cpu, left := 0, all.Count(); left > 0; cpu++ {
		if !all.IsSet(cpu) {
			continue
		}
		left--
		var one unix.CPUSet
		one.Set(cpu)
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			return os.NewSyscallError("sched_setaffinity", err)
		}
		if err := r.roundTrip(); err != nil {
			return err
		}
	}
	return nil
}

// roundTrip sends a sentinel from this processor and waits until it is recorded.
func (r *Recorder) roundTrip() error {
	r.mu.Lock()
	r.sentinel++
	number := r.sentinel
	done := make(chan struct{})
	r.awaited[number] = done
	r.mu.Unlock()
	frame := make([]byte, 60)
	copy(frame, bytes.Repeat([]byte{0xff}, 6)) // to everyone: the only other end
	frame[6] = 0x02                            // a locally administered source
	binary.BigEndian.PutUint16(frame[12:], etherLab)
	binary.BigEndian.PutUint64(frame[14:], number)
	if _, err := r.out.Write(frame); err != nil {
		return fmt.Errorf("send a sentinel over the wire: %w", err)
	}
	select {
	case <-done:
		return nil
	case <-r.stopped:
		return errors.New("the recorder is closed")
	case <-time.After(syncTimeout):
		return errors.New("a sentinel was lost on the wire")
	}
}

// Mark returns the moment after everything that was sent so far.
func (r *Recorder) Mark() Mark {
	_ = r.sync() // a recorder that cannot follow says so in Since
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.first + Mark(len(r.packets))
}

// Since returns what arrived after m, without the link's own neighbour
// discovery; Everything has that too.
func (r *Recorder) Since(m Mark) Seen {
	s := r.Everything(m)
	return s.Where(func(p Packet) bool { return !p.Neighbour })
}

// Everything returns all that arrived after m.
func (r *Recorder) Everything(m Mark) Seen {
	err := r.sync()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.addKernelDrops()
	if r.lost > 0 {
		err = errors.Join(err, fmt.Errorf("%d packets were lost before they were recorded", r.lost))
	}
	if m < r.first {
		err = errors.Join(err, fmt.Errorf("the %d oldest packets after the mark are no longer kept", r.first-m))
		m = r.first
	}
	return Seen{packets: slices.Clone(r.packets[min(int(m-r.first), len(r.packets)):]), err: err}
}

// Lost counts packets that arrived and were not recorded.
func (r *Recorder) Lost() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.addKernelDrops()
	return r.lost
}

// addKernelDrops must be called with mu held. Reading the counter resets it.
func (r *Recorder) addKernelDrops() {
	raw, err := r.in.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		if st, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			r.lost += uint64(st.Drops)
		}
	})
}

func (r *Recorder) close() error {
	err := errors.Join(r.in.Close(), r.out.Close())
	<-r.stopped
	return err
}

// Seen is a selection of recorded packets, in the order they arrived.
type Seen struct {
	packets []Packet
	err     error // why the selection may be incomplete
}

// Err says why packets may be missing from the selection, or nil.
func (s Seen) Err() error { return s.err }

// Packets returns the packets themselves.
func (s Seen) Packets() []Packet { return s.packets }

// Where selects by a function.
func (s Seen) Where(keep func(Packet) bool) Seen {
	out := Seen{err: s.err}
	for _, p := range s.packets {
		if keep(p) {
			out.packets = append(out.packets, p)
		}
	}
	return out
}

// To selects what was sent to an address.
func (s Seen) To(a netip.Addr) Seen {
	return s.Where(func(p Packet) bool { return p.Dst.Addr() == a })
}

// ToPort selects what was sent to a port, TCP or UDP.
func (s Seen) ToPort(port uint16) Seen {
	return s.Where(func(p Packet) bool { return p.Dst.Port() == port })
}

// Proto selects by IP protocol number.
func (s Seen) Proto(proto uint8) Seen {
	return s.Where(func(p Packet) bool { return p.Proto == proto })
}

// Connects selects attempts to open a TCP connection: SYN without ACK.
func (s Seen) Connects() Seen {
	return s.Where(func(p Packet) bool {
		return p.Proto == ProtoTCP && p.Flags&(FlagSYN|FlagACK) == FlagSYN
	})
}

// None is nil if nothing was selected and nothing can have been missed; else the
// error lists what there is.
func (s Seen) None() error {
	if s.err != nil {
		return fmt.Errorf("the recording is incomplete: %w", s.err)
	}
	if len(s.packets) == 0 {
		return nil
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d packets reached the internet:", len(s.packets))
	for i, p := range s.packets {
		if i == 8 {
			b.WriteString("\n\t…")
			break
		}
		fmt.Fprintf(&b, "\n\t%s", p)
	}
	return errors.New(b.String())
}

// Payload is everything the selected packets carried: TCP streams put together
// in order, each once, then datagrams.
func (s Seen) Payload() []byte {
	return bytes.Join(s.streams(), []byte("\n"))
}

// Contains reports whether data was carried, within one stream or one packet,
// however it was cut into segments.
func (s Seen) Contains(data []byte) bool {
	for _, stream := range s.streams() {
		if bytes.Contains(stream, data) {
			return true
		}
	}
	return slices.ContainsFunc(s.packets, func(p Packet) bool { return bytes.Contains(p.Payload, data) })
}

type flowKey struct{ src, dst netip.AddrPort }

// streams returns the byte stream of each TCP connection and the payload of
// each other packet.
func (s Seen) streams() [][]byte {
	byFlow := map[flowKey][]Packet{}
	var order []flowKey
	var loose [][]byte
	for _, p := range s.packets {
		if p.Proto != ProtoTCP {
			if len(p.Payload) > 0 {
				loose = append(loose, p.Payload)
			}
			continue
		}
		k := flowKey{p.Src, p.Dst}
		if _, ok := byFlow[k]; !ok {
			order = append(order, k)
		}
		byFlow[k] = append(byFlow[k], p)
	}
	var out [][]byte
	for _, k := range order {
		if stream := reassemble(byFlow[k]); len(stream) > 0 {
			out = append(out, stream)
		}
	}
	return append(out, loose...)
}

// reassemble orders segments by sequence number and drops what was repeated. A
// gap is closed: the recorder did not see it, but what follows still counts.
func reassemble(segments []Packet) []byte {
	if len(segments) == 0 {
		return nil
	}
	base := segments[0].Seq
	type piece struct {
		at   int64 // offset from base, signed: segments may precede the first seen
		data []byte
	}
	var pieces []piece
	for _, p := range segments {
		at := int64(int32(p.Seq - base))
		if p.Flags&FlagSYN != 0 {
			at++ // a SYN takes one sequence number
		}
		if len(p.Payload) > 0 {
			pieces = append(pieces, piece{at, p.Payload})
		}
	}
	slices.SortStableFunc(pieces, func(a, b piece) int { return int(a.at - b.at) })
	var out []byte
	end := int64(-1 << 62)
	for _, p := range pieces {
		stop := p.at + int64(len(p.data))
		if stop <= end {
			continue
		}
		if p.at < end {
			p.data = p.data[end-p.at:]
		}
		out, end = append(out, p.data...), stop
	}
	return out
}

// Question is one DNS question that reached the internet.
type Question struct {
	Server netip.AddrPort
	Name   string // lower case, without the final dot
	Type   string // "A", "HTTPS"
}

// Questions returns the DNS questions asked over UDP and TCP port 53.
func (s Seen) Questions() []Question {
	var out []Question
	add := func(server netip.AddrPort, wire []byte) {
		var m dns.Msg
		if m.Unpack(wire) != nil || m.Response {
			return
		}
		for _, q := range m.Question {
			name := strings.ToLower(strings.TrimSuffix(q.Name, "."))
			out = append(out, Question{Server: server, Name: name, Type: dns.TypeToString[q.Qtype]})
		}
	}
	at53 := s.ToPort(53)
	for _, p := range at53.Proto(ProtoUDP).packets {
		add(p.Dst, p.Payload)
	}
	byFlow := map[flowKey][]Packet{}
	for _, p := range at53.Proto(ProtoTCP).packets {
		byFlow[flowKey{p.Src, p.Dst}] = append(byFlow[flowKey{p.Src, p.Dst}], p)
	}
	for k, segments := range byFlow {
		stream := reassemble(segments)
		for len(stream) >= 2 {
			n := int(binary.BigEndian.Uint16(stream))
			if len(stream) < 2+n {
				break
			}
			add(k.dst, stream[2:2+n])
			stream = stream[2+n:]
		}
	}
	return out
}

// AskedFor reports whether a question for name, or for a name below it, was asked.
func (s Seen) AskedFor(name string) bool {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	return slices.ContainsFunc(s.Questions(), func(q Question) bool {
		return q.Name == name || strings.HasSuffix(q.Name, "."+name)
	})
}

// interfaceIndex looks a link up in a namespace.
func interfaceIndex(n *Netns, name string) (int, error) {
	var index int
	err := n.Do(func() error {
		i, err := net.InterfaceByName(name)
		if err != nil {
			return fmt.Errorf("look up link %s: %w", name, err)
		}
		index = i.Index
		return nil
	})
	return index, err
}
