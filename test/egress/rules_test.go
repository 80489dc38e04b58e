package egress_test

import (
	"context"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/lab"
)

// The lab's cast, see proving/lab/world.zone.
const (
	addrA, nameA = "198.51.100.10", "allowed.test"
	addrB, nameB = "198.51.100.20", "denied.test"
	attacker     = "198.51.100.66"
	addrA6       = "2001:db8:80::c633:640a"
	addrB6       = "2001:db8:80::c633:6414"
)

var (
	all     = []string{client.AllTraffic}
	allow0  = verdict{"allow", "allow[0]", "allow-address"}
	allow1  = verdict{"allow", "allow[1]", "allow-address"}
	allowed = verdict{"allow", "allow[0]", "allow-name"}
	denied  = verdict{"deny", "deny[0]", "deny-address"}
	offline = verdict{"deny", "deny[internet]", "deny-address"}
	open    = verdict{"allow", "default", "default"}
	floor   = verdict{"deny", "floor", "floor"}
)

func tcp(addr string) try { return try{Kind: "tcp", Addr: addr + ":4000"} }
func udp(addr string) try { return try{Kind: "udp", Addr: addr + ":4000"} }

// web is a request to an address that shows a name; get the same without TLS.
func web(addr, name string) try { return try{Kind: "https", Addr: addr + ":443", Name: name} }
func get(addr, name string) try { return try{Kind: "http", Addr: addr + ":80", Name: name} }
func ask8(name string) try      { return try{Kind: "dns", Addr: "8.8.8.8:53", Name: name} }

// passes and refuses are the outcomes of flows that the kernel judges.
func passes(y try, v verdict) check  { return check{try: y, class: "ok", verdict: v} }
func refuses(y try, v verdict) check { return check{try: y, class: "refused", verdict: v} }

// domainOnly is what "allowed.test" in allowOut and everything in denyOut mean.
func domainOnly() []check {
	wrong := verdict{"deny", "deny[0]", "name-denied"}
	return []check{
		{web(nameA, nameA), "ok", allowed, addrA + ":443"},
		{get(nameA, nameA), "ok", allowed, addrA + ":80"},
		{ask8(nameA), "NOERROR", allowed, addrA},
		{ask8(nameB), "NODATA", verdict{"deny", "dns", "name-denied"}, ""},
		{web(addrB, nameB), "alert", wrong, ""},
		{get(addrB, nameB), "403", wrong, ""},
		{web(attacker, nameA), "ok", allowed, addrA + ":443"}, // a borrowed name leads to its owner
		refuses(tcp(addrA), denied),
		refuses(udp(addrA), denied),
	}
}

// step is one update and what it must mean.
type step struct {
	name  string
	rules client.Network
	want  []check
}

