// Command guest is what runs in the sandboxes of the contract test: it does
// what it is told, one JSON request per TCP connection, and says what it saw.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

type request struct {
	Do   string
	Args []string
}

type reply struct {
	Out string
	Err string
}

// memory is what "remember" keeps, to be found again after a restore.
var memory struct {
	sync.Mutex
	text string
	held [][]byte
}

func main() {
	if len(os.Args) > 1 && os.Args[1] != "serve" {
		out, err := do(request{Do: os.Args[1], Args: os.Args[2:]})
		fmt.Print(out)
		if err != nil {
			fmt.Print(err)
			os.Exit(1)
		}
		return
	}
	l, err := net.Listen("tcp", ":49983")
	if err != nil {
		panic(err)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			panic(err)
		}
		go serve(c)
	}
}

func serve(c net.Conn) {
	defer c.Close()
	var req request
	if err := json.NewDecoder(c).Decode(&req); err != nil {
		return
	}
	var r reply
	out, err := do(req)
	r.Out = out
	if err != nil {
		r.Err = err.Error()
	}
	_ = json.NewEncoder(c).Encode(r)
}

func arg(a []string, i int) string {
	if i < len(a) {
		return a[i]
	}
	return ""
}

func num(a []string, i int) int {
	n, _ := strconv.Atoi(arg(a, i))
	return n
}

func do(r request) (string, error) {
	if f, ok := commands[r.Do]; ok {
		return f(r.Args)
	}
	return "", fmt.Errorf("guest cannot %q", r.Do)
}

var commands = map[string]func(a []string) (string, error){
	"hello": func(a []string) (string, error) {
		return "hello", nil
	},
	"exit": func(a []string) (string, error) {
		time.AfterFunc(20*time.Millisecond, func() { os.Exit(num(a, 0)) })
		return "", nil
	},
	"hostname": func(a []string) (string, error) {
		return os.Hostname()
	},
	"env": func(a []string) (string, error) {
		return strings.Join(os.Environ(), "\n"), nil
	},
	"cat": func(a []string) (string, error) {
		b, err := os.ReadFile(arg(a, 0))
		return string(b), err
	},
	"write": func(a []string) (string, error) {
		return "", os.WriteFile(arg(a, 0), []byte(arg(a, 1)), 0o644)
	},
	"mkdir": func(a []string) (string, error) {
		return "", os.Mkdir(arg(a, 0), 0o755)
	},
	"fill": func(a []string) (string, error) { // path, MiB: writes until it is full
		return fill(arg(a, 0), num(a, 1))
	},
	"terminal": func(a []string) (string, error) {
		return terminal()
	},
	"crowd": func(a []string) (string, error) { // users, processes of each
		return crowd(num(a, 0), num(a, 1))
	},
	"remove": func(a []string) (string, error) {
		return "", os.Remove(arg(a, 0))
	},
	"ls": func(a []string) (string, error) {
		entries, err := os.ReadDir(arg(a, 0))
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return strings.Join(names, "\n"), err
	},
	"fds": func(a []string) (string, error) {
		return fds()
	},
	"setxattr": func(a []string) (string, error) {
		return "", syscall.Setxattr(arg(a, 0), arg(a, 1), []byte(arg(a, 2)), 0)
	},
	"getxattr": func(a []string) (string, error) {
		b := make([]byte, 4096)
		n, err := syscall.Getxattr(arg(a, 0), arg(a, 1), b)
		return string(b[:max(n, 0)]), err
	},
	"remember": func(a []string) (string, error) {
		memory.Lock()
		defer memory.Unlock()
		memory.text = arg(a, 0)
		return "", nil
	},
	"recall": func(a []string) (string, error) {
		memory.Lock()
		defer memory.Unlock()
		return memory.text, nil
	},
	"allocate": func(a []string) (string, error) { // MiB, kept
		memory.Lock()
		defer memory.Unlock()
		for range num(a, 0) {
			b := make([]byte, 1<<20)
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			memory.held = append(memory.held, b)
		}
		return "", nil
	},
	"burn": func(a []string) (string, error) { // milliseconds of CPU
		for end := time.Now().Add(time.Duration(num(a, 0)) * time.Millisecond); time.Now().Before(end); {
		}
		return "", nil
	},
	"ids": func(a []string) (string, error) {
		return fmt.Sprint(os.Getuid(), os.Geteuid()), nil
	},
	"as": func(a []string) (string, error) { // uid, program, args
		return as(num(a, 0), a[1:])
	},
	"forks": func(a []string) (string, error) { // how many processes may live at once, at most n
		return forks(num(a, 0))
	},
	"userforks": func(a []string) (string, error) { // forks, by a program of a user without rights
		c := exec.Command("/guest", "forks", arg(a, 0))
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 10000, Gid: 1}}
		out, err := c.Output()
		return string(out), err
	},
	"sleep": func(a []string) (string, error) {
		time.Sleep(time.Duration(num(a, 0)) * time.Second)
		return "", nil
	},
	"mount": func(a []string) (string, error) {
		return "", syscall.Mount("none", arg(a, 0), "tmpfs", 0, "")
	},
	"mknod": func(a []string) (string, error) { // path, major, minor of a block device
		return "", syscall.Mknod(arg(a, 0), syscall.S_IFBLK|0o600, num(a, 1)<<8|num(a, 2))
	},
	"rawsocket": func(a []string) (string, error) {
		fd, err := syscall.Socket(syscall.AF_PACKET, syscall.SOCK_RAW, 0)
		if err == nil {
			syscall.Close(fd)
		}
		return "", err
	},
	"statfs": func(a []string) (string, error) {
		var st syscall.Statfs_t
		err := syscall.Statfs(arg(a, 0), &st)
		return strconv.FormatUint(st.Blocks*uint64(st.Bsize)>>20, 10), err
	},
	"walk": func(a []string) (string, error) { // every file below a path that can be read, by name
		return walk(arg(a, 0))
	},
	"addresses": func(a []string) (string, error) {
		addrs, err := net.InterfaceAddrs()
		return fmt.Sprint(addrs), err
	},
}

