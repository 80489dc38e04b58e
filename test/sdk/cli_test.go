package sdk

import (
	"bytes"
	"context"
	"encoding/json"
	"regexp"
	"strings"
	"testing"
	"time"
)

// cli runs e2b's own command line, unmodified, on the server's machine with a user's
// environment.
type cli struct {
	s   *live
	env []string
}

// said is what a command printed and how it ended.
type said struct {
	out, err string
	exit     int
}

const cliProgram = "js/node_modules/@e2b/cli/dist/index.js"

// run runs a command and expects it to end with exit.
func (c cli) run(t *testing.T, exit int, stdin string, args ...string) said {
	t.Helper()
	return c.start(t, exit, stdin, "node", append([]string{cliProgram}, args...)...)
}

// terminal runs a command in a terminal, where stdin is typed.
func (c cli) terminal(t *testing.T, stdin, command string) said {
	t.Helper()
	return c.start(t, 0, stdin, "script", "--quiet", "--return", "--command", "stty -echo; exec node "+cliProgram+" "+command, "/dev/null")
}

func (c cli) start(t *testing.T, exit int, stdin, program string, args ...string) said {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := c.s.Lab.HostCommand(ctx, program, args...)
	cmd.Env = c.env
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	r := said{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
	if r.exit != exit {
		t.Fatalf("%s %q: exit %d (%v), want %d\n%s%s", program, args, r.exit, err, exit, r.out, r.err)
	}
	return r
}

// want is what an output has to hold.
func (r said) want(t *testing.T, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(r.out+r.err, p) {
			t.Errorf("lacks %q:\n%s%s", p, r.out, r.err)
		}
	}
}

// records reads an output of --format json: a list, one object, or an object a line.
func records(t *testing.T, r said) []map[string]any {
	t.Helper()
	var list []map[string]any
	if json.Unmarshal([]byte(r.out), &list) == nil {
		return list
	}
	d := json.NewDecoder(strings.NewReader(r.out))
	for d.More() {
		var m map[string]any
		if err := d.Decode(&m); err != nil {
			t.Fatalf("%v:\n%s", err, r.out)
		}
		list = append(list, m)
	}
	return list
}

// holds reports whether a record has value under key.
func holds(list []map[string]any, key string, value any) bool {
	for _, m := range list {
		if m[key] == value {
			return true
		}
	}
	return false
}

var idForm = regexp.MustCompile(`\bi[0-9a-z]{20}\b`)

// create makes a sandbox and returns its ID.
func (c cli) create(t *testing.T, args ...string) string {
	t.Helper()
	r := c.run(t, 0, "", append([]string{"sandbox", "create", "--detach", "--timeout", "300"}, args...)...)
	id := idForm.FindString(r.out)
	if id == "" {
		t.Fatalf("no ID:\n%s%s", r.out, r.err)
	}
	return id
}

