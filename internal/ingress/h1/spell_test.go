package h1

import (
	"fmt"
	"net/http"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSpell(t *testing.T) {
	for name, c := range map[string]struct {
		h              http.Header
		original, want []Field
	}{
		"nothing":                                  {nil, nil, nil},
		"order and spelling are the original's":    {http.Header{"A": {"1"}, "Bc-D": {"2"}}, []Field{{"bC-d", "x"}, {"a", "x"}}, []Field{{"bC-d", "2"}, {"a", "1"}}},
		"each place of a name has its own value":   {http.Header{"A": {"1", "2"}, "B": {"3"}}, []Field{{"A", ""}, {"b", ""}, {"a", ""}}, []Field{{"A", "1"}, {"b", "3"}, {"a", "2"}}},
		"what is not in the header is left out":    {http.Header{"B": {"1"}}, []Field{{"a", "x"}, {"b", "x"}, {"b", "y"}}, []Field{{"b", "1"}}},
		"what is new comes last, sorted":           {http.Header{"Z": {"1"}, "C": {"2"}, "A": {"3", "4"}}, []Field{{"z", "x"}}, []Field{{"z", "1"}, {"A", "3"}, {"A", "4"}, {"C", "2"}}},
		"more values than places":                  {http.Header{"A": {"1", "2", "3"}}, []Field{{"a", "x"}}, []Field{{"a", "1"}, {"A", "2"}, {"A", "3"}}},
		"an entry without values is no field":      {http.Header{"A": nil}, []Field{{"a", "x"}}, nil},
		"a name that is not canonical is appended": {http.Header{"a": {"1"}}, []Field{{"a", "x"}}, []Field{{"a", "1"}}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, Spell(nil, c.h, c.original)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// Many fields are counted in another way.
func TestSpellManyFields(t *testing.T) {
	h := http.Header{}
	var original, want []Field
	for i := range 100 {
		name, v := fmt.Sprintf("x-%d", i%7), fmt.Sprint(i)
		original = append(original, Field{name, "old"})
		want = append(want, Field{name, v})
		h.Add(name, v)
	}
	if diff := cmp.Diff(append([]Field{{"Already", "here"}}, want...), Spell([]Field{{"Already", "here"}}, h, original)); diff != "" {
		t.Error(diff)
	}
}
