package bench

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/cordonhq/cordon/internal/policy"
)

// Another build is compared with this one row by row: both stand between clients and
// servers of this build, in turns, in one run.

// The ways of a comparison.
const oldBuild, newBuild = "old", "new"

// chosen are the measures whose rows were asked for, by a part of their names.
func (o *Options) chosen(all []measure) []measure {
	if len(o.Rows) == 0 {
		return all
	}
	return slices.DeleteFunc(slices.Clone(all), func(m measure) bool {
		return !slices.ContainsFunc(m.reads, func(r reading) bool { return o.chose(r.name) })
	})
}

func (o *Options) chose(row string) bool {
	return len(o.Rows) == 0 || slices.ContainsFunc(o.Rows, func(part string) bool { return strings.Contains(row, part) })
}

// egressVersus measures what egressTables does of the other build and of this one.
func egressVersus(ctx context.Context, r *run) error {
	denied := proxyMeasures()
	denied = denied[len(denied)-1:]
	many := fmt.Sprintf("kernel path, %d sandboxes, %d CIDRs", r.Sandboxes, r.CIDRs)
	// Builds may differ in what they say by default to a request that is denied.
	denies := func(how policy.OnDeny) GatewayConfig {
		in := nameRules()
		in.OnDeny = how
		return GatewayConfig{Policy: in}
	}
	for _, part := range []struct {
		title    string
		gateway  GatewayConfig
		measures []measure
		more     func(context.Context, *run, []*way) error
	}{
		{"kernel path", GatewayConfig{Policy: oneRule}, kernelMeasures(), versusUpdates},
		{many, GatewayConfig{Policy: manyRules(r.CIDRs), Slots: r.Sandboxes}, kernelMeasures()[:6], nil},
		{"proxy path", GatewayConfig{Policy: nameRules()}, proxyMeasures(), versusIdle},
		{"proxy path, onDeny reset", denies(policy.OnDenyReset), denied, nil},
		{"proxy path, onDeny explain", denies(policy.OnDenyExplain), denied, nil},
	} {
		part.measures = slices.Clone(part.measures) // tables may share them
		for i := range part.measures {
			m := &part.measures[i]
			m.unless, m.reads = nil, slices.Clone(m.reads)
			for j := range m.reads {
				m.reads[j].name = part.title + ": " + m.reads[j].name
			}
		}
		t := &table{title: part.title, measures: r.chosen(part.measures)}
		if err := r.versus(ctx, t, part.gateway, part.more); err != nil {
			return err
		}
	}
	return nil
}

// versus measures one table of both builds, each through a gateway of its own.
func (r *run) versus(ctx context.Context, t *table, c GatewayConfig, more func(context.Context, *run, []*way) error) (err error) {
	if len(t.measures) == 0 && (more == nil || len(r.Rows) > 0) {
		return nil
	}
	w, err := r.newWorld(ctx)
	defer func() {
		if failed := w.close(); err == nil {
			err = failed
		}
	}()
	if err != nil {
		return err
	}
	for _, b := range []struct {
		name string
		self []string
	}{{oldBuild, r.Versus}, {newBuild, r.Self}} {
		way, err := w.gateway(ctx, b.name, b.self, c)
		if err != nil {
			return fmt.Errorf("the %s build: %w", b.name, err)
		}
		t.ways = append(t.ways, way)
	}
	if more != nil && len(r.Rows) == 0 {
		if err := more(ctx, r, t.ways); err != nil {
			return err
		}
	}
	if err := t.run(ctx, r); err != nil {
		return err
	}
	t.printVersus(r.out)
	return nil
}

// versusUpdates measures policy updates of both builds in turns.
func versusUpdates(ctx context.Context, r *run, ways []*way) error {
	var took [2]updateTimes
	for range r.Rounds * 2 {
		for i, w := range ways {
			if err := took[i].measure(ctx, w); err != nil {
				return err
			}
		}
	}
	for i, w := range ways {
		var done Applied
		if err := w.program.call(ctx, "Apply", oneRule, &done); err != nil { // the rows that follow need it
			return err
		}
		fmt.Fprintf(r.out, "\nPolicy update, %s, %d times, from the call\n\n", w.name, len(took[i].cut))
		printFigures(r.out, took[i].figures())
	}
	return nil
}

// versusIdle compares the memory of an idle connection.
func versusIdle(ctx context.Context, r *run, ways []*way) error {
	idle := r.idleLoad()
	figures := r.perConnection(ctx, ways, idle, 0)
	fmt.Fprintf(r.out, "\nMemory of a proxied idle connection, both directions, %d of them\n\n", idle.Conns)
	printFigures(r.out, figures)
	return ctx.Err()
}

// printVersus writes a row for each measure, and one for the processor time of its
// program: medians, their ratio, and the middle half of the rounds' ratios.
func (t *table) printVersus(out io.Writer) {
	fmt.Fprintln(out)
	tab := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintf(tab, "%s\t%s\t%s\tratio of medians\tmiddle half\n", t.title, oldBuild, newBuild)
	for _, m := range t.measures {
		for _, row := range m.reads {
			name := strings.TrimPrefix(row.name, t.title+": ")
			before, now := t.values[row.name][oldBuild], t.values[row.name][newBuild]
			if len(before) == 0 || len(now) == 0 {
				fmt.Fprintf(tab, "%s\tnot measured: %s%s\n", name, t.failed[row.name+", "+oldBuild], t.failed[row.name+", "+newBuild])
				continue
			}
			fmt.Fprintf(tab, "%s\t%s\n", name, ratioCells(row.unit, before, now))
		}
		row := m.reads[0].name
		if a, b := t.spent[row][oldBuild], t.spent[row][newBuild]; a.steps > 0 && b.steps > 0 && a.time > 0 {
			fmt.Fprintf(tab, "  its processor time, each\t%.1f µs\t%.1f µs\t%.2f\t\n", a.each(), b.each(), b.each()/a.each())
		}
	}
	tab.Flush()
}

// each is the time of one step, in microseconds.
func (e effort) each() float64 { return float64(e.time) / float64(time.Microsecond) / float64(e.steps) }

// ratioCells are the medians of two builds, their ratio, and the middle half of the
// rounds' ratios.
func ratioCells(u unit, before, now []float64) string {
	old, _, _ := spread(before)
	mine, _, _ := spread(now)
	u.added = false
	_, low, high := spread(compare(u, now, before))
	return fmt.Sprintf("%.*f %s\t%.*f %s\t%.2f\t%.2f–%.2f", u.digits, old, u.name, u.digits, mine, u.name, mine/old, low, high)
}
