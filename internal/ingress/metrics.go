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
}

func newMetrics() *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cordon_ingress_requests_total", Help: "Requests answered, by status code.",
		}, []string{"code"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "cordon_ingress_request_duration_seconds", Help: "Time from a request's header to the end of its answer, or to the switch of protocols.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60},
		}),
	}
	m.none, m.other = m.requests.WithLabelValues("none"), m.requests.WithLabelValues("other")
	for code := range m.byCode {
		if http.StatusText(code) != "" {
			m.byCode[code] = m.requests.WithLabelValues(strconv.Itoa(code))
		}
	}
	return m
}

func (m *metrics) register(r prometheus.Registerer) error {
	if err := r.Register(m.requests); err != nil {
		return err
	}
	return r.Register(m.duration)
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
