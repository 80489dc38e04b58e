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
	a := r.Args
	switch r.Do {
	case "hello":
		return "hello", nil
	case "exit":
		time.AfterFunc(20*time.Millisecond, func() { os.Exit(num(a, 0)) })
		return "", nil
	case "hostname":
		return os.Hostname()
	case "env":
		return strings.Join(os.Environ(), "\n"), nil
	case "cat":
		b, err := os.ReadFile(arg(a, 0))
		return string(b), err
	case "write":
		return "", os.WriteFile(arg(a, 0), []byte(arg(a, 1)), 0o644)
	case "mkdir":
		return "", os.Mkdir(arg(a, 0), 0o755)
	case "fill": // path, MiB: writes until it is full
		return fill(arg(a, 0), num(a, 1))
	case "remove":
		return "", os.Remove(arg(a, 0))
	case "ls":
		entries, err := os.ReadDir(arg(a, 0))
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return strings.Join(names, "\n"), err
	case "fds":
		return fds()
	case "setxattr":
		return "", syscall.Setxattr(arg(a, 0), arg(a, 1), []byte(arg(a, 2)), 0)
	case "getxattr":
		b := make([]byte, 4096)
		n, err := syscall.Getxattr(arg(a, 0), arg(a, 1), b)
		return string(b[:max(n, 0)]), err
	case "remember":
		memory.Lock()
		defer memory.Unlock()
		memory.text = arg(a, 0)
		return "", nil
	case "recall":
		memory.Lock()
		defer memory.Unlock()
		return memory.text, nil
	case "allocate": // MiB, kept
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
	case "burn": // milliseconds of CPU
		for end := time.Now().Add(time.Duration(num(a, 0)) * time.Millisecond); time.Now().Before(end); {
		}
		return "", nil
	case "ids":
		return fmt.Sprint(os.Getuid(), os.Geteuid()), nil
	case "as": // uid, program, args
		return as(num(a, 0), a[1:])
	case "forks": // how many processes may live at once, at most n
		return forks(num(a, 0))
	case "sleep":
		time.Sleep(time.Duration(num(a, 0)) * time.Second)
		return "", nil
	case "mount":
		return "", syscall.Mount("none", arg(a, 0), "tmpfs", 0, "")
	case "mknod": // path, major, minor of a block device
		return "", syscall.Mknod(arg(a, 0), syscall.S_IFBLK|0o600, num(a, 1)<<8|num(a, 2))
	case "rawsocket":
		fd, err := syscall.Socket(syscall.AF_PACKET, syscall.SOCK_RAW, 0)
		if err == nil {
			syscall.Close(fd)
		}
		return "", err
	case "statfs":
		var st syscall.Statfs_t
		err := syscall.Statfs(arg(a, 0), &st)
		return strconv.FormatUint(st.Blocks*uint64(st.Bsize)>>20, 10), err
	case "walk": // every file below a path that can be read, by name
		return walk(arg(a, 0))
	case "addresses":
		addrs, err := net.InterfaceAddrs()
		return fmt.Sprint(addrs), err
	}
	return "", fmt.Errorf("guest cannot %q", r.Do)
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
