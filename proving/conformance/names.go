package conformance

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/miekg/dns"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/conformance/probe"
)

func nameCases() []Case {
	const group = "Names"
	return []Case{
		{ID: 32, Group: group, Title: "a trailing dot", Run: trailingDot},
		{ID: 33, Group: group, Title: "upper and lower case", Run: letterCase},
		{ID: 34, Group: group, Title: "punycode, full-width dots, homoglyphs", Run: unicodeNames},
		{ID: 35, Group: group, Title: "names that only look alike", Run: lookalikes},
		{ID: 36, Group: group, Title: "NUL, controls and backslashes in names", Run: controlNames},
		{ID: 37, Group: group, Title: "userinfo, brackets and ports in Host", Run: hostExtras},
		{ID: 38, Group: group, Title: "malformed and over-broad rules at the API", Run: badRules, Anywhere: true},
		{ID: 39, Group: group, Title: "limits of length", Run: longNames},
	}
}

// refuseNames shows each text as SNI and as Host, to A's address.
func refuseNames(t *Trial, what string, by *Subject, reasons []string, names ...string) {
	h := newHello(nameA)
	t.Try(Try{
		What: what + ", as SNI", By: by,
		Orders: each(names, func(n string) probe.Order { return hello(addrA, h.named(hostName(n)).bytes()) }),
		Answer: alerted, Log: denied(reasons...),
	})
	t.Try(Try{
		What: what + ", as Host", By: by,
		Orders: each(names, func(n string) probe.Order { return http80(addrA, get(n, "/canary")) }),
		Never:  []string{"canary"}, Answer: cut, Log: denied(reasons...),
	})
}

// acceptNames shows each name as SNI and as Host, to the attacker's address: the
// server at its own address answers.
func acceptNames(t *Trial, what string, by *Subject, owner place, names ...string) {
	h := newHello(nameA)
	t.Try(Try{
		What: "control: " + what + ", as SNI", By: by,
		Orders:  each(names, func(n string) probe.Order { return hello(addrAttacker, h.named(hostName(n)).bytes()) }),
		Reaches: []Arrival{{At: owner.at, Port: 443}}, Asks: []string{owner.host}, Answer: answered, Log: allowed("allow-name"),
	})
	for _, n := range names {
		t.Try(Try{
			What: "control: " + what + ", as Host " + shown(n), By: by, Orders: []probe.Order{http80(addrAttacker, get(n, "/"))},
			Reaches: []Arrival{{At: owner.at, Port: 80}}, Asks: []string{owner.host}, Answer: served(owner.at, n), Log: allowed("allow-name"),
		})
	}
}

func shown(name string) string {
	if len(name) > 24 {
		return fmt.Sprintf("%s… (%d octets)", name[:20], len(name))
	}
	return name
}

func trailingDot(t *Trial) {
	s := t.Sandbox(standard())
	refuseNames(t, "B with a dot", s, []string{"name-denied"}, nameB+".")
	refuseNames(t, "two dots, a dot in front, only dots", s, []string{"bad-name"}, nameA+"..", "."+nameA, ".", "..")
	acceptNames(t, "A with a dot", s, place{addrA, nameA}, nameA+".")
	t.Try(Try{
		What: "B with a dot, in DNS", By: s, Orders: []probe.Order{ask(addrDNS, nameB+".", dns.TypeA)},
		Answer: blocked, Log: Want{"deny", []string{"name-denied"}, nameB},
	})
}

func letterCase(t *Trial) {
	s := t.Sandbox(standard())
	refuseNames(t, "B in capitals", s, []string{"name-denied"}, "DENIED.TEST", "Denied.tesT")
	acceptNames(t, "A in capitals", s, place{addrA, nameA}, "ALLOWED.TEST", "aLLowed.Test")
	acceptNames(t, "A where the rule is in capitals", t.Sandbox(only("ALLOWED.Test")), place{addrA, nameA}, nameA)
}

