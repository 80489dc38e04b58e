// Package e2e runs the command line as users type it, against a live server in a
// small internet.
package e2e

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cordonhq/cordon/proving/lab"
	"github.com/cordonhq/cordon/proving/stand"
)

// patience is how long one command of a script may take.
const patience = 30 * time.Second

// TestScripts runs each script in testdata on a stand of its own. On top of
// testscript's commands they have
//
//	cordon <args>       run it on the server's machine, with the server's configuration
//	serve               start the server; its output is the command's
//	end [-KILL]         end it
//	hold <address>      occupy a TCP address of the server's machine
//	keep <variable>     set a variable to the last command's output
//	retry <args>        cordon, again until the next line's stdout can be found
//	host <program> ...  run any program on the server's machine
func TestScripts(t *testing.T) {
	if testing.Short() {
		t.Skip("starts servers and sandboxes")
	}
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			c := &commands{t: t, stand: stand.New(t, stand.Options{})}
			testscript.Run(t, testscript.Params{
				Files: []string{file},
				Setup: func(e *testscript.Env) error {
					e.Setenv("DIR", c.stand.Dir)
					e.Setenv("NAME", c.stand.Name)
					e.Setenv("CONFIG", c.stand.Config)
					e.Setenv("CORDON", stand.Binary())
					return nil
				},
				Cmds: map[string]func(*testscript.TestScript, bool, []string){
					"cordon": c.cordon, "serve": c.serve, "end": c.end, "hold": c.hold, "keep": c.keep,
					"retry": c.retry, "host": c.host,
				},
			})
		})
	}
}

// commands are what scripts have on one stand.
type commands struct {
	t     *testing.T
	stand *stand.Stand
	last  string // the last command's standard output
}

func (c *commands) cordon(ts *testscript.TestScript, neg bool, args []string) {
	c.run(ts, neg, stand.Binary(), append([]string{"--config", c.stand.Config}, args...)...)
}

func (c *commands) host(ts *testscript.TestScript, neg bool, args []string) {
	c.run(ts, neg, args[0], args[1:]...)
}

func (c *commands) run(ts *testscript.TestScript, neg bool, program string, args ...string) {
	if err := c.try(ts, ts.Stdout(), ts.Stderr(), program, args...); (err != nil) != neg {
		if err == nil {
			ts.Fatalf("%s succeeded", program)
		}
		ts.Fatalf("%s: %v", program, err)
	}
}

func (c *commands) try(ts *testscript.TestScript, out, errOut io.Writer, program string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := c.stand.Lab.HostCommand(ctx, program, args...)
	cmd.Dir = ts.MkAbs(".")
	for _, name := range []string{"CORDON_API_KEY", "CORDON_API_URL", "CORDON_NAME", "CORDON_STATE_DIR", "CORDON_RUN_DIR"} {
		if v := ts.Getenv(name); v != "" {
			cmd.Env = append(cmd.Env, name+"="+v)
		}
	}
	var stdout bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.MultiWriter(out, &stdout), errOut
	err := cmd.Run()
	c.last = stdout.String()
	return err
}

func (c *commands) serve(ts *testscript.TestScript, neg bool, _ []string) {
	if neg {
		ts.Fatalf("use ! cordon serve")
	}
	if err := c.stand.Start(context.Background()); err != nil {
		ts.Fatalf("%v", err)
	}
	c.last = c.stand.Log(100)
	_, err := io.WriteString(ts.Stdout(), c.last)
	ts.Check(err)
}

func (c *commands) end(ts *testscript.TestScript, _ bool, args []string) {
	sig := syscall.SIGTERM
	if len(args) == 1 && args[0] == "-KILL" {
		sig = syscall.SIGKILL
	}
	c.stand.Stop(c.t, sig)
}

func (c *commands) hold(ts *testscript.TestScript, _ bool, args []string) {
	l, err := c.stand.Lab.Host().Listen(context.Background(), "tcp", args[0])
	ts.Check(err)
	ts.Defer(func() { l.Close() })
}

func (c *commands) keep(ts *testscript.TestScript, _ bool, args []string) {
	ts.Setenv(args[0], strings.TrimSpace(c.last))
}

// retry runs cordon until its output holds the first argument: some verdicts reach
// the flow log a moment after the fact.
func (c *commands) retry(ts *testscript.TestScript, _ bool, args []string) {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		var out bytes.Buffer
		err := c.try(ts, &out, io.Discard, stand.Binary(), append([]string{"--config", c.stand.Config}, args[1:]...)...)
		if err == nil && strings.Contains(out.String(), args[0]) {
			_, err = ts.Stdout().Write(out.Bytes())
			ts.Check(err)
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("cordon %v never printed %q, but %v:\n%s", args[1:], args[0], err, &out)
		}
	}
}

// TestDemo runs the demo as the Makefile does, with the published SDK and with the
// Go client.
func TestDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and sandboxes")
	}
	facts := map[string][]string{}
	for _, with := range []string{"js", "go"} {
		t.Run(with, func(t *testing.T) {
			out := runDemo(t, with)
			for _, want := range []string{
				"3. Only these addresses",
				"deny tls example.org at 93.184.216.34:443 by deny[0] 0.0.0.0/0",
				"✓ packets to the forged address that left the machine    none",
				"All scenarios behaved as documented",
				"sudo bin/cordon serve",
			} {
				if !strings.Contains(out, want) {
					t.Errorf("the demo does not say %q", want)
				}
			}
			if strings.ContainsAny(out, "\x1b✗") {
				t.Error("the demo shows a colour although its output is no terminal, or a failure")
			}
			for line := range strings.Lines(out) {
				if what, ok := strings.CutPrefix(line, "   ✓ "); ok {
					what, _, _ = strings.Cut(what, "  ")
					facts[with] = append(facts[with], what)
				}
			}
		})
	}
	if js, own := strings.Join(facts["js"], "\n"), strings.Join(facts["go"], "\n"); js != own && js != "" {
		t.Errorf("the clients show different facts:\n%s\n\n%s", js, own)
	}
}

func runDemo(t *testing.T, with string) string {
	t.Helper()
	lab.Privileged(t)
	if with == "js" {
		if _, err := os.Stat("../sdk/js/node_modules/novita-sandbox"); err != nil && os.Getenv("CI") != "true" {
			t.Skip("the SDK's package is not installed: scripts/test installs it")
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "../../bin/cordon-lab", "--cordon", stand.Binary(), "demo", "--client", with)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("cordon-lab demo: %v", err)
	}
	t.Logf("%s", out)
	return string(out)
}

// TestKilledDemo kills the demo in the middle: nothing of it runs on, and what it
// leaves on the disk and of cgroups the next one removes.
func TestKilledDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("starts servers and sandboxes")
	}
	lab.Privileged(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "../../bin/cordon-lab", "--cordon", stand.Binary(), "demo", "--client", "go")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "4. ") {
			break
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	runDemo(t, "go")
	for _, pattern := range []string{"/sys/fs/cgroup/cordon/dem*", "/sys/fs/cgroup/*/cordon/dem*", "/var/cache/cordon/demo/[0-9]/*"} {
		left, err := filepath.Glob(pattern)
		if err != nil || len(left) > 0 {
			t.Errorf("left behind: %v %v", left, err)
		}
	}
}
