package policy

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var somewhere = netip.MustParseAddr("151.101.0.223")

func to(name string, port uint16) Flow {
	return Flow{Proto: TCP, Dst: netip.AddrPortFrom(somewhere, port), Name: name}
}

// TestPresetFileIsWellFormed reads the list that is part of the program: hosts
// are canonical, names and aliases are one preset's only, and a version is there once.
func TestPresetFileIsWellFormed(t *testing.T) {
	all, err := parsePresets(presetText)
	if err != nil {
		t.Fatal(err)
	}
	owner, seen := map[string]string{}, map[string]bool{}
	for _, p := range all {
		if key := p.Name + "@" + p.Version; seen[key] {
			t.Errorf("%s is there twice", key)
		} else {
			seen[key] = true
		}
		for _, name := range append([]string{p.Name}, p.Aliases...) {
			if o, taken := owner[name]; taken && o != p.Name {
				t.Errorf("%q means %s and %s", name, o, p.Name)
			}
			owner[name] = p.Name
		}
		if len(p.Hosts) == 0 {
			t.Errorf("%s has no hosts", p.Name)
		}
		hosts := map[string]bool{}
		for _, h := range p.Hosts {
			if hosts[h.Host] {
				t.Errorf("%s has %s twice", p.Name, h.Host)
			}
			hosts[h.Host] = true
			if name, ok := CanonicalName(strings.TrimPrefix(h.Host, "*.")); !ok || name != strings.TrimPrefix(h.Host, "*.") {
				t.Errorf("%s: %q is not a canonical name", p.Name, h.Host)
			}
		}
	}
	for _, name := range []string{"python", "npm", "yarn", "cargo", "go", "debian", "ubuntu", "apt", "alpine", "maven", "gradle", "github", "huggingface", "dockerhub"} {
		if owner[name] != name {
			t.Errorf("preset %s is missing: stored rules that name it would be invalid", name)
		}
	}
}

func TestAPresetAllowsItsHostsAndNothingElse(t *testing.T) {
	c := mustCompile(t, Input{AllowOut: []string{"preset:python", "example.com", "preset:apt", "preset:HuggingFace@2026-12"}, DenyOut: []string{"0.0.0.0/0"}}, nil)
	for _, tt := range []struct {
		name string
		port uint16
		want Verdict
	}{
		{"pypi.org", 443, Verdict{Allow: true, Rule: Rule{"allow[0]", "preset:python pypi.org"}, Reason: ReasonAllowName}},
		{"files.pythonhosted.org", 443, Verdict{Allow: true, Rule: Rule{"allow[0]", "preset:python files.pythonhosted.org"}, Reason: ReasonAllowName}},
		{"example.com", 80, Verdict{Allow: true, Rule: Rule{"allow[1]", "example.com"}, Reason: ReasonAllowName}},
		{"deb.debian.org", 80, Verdict{Allow: true, Rule: Rule{"allow[2]", "preset:apt deb.debian.org"}, Reason: ReasonAllowName}},
		{"deb.debian.org", 443, Verdict{Allow: true, Rule: Rule{"allow[2]", "preset:apt deb.debian.org"}, Reason: ReasonAllowName}},
		{"cas-server.xethub.hf.co", 443, Verdict{Allow: true, Rule: Rule{"allow[3]", "preset:HuggingFace@2026-12 *.hf.co"}, Reason: ReasonAllowName}},
		{"pypi.org", 80, Verdict{Rule: Rule{"deny[0]", "0.0.0.0/0"}, Reason: ReasonNameDenied}},
		{"pypi.org", 22, Verdict{Rule: Rule{"deny[0]", "0.0.0.0/0"}, Reason: ReasonDenyAddr}},
		{"upload.pypi.org", 443, Verdict{Rule: Rule{"deny[0]", "0.0.0.0/0"}, Reason: ReasonNameDenied}},
		{"evil-pypi.org", 443, Verdict{Rule: Rule{"deny[0]", "0.0.0.0/0"}, Reason: ReasonNameDenied}},
	} {
		if diff := cmp.Diff(tt.want, c.Decide(to(tt.name, tt.port))); diff != "" {
			t.Errorf("%s:%d (-want +got):\n%s", tt.name, tt.port, diff)
		}
	}
	if v := c.DecideQuery("pypi.org"); !v.Allow || v.Rule.Text != "preset:python pypi.org" {
		t.Errorf("the name of a preset's host is not resolved: %+v", v)
	}
	if v := c.DecideQuery("upload.pypi.org"); v.Allow {
		t.Errorf("a name outside the preset is resolved: %+v", v)
	}
	if ports := c.PinPorts("pypi.org"); ports != nil {
		t.Errorf("a preset opens ports beside the proxy's: %v", ports)
	}
}