func unicodeNames(t *Trial) {
	s := t.Sandbox(only(nameA, "bücher.test"))
	acceptNames(t, "the A-label of a rule in Unicode", s, place{addrUnicode, unicodeName}, unicodeName, strings.ToUpper(unicodeName))
	t.Try(Try{
		What: "Unicode and Latin-1 as SNI", By: s, Answer: alerted, Log: denied("bad-name"),
		Orders: each([]string{"bücher.test", "b\xfccher.test"}, func(n string) probe.Order { return hello(addrA, newHello(nameA).named(hostName(n)).bytes()) }),
	})
	t.Try(Try{
		What: "control: the same as Host; the server reads the A-label", By: s,
		Orders:  []probe.Order{http80(addrAttacker, get("bücher.test", "/")), http80(addrAttacker, get("B\xdccher.test", "/"))},
		Reaches: []Arrival{{At: addrUnicode, Port: 80}}, Answer: served(addrUnicode, unicodeName), Log: allowed("allow-name"),
	})
	refuseNames(t, "full-width letters and dots, ideographic dot", s, []string{"bad-name"},
		"ａllowed.test", "allowed．test", "allowed。test", "allowed｡test")
	refuseNames(t, "homoglyphs, zero-width and soft hyphen", s, []string{"bad-name", "name-denied"},
		"аllowed.test", "allow\u200bed.test", "allow\u00aded.test", "ſomething."+nameA)
	refuseNames(t, "A-labels of homoglyphs", s, []string{"name-denied"}, "xn--llowed-4nf.test", "xn--allowed-9za.test", "xn--bcher-kvb.test")
}

func lookalikes(t *Trial) {
	s := t.Sandbox(standard())
	refuseNames(t, "A as the end or the beginning of another name", s, []string{"name-denied"},
		"not"+nameA, "x-"+nameA, nameA+".attacker.test", nameA+"x", "lowed.test", "test", "www."+nameA)
	refuseNames(t, "the wildcard's apex, its siblings, itself", s, []string{"name-denied", "bad-name"},
		nameWild, "not"+nameWild, "x"+nameWild, nameWild+".attacker.test", "x."+nameWild+".attacker.test", "*."+nameWild)
	acceptNames(t, "names under the wildcard, at any depth", s, place{addrWild, nameWild}, "x."+nameWild, "a.b.c."+nameWild)
	t.Try(Try{
		What: "the same in DNS", By: s,
		Orders: each([]string{"not" + nameA, nameA + ".attacker.test", nameWild, "not" + nameWild}, func(n string) probe.Order {
			return ask(addrDNS, n, dns.TypeA)
		}),
		Answer: blocked, Log: denied("name-denied"),
	})
}

func controlNames(t *Trial) {
	s := t.Sandbox(standard())
	refuseNames(t, "NUL, line ends, DEL", s, []string{"bad-name", "bad-hello", "bad-request"},
		nameA+"\x00."+nameB, nameB+"\x00."+nameA, "\x00"+nameA, nameA+"\x00", "a\x01."+nameWild, nameA+"\x7f")
	refuseNames(t, "backslash, slash, percent, space", s, []string{"bad-name", "bad-hello"},
		nameB+"\\."+nameA, "x\\."+nameWild, "x/."+nameWild, nameA+"/", "allowed%2etest", "x y."+nameWild, nameB+",."+nameWild)
	refuseNames(t, "a hyphen first, empty labels", s, []string{"bad-name"}, "-."+nameWild, "-x."+nameWild, "x.."+nameWild)
	acceptNames(t, "underscores, a hyphen last", s, place{addrWild, nameWild}, "x_y."+nameWild, "_x."+nameWild, "x-."+nameWild)
}

func hostExtras(t *Trial) {
	s := t.Sandbox(standard())
	refuse := func(what string, reasons []string, hosts ...string) {
		t.Try(Try{
			What: what, By: s, Orders: each(hosts, func(h string) probe.Order { return http80(addrB, get(h, "/canary")) }),
			Never: []string{"canary", nameB}, Answer: cut, Log: denied(reasons...),
		})
	}
	refuse("userinfo", []string{"bad-name"}, "user@"+nameA, nameA+"@"+nameB, nameB+"@"+nameA, nameA+":80@"+nameB)
	refuse("brackets", []string{"bad-name"}, "["+nameA+"]", "["+nameA, "[::1", "[::1]x", "[fe80::1%25eth0]")
	refuse("ports that are none", []string{"bad-name"}, nameA+":", nameA+":80:80", nameA+":+80", nameA+": 80", nameA+":8o", ":80", nameA+":65536")
	refuse("another port than the one connected to", []string{"port-mismatch"}, nameA+":443", nameA+":8080")
	refuse("URLs and fragments", []string{"bad-name"}, "http://"+nameA, nameA+"/", nameA+"#@"+nameB, nameA+"?x", "//"+nameA)
	t.Try(Try{
		What: "control: the port connected to", By: s, Orders: []probe.Order{http80(addrB, get(nameA+":80", "/"))},
		Reaches: reachesA, Answer: served(addrA, nameA+":80"), Log: allowed("allow-name"),
	})
}

