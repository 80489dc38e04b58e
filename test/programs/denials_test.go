package programs_test

import (
	"cmp"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
)

// form is one way in which cordon denies, and the rules that make it do so.
type form struct {
	Name   string
	scheme string
	rules  client.Network
}

// named is a host that rules may name; nothing asks for it.
const named = "unrelated.test"

func forms() []form {
	all := []string{client.AllTraffic}
	// With the resolver's address allowed by address, every name resolves.
	resolves := "8.8.8.8:53"
	return []form{
		{"name", "https", client.Network{DenyOut: all, AllowOut: []string{named}}},
		{"address", "https", client.Network{DenyOut: all, AllowOut: []string{resolves}}},
		{"TLS", "https", client.Network{DenyOut: all, AllowOut: []string{named, resolves}}},
		{"HTTP", "http", client.Network{DenyOut: all, AllowOut: []string{named, resolves}}},
	}
}

// limit bounds one run: npm and pnpm wait for 70 seconds between their tries.
const limit = 110 * time.Second

// atOnce is how many programs run beside each other: most of them wait.
const atOnce = 4

// TestDenials runs each program against each form of denial and writes what it
// took and said to .cache/denials/now.json. TEST_ONLY, a regular expression, chooses
// programs, and the others keep what they have. With TEST_QUICKER=1 what was measured
// earlier is kept where it was quicker: on a busy machine the quicker of two runs is
// nearer to what the program does. TEST_LABEL=before, with the binary of an earlier
// release (TEST_BINARY), writes what TestDenialsPage compares with.
func TestDenials(t *testing.T) {
	m := newMachine(t)
	label := cmp.Or(os.Getenv("TEST_LABEL"), "now")
	all := readResults(t, label)
	if all == nil {
		all = results{}
	}
	only, err := regexp.Compile(os.Getenv("TEST_ONLY"))
	if err != nil {
		t.Fatal(err)
	}
	measured := results{}
	for _, f := range forms() {
		m.rules(f.rules)
		programs := append(managers(), clients()...)
		if f.Name == "name" {
			programs = append(lookups(), programs...)
		}
		measured[f.Name] = m.measure(f, slices.DeleteFunc(programs, func(p program) bool { return !only.MatchString(f.Name + "/" + p.name) }))
	}
	m.countTries(measured)
	for form, list := range measured {
		if all[form] == nil {
			all[form] = map[string]outcome{}
		}
		for name, o := range list {
			if old, ok := all[form][name]; !ok || os.Getenv("TEST_QUICKER") == "" || o.Seconds < old.Seconds {
				all[form][name] = o
			}
		}
	}
	writeResults(t, label, all)
}

// countTries adds how many questions, connections or requests of each program the
// server denied. Denials by address have no name that tells whose they were.
func (m *machine) countTries(measured results) {
	m.t.Helper()
	events, err := m.Events(m.t.Context(), client.EventOptions{Limit: 1 << 20, Verdict: client.Denied})
	if err != nil {
		m.t.Fatal(err)
	}
	tries := map[string]int{}
	for i := range events {
		tries[events[i].Name]++
	}
	for form, list := range measured {
		for name, o := range list {
			o.Tries = tries[o.host]
			measured[form][name] = o
		}
	}
}

// measure runs programs against one form of denial.
func (m *machine) measure(f form, programs []program) map[string]outcome {
	var mu sync.Mutex // guards out
	out := map[string]outcome{}
	room := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	for i, p := range programs {
		if p.needs != "" && !m.has(p.needs) {
			m.t.Logf("%s: left out, the machine lacks it", p.name)
			continue
		}
		wg.Add(1)
		room <- struct{}{}
		go func() {
			defer wg.Done()
			defer func() { <-room }()
			host := fmt.Sprintf("p%d-%s.example.com", i, strings.ToLower(f.Name))
			o, err := m.run(fmt.Sprintf("%s-%d", f.Name, i), p.at(f.scheme, host), limit)
			if err != nil {
				m.t.Errorf("%s, %s: %v", p.name, f.Name, err)
				return
			}
			o.host = host
			o.Words = telling(o.Output, host)
			m.t.Logf("%-8s %-24s exit %3d %6.1f s  %s", f.Name, p.name, o.Exit, o.Seconds, o.Words)
			mu.Lock()
			out[p.name] = o
			mu.Unlock()
		}()
	}
	wg.Wait()
	return out
}

func (m *machine) has(path string) bool {
	r, err := m.Commands.Run(m.t.Context(), "test -e "+path, client.RunOptions{})
	return err == nil && r.ExitCode == 0
}

// tells are what an output may say, the most telling first.
var tells = []*regexp.Regexp{
	regexp.MustCompile(`(?i)egress policy`),
	regexp.MustCompile(`(?i)access.?(was )?denied`),
	regexp.MustCompile(`(?i)\b403\b`),
	regexp.MustCompile(`^[WE]: Failed to fetch`),
	regexp.MustCompile(`(?i)refused`),
	regexp.MustCompile(`(?i)no such host|misbehaving|ENOTFOUND|EAI_|ENODATA|UnknownHost|Name or service|not known|No address associated|failure in name|resolve|wicked|getaddrinfo|dns error|lookup`),
	regexp.MustCompile(`(?i)reset|closed|ECONN|hang up|EOF|alert|SSL|TLS`),
	regexp.MustCompile(`(?i)error|failed|No matching`),
	regexp.MustCompile(`\S`),
}

// code is a line that shows where a program failed, not how.
var code = regexp.MustCompile(`^(for |at |return |raise |File |self\.|this\.|\w+ = |sock|throw )|\(err, |YN0027|,$`)

var colours = regexp.MustCompile("\x1b\\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f]")

var sandboxID = regexp.MustCompile(`\bi[0-9a-z]{20}\b`)

// telling picks the line of an output that tells most about the denial.
func telling(output, host string) string {
	output = colours.ReplaceAllString(output, "")
	for _, re := range tells {
		for line := range strings.Lines(output) {
			line = strings.TrimSpace(line)
			at := re.FindStringIndex(line)
			if at == nil || code.MatchString(line) {
				continue
			}
			line = sandboxID.ReplaceAllString(strings.ReplaceAll(line, host, "HOST"), "ID")
			if at = re.FindStringIndex(line); at != nil && at[1] > 150 {
				line = "…" + line[max(0, at[0]-90):]
			}
			if len(line) > 160 {
				line = strings.ToValidUTF8(line[:160], "") + "…"
			}
			return line
		}
	}
	return ""
}
