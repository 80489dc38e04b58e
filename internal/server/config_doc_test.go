package server

import (
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestEveryKeyIsDocumented compares the table in docs/operations.md with the
// configuration: each key, in the order of the structure, with its default.
func TestEveryKeyIsDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile("(?m)^\\| `([a-z0-9_.]+)` \\| (?:`(.*?)`)? *\\| (.+) \\|$")
	var documented []string
	for _, m := range row.FindAllStringSubmatch(string(text), -1) {
		documented = append(documented, m[1]+" = "+m[2])
	}
	var c Config
	c.setDefaults()
	if diff := cmp.Diff(keys("", reflect.ValueOf(c)), documented); diff != "" {
		t.Errorf("configuration (-) and docs/operations.md (+) differ:\n%s", diff)
	}
}

// TestVariablesFollowTheKeys is what the page says of the environment.
func TestVariablesFollowTheKeys(t *testing.T) {
	var walk func(prefix string, of reflect.Type)
	walk = func(prefix string, of reflect.Type) {
		for f := range of.Fields() {
			key := strings.ToUpper(f.Tag.Get("yaml"))
			got, want := f.Tag.Get("env"), key
			if f.Type.Kind() == reflect.Struct && f.Tag.Get("env") == "" {
				got, want = f.Tag.Get("envPrefix"), key+"_"
				walk(prefix+key+"_", f.Type)
			}
			if got != want {
				t.Errorf("%s%s is read from the variable %q", prefix, key, got)
			}
		}
	}
	walk("CORDON_", reflect.TypeFor[Config]())
}

// keys lists "key = default" of every field below v.
func keys(prefix string, v reflect.Value) []string {
	var out []string
	for f, value := range v.Fields() {
		key := prefix + f.Tag.Get("yaml")
		if f.Tag.Get("env") == "" {
			out = append(out, keys(key+".", value)...)
			continue
		}
		out = append(out, key+" = "+shown(value))
	}
	return out
}

// shown is how the table writes a value.
func shown(v reflect.Value) string {
	switch v.Kind() {
	case reflect.Slice:
		var all []string
		for _, e := range v.Seq2() {
			all = append(all, fmt.Sprint(e.Interface()))
		}
		return strings.Join(all, ", ")
	case reflect.Map:
		var all []string
		for _, k := range v.MapKeys() {
			all = append(all, fmt.Sprintf("%v: %v", k.Interface(), v.MapIndex(k).Interface()))
		}
		slices.Sort(all)
		return strings.Join(all, ", ")
	default:
		return fmt.Sprint(v.Interface())
	}
}
