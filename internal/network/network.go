// Package network gives each sandbox a network of its own and enforces its policy in the
// kernel. It keeps a pool of slots (package slot), puts programs of nftables rules in force
// for them (package nft), ends flows that a policy no longer allows and reports others
// (package conntrack), and keeps sandboxes closed while the rules are gone (package
// failclosed). Callers see slots that are ready, policies that are in force or not, and
// verdicts in the flow log.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/flowlog"
	"github.com/cordonhq/cordon/internal/network/conntrack"
	"github.com/cordonhq/cordon/internal/network/failclosed"
	"github.com/cordonhq/cordon/internal/network/nft"
	"github.com/cordonhq/cordon/internal/network/slot"
	"github.com/cordonhq/cordon/internal/policy"
	"github.com/cordonhq/cordon/internal/sandbox"
)

// IPv6 says whether sandboxes get IPv6.
type IPv6 uint8

// The choices. With IPv6Auto, the default, sandboxes get IPv6 exactly when the
// host has an IPv6 default route, so that nothing inside stalls on a dead family.
const (
	IPv6Auto IPv6 = iota
	IPv6On
	IPv6Off
)

// Config says where and how a Network works. Zero fields take the defaults named
// with them.
type Config struct {
	// Name keeps two servers on one machine apart: it is part of every table,
	// link and namespace name. 1 to 6 characters of [a-z0-9]; default "main".
	Name string
	// RunDir holds the namespaces' bind mounts, in RunDir/netns; default "/run/cordon".
	RunDir string
	// Subnet4 is cut into one /30 per slot; default 10.223.0.0/16. Subnet6 is a
	// /48 cut into one /64 per slot; default derived from Name (RFC 4193).
	Subnet4, Subnet6 netip.Prefix
	IPv6             IPv6
	// ProxyPort and DNSPort are where the transparent proxy and the resolver
	// listen on 127.0.0.1 and ::1 (TCP; the resolver UDP too). While they do not
	// listen, what is meant for them is refused.
	ProxyPort, DNSPort uint16
	// Mark is the packet mark bit that sends a packet to the transparent
	// sockets, RouteTable the routing table that does it; default 1<<28 and a
	// number derived from Name.
	Mark       uint32
	RouteTable int
	// SourcePorts are the ports that flows of sandboxes have outside; nothing of the
	// host may listen there. Default DefaultSourcePorts.
	SourcePorts PortRange
	// PublicAddresses are those that others know the machine by and that no link of it has.
	PublicAddresses []netip.Prefix
	// NFLogGroup is the netfilter log group that refused packets go to; default
	// derived from Name. Groups belong to a whole network namespace.
	NFLogGroup uint16
	// PoolSize is how many slots are kept ready; default 16.
	PoolSize int
	// MaxFlows is how many flows one sandbox may have at a time, so that none fills
	// the host's connection tracker; default 8192.
	MaxFlows uint32
	// Sandboxes is how many there will be at a time at most, for the size of the
	// tracker's table; 0: not known.
	Sandboxes int
	// MaxNewFlows is how many flows one sandbox may open in a second, and at once; 0:
	// no limit.
	MaxNewFlows uint32
	// MaxQueries is how many DNS queries one sandbox may send over UDP in a second, and
	// at once; default [DefaultQueries].
	MaxQueries uint32
	// MaxBytesOut is how many bytes, headers and all, the flows that a sandbox opens
	// may take out in all, by the kernel or by the proxy; then every packet is refused. A
	// restart of the server does not begin a new budget, a new slot does. 0: no limit.
	MaxBytesOut uint64
	// Quarantine is how long a released slot's addresses rest; default one minute.
	Quarantine time.Duration
	Flows      flowlog.Recorder // required
	// Lost is called with a number when the kernel dropped at least so many events because
	// they were read too slowly; may be nil.
	Lost func(atLeast uint64)
	Log  *slog.Logger // required

	entries uint64 // of the tracker's table, in tests; 0: what the kernel says
}

var nameForm = regexp.MustCompile(`^[a-z0-9]{1,6}$`)