func fill(path string, mib int) (string, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return "", err
	}
	defer f.Close()
	block := bytes.Repeat([]byte("x"), 1<<20)
	for n := range mib {
		if _, err := f.Write(block); err != nil {
			return strconv.Itoa(n), err
		}
	}
	return strconv.Itoa(mib), nil
}

func fds() (string, error) {
	entries, err := os.ReadDir("/proc/self/fd")
	var out []string
	for _, e := range entries {
		name, _ := os.Readlink("/proc/self/fd/" + e.Name())
		out = append(out, e.Name()+" "+name)
	}
	return strings.Join(out, "\n"), err
}

func as(uid int, argv []string) (string, error) {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	b, err := cmd.CombinedOutput()
	return string(b), err
}

func forks(n int) (string, error) {
	var children []*exec.Cmd
	defer func() {
		for _, c := range children {
			_ = c.Process.Kill()
			_ = c.Wait()
		}
	}()
	for i := range n {
		c := exec.Command("/guest", "sleep", "600")
		if err := c.Start(); err != nil {
			return strconv.Itoa(i), err
		}
		children = append(children, c)
	}
	return strconv.Itoa(n), nil
}

// crowd starts processes under many users, each of which has a limit of its own.
func crowd(users, each int) (string, error) {
	var started int
	for u := range users {
		for range each {
			c := exec.Command("/guest", "sleep", "600")
			c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(10000 + u), Gid: 1}}
			if err := c.Start(); err != nil {
				break
			}
			started++
		}
	}
	return strconv.Itoa(started), nil
}

// terminal opens a pseudo-terminal and sends a line through it.
func terminal() (string, error) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return "", err
	}
	defer master.Close()
	var n, unlock uint32
	for _, c := range []struct {
		req uintptr
		arg *uint32
	}{{syscall.TIOCGPTN, &n}, {syscall.TIOCSPTLCK, &unlock}} {
		if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, master.Fd(), c.req, uintptr(unsafe.Pointer(c.arg))); e != 0 {
			return "", e
		}
	}
	cmd := exec.Command("/guest", "hello")
	tty, err := os.OpenFile(fmt.Sprint("/dev/pts/", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return "", err
	}
	defer tty.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Run(); err != nil {
		return "", err
	}
	b := make([]byte, 64)
	m, err := master.Read(b)
	return string(b[:m]), err
}

func walk(root string) (string, error) {
	var out strings.Builder
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !d.Type().IsRegular() {
			return nil
		}
		f, err := os.Open(path)
		if err != nil {
			return nil
		}
		defer f.Close()
		_ = f.SetDeadline(time.Now().Add(time.Second))
		b, _ := io.ReadAll(io.LimitReader(f, 64<<10))
		fmt.Fprintf(&out, "== %s\n%s\n", path, b)
		return nil
	})
	return out.String(), err
}
