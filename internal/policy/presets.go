package policy

import (
	_ "embed"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cordonhq/cordon/internal/errs"
)

// presetPrefix begins a list entry that stands for a preset: "preset:python",
// or "preset:python@2026-12" for one version of it.
const presetPrefix = "preset:"

//go:embed presets.txt
var presetText string

// Preset is a named list of hosts that a common tool needs.
type Preset struct {
	Name    string
	Version string   // of this list, e.g. "2026-12"
	Aliases []string // other names for it: the tools it is for
	Hosts   []PresetHost
}

// PresetHost is one host of a preset.
type PresetHost struct {
	Host   string // "pypi.org" or "*.hf.co"
	Ports  []uint16
	Remark string // what a user should know before allowing the host; may be empty
}

// presets is every version of every preset, in the order of the file.
var presets = sync.OnceValue(func() []Preset {
	list, err := parsePresets(presetText)
	if err != nil {
		panic(err) // the file is part of the program and a test reads it
	}
	return list
})

// Presets returns every version of every preset, the newest of a name last.
func Presets() []Preset { return slices.Clone(presets()) }

// newestPresets returns the last version of each preset.
func newestPresets() []Preset {
	var newest []Preset
	for _, p := range presets() {
		if i := slices.IndexFunc(newest, func(q Preset) bool { return q.Name == p.Name }); i >= 0 {
			newest[i] = p
		} else {
			newest = append(newest, p)
		}
	}
	return newest
}

// FindPreset returns a preset by "name" or "name@version", where the name may be
// an alias. The error says which there are.
func FindPreset(name string) (Preset, error) {
	return findPreset(presets(), name)
}

func findPreset(all []Preset, text string) (Preset, error) {
	name, version, pinned := strings.Cut(strings.ToLower(text), "@")
	var versions []string
	for _, p := range slices.Backward(all) { // the newest list of a name is its last
		if p.Name != name && !slices.Contains(p.Aliases, name) {
			continue
		}
		if !pinned || p.Version == version {
			return p, nil
		}
		versions = append(versions, p.Version)
	}
	if versions != nil {
		return Preset{}, errs.New(errs.Invalid, "preset %q has no version %q: use %s, or no version for the newest", name, version, strings.Join(versions, ", "))
	}
	if base, _, ok := strings.Cut(name, ":"); ok && base != "" {
		if p, err := findPreset(all, base); err == nil {
			return Preset{}, errs.New(errs.Invalid, "a preset has no variants such as %q: use %s%s", name[len(base):], presetPrefix, p.Name)
		}
	}
	return Preset{}, errs.New(errs.Invalid, "there is no preset %q: use %s", name, strings.Join(presetNames(all), ", "))
}

func presetNames(all []Preset) []string {
	var names []string
	for _, p := range all {
		if !slices.Contains(names, p.Name) {
			names = append(names, p.Name)
		}
	}
	return names
}

// isPreset reports whether a list entry stands for a preset.
func isPreset(text string) bool {
	return len(text) >= len(presetPrefix) && strings.EqualFold(text[:len(presetPrefix)], presetPrefix)
}

// listed is one entry of a list, and the text under which its rule is reported.
type listed struct {
	entry
	text string
}

// expand reads one text of a list that may hold presets: an entry as it is, or
// an entry for each host and port of a preset. Names in the rules' texts tell
// which host of the preset decided.
func expand(text string) ([]listed, error) {
	if !isPreset(text) {
		e, err := parseEntry(text)
		return []listed{{e, text}}, err
	}
	p, err := FindPreset(text[len(presetPrefix):])
	if err != nil {
		return nil, err
	}
	var out []listed
	for _, h := range p.Hosts {
		e, err := parseName(h.Host)
		if err != nil {
			return nil, fmt.Errorf("preset %s, host %q: %w", p.Name, h.Host, err)
		}
		rule := text + " " + h.Host
		for _, port := range h.Ports {
			e.port, e.shown = port, proxyPort(port)
			out = append(out, listed{e, rule})
		}
	}
	return out, nil
}

// expandDenied is expand for a list that denies: a host of a preset is denied on
// both of the proxy's ports and is not resolved, whatever ports the preset opens.
func expandDenied(text string) ([]listed, error) {
	list, err := expand(text)
	if !isPreset(text) {
		return list, err
	}
	for i := range list {
		list[i].port = 0
	}
	return slices.CompactFunc(list, func(a, b listed) bool { return a.text == b.text }), err
}

// parsePresets reads the form that presets.txt describes.
func parsePresets(text string) ([]Preset, error) {
	var all []Preset
	n := 0
	for line := range strings.Lines(text) {
		n++
		indented := strings.HasPrefix(line, " ")
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		var err error
		switch {
		case !indented:
			var p Preset
			if p, err = parsePresetHead(line); err == nil {
				all = append(all, p)
			}
		case len(all) == 0:
			err = fmt.Errorf("a host before the first preset")
		default:
			err = all[len(all)-1].add(line, all[:len(all)-1])
		}
		if err != nil {
			return nil, fmt.Errorf("presets.txt:%d: %w", n, err)
		}
	}
	return all, nil
}

// parsePresetHead reads "name @version (alias, alias)".
func parsePresetHead(line string) (Preset, error) {
	head, aliases, _ := strings.Cut(line, "(")
	name, version, ok := strings.Cut(head, "@")
	p := Preset{Name: strings.TrimSpace(name), Version: strings.TrimSpace(version)}
	if !ok || p.Name == "" || p.Version == "" {
		return p, fmt.Errorf("%q is not name @version", head)
	}
	for alias := range strings.SplitSeq(strings.TrimSuffix(aliases, ")"), ",") {
		if alias = strings.TrimSpace(alias); alias != "" {
			p.Aliases = append(p.Aliases, alias)
		}
	}
	return p, nil
}

// add reads a host's line, or "+ name".
func (p *Preset) add(line string, before []Preset) error {
	line, remark, _ := strings.Cut(line, ";")
	fields := strings.Fields(line)
	if fields[0] == "+" && len(fields) == 2 {
		q, err := findPreset(before, fields[1])
		for _, h := range q.Hosts {
			if !slices.ContainsFunc(p.Hosts, func(have PresetHost) bool { return have.Host == h.Host }) {
				p.Hosts = append(p.Hosts, h)
			}
		}
		return err
	}
	h := PresetHost{Host: fields[0], Ports: []uint16{443}, Remark: strings.TrimSpace(remark)}
	if e, err := parseName(h.Host); err != nil || e.name == "" {
		return fmt.Errorf("%q is not a name", h.Host)
	}
	if len(fields) > 1 {
		h.Ports = nil
	}
	for _, text := range fields[1:] {
		port, err := strconv.ParseUint(text, 10, 16)
		if err != nil || port == 0 {
			return fmt.Errorf("%q is not a port", text)
		}
		h.Ports = append(h.Ports, uint16(port))
	}
	p.Hosts = append(p.Hosts, h)
	return nil
}
