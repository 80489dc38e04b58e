package agent_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cordonhq/cordon/client"
)

// TestRoot asserts each row of the tables of docs/agent.md about what root may do
// and what the network stack does.
func TestRoot(t *testing.T) {
	s := newStand(t)
	t.Run("what root may do", s.rootMay)
	t.Run("the network stack", s.networkStack)
	t.Run("a server keeps its address over a pause", s.keptAddress)
}

// asRoot runs a script as root and returns all it says, and its exit code.
func (s *live) asRoot(t *testing.T, sb *client.Sandbox, script string) string {
	t.Helper()
	r, err := sb.Commands.Run(t.Context(), script+"\necho \"= $?\"", client.RunOptions{User: "root", Timeout: time.Minute})
	if err != nil {
		t.Fatalf("%s: %v", script, err)
	}
	return strings.TrimSpace(r.Stdout + r.Stderr)
}

func (s *live) rootMay(t *testing.T) {
	sb := s.sandbox(t)
	run(t, sb, "sudo mkdir -p /m/a /m/b /m/up /m/work; true", 0)
	for _, c := range []struct{ name, script, want string }{
		{"tmpfs", "mount -t tmpfs -o size=8m tmpfs /m/a && touch /m/a/x && umount /m/a", "= 0"},
		{"bind", "mount --bind /etc /m/b && test -e /m/b/passwd && umount /m/b", "= 0"},
		{"proc", "mount -t proc proc /m/a && test -e /m/a/self && umount /m/a", "= 0"},
		{"overlay on tmpfs", "mount -t tmpfs t /m/up && mkdir /m/up/u /m/up/w && mount -t overlay o -o lowerdir=/etc,upperdir=/m/up/u,workdir=/m/up/w /m/a && touch /m/a/new && test -e /m/up/u/new && umount /m/a && umount /m/up", "= 0"},
		{"overlay on /", "mount -t overlay o -o lowerdir=/etc,upperdir=/m/up,workdir=/m/work /m/a 2>/dev/null", "= 32"},
		{"ext4", "mount -t ext4 /dev/null /m/a 2>/dev/null", "= 32"},
		{"FUSE", `python3 -c "
import ctypes, os
fd = os.open('/dev/fuse', os.O_RDWR)
libc = ctypes.CDLL(None, use_errno=True)
print(libc.mount(b'x', b'/m/a', b'fuse', 0, f'fd={fd},rootmode=40000,user_id=0,group_id=0'.encode()), ctypes.get_errno())
libc.umount2(b'/m/a', 2)"`, "0 0\n= 0"},
		{"pivot_root", `unshare -m sh -c 'mount -t tmpfs t /m/a && mkdir /m/a/old && cd /m/a && pivot_root . old'`, "= 0"},
		{"host name", "hostname other && hostname && hostname " + sb.ID, "other\n= 0"},
		{"a network namespace's loopback", `unshare -n sh -c "ip link set lo up && ping -c1 -W2 127.0.0.1 >/dev/null"`, "= 0"},
		{"addresses", "ip address add 10.99.0.1/32 dev lo && ping -c1 -W2 10.99.0.1 >/dev/null", "= 0"},
		{"packet sockets", `python3 -c "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 768)" 2>&1 | tail -1`, "PermissionError: [Errno 1] Operation not permitted\n= 0"},
		{"raw sockets", `python3 -c "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)" 2>&1 | tail -1`, "PermissionError: [Errno 1] Operation not permitted\n= 0"},
		{"ping", "ping -c1 -W2 127.0.0.1 >/dev/null", "= 0"},
		{"file capabilities of the set", `cp /usr/bin/python3 /m/py && setcap cap_net_bind_service+ep /m/py && /m/py -c ""`, "= 0"},
		{"file capabilities beyond it", `setcap cap_sys_time+ep /m/py && /m/py -c "" 2>/dev/null`, "= 126"},
		{"sysctl that is kept", "sysctl -qw net.ipv4.ip_local_port_range='20000 30000' && cat /proc/sys/net/ipv4/ip_local_port_range && sysctl -qw net.ipv4.ip_local_port_range='16000 65535'", "20000 30000\n= 0"},
		{"sysctl that is not", "sysctl -qw net.core.somaxconn=4096 2>/dev/null; cat /proc/sys/net/core/somaxconn; echo", "1024\n= 0"},
		{"ss", "ss -ltn 2>/dev/null | grep -c 49983", "1\n= 0"},
		{"ss -p", "ss -ltnp 2>&1 >/dev/null | head -1", "Cannot open netlink socket: Protocol not supported\n= 0"},
		{"clock", "date -s 2020-01-01 >/dev/null 2>&1", "= 1"},
		{"modules", "python3 -c \"import ctypes; l = ctypes.CDLL(None, use_errno=True); print(l.syscall(175, 0, 0, b''), ctypes.get_errno())\"", "-1 1\n= 0"},
		{"swap", "swapon /m/py 2>/dev/null", "= 255"},
		{"chroot", "chroot / true", "= 0"},
		{"device nodes", "mknod /m/null c 1 3 && echo x >/m/null", "= 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := s.asRoot(t, sb, c.script); got != c.want {
				t.Errorf("%s\n%q, want %q", c.script, got, c.want)
			}
		})
	}
}

