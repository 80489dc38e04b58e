package life

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/stand"
)

// unit is the service of the packages: its text, and the settings of [Service].
func unit(t *testing.T) (text string, settings map[string]string) {
	t.Helper()
	b, err := os.ReadFile("../../packaging/cordon.service")
	must(t, err)
	text = string(b)
	_, service, _ := strings.Cut(text, "[Service]\n")
	service, _, _ = strings.Cut(service, "\n[")
	settings = map[string]string{}
	for line := range strings.Lines(service) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(k, "#") {
			settings[k] = v
		}
	}
	return text, settings
}

// TestTheUnitIsWhatSystemdTakes has systemd read the unit and rate what it confines.
func TestTheUnitIsWhatSystemdTakes(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("systemd-analyze is not installed")
	}
	text, _ := unit(t)
	file := filepath.Join(t.TempDir(), "cordon.service")
	must(t, os.WriteFile(file, []byte(strings.ReplaceAll(text, "/usr/bin/cordon", "/bin/true")), 0o644))
	out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--man=no", file).CombinedOutput()
	if err != nil || strings.Contains(string(out), file) {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	out, err = exec.CommandContext(t.Context(), "systemd-analyze", "security", "--offline=yes", "--threshold=75", "--no-pager", file).CombinedOutput()
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	t.Log(lines[len(lines)-1])
	if err != nil {
		t.Errorf("systemd-analyze security: %v\n%s", err, out)
	}
}

// TestTheServerNeedsNoMoreThanItsUnitGives runs a server with the capabilities of the
// unit and no others, and what users do with sandboxes, across a restart.
func TestTheServerNeedsNoMoreThanItsUnitGives(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and a sandbox")
	}
	if _, err := exec.LookPath("setpriv"); err != nil {
		t.Skip("setpriv is not installed")
	}
	_, settings := unit(t)
	bounding := "-all"
	for c := range strings.FieldsSeq(settings["CapabilityBoundingSet"]) {
		bounding += ",+" + strings.ToLower(strings.TrimPrefix(c, "CAP_"))
	}
	under := []string{"setpriv", "--bounding-set", bounding, "--inh-caps", "-all"}
	if settings["NoNewPrivileges"] == "yes" {
		under = append(under, "--no-new-privs")
	}
	s := stand.New(t, stand.Options{Under: under, LogLevel: "info"})
	must(t, s.Start(t.Context()))
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.PID()))
	must(t, err)
	own, err := os.ReadFile("/proc/self/status")
	must(t, err)
	if field(status, "CapBnd") == field(own, "CapBnd") || field(status, "NoNewPrivs") != "1" {
		t.Fatalf("the server is not confined:\n%s", status)
	}
	sb, err := s.User(t).Create(t.Context(), client.CreateOptions{Timeout: 10 * time.Minute, Network: client.Network{DenyOut: []string{client.AllTraffic}, AllowOut: []string{"allowed.test"}}})
	must(t, err)
	run := func(line, want string) {
		t.Helper()
		res, err := sb.Commands.Run(t.Context(), line, client.RunOptions{})
		must(t, err)
		if got := strings.TrimSpace(res.Stdout); got != want {
			t.Errorf("%s: %q (%s), want %q", line, got, res.Stderr, want)
		}
	}
	run("id -u; sudo id -u", "1000\n0")
	run("curl -s -o /dev/null -w %{http_code} https://allowed.test", "200")
	run("curl -s -o /dev/null --max-time 5 -w %{http_code} https://shared-a.test", "000")
	must(t, sb.Pause(t.Context()))
	s.Stop(t, syscall.SIGTERM)
	must(t, s.Start(t.Context()))
	sb, err = s.User(t).Connect(t.Context(), sb.ID, time.Minute)
	must(t, err)
	run("sudo touch /root/x && echo resumed", "resumed")
	must(t, sb.Kill(t.Context()))
	for line := range strings.Lines(s.Log(1000)) {
		if strings.Contains(line, "level=ERROR") || strings.Contains(line, "not permitted") {
			t.Errorf("the log says: %s", line)
		}
	}
}

// field is a line of /proc/<pid>/status.
func field(status []byte, name string) string {
	_, rest, _ := strings.Cut("\n"+string(status), "\n"+name+":")
	value, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(value)
}
