package bench

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// way is one of the things that are compared: a client and what stands between
// it and the server.
type way struct {
	name    string
	client  *process
	program *process        // what stands between, if it is one: its processor time is shown
	addr    func(Load) Load // where this way wants a load sent; nil: as it is
}

// unit is how a measure's values read.
type unit struct {
	of     func(Result) float64
	name   string
	digits int // after the point
	// added says that a way is compared by its difference to the first way, as
	// delays are; others by their quotient.
	added bool
}

var (
	gigabits   = unit{of: func(r Result) float64 { return r.Rate * 8 / 1e9 }, name: "Gbit/s", digits: 1}
	perSecond  = unit{of: func(r Result) float64 { return r.Rate }, name: "/s"}
	medianUsec = unit{of: func(r Result) float64 { return float64(r.P50.Nanoseconds()) / 1e3 }, name: "µs", added: true}
	tailUsec   = unit{of: func(r Result) float64 { return float64(r.P99.Nanoseconds()) / 1e3 }, name: "µs", added: true}
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
	spent  map[string]map[string]effort    // by row and way
	failed map[string]string               // the first failure by row and way
}

// effort is the processor time of a program over all rounds, and what it did.
type effort struct {
	time  time.Duration
	steps int
}

// run measures everything, in rounds: in each, every way once for every load,
// and the order of ways turns, so that what disturbs the machine disturbs all.
func (t *table) run(ctx context.Context, r *run) error {
	t.values, t.failed, t.spent = map[string]map[string][]float64{}, map[string]string{}, map[string]map[string]effort{}
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
	if w.program != nil {
		load.Program = w.program.cmd.Process.Pid
	}
	var res Result
	err := w.client.call(ctx, "Do", load, &res)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil && w.program != nil && res.Steps > 0 {
		t.effort(m.reads[0], w, res)
	}
	for _, row := range m.reads {
		if err != nil {
			if key := row.name + ", " + w.name; t.failed[key] == "" {
				t.failed[key] = err.Error()
			}
			continue
		}
		t.add(row.name, w.name, row.unit.of(res))
	}
	return nil
}

// effort adds up what the steps of a rate cost the program on the way.
func (t *table) effort(row reading, w *way, res Result) {
	if row.unit.added {
		return
	}
	if t.spent[row.name] == nil {
		t.spent[row.name] = map[string]effort{}
	}
	e := t.spent[row.name][w.name]
	t.spent[row.name][w.name] = effort{e.time + res.Spent, e.steps + res.Steps}
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

// spread is the median of values and the range of their middle half.
func spread(v []float64) (mid, low, high float64) {
	s := slices.Sorted(slices.Values(v))
	return quantile(s, 0.5), quantile(s, 0.25), quantile(s, 0.75)
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
	t.printEffort(out)
	fmt.Fprintln(out)
	for _, g := range t.goals {
		if line := t.verdict(g); line != "" {
			fmt.Fprintln(out, line)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(t.failed)) {
		fmt.Fprintf(out, "not measured: %s: %s\n", key, strings.TrimSpace(t.failed[key]))
	}
	for _, s := range t.remarks {
		fmt.Fprintln(out, s)
	}
}

// printEffort writes what each step costs the program on the way: unlike a rate
// it hardly depends on what else the machine does.
func (t *table) printEffort(out io.Writer) {
	if len(t.spent) == 0 {
		return
	}
	fmt.Fprintln(out)
	tab := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	head := []string{"processor time of the program, each"}
	for _, w := range t.ways {
		if w.program != nil {
			head = append(head, w.name)
		}
	}
	fmt.Fprintln(tab, strings.Join(head, "\t"))
	for _, m := range t.measures {
		row := m.reads[0].name
		if t.spent[row] == nil {
			continue
		}
		cells := []string{row}
		for _, w := range t.ways {
			if e := t.spent[row][w.name]; e.steps > 0 {
				cells = append(cells, fmt.Sprintf("%.1f µs", float64(e.time.Nanoseconds())/1e3/float64(e.steps)))
			} else if w.program != nil {
				cells = append(cells, "–")
			}
		}
		fmt.Fprintln(tab, strings.Join(cells, "\t"))
	}
	tab.Flush()
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
		d := row.unit.digits
		return fmt.Sprintf("%.*f %s (%.*f–%.*f)", d, mid, row.unit.name, d, low, d, high)
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
	return fmt.Sprintf("goal %s: %s: %.4g, goal %s %g", word, what, got, sign, want)
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