// steps is the life of one sandbox's rules; each replaces the one before.
func steps() []step {
	net := func(deny []string, allow ...string) client.Network {
		return client.Network{AllowOut: allow, DenyOut: deny}
	}
	return []step{
		{"deny all", net(all), []check{
			refuses(tcp(addrA), denied), refuses(udp(addrA), denied), refuses(web(addrA, nameA), denied), refuses(get(addrA, nameA), denied),
			refuses(tcp("["+addrA6+"]"), denied), refuses(udp("["+addrA6+"]"), denied),
			{ask8(nameA), "NODATA", denied, ""},
		}},
		{"allow through deny all", net(all, addrA), []check{
			passes(tcp(addrA), allow0), passes(udp(addrA), allow0), passes(web(addrA, nameA), allow0), passes(get(addrA, nameA), allow0),
			refuses(tcp(addrB), denied), refuses(tcp("["+addrA6+"]"), denied),
		}},
		{"an update replaces and does not append", net(all, addrB), []check{
			passes(tcp(addrB), allow0), refuses(tcp(addrA), denied), refuses(udp(addrA), denied), refuses(web(addrA, nameA), denied),
		}},
		{"several addresses", net(all, addrA, addrB), []check{
			passes(tcp(addrA), allow0), passes(tcp(addrB), allow1), refuses(tcp(attacker), denied),
		}},
		{"a network, to its edges", net(all, "198.51.100.16/28"), []check{
			passes(tcp("198.51.100.16"), allow0), passes(udp(addrB), allow0), passes(tcp("198.51.100.31"), allow0),
			refuses(tcp("198.51.100.15"), denied), refuses(tcp("198.51.100.32"), denied),
		}},
		{"nested, overlapping and duplicate networks, with host bits set",
			net(all, "198.51.100.0/26", "198.51.100.20/30", "198.51.100.10/32", "198.51.100.77/28", "198.51.100.64/28", "198.51.100.10"), []check{
				passes(tcp("198.51.100.0"), allow0), passes(tcp("198.51.100.63"), allow0),
				passes(tcp("198.51.100.64"), verdict{"allow", "allow[3]", "allow-address"}),
				passes(tcp("198.51.100.79"), verdict{"allow", "allow[3]", "allow-address"}),
				refuses(tcp("198.51.100.80"), denied),
			}},
		{"a small hole in a denied network, and a denied network in the open", net([]string{"198.51.100.0/24"}, "198.51.100.10/31"), []check{
			passes(tcp(addrA), allow0), passes(tcp("198.51.100.11"), allow0),
			refuses(tcp("198.51.100.9"), denied), refuses(tcp("198.51.100.255"), denied), passes(tcp("8.8.8.9"), open),
		}},
		{"networks as large and as high as they come", net([]string{"0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"}, "198.51.100.254/31", "255.255.255.255/32", "2001:db8:80::/96"), []check{
			passes(tcp("198.51.100.255"), allow0), passes(tcp("["+addrA6+"]"), verdict{"allow", "allow[2]", "allow-address"}),
			refuses(tcp(addrA), verdict{"deny", "deny[1]", "deny-address"}), refuses(tcp("8.8.8.9"), denied),
		}},
		{"everything allowed beats everything denied", net(all, "0.0.0.0/0", "::/0"), []check{
			passes(tcp(addrA), allow0), passes(tcp("["+addrA6+"]"), allow1), refuses(tcp("10.0.0.5"), floor),
		}},
		{"IPv6 addresses and networks", net(all, addrA6, "2001:db8:80::c633:6410/124"), []check{
			passes(tcp("["+addrA6+"]"), allow0), passes(udp("["+addrB6+"]"), allow1), passes(web("["+addrA6+"]", nameA), allow0),
			refuses(tcp("[2001:db8:80::c633:6420]"), denied), refuses(tcp("[2001:db8:80::c633:640f]"), denied), refuses(tcp(addrA), denied),
		}},
		{"IPv6 alone denied", net([]string{"::/0"}), []check{
			passes(tcp(addrA), open), refuses(tcp("["+addrA6+"]"), denied), refuses(udp("["+addrA6+"]"), denied),
		}},
		{"a domain", net(all, nameA), domainOnly()},
		{"a domain and an address", net(all, nameA, addrB), append([]check{
			passes(tcp(addrB), allow1), passes(udp(addrB), allow1), {web(addrB, nameB), "ok", allow1, addrB + ":443"},
			{web(nameA, nameA), "ok", allowed, addrA + ":443"},
		}, refuses(tcp(addrA), denied))},
		{"a wildcard: every depth, not the apex", net(all, "*.wild.test"), []check{
			{web("a.wild.test", ""), "ok", allowed, "198.51.100.40:443"},
			{get("a.b.c.wild.test", ""), "ok", allowed, "198.51.100.40:80"},
			{web("198.51.100.41", "wild.test"), "alert", verdict{"deny", "deny[0]", "name-denied"}, ""},
			{web("198.51.100.42", "notwild.test"), "alert", verdict{"deny", "deny[0]", "name-denied"}, ""},
		}},
		{"the allow list removed", net(all), []check{
			refuses(tcp(addrB), denied), refuses(web(addrA, nameA), denied), {ask8(nameA), "NODATA", denied, ""},
		}},
		{"everything cleared", client.Network{}, []check{
			passes(tcp(addrA), open), passes(udp(addrB), open), passes(tcp("["+addrA6+"]"), open), {web(nameB, nameB), "ok", open, ""},
			{ask8(nameB), "NOERROR", open, addrB}, refuses(tcp("10.0.0.5"), floor), refuses(get("169.254.169.254", ""), floor),
		}},
		{"applied again", net(all, nameA), domainOnly()},
		{"no internet", client.Network{AllowInternetAccess: new(false)}, []check{
			refuses(tcp(addrA), offline), refuses(udp("["+addrA6+"]"), offline), {ask8(nameA), "NODATA", offline, ""},
		}},
		{"no internet, but an address and a domain", client.Network{AllowInternetAccess: new(false), AllowOut: []string{addrB, nameA}}, []check{
			passes(tcp(addrB), allow0), refuses(tcp(addrA), offline),
			{web(nameA, nameA), "ok", verdict{"allow", "allow[1]", "allow-name"}, addrA + ":443"},
		}},
		{"internet access true changes nothing", client.Network{AllowInternetAccess: new(true), DenyOut: []string{addrB}}, []check{
			passes(tcp(addrA), open), refuses(tcp(addrB), denied),
		}},
		{"internet access left out clears it", client.Network{}, []check{passes(tcp(addrB), open)}},
	}
}

