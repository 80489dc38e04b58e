package server

import (
	"strings"
	"testing"

	"github.com/cordonhq/cordon/internal/errs"
)

func TestTheHostTemplateIsOffWhileThereAreSeveralKeys(t *testing.T) {
	for _, c := range []struct {
		setting string
		keys    int
		say     string // "": it is on
	}{
		{"", 1, ""}, {"", 2, "2 API keys"}, {"auto", 1, ""}, {"auto", 7, "sandboxes.host_template to on"},
		{"on", 7, ""}, {"off", 1, "off on this server"},
	} {
		var cfg Config
		cfg.Sandboxes.HostTemplate = c.setting
		cfg.setDefaults()
		if err := cfg.validNumbers(); err != nil {
			t.Fatal(err)
		}
		err := cfg.hostTemplate(c.keys)
		if (err == nil) != (c.say == "") || err != nil && (!errs.Is(err, errs.Forbidden) || !strings.Contains(err.Error(), c.say)) {
			t.Errorf("%q with %d keys: %v, want %q", c.setting, c.keys, err, c.say)
		}
	}
	cfg := Config{Sandboxes: SandboxConfig{HostTemplate: "maybe"}}
	if err := cfg.validNumbers(); err == nil || !strings.Contains(err.Error(), "sandboxes.host_template") {
		t.Errorf("a wrong setting: %v", err)
	}
}
