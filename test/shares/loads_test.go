package shares

import (
	"context"
	"fmt"
	"time"

	"github.com/cordonhq/cordon/client"
)

// load is what the hostile key does to one resource.
type load struct {
	name     string
	prepare  func(ctx context.Context, h *attacker)
	parallel int
	do       func(ctx context.Context, h *attacker, n int) error
}

// inside has each sandbox of the attacker run a program over and over.
func inside(name string, boxes int, command string) load {
	return load{
		name:    name,
		prepare: func(ctx context.Context, h *attacker) { h.need(ctx, boxes) }, parallel: boxes,
		do: func(ctx context.Context, h *attacker, n int) error {
			res, err := h.boxes[n%len(h.boxes)].Commands.Run(ctx, command, client.RunOptions{})
			if err == nil && res.ExitCode != 0 {
				err = fmt.Errorf("%s: %s", res.Status, res.Stderr)
			}
			return err
		},
	}
}

// Programs that the hostile key's sandboxes run. Each ends within 20 seconds.
const (
	burn = "for i in 1 2; do timeout 20 sh -c 'while :; do :; done' & done; wait; true"

	hold = `timeout 20 python3 -c '
import time
x = bytearray(350 << 20)
time.sleep(1)
' ; true`

	write = "dd if=/dev/zero of=/tmp/big bs=1M count=200 status=none; sync; rm /tmp/big"

	// ask sends queries without waiting for answers.
	ask = `timeout 20 python3 -c '
import os, socket
server = [l.split()[1] for l in open("/etc/resolv.conf") if l.startswith("nameserver")][0]
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for i in range(40000):
    label = b"%d-%d" % (os.getpid(), i)
    head = bytes([0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0])
    name = bytes([len(label)]) + label + bytes([7]) + b"example" + bytes([3]) + b"com" + bytes([0])
    s.sendto(head + name + bytes([0, 1, 0, 1]), (server, 53))
' ; true`

	// connect holds connections whose first record never ends.
	connect = `timeout 20 python3 -c '
import socket, time
held = []
for i in range(2000):
    s = socket.socket()
    s.settimeout(2)
    try:
        s.connect(("example.com", 443))
        s.send(bytes([22, 3, 1, 2, 0]))
        held.append(s)
    except OSError:
        time.sleep(0.01)
    if len(held) > 800:
        held.pop(0).close()
' ; true`
)

// loads are bounded: what a sandbox may use of the machine is its configuration's, and
// nothing goes beyond the lab.
var loads = []load{
	{name: "starts", parallel: 16, do: func(ctx context.Context, h *attacker, _ int) error {
		box, err := h.c.Create(ctx, client.CreateOptions{Timeout: 10 * time.Minute})
		if err != nil {
			return err
		}
		return box.Kill(ctx)
	}},
	{name: "forks", prepare: func(ctx context.Context, h *attacker) { h.need(ctx, 1) }, parallel: 2,
		do: func(ctx context.Context, h *attacker, _ int) error {
			copies, err := h.boxes[0].Fork(ctx, 20, 10*time.Minute)
			for _, box := range copies {
				_ = box.Kill(ctx)
			}
			return err
		}},
	{name: "rule updates", prepare: func(ctx context.Context, h *attacker) { h.need(ctx, 4) }, parallel: 8,
		do: func(ctx context.Context, h *attacker, n int) error {
			rules := byName("example.com")
			for i := range 1000 {
				rules.AllowOut = append(rules.AllowOut, fmt.Sprintf("198.51.%d.%d", i>>8, (i+n)&255))
			}
			return h.boxes[n%4].SetNetwork(ctx, rules)
		}},
	{name: "requests", parallel: 16, do: func(ctx context.Context, h *attacker, _ int) error {
		_, err := h.c.List(ctx, client.ListOptions{})
		return err
	}},
	{name: "snapshots", prepare: func(ctx context.Context, h *attacker) { h.need(ctx, 2) }, parallel: 4,
		do: func(ctx context.Context, h *attacker, n int) error {
			snap, err := h.boxes[n%2].Snapshot(ctx, "")
			if err != nil {
				return err
			}
			return h.c.DeleteSnapshot(ctx, snap.ID)
		}},
	inside("cpu", 6, burn),
	inside("memory", 4, hold),
	inside("disk", 2, write),
	inside("dns", 6, ask),
	inside("connections", 6, connect),
}
