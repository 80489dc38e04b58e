package bench

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// way is one of the things that are compared: a client and what stands between
// it and the server.
type way struct {
	name   string
	client *process
	addr   func(Load) Load // where this way wants a load sent; nil: as it is
}

// unit is how a measure's values read.
type unit struct {
	of    func(Result) float64
	print string // of a value, with its unit
	// added says that a way is compared by its difference to the first way, as
	// delays are; others by their quotient.
	added bool
}

var (
	gigabits   = unit{of: func(r Result) float64 { return r.Rate * 8 / 1e9 }, print: "%.1f Gbit/s"}
	perSecond  = unit{of: func(r Result) float64 { return r.Rate }, print: "%.0f /s"}
	medianUsec = unit{of: func(r Result) float64 { return float64(r.P50.Nanoseconds()) / 1e3 }, print: "%.0f µs", added: true}
	tailUsec   = unit{of: func(r Result) float64 { return float64(r.P99.Nanoseconds()) / 1e3 }, print: "%.0f µs", added: true}
)

// measure is one load and what is read from it.
type measure struct {
	load  Load
	reads []reading
	// unless holds the ways the load makes no sense for.
	unless []string
}

// reading is one row of a table.
type reading struct {
	name string
	unit unit
}

// goal is what performance we hold ourselves to: way's values for row against
// another way's, by the row's way of comparing. Against "" means the bare value.
type goal struct {
	row, way, against string
	least, most       float64 // one of them
}

// table is a set of measures over ways, in interleaved rounds.
type table struct {
	title    string
	ways     []*way // the first is what others are compared with
	measures []measure
	goals    []goal
	remarks  []string

	values map[string]map[string][]float64 // by row and way, one for each round
	failed map[string]string               // the first failure by row and way
}

