package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"

	"github.com/cordonhq/cordon/internal/agent"
	"github.com/cordonhq/cordon/internal/interpreter"
)

// runInterpreter serves the code-interpreter SDKs. It listens when the first
// kernel is warm, so that a connection is the sign that it is ready.
func runInterpreter(ctx context.Context, args []string, getenv func(string) string, out io.Writer) error {
	fs := flag.NewFlagSet("cordon-agent interpreter", flag.ContinueOnError)
	fs.SetOutput(out)
	port := fs.Uint("port", interpreter.Port, "TCP `port` to listen on")
	at := fs.String("agent", "http://127.0.0.1:49983", "base `URL` of the sandbox's agent")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q: there are only flags", fs.Arg(0))
	}
	if *port == 0 || *port > 0xffff {
		return fmt.Errorf("--port %d: use a number from 1 to 65535", *port)
	}
	home := getenv("HOME")
	if home == "" {
		return errors.New("HOME is not set: kernels work in the user's home")
	}
	i, err := interpreter.New(interpreter.Config{
		Dir: filepath.Join(home, ".cache/cordon/interpreter"), Home: home, Env: os.Environ(), Agent: *at,
		Log: slog.New(slog.NewJSONHandler(out, nil)),
	})
	if err != nil {
		return err
	}
	if err := i.Warm(ctx); err != nil {
		return errors.Join(err, i.Close())
	}
	ln, err := agent.ListenConfig().Listen(ctx, "tcp", ":"+strconv.Itoa(int(*port)))
	if err != nil {
		return errors.Join(fmt.Errorf("listen: %w", err), i.Close())
	}
	return i.Run(ctx, ln)
}