// withDefaults fills in and checks c.
func (c Config) withDefaults() (Config, error) {
	if c.Name == "" {
		c.Name = "main"
	}
	if !nameForm.MatchString(c.Name) {
		return c, errs.New(errs.Invalid, "network.name %q: use 1 to 6 characters of a-z and 0-9", c.Name)
	}
	h := slot.Hash(c.Name)
	if c.RunDir == "" {
		c.RunDir = "/run/cordon"
	}
	if !c.Subnet4.IsValid() {
		c.Subnet4 = netip.MustParsePrefix("10.223.0.0/16")
	}
	if !c.Subnet6.IsValid() {
		c.Subnet6 = netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0xc0, 0x4d, byte(h >> 16), byte(h >> 8), byte(h)}), 48)
	}
	if c.Mark == 0 {
		c.Mark = 1 << 28
	}
	if c.RouteTable == 0 {
		c.RouteTable = 0xc0d0000 | int(h&0xffff)
	}
	if c.SourcePorts == (PortRange{}) {
		c.SourcePorts = DefaultSourcePorts
	}
	if c.NFLogGroup == 0 {
		c.NFLogGroup = uint16(h%60000) + 1000
	}
	if c.PoolSize == 0 {
		c.PoolSize = 16
	}
	if c.MaxFlows == 0 {
		c.MaxFlows = 8192
	}
	if c.MaxQueries == 0 {
		c.MaxQueries = DefaultQueries
	}
	if c.Quarantine == 0 {
		c.Quarantine = time.Minute
	}
	return c, c.check()
}

func (c Config) check() error {
	switch {
	case !c.Subnet4.Addr().Is4() || c.Subnet4.Bits() > 28 || c.Subnet4 != c.Subnet4.Masked():
		return errs.New(errs.Invalid, "network.subnet4 %s: give an IPv4 network of at most 28 bits, for example 10.223.0.0/16", c.Subnet4)
	case !c.Subnet4.Addr().IsPrivate():
		return errs.New(errs.Invalid, "network.subnet4 %s: use a private network (RFC 1918), which every policy already denies", c.Subnet4)
	case !c.Subnet6.Addr().Is6() || c.Subnet6.Bits() != 48 || c.Subnet6 != c.Subnet6.Masked() || !c.Subnet6.Addr().IsPrivate():
		return errs.New(errs.Invalid, "network.subnet6 %s: give a unique local /48, for example fd12:3456:789a::/48", c.Subnet6)
	case c.Mark&(c.Mark-1) != 0:
		return errs.New(errs.Invalid, "network.mark %#x: give exactly one bit", c.Mark)
	case c.SourcePorts.First < 1024 || c.SourcePorts.Len() < leastSourcePorts:
		return errs.New(errs.Invalid, "network.source_ports %s: give a range of at least %d ports above 1023, for example %s", c.SourcePorts, leastSourcePorts, DefaultSourcePorts)
	case c.SourcePorts.Has(c.ProxyPort) || c.SourcePorts.Has(c.DNSPort):
		return errs.New(errs.Invalid, "network.source_ports %s: the proxy's port %d and the resolver's %d must be outside of it", c.SourcePorts, c.ProxyPort, c.DNSPort)
	case !strings.HasPrefix(c.RunDir, "/"):
		return errs.New(errs.Invalid, "network.runDir %q: give an absolute path", c.RunDir)
	case c.Flows == nil || c.Log == nil:
		return errs.New(errs.Invalid, "network: Flows and Log are required")
	}
	return nil
}

// machine is what a Network needs of the machine outside of its table: links, routing rules,
// kernel parameters, the fail-closed guard.
type machine struct {
	cfg   Config
	plan  slot.Plan // which slot has which address
	kern  *kernel
	link  *netlink.Handle
	v6    bool              // new slots get IPv6
	guard *failclosed.Guard // nil before Reconcile, or where the kernel lacks what it needs
}

// Network implements sandbox.Network on the Linux kernel, in the network
// namespace its process is in.
type Network struct {
	*machine
	*shares
	ct *conntrack.Tracker

	hidden atomic.Bool // the table's rules for source ports are in force

	around atomic.Pointer[near]
	nat64  atomic.Pointer[[]netip.Prefix] // the network's own prefixes
	nearMu sync.Mutex                     // held while around or denied is replaced
	denied atomic.Pointer[map[netip.AddrPort]int]
	// deniedInForce is what the kernel has of denied; nil: not known. Guarded by nearMu.
	deniedInForce map[netip.AddrPort]int
	owners        []atomic.Pointer[owner] // by slot number: who may be asked about without a lock

	ready  chan *slotState // the pool
	wake   chan struct{}   // the pool is not full
	opened chan struct{}   // closed by Reconcile

	mu      sync.Mutex // guards what follows
	slots   map[int]*slotState
	byID    map[sandbox.ID]*slotState
	byLink  map[uint32]*slotState // by interface index
	next    int                   // slot number to try first: numbers go round
	resting map[int]time.Time
	trash   []*slotState
	keys    map[string]uint32 // API keys by number, in the order they were met
	open    bool
}