func testRules(t *testing.T, s *live) {
	sequence := steps()
	g := s.guest(t, sequence[0].rules)
	for i, st := range sequence {
		if !t.Run(st.name, func(t *testing.T) {
			g := g.in(t)
			if i > 0 {
				g.rules(st.rules)
			}
			mark := s.lab.Recorder().Mark()
			g.run(st.want...)
			g.silent(mark, st.want)
		}) {
			t.Log(st.rules)
		}
	}
	t.Run("rules that are refused leave the old ones in force", func(t *testing.T) {
		g := g.in(t)
		g.rules(client.Network{DenyOut: all, AllowOut: []string{addrA}})
		for _, bad := range []client.Network{{AllowOut: []string{nameA}}, {DenyOut: []string{nameA}}, {DenyOut: all, AllowOut: []string{"*foo.com"}}} {
			if err := g.SetNetwork(t.Context(), bad); err == nil {
				t.Errorf("%+v is accepted", bad)
			}
		}
		g.run(passes(tcp(addrA), allow0), refuses(tcp(addrB), denied))
	})
	t.Run("a pause and a resume keep them", func(t *testing.T) {
		testPause(t, s, g)
	})
}

// in makes the sandbox a subtest's.
func (g *guest) in(t *testing.T) *guest {
	c := *g
	c.t = t
	return &c
}

// silent demands that no packet of a refused attempt left the host.
func (g *guest) silent(mark lab.Mark, checks []check) {
	g.t.Helper()
	reached := map[string]bool{}
	for _, c := range checks {
		if c.class == "ok" || c.class == "NOERROR" {
			reached[hostOf(c.Addr)], reached[hostOf(c.server)] = true, true
		}
	}
	seen := g.live.lab.Recorder().Since(mark)
	for _, c := range checks {
		host := hostOf(c.Addr)
		if c.Kind == "dns" {
			if c.class == "NODATA" && seen.AskedFor(c.Name) {
				g.t.Errorf("a question for %s left the host", c.Name)
			}
			continue
		}
		addr, ok := parseAddr(host)
		if !ok || reached[host] {
			continue
		}
		if err := seen.To(addr).None(); err != nil {
			g.t.Errorf("%s is refused, but left the host: %v", c.try, err)
		}
	}
}

func testPause(t *testing.T, s *live, g *guest) {
	g = g.in(t)
	g.rules(client.Network{DenyOut: all, AllowOut: []string{nameA, addrB}})
	g.sh("echo kept > /home/user/note")
	want := append([]check{
		passes(tcp(addrB), allow1), {web(nameA, nameA), "ok", allowed, addrA + ":443"}, refuses(tcp(addrA), denied),
		{web("198.51.100.30", "shared-a.test"), "alert", verdict{"deny", "deny[0]", "name-denied"}, ""},
	}, check{ask8(nameB), "NODATA", verdict{"deny", "dns", "name-denied"}, ""})
	since := g.lastSeq()
	g.run(want...)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	began := time.Now()
	if err := g.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	paused := time.Since(began)
	mark := s.lab.Recorder().Mark()
	began = time.Now()
	if _, err := s.Connect(ctx, g.ID, time.Minute); err != nil {
		t.Fatal(err)
	}
	t.Logf("pause %s, resume %s", paused.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	g.locate()
	if before := g.events(client.EventOptions{Since: since}); len(before) == 0 || before[0].Time.After(began) {
		t.Errorf("the pause lost the flow log: %s", list(before))
	}
	if got := g.sh("cat /home/user/note"); got != "kept\n" {
		t.Errorf("after the resume the file says %q", got)
	}
	g.run(want...)
	g.silent(mark, want)
	t.Run("rules set while paused hold from the resume on", func(t *testing.T) {
		g := g.in(t)
		if err := g.Pause(ctx); err != nil {
			t.Fatal(err)
		}
		g.rules(client.Network{DenyOut: all, AllowOut: []string{addrA}})
		if _, err := s.Connect(ctx, g.ID, time.Minute); err != nil {
			t.Fatal(err)
		}
		g.locate()
		g.run(passes(tcp(addrA), allow0), refuses(tcp(addrB), denied), refuses(web(addrB, nameA), denied))
	})
}