// TestAPresetIsStoredByName: rules keep what was written, so that they mean the
// newest list after an upgrade.
func TestAPresetIsStoredByName(t *testing.T) {
	in := Input{AllowOut: []string{"preset:pip"}, DenyOut: []string{"0.0.0.0/0"}}
	stored, err := json.Marshal(mustCompile(t, in, nil).Input())
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"allowOut":["preset:pip"],"denyOut":["0.0.0.0/0"]}`; string(stored) != want {
		t.Errorf("stored as %s, want %s", stored, want)
	}
}

func TestPresetsThatCannotBe(t *testing.T) {
	all := []string{"0.0.0.0/0"}
	for _, tt := range []struct {
		name string
		in   Input
		op   *Operator
		want []string
	}{
		{"unknown", Input{AllowOut: []string{"1.1.1.1", "preset:pyhton"}, DenyOut: all}, nil,
			[]string{"invalid allowed address preset:pyhton", "network.allowOut[1]", `there is no preset "pyhton"`, "use python, npm, yarn, "}},
		{"none", Input{AllowOut: []string{"preset:"}, DenyOut: all}, nil, []string{`there is no preset ""`, "use python"}},
		{"an unknown version", Input{AllowOut: []string{"preset:npm@1999-01"}, DenyOut: all}, nil, []string{`preset "npm" has no version "1999-01": use 2026-12`}},
		{"a variant", Input{AllowOut: []string{"preset:npm:read"}, DenyOut: all}, nil, []string{`a preset has no variants such as ":read": use preset:npm`}},
		{"a port", Input{AllowOut: []string{"preset:npm:443"}, DenyOut: all}, nil, []string{`use preset:npm`}},
		{"without deny-all", Input{AllowOut: []string{"preset:npm"}}, nil, []string{needsDenyAll}},
		{"in denyOut", Input{DenyOut: []string{"preset:npm"}}, nil, []string{"invalid denied CIDR preset:npm", "network.denyOut[0]", "allowOut"}},
		{"as an exception to the always blocked ranges", Input{}, &Operator{FloorOpen: []string{"preset:npm"}}, []string{`operator floorOpen[0] is "preset:npm"`, "exact name"}},
		{"unknown to the operator", Input{}, &Operator{AlwaysAllow: []string{"preset:nope"}}, []string{`operator alwaysAllow[0] is "preset:nope"`, "use python"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Compile(tt.in, tt.op, 1)
			if err == nil {
				t.Fatal("accepted")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error %q does not say %q", err, want)
				}
			}
		})
	}
}

// TestTheOperatorsPresets: always_allow opens a preset's hosts, always_deny
// closes them on both of the proxy's ports, in DNS too.
func TestTheOperatorsPresets(t *testing.T) {
	c := mustCompile(t, Input{DenyOut: []string{"0.0.0.0/0"}}, &Operator{AlwaysAllow: []string{"preset:npm"}})
	if v := c.Decide(to("registry.npmjs.org", 443)); !v.Allow || v.Rule != (Rule{"operator.allow[0]", "preset:npm registry.npmjs.org"}) {
		t.Errorf("always_allow: %+v", v)
	}
	if v := c.DecideQuery("registry.npmjs.org"); !v.Allow {
		t.Errorf("always_allow: %+v", v)
	}
	c = mustCompile(t, Input{}, &Operator{AlwaysDeny: []string{"preset:npm"}})
	for _, port := range []uint16{80, 443} {
		if v := c.Decide(to("registry.npmjs.org", port)); v.Allow || v.Rule != (Rule{"operator.deny[0]", "preset:npm registry.npmjs.org"}) {
			t.Errorf("always_deny on %d: %+v", port, v)
		}
	}
	if v := c.DecideQuery("nodejs.org"); v.Allow {
		t.Errorf("always_deny resolves: %+v", v)
	}
	if v := c.Decide(to("example.com", 443)); !v.Allow {
		t.Errorf("always_deny of a preset denies another name: %+v", v)
	}
}

// TestPresetVersions: without a version the newest list is meant, with one that list.
func TestPresetVersions(t *testing.T) {
	all, err := parsePresets("# remark\na @1 (x)\n  one.test\nb @1\n  two.test 80 443 ; careful\n  + a\na @2 (x, y)\n  three.test # and why\n")
	if err != nil {
		t.Fatal(err)
	}
	https := []uint16{443}
	for name, want := range map[string][]PresetHost{
		"a": {{"three.test", https, ""}}, "a@1": {{"one.test", https, ""}}, "Y@2": {{"three.test", https, ""}},
		"x": {{"three.test", https, ""}}, "b": {{"two.test", []uint16{80, 443}, "careful"}, {"one.test", https, ""}},
	} {
		p, err := findPreset(all, name)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, p.Hosts, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	for _, bad := range []string{"  one.test\n", "a\n", "@1\n", "a @1\n  *\n", "a @1\n  a_b..test\n", "a @1\n  one.test 0\n", "a @1\n  one.test x\n", "a @1\n  + b\n", "a @1\n  10.0.0.1\n"} {
		if _, err := parsePresets(bad); err == nil {
			t.Errorf("parsed: %q", bad)
		}
	}
}
