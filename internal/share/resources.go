package share

// The resources that keys share. Whole and Sandbox are set where the server's
// configuration and the machine are known ([Resource.Of]).
var (
	ProxyConnections = Resource{Name: "proxy_connections", What: "connections through the egress proxy", Alpha: 1,
		Answer: "reset; `budget` in the flow log"}
	SniffMemory = Resource{Name: "sniff_memory", What: "memory of connections that have not shown a name yet", Bytes: true, Alpha: 1,
		Answer: "reset; `budget` in the flow log"}
	SourcePorts = Resource{Name: "source_ports", What: "connections to one destination", Alpha: 1,
		Answer: "refused by the kernel; `too-many-flows` in the flow log"}
	Tracker = Resource{Name: "conntrack", What: "entries of the connection tracker", Alpha: 1,
		Answer: "refused by the kernel; `too-many-flows` in the flow log"}
	DNSQueries = Resource{Name: "dns_queries", What: "DNS queries in hand, waiting or not", Alpha: 1,
		Answer: "REFUSED at once; `budget-concurrent` in the flow log"}
	DNSHandlers = Resource{Name: "dns_handlers", What: "DNS queries asked upstream", Alpha: 1,
		Answer: "waits in the key's queue, then REFUSED; `budget-concurrent` in the flow log"}
	DNSRate = Resource{Name: "dns_rate", What: "DNS queries in a second", Alpha: 1,
		Answer: "waits in the key's queue, then REFUSED; `budget-queries` in the flow log"}
	DNSDatagrams = Resource{Name: "dns_datagrams", What: "DNS queries over UDP in a second", Alpha: 1,
		Answer: "lost in the kernel; `budget-queries` in the flow log"}
	DNSConnections = Resource{Name: "dns_connections", What: "TCP connections to the resolver", Alpha: 1,
		Answer: "closed"}
	Pins = Resource{Name: "pins", What: "addresses pinned for rules with a port in a second", Alpha: 1,
		Answer: "REFUSED; `budget-pins` in the flow log"}
	RuleUpdates = Resource{Name: "rule_updates", What: "network rule updates under way", Alpha: 1,
		Answer: "waits in the key's queue, then 429"}
	Starts = Resource{Name: "starts", What: "creates, resumes, forks and snapshots under way", Alpha: 1,
		Answer: "waits in the key's queue, then 429"}
	Requests = Resource{Name: "api_requests", What: "API requests in a second", Alpha: 1,
		Answer: "429 with `Retry-After`"}
	RequestsUnderWay = Resource{Name: "api_under_way", What: "API requests under way", Alpha: 1,
		Answer: "429 with `Retry-After`"}
	Queries = Resource{Name: "api_queries", What: "lists, events and metrics being computed", Alpha: 1,
		Answer: "waits in the key's queue, then 429"}
	Exchanges = Resource{Name: "exchanges", What: "requests and tunnels to sandboxes", Alpha: 1,
		Answer: "429"}
	Certificates = Resource{Name: "certificates", What: "orders of certificates for custom domains", Alpha: 1,
		Answer: "waits in the key's queue; the handshake fails"}
	Memory = Resource{Name: "memory", What: "memory of running sandboxes", Bytes: true, Alpha: 9,
		Answer: "429; a sandbox whose key's sandboxes grow beyond it ends"}
	Threads = Resource{Name: "threads", What: "threads of running sandboxes", Alpha: 3,
		Answer: "a process inside does not start, or the sandbox ends"}
	Disk = Resource{Name: "disk", What: "disk space of files, snapshots and paused sandboxes", Bytes: true, Alpha: 3,
		Answer: "429; when the disk is nearly full, a sandbox of the key that uses most is killed"}
	Events = Resource{Name: "events", What: "events kept in the history", Bytes: true, Alpha: 1,
		Answer: "the key's own oldest events are dropped"}
)

// All returns the resources, in the order of the documentation.
func All() []Resource {
	return []Resource{
		ProxyConnections, SniffMemory, SourcePorts, Tracker,
		DNSQueries, DNSHandlers, DNSRate, DNSDatagrams, DNSConnections,
		Pins, RuleUpdates, Starts, Requests, RequestsUnderWay, Queries,
		Exchanges, Certificates,
		Memory, Threads, Disk,
		Events,
	}
}