// badRules: what is no rule is refused before anything exists, and named.
func badRules(t *Trial) {
	label := strings.Repeat("x", 64)
	refuse := func(what string, network func(string) client.Network, entries ...string) {
		t.Try(Try{What: what, Do: func(ctx context.Context) error {
			for _, e := range entries {
				sb, err := t.suite.client.Create(ctx, client.CreateOptions{Network: network(e)})
				if err == nil {
					return errors.Join(fmt.Errorf("%q was accepted", e), sb.Kill(ctx))
				}
				if !errors.Is(err, client.ErrInvalid) || !strings.Contains(err.Error(), e) {
					return fmt.Errorf("%q: the error does not name it: %w", e, err)
				}
			}
			return nil
		}})
	}
	allow := func(e string) client.Network { return only(nameA, e) }
	refuse("wildcards in other places", allow, "*foo.test", "a.*.test", "*.*.test", "**.test", "*.", "test.*", "a*.test", "*.*")
	refuse("URLs, spaces, empty labels, nothing", allow, "http://"+nameA, nameA+"/", "", " ", "a b.test", "allowed..test", "-a.test", ".test", "user@"+nameA)
	refuse("names over the limits", allow, label+".test", longName+"x", "*."+label+".test")
	refuse("ports and numbers that are none", allow, nameA+":0", nameA+":65536", nameA+":http", "1.2.3", "0x7f.1", "1.2.3.256", "1.2.3.4/33", "::/129", "fe80::1%eth0")
	refuse("names in a deny list", func(e string) client.Network { return client.Network{DenyOut: []string{client.AllTraffic, e}} },
		nameB, "*."+nameB, "*", "http://"+nameB, "1.2.3.4/33")
	t.Try(Try{What: "a name without deny-all beside it", Do: func(ctx context.Context) error {
		sb, err := t.suite.client.Create(ctx, client.CreateOptions{Network: client.Network{AllowOut: []string{nameA}}})
		if err == nil {
			return errors.Join(errors.New("it was accepted"), sb.Kill(ctx))
		}
		if !errors.Is(err, client.ErrInvalid) || !strings.Contains(err.Error(), "ALL_TRAFFIC") {
			return err
		}
		return nil
	}})
	if t.suite.stand != nil {
		rulesThatStay(t)
	}
}

// rulesThatStay: a refused update changes nothing, and "*" is about names only.
func rulesThatStay(t *Trial) {
	s := t.Fresh(only(nameA))
	t.Try(Try{
		What: "an update with a bad entry leaves the old rules in force", By: s,
		Do: func(ctx context.Context) error {
			if err := s.SetNetwork(ctx, only(nameB, "a.*.test")); !errors.Is(err, client.ErrInvalid) {
				return fmt.Errorf("the update was not refused: %w", err)
			}
			return nil
		},
		Orders: []probe.Order{http80(addrB, get(nameB, "/canary"))},
		Never:  []string{"canary"}, Answer: cut, Log: Want{"deny", []string{"name-denied"}, nameB},
	})
	any := t.Sandbox(only("*"))
	t.Try(Try{
		What: `"*" allows names, not addresses, and no private ones`, By: any,
		Orders: []probe.Order{http80(addrB, get(addrB.String(), "/canary")), hello(addrB, newHello(nameA).named().bytes())},
		Never:  []string{"canary"}, Answer: cut, Log: denied("no-host", "no-sni"),
	})
	t.Try(Try{
		What: `control: "*" and any name`, By: any, Orders: []probe.Order{http80(addrA, get(nameB, "/"))}, Asks: []string{nameB},
		Reaches: []Arrival{{At: addrB, Port: 80}}, Answer: served(addrB, nameB), Log: allowed("allow-name"),
	})
}

func longNames(t *Trial) {
	s := t.Sandbox(only(longLabel+".test", longName, "*."+nameWild))
	tooLong := strings.Repeat(strings.Repeat("x", 60)+".", 5)
	refuseNames(t, "labels of 64, names of 254 octets and more", s, []string{"bad-name", "bad-hello"},
		longLabel+"l.test", "x"+longName, tooLong+nameWild, strings.Repeat("x", 64)+"."+nameWild, strings.Repeat("x.", 500)+nameWild)
	acceptNames(t, "a label of 63", s, place{addrA, longLabel + ".test"}, longLabel+".test")
	acceptNames(t, "a name of 253", s, place{addrA, longName}, longName)
}
