package programs_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
)

// spelling is a way to write an allowed host in a URL.
type spelling struct {
	name   string
	scheme string
	host   string // with %s for the program's label
	listed string // the same as the flow log has it
}

func spellings() []spelling {
	plain, idn := "%s.example.com", "%s.xn--bcher-kva.test"
	return []spelling{
		{"dot, TLS", "https", "%s.example.com.", plain},
		{"dot, HTTP", "http", "%s.example.com.", plain},
		{"upper case, TLS", "https", "%s.EXAMPLE.com", plain},
		{"upper case, HTTP", "http", "%s.EXAMPLE.com", plain},
		{"port, TLS", "https", "%s.example.com:443", plain},
		{"port, HTTP", "http", "%s.example.com:80", plain},
		{"Unicode, TLS", "https", "%s.bücher.test", idn},
		{"Unicode, HTTP", "http", "%s.bücher.test", idn},
	}
}

// refusedByItself is what a program refuses after it asked for the name and before
// it sends an octet.
var refusedByItself = map[string]string{
	"Java HttpClient, dot, TLS": "cannot have the trailing dot",
}

// TestNamesAsProgramsSendThem opens an allowed name in spellings that a user may
// write, with each program: whatever the program makes of it in SNI and Host, it
// is the same name. A program that refuses a spelling itself is reported and no more.
func TestNamesAsProgramsSendThem(t *testing.T) {
	m := newMachine(t)
	m.rules(client.Network{DenyOut: []string{client.AllTraffic}, AllowOut: []string{"*.example.com", "*.bücher.test"}})
	programs := clients()
	for _, p := range managers() {
		if p.name == "apt" || p.name == "cargo" { // cargo offers HTTP/2 on http://, as Java's HttpClient does
			programs = append(programs, p)
		}
	}
	type attempt struct {
		program, spelling string
		http              bool
		outcome           outcome
	}
	var mu sync.Mutex // guards attempts
	attempts := map[string]attempt{}
	var wg sync.WaitGroup
	room := make(chan struct{}, atOnce)
	for i, p := range programs {
		if p.needs != "" && !m.has(p.needs) {
			t.Logf("%s: left out, the machine lacks it", p.name)
			continue
		}
		for j, s := range spellings() {
			wg.Add(1)
			room <- struct{}{}
			go func() {
				defer wg.Done()
				defer func() { <-room }()
				label := fmt.Sprintf("n%d-%d", i, j)
				o, err := m.run(label, p.at(s.scheme, fmt.Sprintf(s.host, label)), 30*time.Second)
				if err != nil {
					t.Errorf("%s, %s: %v", p.name, s.name, err)
					return
				}
				mu.Lock()
				attempts[fmt.Sprintf(s.listed, label)] = attempt{p.name, s.name, s.scheme == "http", o}
				mu.Unlock()
			}()
		}
	}
	wg.Wait()
	events, err := m.Events(t.Context(), client.EventOptions{Limit: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	asked, allowed := map[string]bool{}, map[string]bool{}
	for i := range events {
		e := &events[i]
		switch {
		case e.Verdict == client.Denied && (e.Protocol == "http" || e.Protocol == "tls"):
			t.Errorf("denied: %s %q at %s, %s %s", e.Protocol, e.Name, e.Destination, e.Reason, e.Detail)
		case e.Protocol == "dns":
			asked[e.Name] = true
		case e.Verdict == client.Allowed:
			allowed[e.Name] = true
		}
	}
	for name, a := range attempts {
		itself, known := refusedByItself[a.program+", "+a.spelling]
		switch {
		case known && strings.Contains(a.outcome.Output, itself):
			t.Logf("%s does not take the spelling %q: %s", a.program, a.spelling, itself)
		case !asked[name] && !allowed[name]:
			t.Logf("%s does not take the spelling %q: %s", a.program, a.spelling, strings.TrimSpace(tail(a.outcome.Output)))
		case !allowed[name]:
			t.Errorf("%s, %s: %s was not reached: exit %d\n%s", a.program, a.spelling, name, a.outcome.Exit, a.outcome.Output)
		case a.http && a.outcome.Exit != 0 && a.program != "apt" && a.program != "cargo": // they find no package there
			t.Errorf("%s, %s: exit %d\n%s", a.program, a.spelling, a.outcome.Exit, a.outcome.Output)
		}
	}
}

// tail is the last line of an output.
func tail(output string) string {
	lines := strings.Split(strings.TrimSpace(output), "\n")
	return lines[len(lines)-1]
}