var _ sandbox.Network = (*Network)(nil)

// slotState is a slot and what is in force for it.
type slotState struct {
	slot.Slot

	mu      sync.Mutex   // serialises Apply, Pin, Unpin and Release; guards what follows
	tries   uint16       // the highest generation used
	inForce *nft.InForce // nil before the first policy
	pins    pinTable
	key     uint32 // number of its owner's API key
	spent   uint64 // of Config.MaxBytesOut, by an earlier server process
	retired bool   // its rules are withdrawn
}

// owner is what is known about the sandbox behind an address. It is replaced,
// never changed.
type owner struct {
	id     sandbox.ID
	policy *policy.Compiled // nil before the first Apply
	gone   bool             // released: kept only to name the last events of its flows
}

// New checks cfg and opens what a Network needs. It changes nothing yet: call
// Reconcile, then Run.
func New(cfg Config) (*Network, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	h, err := netlink.NewHandle()
	if err != nil {
		return nil, fmt.Errorf("open route netlink: %w", err)
	}
	m := &machine{
		cfg: cfg, kern: &kernel{}, link: h,
		plan: slot.Plan{Name: cfg.Name, Dir: cfg.RunDir + "/netns", Subnet4: cfg.Subnet4, Subnet6: cfg.Subnet6, Most: nft.MaxSlots},
	}
	n := &Network{
		machine: m,
		shares:  &shares{conf: &m.cfg},
		ct:      &conntrack.Tracker{},
		ready:   make(chan *slotState, cfg.PoolSize),
		wake:    make(chan struct{}, 1),
		opened:  make(chan struct{}),
		slots:   map[int]*slotState{},
		byID:    map[sandbox.ID]*slotState{},
		byLink:  map[uint32]*slotState{},
		resting: map[int]time.Time{},
		keys:    map[string]uint32{},
	}
	n.measure()
	if err := n.readAddrs(); err != nil {
		h.Close()
		return nil, err
	}
	n.owners = make([]atomic.Pointer[owner], n.plan.Capacity())
	switch cfg.IPv6 {
	case IPv6On:
		n.v6 = true
	case IPv6Auto:
		r, ok := slot.DefaultRoute(h, netlink.FAMILY_V6)
		n.v6 = ok && r.Type == unix.RTN_UNICAST
	}
	return n, nil
}

// Run keeps the pool filled, deletes released slots and feeds the flow log,
// until ctx ends. It waits for Reconcile.
func (n *Network) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-n.opened:
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.keepPool(ctx) })
	g.Go(func() error { return n.emptyTrash(ctx) })
	g.Go(func() error { return n.followFlows(ctx) })
	g.Go(func() error { return n.followLogs(ctx) })
	g.Go(func() error { return n.guardTable(ctx) })
	g.Go(func() error { return n.watchHost(ctx) })
	return g.Wait()
}

// Close releases what this process holds open. Everything in the kernel stays:
// sandboxes and their rules outlive the server.
func (n *Network) Close() error {
	n.kern.close()
	err := errors.Join(n.ct.Close(), n.guard.Close())
	n.link.Close()
	return err
}

// HasIPv6 reports whether slots get IPv6 addresses.
func (n *Network) HasIPv6() bool { return n.v6 }

// Owner returns the sandbox that has addr, IPv4 or IPv6, and the policy it is
// under. It takes no lock. False: no sandbox has it, or none with a policy in force yet.
func (n *Network) Owner(addr netip.Addr) (sandbox.ID, *policy.Compiled, bool) {
	i, ok := n.plan.SlotOf(addr)
	if !ok {
		return "", nil, false
	}
	o := n.owners[i].Load()
	if o == nil || o.gone || o.policy == nil {
		return "", nil, false
	}
	return o.id, o.policy, true
}

// poke wakes keepPool.
func (n *Network) poke() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// isOpen returns an error until Reconcile is done: before that it is not known which
// slots are taken.
func (n *Network) isOpen() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.open {
		return errs.New(errs.Unavailable, "the network is still being set up; try again in a moment")
	}
	return nil
}

// held returns the slot of a lease in use.
func (n *Network) held(l sandbox.Lease) (*slotState, error) {
	if err := n.isOpen(); err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.byID[l.Sandbox]
	if s == nil || s.Num != l.Slot {
		return nil, errs.New(errs.NotFound, "sandbox %s holds no network slot %d", l.Sandbox, l.Slot)
	}
	return s, nil
}
