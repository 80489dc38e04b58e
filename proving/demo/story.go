package demo

import (
	"fmt"
	"strings"
	"time"
)

// act is one scenario of the demo. Its players, in JavaScript and Go, do it; the
// story says what must come of it.
type act struct {
	key, title string
	facts      []fact
	quiet      quiet
}

// fact is one thing a player reports.
type fact struct {
	key  string
	what string // for the reader
	// run is the command in the sandbox that finds out: it prints the seconds it
	// took and what it saw. Of a player's own facts it is what the player starts.
	run string
	// want is what must be in the value; within is the longest it may take, 0 for
	// any time.
	want   string
	within time.Duration
	// denied is the destination or name whose verdict the flow log must hold.
	denied string
}

// quiet is what must not have reached the internet during the act.
type quiet struct {
	what, address, name string
}

// curl prints the seconds and the status, or why there is none.
func curl(args string) string {
	return "curl -s -o /dev/null --max-time 10 -w '%{time_total} %{http_code} %{errormsg}' " + args + " || true"
}

// connect prints the seconds and the name of the error that connect(2) returned.
func connect(addr string, port int) string {
	return fmt.Sprintf(`python3 -c "
import errno, socket, time
s = socket.socket(); s.settimeout(5)
t = time.perf_counter()
e = s.connect_ex(('%s', %d))
print(f'{time.perf_counter() - t:.6f}', errno.errorcode.get(e, 'connected'))"`, addr, port)
}

// lookup prints the seconds and the addresses of a name, or that there are none.
func lookup(name string) string {
	return fmt.Sprintf(`python3 -c "
import socket, time
t = time.perf_counter()
try:
    a = ' '.join(sorted({i[4][0] for i in socket.getaddrinfo('%s', 443)}))
except OSError:
    a = 'no address'
print(f'{time.perf_counter() - t:.6f}', a)"`, name)
}

// echoHost serves what it sees as Host on port 3000.
const echoHost = `python3 -c "
from http.server import BaseHTTPRequestHandler, HTTPServer
class Echo(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(self.headers['Host'].encode())
HTTPServer(('', 3000), Echo).serve_forever()"`

// refusal is the longest that the kernel may take to refuse a connection, as seen
// in the sandbox on a busy machine. Alone it takes less than one.
const refusal = 250 * time.Millisecond

// live is how long a flow may go on that new rules refuse.
const live = time.Second

