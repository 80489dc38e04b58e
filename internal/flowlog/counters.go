package flowlog

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cordonhq/cordon/internal/policy"
)

// maxReasons bounds the series of cordon_flows_total. Packages define their own
// reasons; should one ever put data into a reason, it is counted as "other".
const maxReasons = 64

// counters are the Prometheus side of the log. All methods but the lost
// counter's are called under Log.mu.
type counters struct {
	flows   *prometheus.CounterVec
	lost    prometheus.Counter
	reasons map[policy.Reason]struct{}
	series  map[series]prometheus.Counter // saves the label lookup
}

type series struct {
	layer   Layer
	verdict Verdict
	reason  policy.Reason
}

const other = "other"

func newCounters(to prometheus.Registerer) (*counters, error) {
	c := &counters{
		flows: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cordon_flows_total",
			Help: "Verdicts about flows and DNS queries.",
		}, []string{"layer", "verdict", "reason"}),
		lost: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "cordon_flows_lost_total",
			Help: "Verdicts that did not reach the flow log or one of its followers.",
		}),
		reasons: map[policy.Reason]struct{}{},
		series:  map[series]prometheus.Counter{},
	}
	if to == nil {
		return c, nil
	}
	if err := to.Register(c.flows); err != nil {
		return nil, err
	}
	return c, to.Register(c.lost)
}

func (c *counters) count(e *Event) {
	s := series{e.Layer, e.Verdict, e.Reason}
	counter, ok := c.series[s]
	if !ok {
		s = c.bounded(s)
		counter = c.flows.WithLabelValues(string(s.layer), string(s.verdict), string(s.reason))
		c.series[s] = counter
	}
	counter.Inc()
}

// bounded replaces labels beyond the known sets.
func (c *counters) bounded(s series) series {
	switch s.layer {
	case LayerKernel, LayerProxy, LayerResolver:
	default:
		s.layer = other
	}
	switch s.verdict {
	case Allowed, Denied, Observed, Closed, Failed:
	default:
		s.verdict = other
	}
	if _, known := c.reasons[s.reason]; !known {
		if len(c.reasons) >= maxReasons || len(s.reason) > 32 {
			s.reason = other
		} else {
			c.reasons[s.reason] = struct{}{}
		}
	}
	return s
}
