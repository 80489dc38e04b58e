package share

import "github.com/prometheus/client_golang/prometheus"

// Collector tells Prometheus of pools: what each has, what is held of it, what the
// key that holds most holds, and how often a request was refused by whose limit. Keys
// are not labels: their number has no bound.
type Collector struct{ pools []*Pool }

// NewCollector returns a collector of the given pools.
func NewCollector(pools ...*Pool) *Collector { return &Collector{pools} }

var (
	descWhole   = prometheus.NewDesc("cordon_share_whole", "What the server has of a shared resource.", []string{"resource"}, nil)
	descUsed    = prometheus.NewDesc("cordon_share_used", "What all API keys hold of a shared resource.", []string{"resource"}, nil)
	descMost    = prometheus.NewDesc("cordon_share_largest", "What the API key that holds most of a shared resource holds.", []string{"resource"}, nil)
	descRefused = prometheus.NewDesc("cordon_share_refused_total", "Requests refused because a sandbox, a key or the server held its limit.", []string{"resource", "scope"}, nil)
)

// Describe implements prometheus.Collector.
func (c *Collector) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descWhole, descUsed, descMost, descRefused} {
		to <- d
	}
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(to chan<- prometheus.Metric) {
	for _, p := range c.pools {
		p.mu.Lock()
		used, whole, most := p.used, p.r.Whole, int64(0)
		for _, n := range p.keys {
			most = max(most, n)
		}
		p.mu.Unlock()
		name := p.r.Name
		to <- prometheus.MustNewConstMetric(descWhole, prometheus.GaugeValue, float64(whole), name)
		to <- prometheus.MustNewConstMetric(descUsed, prometheus.GaugeValue, float64(used), name)
		to <- prometheus.MustNewConstMetric(descMost, prometheus.GaugeValue, float64(most), name)
		for i, s := range scopes {
			to <- prometheus.MustNewConstMetric(descRefused, prometheus.CounterValue, float64(p.refused[i].Load()), name, string(s))
		}
	}
}
