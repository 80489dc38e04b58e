package share

import (
	"fmt"
	"strings"
)

// sizes says of each resource how much the server has, and how much of it one sandbox may
// hold, for the documentation; "" is no limit but its key's.
var sizes = map[string]struct{ whole, sandbox string }{
	"proxy_connections": {"an eighth of the process's descriptors, at most 100,000", "`network.limits.connections`"},
	"sniff_memory":      {"256 MiB", "4 MiB"},
	"source_ports":      {"the ports that connections out are given, for each destination", ""},
	"conntrack":         {"`net.netfilter.nf_conntrack_max`, less what the machine needs", "`network.limits.connections`"},
	"dns_queries":       {"8192", "1024"},
	"dns_handlers":      {"2048", ""},
	"dns_rate":          {"ten times `network.limits.dns_queries`, for each key", "`network.limits.dns_queries`"},
	"dns_datagrams":     {"10,000, or 20 times `network.limits.dns_queries` where that is more", "2000, or 4 times `network.limits.dns_queries`"},
	"dns_connections":   {"2048", "64"},
	"pins":              {"1000, and 2048 at once, for each key", ""},
	"rule_updates":      {"2", "1"},
	"starts":            {"two per CPU, at least 4", "1"},
	"api_requests":      {"500, and 1000 at once, for each key", ""},
	"api_under_way":     {"4096", ""},
	"api_queries":       {"one per CPU and one more, at least 3", ""},
	"exchanges":         {"`listen.connections_per_sandbox` times 4", "`listen.connections_per_sandbox`"},
	"certificates":      {"10 in any ten minutes", ""},
	"memory":            {"the machine's, less `sandboxes.reserve_memory_mb`", "`sandboxes.memory_mb`, a quarter of it for bursts and 64 MiB for its kernel"},
	"threads":           {"three quarters of `kernel.pid_max` or `kernel.threads-max`", "`sandboxes.processes` for each CPU and two more"},
	"disk":              {"what is free above `sandboxes.min_free_disk_mb` and what keys have", "`sandboxes.disk_mb` of files"},
	"events":            {"20,000 and 32 MiB, of seven days", "1000"},
}

// ownBucket are the resources of which every key has all, by a bucket of its own.
var ownBucket = map[string]bool{"api_requests": true, "dns_rate": true, "pins": true}

// part is what one key holds while no other key holds anything, in words.
func (r Resource) part() string {
	if ownBucket[r.Name] {
		return "all of it"
	}
	switch r.Alpha {
	case 1:
		return "half"
	case 3:
		return "three quarters"
	}
	return fmt.Sprintf("%d of %d parts", r.Alpha, r.Alpha+1)
}

// Table is what docs/operations.md says of some resources, in Markdown.
func Table(resources []Resource) string {
	var b strings.Builder
	b.WriteString("| resource | the server has | one key alone | one sandbox | beyond it | metric |\n|---|---|---|---|---|---|\n")
	for _, r := range resources {
		s := sizes[r.Name]
		if s.sandbox == "" {
			s.sandbox = "as its key"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | `%s` |\n", r.What, s.whole, r.part(), s.sandbox, r.Answer, r.Name)
	}
	for _, line := range []string{
		"| CPU time | all CPUs | all of it; keys that want more get the same | `sandboxes.cpus` | it runs behind keys that use less | |",
		"| disk I/O, where the kernel weighs it | the disk's | likewise | as its key | it waits | |",
		"| flow log | 65,536 verdicts | all of it | 4096 | the key that has most loses its oldest | |",
	} {
		b.WriteString(line + "\n")
	}
	return b.String()
}