func (s *live) networkStack(t *testing.T) {
	sb := s.sandbox(t)
	python := func(script string) string { return `python3 -c "import socket, os, struct` + "\n" + script + `"` }
	for _, c := range []struct{ name, script, want string }{
		{"congestion control", python("s = socket.socket(); print(s.getsockopt(6, 13, 16).strip(b'\\0').decode())"), "cubic"},
		{"of an accepted connection", python(`
l = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(l.getsockname()); a, _ = l.accept()
print(a.getsockopt(6, 13, 16).strip(b'\0').decode(), c.getsockopt(6, 13, 16).strip(b'\0').decode())`), "cubic cubic"},
		{"in a network namespace", "unshare -Urn " + python("s = socket.socket(socket.AF_INET6); print(s.getsockopt(6, 13, 16).strip(b'\\0').decode())"), "cubic"},
		{"reno for the asking", python("s = socket.socket(); s.setsockopt(6, 13, b'reno'); print(s.getsockopt(6, 13, 16).strip(b'\\0').decode())"), "reno"},
		{"bbr", python("s = socket.socket()\ntry: s.setsockopt(6, 13, b'bbr')\nexcept OSError as e: print(e.errno)"), "2"},
		{"what /proc says", "cat /proc/sys/net/ipv4/tcp_congestion_control; echo", "reno"},
		{"SACK and RACK", "cat /proc/sys/net/ipv4/tcp_sack; cat /proc/sys/net/ipv4/tcp_recovery", "1\n1"},
		{"keepalive", python("s = socket.socket(); print([s.getsockopt(6, o) for o in (4, 5, 6)])"), "[7200, 75, 9]"},
		{"ephemeral ports", "cat /proc/sys/net/ipv4/ip_local_port_range", "16000 65535"},
		{"MTU", "ip link show eth0 | grep -o 'mtu [0-9]*'", "mtu 1500"},
		{"ports below 1024 for every user", python("print(socket.create_server(('127.0.0.1', 80)).getsockname()[1])"), "80"},
		{"SO_REUSEPORT", python(`
def listen():
    s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1); s.bind(('127.0.0.1', 7001)); s.listen(); return s
a, b = listen(), listen(); print('both')`), "both"},
		{"TCP_FASTOPEN is set and not read", python("s = socket.socket(); s.setsockopt(6, 23, 5)\ntry: s.getsockopt(6, 23)\nexcept OSError as e: print(e.errno)"), "92"},
		{"UDP_SEGMENT is set and not read", python("s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.setsockopt(17, 103, 1000)\ntry: s.getsockopt(17, 103)\nexcept OSError as e: print(e.errno)"), "92"},
		{"buffers grow to", "cut -f3 /proc/sys/net/ipv4/tcp_wmem; cut -f3 /proc/sys/net/ipv4/tcp_rmem", "4194304\n4194304"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := run(t, sb, c.script, 0); got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

// keptAddress binds servers to the sandbox's own address, and asks them by their
// public URL and from inside after pauses, in which others take the address.
func (s *live) keptAddress(t *testing.T) {
	sb := s.sandbox(t)
	const serve = `ip=$(hostname -I | cut -d' ' -f1); nohup python3 -m http.server %d --bind $ip >/dev/null 2>&1 & echo $ip`
	first := run(t, sb, fmt.Sprintf(serve, 8080), 0)
	check := func(when, own string, port int) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			req, err := sb.NewRequest(t.Context(), "GET", port, "/", nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := sb.Do(req)
			if err == nil {
				resp.Body.Close()
				if resp.StatusCode == 200 {
					break
				}
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s, the server at %s:%d: %+v, %v", when, own, port, resp, err)
			}
		}
		run(t, sb, fmt.Sprintf("curl -sf -o /dev/null -m 5 http://%s:%d/", own, port), 0)
	}
	check("at first", first, 8080)
	for range 2 {
		if err := sb.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.sandbox(t) // one that may get the slot
		var err error
		if sb, err = s.Connect(t.Context(), sb.ID, 5*time.Minute); err != nil {
			t.Fatal(err)
		}
		check("after a pause", first, 8080)
	}
	second := run(t, sb, fmt.Sprintf(serve, 8081), 0)
	check("with another", second, 8081)
	if err := sb.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.sandbox(t)
	var err error
	if sb, err = s.Connect(t.Context(), sb.ID, 5*time.Minute); err != nil {
		t.Fatal(err)
	}
	check("in the end", first, 8080)
	check("in the end", second, 8081)
	if got := strings.Fields(run(t, sb, "hostname -I", 0)); len(got) != 1 {
		t.Errorf("hostname -I: %q", got)
	}
}
