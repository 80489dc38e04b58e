package interpreter

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

var (
	//go:embed drivers/kernel.py
	kernelProgram string
	//go:embed drivers/cordon_display.py
	displayProgram string
)

// The kernel's sockets are files: <dir>/k-<number>. Unlike TCP connections they
// outlive a checkpoint.
const (
	shellNumber = 1
	iopubNumber = 2
)

// settlePatience is how long output may be late after the reply.
const settlePatience = 5 * time.Second

// python is an ipykernel and the connections to it.
type python struct {
	*process
	wire         wire
	shell, iopub *socket
	cells        handover
}

var _ kernel = (*python)(nil)

// startPython starts ipykernel in dir, which must be new, and waits until it answers.
func startPython(ctx context.Context, dir string, l launch) (_ *python, err error) {
	k := &python{wire: newWire()}
	defer func() {
		if err != nil {
			k.close()
		}
	}()
	connection, err := json.Marshal(map[string]any{
		"transport": "ipc", "ip": filepath.Join(dir, "k"), "key": string(k.wire.key), "signature_scheme": "hmac-sha256",
		"shell_port": shellNumber, "iopub_port": iopubNumber, "stdin_port": 3, "control_port": 4, "hb_port": 5,
	})
	if err != nil {
		return nil, fmt.Errorf("encode the connection file: %w", err)
	}
	for name, text := range map[string]string{"kernel.py": kernelProgram, "cordon_display.py": displayProgram, "connection.json": string(connection)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return nil, fmt.Errorf("write the kernel's files: %w", err)
		}
	}
	// Not CommandContext: the kernel outlives what asked for it.
	cmd := exec.Command("python3", filepath.Join(dir, "kernel.py"), filepath.Join(dir, "connection.json")) //nolint:noctx // close ends it
	cmd.Dir = l.cwd
	cmd.Env = append(l.env, "JPY_PARENT_PID="+strconv.Itoa(os.Getpid())) // it ends when we do
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, fmt.Errorf("open the kernel's log: %w", err)
	}
	defer log.Close()
	cmd.Stderr = log
	if k.process, err = startProcess(cmd); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	if err := k.connect(ctx, dir); err != nil {
		return nil, fmt.Errorf("start the Python kernel: %w: %s", err, lastWords(log.Name()))
	}
	return k, nil
}

// lastWords are the last lines of a log.
func lastWords(path string) string {
	const most = 1000
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if size, err := f.Seek(0, io.SeekEnd); err == nil {
		_, _ = f.Seek(max(0, size-most), io.SeekStart) // from the beginning is as well
	}
	b, _ := io.ReadAll(io.LimitReader(f, most)) // what can be read is better than nothing
	return strings.TrimSpace(string(b))
}

// connect waits for the kernel's sockets and for the first sign on each.
func (k *python) connect(ctx context.Context, dir string) (err error) {
	if k.shell, err = k.dial(ctx, filepath.Join(dir, "k-"+strconv.Itoa(shellNumber)), dealer); err != nil {
		return err
	}
	if k.iopub, err = k.dial(ctx, filepath.Join(dir, "k-"+strconv.Itoa(iopubNumber)), subscribe); err != nil {
		return err
	}
	go k.receive(k.shell)
	go k.receive(k.iopub)
	// A subscription takes a moment; what is published before is lost.
	for ctx.Err() == nil {
		x, err := k.request("kernel_info_request", struct{}{}, struct{}{})
		if err != nil {
			return err
		}
		if k.settle(x, time.Second) {
			return nil
		}
		select {
		case <-k.ended:
			return fmt.Errorf("%w: %s", errEnded, k.state)
		default:
		}
	}
	return fmt.Errorf("no answer: %w", ctx.Err())
}