// tellStory is the demo: the acts of both players, in order.
func tellStory() []act {
	created := fact{key: "created", what: "created, its rules in force", want: "running"}
	return []act{
		{key: "hello", title: "A sandbox on the web", facts: []fact{
			created,
			{key: "web", what: "curl https://example.com", run: curl("https://example.com"), want: "200"},
			{key: "metadata", what: "connect to 169.254.169.254, the cloud's metadata", run: connect("169.254.169.254", 80), want: "ECONNREFUSED", within: refusal, denied: "169.254.169.254:80"},
		}},
		{key: "offline", title: "No network at all", facts: []fact{
			created,
			{key: "connect", what: "connect to 1.1.1.1:443", run: connect("1.1.1.1", 443), want: "ECONNREFUSED", within: refusal, denied: "1.1.1.1:443"},
			{key: "name", what: "look up example.com", run: lookup("example.com"), want: "no address"},
		}, quiet: quiet{what: "questions for example.com that left the machine", name: "example.com"}},
		{key: "addresses", title: "Only these addresses", facts: []fact{
			created,
			{key: "address", what: "curl https://1.1.1.1", run: curl("-k https://1.1.1.1"), want: "301"},
			{key: "range", what: "curl https://8.8.8.8, in 8.8.8.0/24", run: curl("-k https://8.8.8.8"), want: "302"},
			{key: "denied", what: "connect to 198.51.100.66:443", run: connect("198.51.100.66", 443), want: "ECONNREFUSED", within: refusal, denied: "198.51.100.66:443"},
		}, quiet: quiet{what: "packets to 198.51.100.66 that left the machine", address: "198.51.100.66"}},
		{key: "names", title: "Only these names, also where others share their address", facts: []fact{
			created,
			{key: "name", what: "curl https://example.com", run: curl("https://example.com"), want: "200"},
			{key: "wildcard", what: "curl https://api.github.com", run: curl("https://api.github.com"), want: "200"},
			{key: "sni", what: "curl https://example.org, at example.com's address", run: curl("--resolve example.org:443:93.184.216.34 https://example.org"), want: "denied", denied: "example.org"},
			{key: "host", what: "curl http://example.org, there as well", run: curl("--resolve example.org:80:93.184.216.34 http://example.org"), want: "403", denied: "example.org"},
			{key: "lookup", what: "look up example.org", run: lookup("example.org"), want: "no address", denied: "example.org"},
		}, quiet: quiet{what: "bytes with the name example.org that left the machine", name: "example.org"}},
		{key: "forged", title: "Lying about an address leads nowhere", facts: []fact{
			created,
			{key: "owner", what: "curl https://example.com", run: curl("https://example.com"), want: "200"},
		}, quiet: quiet{what: "packets to the forged address that left the machine", address: "198.51.100.66"}},
		{key: "live", title: "New rules cut what they forbid", facts: []fact{
			created,
			{key: "set", what: "the new rules", want: "in force"},
			{key: "cut", what: "the download, since then", want: "curl ended with 56", within: live},
			{key: "after", what: "connect to 93.184.216.34:443 again", run: connect("93.184.216.34", 443), want: "ECONNREFUSED", within: refusal, denied: "93.184.216.34:443"},
			{key: "allowed", what: "connect to 1.1.1.1:443", run: connect("1.1.1.1", 443), want: "connected"},
		}},
		{key: "url", title: "A public URL for every port", facts: []fact{
			created,
			{key: "url", what: "its URL", want: "https://3000-"},
			{key: "open", what: "fetch(url), from outside", want: "200"},
			{key: "closed", what: "fetch of port 3001, where nothing listens", want: "502 The sandbox is running but port is not open"},
		}},
		{key: "mask", title: "A Host of your choice", facts: []fact{
			created,
			{key: "host", what: "the Host that the service saw", run: echoHost, want: "localhost:3000"},
		}},
		{key: "private", title: "A private URL", facts: []fact{
			created,
			{key: "without", what: "fetch(url)", want: "403"},
			{key: "with", what: "fetch(url, { headers })", want: "200"},
		}},
		{key: "kill", title: "Gone is gone", facts: []fact{
			created,
			{key: "gone", what: "fetch of its URL", want: "502 The sandbox was not found"},
		}},
	}
}

// excerpts are the lines that a player's source shows of each act, by its key: a
// function named like the act, and in it what stands between "show" and "end".
func excerpts(source string, keys []string) map[string][]string {
	out := map[string][]string{}
	act, showing := "", false
	for line := range strings.Lines(source) {
		line = strings.TrimRight(line, "\n")
		trimmed := strings.TrimLeft(line, " \t")
		for _, key := range keys {
			if strings.HasPrefix(trimmed, "async "+key+"()") || strings.HasPrefix(trimmed, "func (p *goPlayer) "+key+"(") {
				act = key
			}
		}
		switch {
		case trimmed == "// show":
			showing = act != ""
		case trimmed == "// end":
			showing = false
		case showing:
			out[act] = append(out[act], strings.ReplaceAll(line, "\t", "  "))
		}
	}
	for key, lines := range out {
		out[key] = dedent(lines)
	}
	return out
}

// dedent removes the indentation that all lines have.
func dedent(lines []string) []string {
	least := -1
	for _, l := range lines {
		if n := len(l) - len(strings.TrimLeft(l, " ")); l != "" && (least < 0 || n < least) {
			least = n
		}
	}
	out := make([]string, len(lines))
	for i, l := range lines {
		out[i] = l[min(len(l), max(0, least)):]
	}
	return out
}
