package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/proving/lab"
)

// The roles of the bench's own processes. All but the first answer calls on
// their standard input and output, and end with their input.
const (
	roleTables  = "tables"
	roleServer  = "server"
	roleClient  = "client"
	roleGateway = "gateway"
	roleIngress = "ingress"
)

// Process is the whole life of one of the bench's processes.
func Process(ctx context.Context, role, config string) error {
	var service any
	switch role {
	case roleTables:
		return runTables(ctx, config)
	case roleServer:
		service = &Server{ctx: ctx}
	case roleClient:
		service = &Client{}
	case roleGateway:
		service = &Gateway{ctx: ctx}
	case roleIngress:
		service = &Ingress{ctx: ctx}
	default:
		return errs.New(errs.Invalid, "bench: no role %q", role)
	}
	s := rpc.NewServer()
	if err := s.RegisterName("Bench", service); err != nil {
		return err
	}
	s.ServeConn(struct {
		io.Reader
		io.WriteCloser
	}{os.Stdin, os.Stdout})
	return nil
}

// process is a running part of the bench, in a network namespace.
type process struct {
	cmd    *exec.Cmd
	rpc    *rpc.Client
	stderr *bytes.Buffer
}

// startProcess starts one of the bench's own processes in a namespace.
func startProcess(ns *lab.Netns, command []string, role string) (*process, error) {
	p := &process{cmd: exec.Command(command[0], append(append([]string{}, command[1:]...), role, "")...), stderr: &bytes.Buffer{}}
	p.cmd.Stderr = p.stderr
	in, err := p.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := ns.Do(p.cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	p.rpc = rpc.NewClient(struct {
		io.Reader
		io.WriteCloser
	}{out, in})
	return p, nil
}

// call calls a method and waits for its answer, which takes most a minute more
// than it was told to measure.
func (p *process) call(ctx context.Context, method string, args, reply any) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	done := p.rpc.Go("Bench."+method, args, reply, make(chan *rpc.Call, 1))
	select {
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", method, ctx.Err())
	case <-done.Done:
	}
	if errors.Is(done.Error, rpc.ErrShutdown) || errors.Is(done.Error, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%s: the process ended: %s", method, p.stderr)
	}
	if done.Error != nil {
		return fmt.Errorf("%s: %w", method, done.Error)
	}
	return nil
}

// stop ends the process, politely first.
func (p *process) stop() {
	if p == nil {
		return
	}
	if p.rpc != nil {
		p.rpc.Close() // its input ends
	} else {
		_ = p.cmd.Process.Signal(os.Interrupt)
	}
	late := time.AfterFunc(5*time.Second, func() { _ = p.cmd.Process.Kill() })
	defer late.Stop()
	_ = p.cmd.Wait() // how it ends tells nothing any more
}

// memory is what the process and its children hold, in octets: their share of
// each page, so that what they share counts once.
func (p *process) memory() (int64, error) {
	var sum int64
	for _, pid := range descendants(p.cmd.Process.Pid) {
		n, err := proportional(pid)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// processorTime is what a process and its children have used, to 10 ms; of
// process 0, nothing.
func processorTime(pid int) (sum time.Duration) {
	if pid == 0 {
		return 0
	}
	for _, pid := range descendants(pid) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		// Fields 14 and 15 of proc_pid_stat(5), in ticks; the name before them
		// may hold anything and ends with the last parenthesis.
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(f) < 13 {
			continue // it has ended
		}
		for _, ticks := range f[11:13] {
			n, _ := strconv.ParseInt(ticks, 10, 64)
			sum += time.Duration(n) * tick
		}
	}
	return sum
}

// tick is the unit of proc_pid_stat(5) on every architecture we build for.
const tick = 10 * time.Millisecond

// descendants are a process and all below it.
func descendants(pid int) []int {
	all := []int{pid}
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, list := range lists {
		b, _ := os.ReadFile(list)
		for f := range strings.FieldsSeq(string(b)) {
			if child, err := strconv.Atoi(f); err == nil {
				all = append(all, descendants(child)...)
			}
		}
	}
	return all
}

// proportional reads a process's proportional set size, in octets.
func proportional(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, fmt.Errorf("read memory: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "Pss:" {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("no Pss in /proc/%d/smaps_rollup", pid)
}
