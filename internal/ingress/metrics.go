package ingress

import (
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the figures of the ingress. Labels are bounded: codes that HTTP
// does not know count as "other", a client that left before its answer as "none".
type metrics struct {
	requests *prometheus.CounterVec
	byCode   [600]prometheus.Counter
	none     prometheus.Counter
	other    prometheus.Counter
	duration prometheus.Histogram
	upstream prometheus.Histogram
	bytes    *prometheus.CounterVec
	in, out  prometheus.Counter
}

func newMetrics() *metrics {
	buckets := []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60}
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cordon_ingress_requests_total", Help: "Requests answered, by status code.",
		}, []string{"code"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "cordon_ingress_request_duration_seconds", Help: "Time from a request's header to the end of its answer, or to the switch of protocols.",
			Buckets: buckets,
		}),
		upstream: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "cordon_ingress_upstream_duration_seconds", Help: "Time from a request's header to the beginning of its service's answer, the connection included.",
			Buckets: buckets,
		}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cordon_ingress_bytes_total", Help: "Octets of bodies and tunnels, from clients (in) and to them (out).",
		}, []string{"direction"}),
	}
	m.in, m.out = m.bytes.WithLabelValues("in"), m.bytes.WithLabelValues("out")
	m.none, m.other = m.requests.WithLabelValues("none"), m.requests.WithLabelValues("other")
	for code := range m.byCode {
		if http.StatusText(code) != "" {
			m.byCode[code] = m.requests.WithLabelValues(strconv.Itoa(code))
		}
	}
	return m
}

func (in *Ingress) register(r prometheus.Registerer) error {
	m := in.metrics
	for _, c := range []prometheus.Collector{
		m.requests, m.duration, m.upstream, m.bytes,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "cordon_ingress_active", Help: "Requests and tunnels under way to sandboxes.",
		}, func() float64 { return float64(in.underway()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "cordon_ingress_head_bytes", Help: "What the heads of requests under way take of memory, about.",
		}, func() float64 { return float64(in.heads.held()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "cordon_ingress_connections", Help: "Open connections of clients.",
		}, func() float64 { return float64(in.sources.open()) }),
	} {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}

func (m *metrics) observe(code int, took time.Duration) {
	switch {
	case code == 0:
		m.none.Inc()
	case code < 0 || code >= len(m.byCode) || m.byCode[code] == nil:
		m.other.Inc()
	default:
		m.byCode[code].Inc()
	}
	m.duration.Observe(took.Seconds())
}