// TestCommandLineOfE2B runs each command of the package @e2b/cli that a server of
// one's own can have: all of "sandbox", and the lists of "template". Templates are not
// built here, which the command line says.
func TestCommandLineOfE2B(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a server and its sandboxes")
	}
	node(t)
	installed(t, cliProgram)
	s := newStand(t)
	c := cli{s, s.environ(t)}
	id := c.create(t, "base")

	t.Run("list and info", func(t *testing.T) {
		c.run(t, 0, "", "sandbox", "list").want(t, id, "base", "Running")
		if list := records(t, c.run(t, 0, "", "sandbox", "list", "--format", "json")); !holds(list, "sandboxId", id) || !holds(list, "state", "running") {
			t.Errorf("%v", list)
		}
		c.run(t, 0, "", "sandbox", "list", "--metadata", "no=such").want(t, "No sandboxes found")
		c.run(t, 0, "", "sandbox", "info", id).want(t, "Sandbox info for "+id, "State: running", "Internet access: true")
		if info := records(t, c.run(t, 0, "", "sandbox", "info", "--format", "json", id)); !holds(info, "sandboxId", id) || !holds(info, "templateId", "base") {
			t.Errorf("%v", info)
		}
	})
	t.Run("exec", func(t *testing.T) {
		if r := c.run(t, 3, "", "sandbox", "exec", id, "echo hi; echo bad >&2; exit 3"); r.out != "hi\n" || !strings.HasPrefix(r.err, "bad\n") {
			t.Errorf("%q %q", r.out, r.err)
		}
		if r := c.run(t, 0, "hello\n", "sandbox", "exec", id, "cat"); r.out != "hello\n" {
			t.Errorf("standard input: %q", r.out)
		}
		if r := c.run(t, 0, "", "sandbox", "exec", "--user", "root", "--cwd", "/tmp", "--env", "A=b", id, "id -u; pwd; echo $A"); r.out != "0\n/tmp\nb\n" {
			t.Errorf("%q", r.out)
		}
		c.run(t, 0, "", "sandbox", "exec", "--background", id, "sleep 1; echo done >/tmp/background")
		c.run(t, 0, "", "sandbox", "exec", id, "until [ -s /tmp/background ]; do sleep 0.1; done")
	})
	t.Run("terminal", func(t *testing.T) {
		c.terminal(t, "echo $((6*7)).$PWD.$A; exit\n", "sandbox connect --cwd /tmp --env A=b "+id).want(t, "42./tmp.b")
		r := c.terminal(t, "echo $((6*7)); exit\n", "sandbox create base")
		r.want(t, "42")
		other := idForm.FindString(r.out)
		if other == "" {
			t.Fatalf("no ID: %s", r.out)
		}
		// With the terminal the command line gives the sandbox one second more.
		for end := time.Now().Add(20 * time.Second); strings.Contains(c.run(t, 0, "", "sandbox", "list").out, other); {
			if time.Now().After(end) {
				t.Fatal("the sandbox outlives its terminal")
			}
		}
	})
	t.Run("logs and metrics", func(t *testing.T) {
		c.run(t, 0, "", "sandbox", "logs", id).want(t, "sandbox: create")
		if list := records(t, dropHead(c.run(t, 0, "", "sandbox", "logs", "--format", "json", id))); !holds(list, "event", "create") {
			t.Errorf("%v", list)
		}
		c.run(t, 0, "", "sandbox", "metrics", id).want(t, "Metrics for sandbox "+id, "/ 512   MiB")
		if list := records(t, dropHead(c.run(t, 0, "", "sandbox", "metrics", "--format", "json", id))); !holds(list, "memTotal", float64(512<<20)) {
			t.Errorf("%v", list)
		}
	})
	t.Run("pause and resume", func(t *testing.T) {
		c.run(t, 0, "", "sandbox", "exec", id, "echo kept >/tmp/kept")
		c.run(t, 0, "", "sandbox", "pause", id).want(t, "paused")
		c.run(t, 0, "", "sandbox", "list", "--state", "paused").want(t, id)
		c.run(t, 0, "", "sandbox", "resume", id).want(t, "resumed")
		c.run(t, 0, "", "sandbox", "exec", id, "cat /tmp/kept").want(t, "kept")
	})
	t.Run("snapshots", func(t *testing.T) {
		c.run(t, 0, "", "sandbox", "snapshot", "create", "--name", "snap", id).want(t, "Created snapshot")
		c.run(t, 0, "", "sandbox", "snapshot", "list").want(t, "snap")
		list := records(t, c.run(t, 0, "", "sandbox", "snapshot", "list", "--format", "json", id))
		if len(list) != 1 {
			t.Fatalf("%v", list)
		}
		other := c.create(t, "snap")
		c.run(t, 0, "", "sandbox", "exec", other, "cat /tmp/kept").want(t, "kept")
		snapshot, _ := list[0]["snapshotId"].(string)
		c.run(t, 0, "", "sandbox", "snapshot", "delete", snapshot)
		if r := c.run(t, 0, "", "sandbox", "snapshot", "list"); strings.Contains(r.out, snapshot) {
			t.Errorf("a deleted snapshot is listed: %s", r.out)
		}
	})
	t.Run("templates", func(t *testing.T) {
		c.run(t, 0, "", "template", "list").want(t, "base", "code-interpreter-v1")
		if list := records(t, c.run(t, 0, "", "template", "list", "--format", "json")); !holds(list, "templateID", "base") {
			t.Errorf("%v", list)
		}
		c.run(t, 1, "", "template", "delete", "--yes", "no-such").want(t, "404")
		c.run(t, 1, "", "template", "publish", "--yes", "base").want(t, "501", "does not support template builds")
	})
	t.Run("kill", func(t *testing.T) {
		c.run(t, 0, "", "sandbox", "kill", id).want(t, "has been killed")
		c.run(t, 0, "", "sandbox", "kill", id).want(t, "wasn't found")
		c.run(t, 0, "", "sandbox", "logs", id).want(t, "sandbox: kill")
		c.run(t, 0, "", "sandbox", "kill", "--all")
		c.run(t, 0, "", "sandbox", "list").want(t, "No sandboxes found")
	})
}

// dropHead leaves out what an output says before its first record.
func dropHead(r said) said {
	r.out = r.out[max(0, strings.Index(r.out, "{")):]
	return r
}
