package network

import (
	"context"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/network/slot"
)

func TestTwoServersDoNotShareASubnet(t *testing.T) {
	w := start(t)
	w.lease()
	for name, c := range map[string]struct{ subnet, says string }{
		"the same":            {"10.223.0.0/16", "another cordon server, t,"},
		"a part":              {"10.223.0.0/24", "another cordon server, t,"},
		"the uplink's":        {"10.99.0.0/16", "link up0 leads to 10.99.1.0/24"},
		"another":             {"10.224.0.0/16", ""},
		"a part of an office": {"10.98.1.0/24", ""},
	} {
		t.Run(name, func(t *testing.T) {
			up, err := netlink.LinkByName("up0")
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range []string{"10.99.1.1/24", "10.98.0.1/16"} {
				if err := netlink.AddrReplace(up, slot.Address(netip.MustParsePrefix(a))); err != nil {
					t.Fatal(err)
				}
			}
			cfg := w.cfg
			cfg.Name, cfg.Subnet4, cfg.RunDir = "u", netip.MustParsePrefix(c.subnet), t.TempDir()
			cfg.RouteTable, cfg.NFLogGroup = 0, 0
			n, err := New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := n.Uninstall(context.Background()); err != nil {
					t.Error(err)
				}
				n.Close()
			}()
			err = n.Reconcile(context.Background(), nil)
			switch {
			case c.says == "" && err != nil:
				t.Error(err)
			case c.says != "" && (!errs.Is(err, errs.Conflict) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "network.subnet4")):
				t.Errorf("got %v; want a sentence with %q and the setting", err, c.says)
			}
		})
	}
	if err := CheckGuard("t"); err != nil {
		t.Errorf("the end of one server takes the other's guard: %v", err)
	}
}
