// Command cordon-agent is the first process of a sandbox: it starts commands, moves
// files and reaps orphans on behalf of the SDKs and the host. As "cordon-agent
// interpreter" it is the server of the code-interpreter templates, which the first
// starts as the sandbox's user.
package main

import (
	"context"
	"encoding/hex"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cordonhq/cordon/internal/agent"
	"github.com/cordonhq/cordon/internal/agent/proof"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, os.Args[1:], os.Getenv, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "cordon-agent:", err)
		os.Exit(1)
	}
}

// pidsCgroup is where the runtime mounts the hierarchy that counts processes.
const pidsCgroup = "/sys/fs/cgroup/pids"

// spool is where bodies lie until they are whole: on disk, as memory is scarcer.
const spool = "/run/cordon"

// options are the command line.
type options struct {
	key  proof.Key
	port uint16
}

func run(ctx context.Context, args []string, getenv func(string) string, out io.Writer) error {
	if len(args) > 0 && args[0] == "interpreter" {
		return runInterpreter(ctx, args[1:], getenv, out)
	}
	opt, err := parse(args, getenv, out)
	if err != nil {
		return err
	}
	// Files of the SDKs are 0644, directories 0755, whatever started us.
	unix.Umask(0o022)
	first := os.Getpid() == 1
	if !first {
		// Orphans of our commands come to us all the same.
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("become the reaper of orphans: %w", err)
		}
	}
	cfg := agent.Config{
		ControlHash: opt.key,
		Log:         slog.New(slog.NewJSONHandler(out, nil)),
		Own:         agent.OwnAddress,
		ReapAll:     true,
		Path:        getenv("PATH"),
	}
	if fi, err := os.Stat(pidsCgroup); first && err == nil && fi.IsDir() {
		cfg.Pids = pidsCgroup
	}
	if first { // otherwise neither /run nor the machine's name and addresses are ours
		cfg.Spool, cfg.AddLocal = spool, agent.AddLocal
		cfg.SetHostname = func(name string) error { return unix.Sethostname([]byte(name)) }
	}
	if program, err := os.Executable(); first && err == nil {
		if err := agent.TrustCAs(filepath.Dir(program), "/"); err != nil { // commands work without
			cfg.Log.Error("certificates not added to those that programs trust", "err", err)
		}
	}
	a, err := agent.New(cfg)
	if err != nil {
		return err
	}
	// No address: IPv6 and IPv4 on one listener where there is IPv6.
	ln, err := agent.ListenConfig().Listen(ctx, "tcp", ":"+strconv.Itoa(int(opt.port)))
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	return a.Run(ctx, ln)
}

// keyVariable has the SHA-256 of the host's control token, in hex. It is not on the
// command line, which every user of the sandbox can read.
const keyVariable = "CORDON_CONTROL_KEY"

func parse(args []string, getenv func(string) string, out io.Writer) (options, error) {
	fs := flag.NewFlagSet("cordon-agent", flag.ContinueOnError)
	fs.SetOutput(out)
	port := fs.Uint("port", 49983, "TCP `port` to listen on")
	if err := fs.Parse(args); err != nil {
		return options{}, err
	}
	if fs.NArg() > 0 {
		return options{}, fmt.Errorf("unexpected argument %q: there are only flags", fs.Arg(0))
	}
	if *port == 0 || *port > 0xffff {
		return options{}, fmt.Errorf("--port %d: use a number from 1 to 65535", *port)
	}
	var opt options
	raw, err := hex.DecodeString(getenv(keyVariable))
	if err != nil || len(raw) != len(opt.key) {
		return options{}, fmt.Errorf("%s has %d characters: set it to 64 hex digits, the SHA-256 of the control token", keyVariable, len(getenv(keyVariable)))
	}
	copy(opt.key[:], raw)
	opt.port = uint16(*port)
	return opt, nil
}