// dial connects as soon as the kernel listens.
func (k *python) dial(ctx context.Context, path string, kind socketKind) (*socket, error) {
	for {
		s, err := dialSocket(ctx, path, kind)
		if err == nil {
			return s, nil
		}
		select {
		case <-k.ended:
			return nil, fmt.Errorf("%w: %s", errEnded, k.state)
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (k *python) close() {
	if k.process != nil {
		k.kill()
	}
	for _, s := range []*socket{k.shell, k.iopub} {
		if s != nil {
			s.close()
		}
	}
}

// receive hands the messages of a socket to the cell they belong to, and drops
// those that come between cells. It ends with the connection.
func (k *python) receive(s *socket) {
	for {
		f, err := s.receive()
		if err != nil {
			return
		}
		m, err := k.wire.decode(f)
		if err != nil {
			continue // user code runs in there: what it forges is not ours to answer
		}
		k.cells.give(m)
	}
}

// request sends a request; x then gets the messages that answer it, until done.
func (k *python) request(kind string, content, metadata any) (*exchange, error) {
	id, parts, err := k.wire.request(kind, content, metadata)
	if err != nil {
		return nil, err
	}
	x := k.cells.open(id)
	if err := k.shell.send(parts...); err != nil {
		x.done()
		return nil, err
	}
	return x, nil
}

// settle waits until the request is over, and drops what else is said.
func (k *python) settle(x *exchange, within time.Duration) bool {
	defer x.done()
	return k.drain(x, within)
}

// facts travel with a cell to drivers/kernel.py.
type facts struct {
	Sandbox map[string]*string `json:"sandbox,omitempty"`
	Cell    map[string]*string `json:"cell,omitempty"`
	Reseed  bool               `json:"reseed,omitempty"`
}

func (k *python) run(ctx context.Context, c cell, emit func(line)) error {
	x, err := k.request("execute_request",
		executeContent{Code: c.code, StoreHistory: true, UserExpressions: map[string]any{}},
		map[string]facts{"cordon": {c.sandbox, c.env, c.reseed}})
	if err != nil {
		return fmt.Errorf("%w: %w", errEnded, err)
	}
	defer x.done()
	var late <-chan time.Time // since the last message after the reply
	for !x.over() {
		select {
		case m := <-x.messages:
			x.note(m)
			for _, l := range published(m) {
				emit(l)
			}
			if x.replied {
				late = time.After(settlePatience)
			}
		case <-late:
			return nil // the kernel is free, whatever became of its last words
		case <-ctx.Done():
			return k.stop(func(within time.Duration) bool { return k.drain(x, within) })
		case <-k.ended:
			return fmt.Errorf("%w: %s", errEnded, k.state)
		}
	}
	return nil
}

// drain drops messages until the cell is over.
func (k *python) drain(x *exchange, within time.Duration) bool {
	timer := time.NewTimer(within)
	defer timer.Stop()
	for !x.over() {
		select {
		case m := <-x.messages:
			x.note(m)
		case <-timer.C:
			return x.replied
		case <-k.ended:
			return false
		}
	}
	return true
}

// published turns what a kernel publishes into lines. What is cleared later was
// sent already, and an update is shown as what it is now.
func published(m message) []line {
	if m.skipped > 0 {
		return outputLines(lineStderr, fmt.Sprintf("[output of %d bytes dropped: over %d in one piece]\n", m.skipped, maxMessage))
	}
	switch m.kind {
	case "execute_input":
		var c statusContent
		if json.Unmarshal(m.content, &c) == nil {
			return []line{{"type": lineCount, "execution_count": c.Count}}
		}
	case "stream":
		var c streamContent
		if json.Unmarshal(m.content, &c) == nil {
			kind := lineStdout
			if c.Name == "stderr" {
				kind = lineStderr
			}
			return outputLines(kind, c.Text)
		}
	case "execute_result", "display_data", "update_display_data":
		var c displayContent
		if json.Unmarshal(m.content, &c) == nil && len(c.Data) > 0 {
			return []line{resultLine(c.Data, m.kind == "execute_result")}
		}
	case "error":
		var c errorContent
		if json.Unmarshal(m.content, &c) == nil {
			return []line{errorLine(c.Name, c.Value, strings.Join(c.Traceback, "\n"))}
		}
	}
	return nil
}