// run measures everything, in rounds: in each, every way once for every load,
// and the order of ways turns, so that what disturbs the machine disturbs all.
func (t *table) run(ctx context.Context, r *run) error {
	t.values, t.failed = map[string]map[string][]float64{}, map[string]string{}
	for round := range r.Rounds {
		for _, m := range t.measures {
			for i := range t.ways {
				w := t.ways[(i+round)%len(t.ways)]
				if slices.Contains(m.unless, w.name) {
					continue
				}
				if err := t.sample(ctx, m, w, r); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// sample is one measurement; that it fails is a finding, not the end.
func (t *table) sample(ctx context.Context, m measure, w *way, r *run) error {
	load := m.load
	load.For = r.Each
	if w.addr != nil {
		load = w.addr(load)
	}
	var res Result
	err := w.client.call(ctx, "Do", load, &res)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	for _, row := range m.reads {
		if err != nil {
			if t.failed[row.name+"\x00"+w.name] == "" {
				t.failed[row.name+"\x00"+w.name] = err.Error()
			}
			continue
		}
		t.add(row.name, w.name, row.unit.of(res))
	}
	return nil
}

func (t *table) add(row, way string, v float64) {
	if t.values[row] == nil {
		t.values[row] = map[string][]float64{}
	}
	t.values[row][way] = append(t.values[row][way], v)
}

// compare returns one comparison for each round: quotients, or differences.
func compare(u unit, a, b []float64) []float64 {
	out := make([]float64, min(len(a), len(b)))
	for i := range out {
		if out[i] = a[i] / b[i]; u.added {
			out[i] = a[i] - b[i]
		}
	}
	return out
}

// spread is the median and the range of values.
func spread(v []float64) (mid, low, high float64) {
	s := slices.Sorted(slices.Values(v))
	return quantile(s, 0.5), s[0], s[len(s)-1]
}

// print writes the table, its goals and what could not be measured.
func (t *table) print(out io.Writer) {
	fmt.Fprintf(out, "\n%s\n\n", t.title)
	tab := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	head := []string{""}
	for _, w := range t.ways {
		head = append(head, w.name)
	}
	fmt.Fprintln(tab, strings.Join(head, "\t"))
	for _, m := range t.measures {
		for _, row := range m.reads {
			cells := []string{row.name}
			for _, w := range t.ways {
				cells = append(cells, t.cell(row, w))
			}
			fmt.Fprintln(tab, strings.Join(cells, "\t"))
		}
	}
	tab.Flush()
	for _, g := range t.goals {
		if line := t.verdict(g); line != "" {
			fmt.Fprintln(out, line)
		}
	}
	for key, why := range t.failed {
		row, way, _ := strings.Cut(key, "\x00")
		fmt.Fprintf(out, "not measured: %s, %s: %s\n", row, way, strings.TrimSpace(why))
	}
	for _, s := range t.remarks {
		fmt.Fprintln(out, s)
	}
}

// cell is a value: of the first way as it is, of the others compared with it.
func (t *table) cell(row reading, w *way) string {
	v := t.values[row.name][w.name]
	if len(v) == 0 {
		return "–"
	}
	base := t.values[row.name][t.ways[0].name]
	if w == t.ways[0] || len(base) == 0 {
		mid, low, high := spread(v)
		return fmt.Sprintf(row.unit.print+" (%.3g–%.3g)", mid, low, high)
	}
	mid, low, high := spread(compare(row.unit, v, base))
	if row.unit.added {
		return fmt.Sprintf("%+.0f (%+.0f…%+.0f)", mid, low, high)
	}
	return fmt.Sprintf("%.2f (%.2f–%.2f)", mid, low, high)
}

// verdict says whether a goal is met, or nothing when it was not measured.
func (t *table) verdict(g goal) string {
	v, u := t.values[g.row][g.way], t.unitOf(g.row)
	against := ""
	if g.against != "" {
		v, against = compare(u, v, t.values[g.row][g.against]), " of "+g.against
		if u.added {
			against = " over " + g.against
		}
	}
	if len(v) == 0 {
		return ""
	}
	mid, _, _ := spread(v)
	return judge(fmt.Sprintf("%s, %s%s", g.row, g.way, against), mid, g.least, g.most)
}

// judge is the line about one goal.
func judge(what string, got, least, most float64) string {
	sign, want, met := "≥", least, got >= least
	if most != 0 {
		sign, want, met = "≤", most, got <= most
	}
	word := "met"
	if !met {
		word = "MISSED"
	}
	return fmt.Sprintf("goal %s: %s: %.3g, goal %s %.3g", word, what, got, sign, want)
}

func (t *table) unitOf(row string) unit {
	for _, m := range t.measures {
		for _, r := range m.reads {
			if r.name == row {
				return r.unit
			}
		}
	}
	return unit{}
}

// row is a measure that yields one row.
func row(name string, u unit, l Load) measure {
	return measure{load: l, reads: []reading{{name, u}}}
}

// figure is a set of values that are compared with nothing but a goal.
type figure struct {
	name, unit string
	values     []float64
	most       float64 // goal, of the quantile; 0: none
	quantile   float64
}

// printFigures writes one line for each.
func printFigures(out io.Writer, figures []figure) {
	tab := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tab, "\tp50\tp99\trange")
	var goals []string
	for _, f := range figures {
		if len(f.values) == 0 {
			fmt.Fprintf(tab, "%s\tnot measured\n", f.name)
			continue
		}
		s := slices.Sorted(slices.Values(f.values))
		fmt.Fprintf(tab, "%s\t%.3g %s\t%.3g\t%.3g–%.3g\n", f.name, quantile(s, 0.5), f.unit, quantile(s, 0.99), s[0], s[len(s)-1])
		if f.most != 0 {
			goals = append(goals, judge(fmt.Sprintf("%s, p%.0f, %s", f.name, f.quantile*100, f.unit), quantile(s, f.quantile), 0, f.most))
		}
	}
	tab.Flush()
	for _, g := range goals {
		fmt.Fprintln(out, g)
	}
}
