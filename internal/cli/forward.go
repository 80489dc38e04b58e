package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/internal/errs"
)

func forwardCommand(a *app) *cobra.Command {
	var locals []string
	cmd := &cobra.Command{
		Use:   "forward <sandbox> [port]...",
		Short: "Make TCP ports of a sandbox reachable on this machine",
		Long: `Make TCP ports of a sandbox reachable on this machine until it is interrupted.

A port alone listens at the same number on 127.0.0.1. With -L another address or
number is chosen; the number 0 takes a free one. Ports bound to the sandbox's own
loopback are reached too, whether the sandbox is public or private.`,
		Example: `  cordon forward iabc… 5432
  cordon forward iabc… -L 15432:5432 -L '[::1]:6379:6379'`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ways, err := forwardings(args[1:], locals)
			if err != nil {
				return err
			}
			s, err := a.connect(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.forward(cmd.Context(), s, ways)
		},
	}
	cmd.Flags().StringArrayVarP(&locals, "local", "L", nil, "[bind:]local:remote, as ssh has it; may be repeated")
	return cmd
}

// forwarding is one local address and the port behind it.
type forwarding struct {
	listen string // host:port
	port   int
}

func forwardings(ports, locals []string) ([]forwarding, error) {
	var out []forwarding
	for _, p := range ports {
		f, err := parseForwarding(p + ":" + p)
		if err != nil {
			return nil, errs.New(errs.Invalid, "port %q: use a number from 1 to 65535, or -L for another local one", p)
		}
		out = append(out, f)
	}
	for _, l := range locals {
		f, err := parseForwarding(l)
		if err != nil {
			return nil, err
		}
		out = append(out, f)
	}
	if len(out) == 0 {
		return nil, errs.New(errs.Invalid, "no port: name one, such as 5432, or -L local:remote")
	}
	return out, nil
}

// parseForwarding reads [bind:]local:remote; an IPv6 bind is in brackets.
func parseForwarding(s string) (forwarding, error) {
	bad := errs.New(errs.Invalid, "-L %q: use local:remote or bind:local:remote, such as 15432:5432 or 0.0.0.0:8080:80", s)
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return forwarding{}, bad
	}
	listen := s[:i]
	if !strings.Contains(listen, ":") {
		listen = "127.0.0.1:" + listen
	}
	remote, err := strconv.ParseUint(s[i+1:], 10, 16)
	if err != nil || remote == 0 {
		return forwarding{}, bad
	}
	host, local, err := net.SplitHostPort(listen)
	if err != nil || host == "" {
		return forwarding{}, bad
	}
	if _, err := strconv.ParseUint(local, 10, 16); err != nil {
		return forwarding{}, bad
	}
	return forwarding{listen, int(remote)}, nil
}

// forward listens for all of ways before it carries any.
func (a *app) forward(ctx context.Context, s *client.Sandbox, ways []forwarding) error {
	listeners := make([]net.Listener, 0, len(ways))
	defer func() {
		for _, l := range listeners {
			l.Close() // again, for those that Forward took
		}
	}()
	for _, w := range ways {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", w.listen)
		if err != nil {
			return errs.New(errs.Invalid, "%v: choose another local address or port with -L", err)
		}
		listeners = append(listeners, l)
	}
	g, ctx := errgroup.WithContext(ctx)
	for i, l := range listeners {
		port := ways[i].port
		fmt.Fprintf(a.out, "%s -> port %d of %s\n", l.Addr(), port, s.ID)
		g.Go(func() error {
			return s.Forward(ctx, l, port, client.ForwardOptions{Failed: func(from net.Addr, err error) {
				fmt.Fprintf(a.errOut, "cordon: connection from %s to port %d: %v\n", from, port, err)
			}})
		})
	}
	if err := g.Wait(); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}
