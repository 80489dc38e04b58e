package lifecycle

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/lab"
)

// elsewhere is an address of the lab's internet.
const elsewhere = "198.51.100.66"

// sender sends to elsewhere a thousand times a second, whatever comes of it, and counts
// how often it tried.
const sender = `import socket,mmap,time
f=open('/home/user/sent','w+b'); f.truncate(8); m=mmap.mmap(f.fileno(),8)
s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); n=0
while True:
    n+=1; m[:]=n.to_bytes(8,'little')
    for port in (4009,53,443):
        try: s.sendto(b'out of the checkpoint',('` + elsewhere + `',port))
        except OSError: pass
    time.sleep(0.0003)
`

// sent returns how often a sandbox's sender has tried, and so that it runs.
func sent(t *testing.T, sb *client.Sandbox) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(run(t, sb, "od -An -tu8 -N8 /home/user/sent | tr -d ' '"), 10, 64)
	must(t, err)
	return n
}

// tries waits until the sender in a sandbox has gone on a good while.
func tries(t *testing.T, sb *client.Sandbox) {
	t.Helper()
	first := sent(t, sb)
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if sent(t, sb) > first+100 {
			return
		}
	}
	t.Fatalf("the sender in %s does not go on", sb.ID)
}

// arrived counts what senders got to the internet since a moment.
func (l *live) arrived(t *testing.T, since lab.Mark) (n int, example string) {
	t.Helper()
	seen := l.stand.Lab.Recorder().Since(since)
	must(t, seen.Err())
	for _, p := range seen.Packets() {
		if string(p.Payload) == "out of the checkpoint" {
			n, example = n+1, p.String()
		}
	}
	return n, example
}

// nothingEscapes has a process in the checkpoint send without a pause: from its first
// instruction in a sandbox on, that sandbox's rules hold, not those of the sandbox
// that the checkpoint is of, nor none.
func nothingEscapes(t *testing.T, l *live) {
	no := false
	shut := client.Network{AllowInternetAccess: &no}
	original := l.create(t, client.CreateOptions{})
	run(t, original, "cat >/home/user/send.py <<'EOT'\n"+sender+"EOT\ntouch /home/user/sent; setsid nohup python3 /home/user/send.py >/dev/null 2>&1 </dev/null & sleep 0.5")
	mark := l.stand.Lab.Recorder().Mark()
	tries(t, original)
	if n, _ := l.arrived(t, mark); n == 0 {
		t.Fatal("nothing arrives of an open sandbox: the test shows nothing")
	}
	open, err := original.Snapshot(t.Context(), "") // of a sandbox with an open network
	must(t, err)
	must(t, original.SetNetwork(t.Context(), shut))
	quiet := func(what string, begin func() []*client.Sandbox) {
		t.Helper()
		mark := l.stand.Lab.Recorder().Mark()
		for _, sb := range begin() {
			tries(t, sb)
		}
		if n, example := l.arrived(t, mark); n > 0 {
			t.Errorf("%s: %d packets got out, such as %s", what, n, example)
		}
	}
	one := func(sb *client.Sandbox) []*client.Sandbox { return []*client.Sandbox{sb} }
	quiet("after the update", func() []*client.Sandbox { return one(original) })
	quiet("copies", func() []*client.Sandbox {
		copies, err := original.Fork(t.Context(), 3, 10*time.Minute)
		must(t, err)
		for _, sb := range copies {
			t.Cleanup(func() { _ = sb.Kill(context.Background()) })
		}
		return copies
	})
	quiet("pause and resume", func() []*client.Sandbox {
		must(t, original.Pause(t.Context()))
		return one(l.connect(t, original.ID))
	})
	var made *client.Sandbox
	quiet("a snapshot of an open sandbox", func() []*client.Sandbox {
		made = l.create(t, client.CreateOptions{Template: open.ID, Network: shut})
		return one(made)
	})
	quiet("a reset to that", func() []*client.Sandbox {
		if status, text := l.call(t, http.MethodPost, "/sandboxes/"+made.ID+"/reset", map[string]any{"timeout": 600}, nil); status != http.StatusOK {
			t.Fatalf("reset: %d %s", status, text)
		}
		return one(l.connect(t, made.ID))
	})
	for i := range 3 { // the moment between two steps is short
		quiet(fmt.Sprint("again, ", i), func() []*client.Sandbox {
			sb := l.create(t, client.CreateOptions{Template: open.ID, Network: shut})
			defer func() { must(t, sb.Kill(t.Context())) }()
			tries(t, sb)
			return nil
		})
	}
	mark = l.stand.Lab.Recorder().Mark()
	tries(t, l.create(t, client.CreateOptions{Template: open.ID}))
	if n, _ := l.arrived(t, mark); n == 0 {
		t.Error("nothing arrives of an open sandbox from the snapshot: the test shows nothing")
	}
}
