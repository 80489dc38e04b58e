package network

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/network/sysctl"
)

// PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// DefaultSourcePorts lies in the dynamic range of IANA, above what VPNs listen on by
// default (WireGuard 51820) and below what mosh takes (60001 and up).
var DefaultSourcePorts = PortRange{52000, 59999}

func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// Has reports whether a port is in the range.
func (r PortRange) Has(port uint16) bool { return r.First <= port && port <= r.Last }

// Len is the number of ports.
func (r PortRange) Len() int { return int(r.Last) - int(r.First) + 1 }

// leastSourcePorts is how many a range must have: each is one flow of all sandboxes
// towards one destination.
const leastSourcePorts = 1024

// ParseSourcePorts reads "52000-59999".
func ParseSourcePorts(s string) (PortRange, error) {
	list, err := parsePorts(s)
	if err != nil || len(list) != 1 || list[0].First < 1024 || list[0].Len() < leastSourcePorts {
		return PortRange{}, errs.New(errs.Invalid, "give one range of at least %d ports above 1023, for example %s", leastSourcePorts, DefaultSourcePorts)
	}
	return list[0], nil
}

// reservedPorts is the kernel's list of ports that no socket gets unless it asks for
// that very port; it is about both address families.
const reservedPorts = "net/ipv4/ip_local_reserved_ports"

// reserveSourcePorts keeps the range free of sockets of the host that did not ask for
// a port by number. What was reserved before is kept in a file, for uninstalling
// (docs/operations.md).
func (m *machine) reserveSourcePorts() error {
	list, err := readReserved()
	if err != nil {
		return err
	}
	if _, err := os.Stat(m.reservedFile()); errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(m.reservedFile()), 0o755); err != nil {
			return fmt.Errorf("keep the former reserved ports: %w", err)
		}
		if err := os.WriteFile(m.reservedFile(), []byte(formatPorts(list)+"\n"), 0o644); err != nil {
			return fmt.Errorf("keep the former reserved ports: %w", err)
		}
	}
	for _, finding := range CheckSourcePorts(m.cfg.SourcePorts) {
		m.cfg.Log.Warn(finding)
	}
	return sysctl.Write(reservedPorts, formatPorts(append(list, m.cfg.SourcePorts)))
}

func (m *machine) reservedFile() string { return filepath.Join(m.cfg.RunDir, "reserved_ports") }

func readReserved() ([]PortRange, error) {
	text, err := sysctl.Read(reservedPorts)
	if err != nil {
		return nil, err
	}
	return parsePorts(text)
}

// parsePorts reads the kernel's form of a list: "8080,52000-59999".
func parsePorts(s string) (out []PortRange, err error) {
	for item := range strings.SplitSeq(strings.TrimSpace(s), ",") {
		if item == "" {
			continue
		}
		from, to, ranged := strings.Cut(item, "-")
		first, err := strconv.ParseUint(from, 10, 16)
		last := first
		if err == nil && ranged {
			last, err = strconv.ParseUint(to, 10, 16)
		}
		if err != nil || last < first {
			return nil, fmt.Errorf("%q is no range of ports", item)
		}
		out = append(out, PortRange{uint16(first), uint16(last)})
	}
	return out, nil
}

// formatPorts writes a list as the kernel does, sorted and merged.
func formatPorts(list []PortRange) string {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b PortRange) int { return int(a.First) - int(b.First) })
	merged := list[:0]
	for _, r := range list {
		if k := len(merged) - 1; k >= 0 && int(r.First) <= int(merged[k].Last)+1 {
			merged[k].Last = max(merged[k].Last, r.Last)
			continue
		}
		merged = append(merged, r)
	}
	texts := make([]string, len(merged))
	for i, r := range merged {
		texts[i] = r.String()
	}
	return strings.Join(texts, ",")
}

// CheckReserved returns a sentence where the range is not reserved, as a server that
// runs has it.
func CheckReserved(r PortRange) []string {
	list, err := readReserved()
	switch {
	case err != nil:
		return []string{err.Error()}
	case formatPorts(append(slices.Clone(list), r)) != formatPorts(list):
		return []string{fmt.Sprintf("net.ipv4.ip_local_reserved_ports lacks %s, the ports of sandboxes' flows outside: something unset what the server set at start; restart it.", r)}
	}
	return nil
}

// CheckSourcePorts looks for services of the machine in the range, and returns a
// sentence where there are some: their clients' packets may be taken for answers to a
// sandbox.
func CheckSourcePorts(r PortRange) (out []string) {
	var open []string
	for _, f := range []struct {
		name, proto string
		state       uint64
	}{{"tcp", "TCP", tcpListen}, {"tcp6", "TCP", tcpListen}, {"udp", "UDP", udpUnconnected}, {"udp6", "UDP", udpUnconnected}} {
		ports, err := portsOf("/proc/thread-self/net/"+f.name, f.state)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			out = append(out, err.Error())
		}
		for _, p := range ports {
			if what := fmt.Sprintf("%s %d", f.proto, p); r.Has(p) && !slices.Contains(open, what) {
				open = append(open, what)
			}
		}
	}
	if len(open) > 0 {
		out = append(out, fmt.Sprintf("Services of this machine listen in %s, the ports of sandboxes' flows outside (%s): move them, or set network.source_ports to a range without any.",
			r, strings.Join(open, ", ")))
	}
	return out
}

// The states of sockets in /proc/net (include/net/tcp_states.h); UDP uses the one for
// closed where no peer is set.
const tcpListen, udpUnconnected = 10, 7

// portsOf lists the local ports of sockets in a state, but those on loopback.
func portsOf(path string, state uint64) (out []uint16, err error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("list sockets: %w", err)
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 {
			continue
		}
		addr, port, _ := strings.Cut(fields[1], ":")
		p, perr := strconv.ParseUint(port, 16, 16)
		st, serr := strconv.ParseUint(fields[3], 16, 8)
		if perr == nil && serr == nil && st == state && !onLoopback(addr) {
			out = append(out, uint16(p))
		}
	}
	return out, lines.Err()
}

// onLoopback reads an address as /proc/net prints it, in words of the machine's order.
func onLoopback(text string) bool {
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != 4 && len(b) != 16 {
		return false
	}
	for i := 0; i < len(b); i += 4 {
		if littleEndian {
			slices.Reverse(b[i : i+4])
		}
	}
	if len(b) == 4 {
		return b[0] == 127
	}
	return slices.Equal(b, append(make([]byte, 15), 1))
}

var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1
