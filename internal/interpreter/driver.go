package interpreter

import (
	"bufio"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"
)

var (
	//go:embed drivers/node.cjs
	nodeProgram string
	//go:embed drivers/bash.sh
	bashProgram string
)

const (
	maxAnswer = 64 << 20 // bytes of a driver's answer: a result with pictures
	pieceSize = 32 << 10 // bytes of output read at once
	// markPatience is how long a cell's output may take to arrive after its answer.
	markPatience = 2 * time.Second
)

// answer is what a driver says at the end of a cell.
type answer struct {
	Mark        string                     `json:"mark"`
	Result      map[string]json.RawMessage `json:"result"`
	Error       *driverError               `json:"error"`
	Status      int                        `json:"status"`
	Interrupted bool                       `json:"interrupted"`
}

type driverError struct {
	Name      string `json:"name"`
	Value     string `json:"value"`
	Traceback string `json:"traceback"`
}

// driver is a kernel that is a program of ours in another language, spoken to over
// pipes: requests on its descriptor 3, answers on 4, output as usual.
type driver struct {
	*process
	dialect  dialect
	requests *os.File
	files    []*os.File // our ends of the pipes
	answers  chan answer
	output   chan piece
	closed   chan struct{}
	once     sync.Once
}

var _ kernel = (*driver)(nil)

// piece is output, or the mark that ends a cell's output on its stream.
type piece struct {
	kind string // lineStdout or lineStderr
	text string
	mark string
}

// startNode starts the driver for JavaScript or TypeScript.
func startNode(ctx context.Context, dir string, l launch) (*driver, error) {
	program := filepath.Join(dir, "node.cjs")
	if err := os.WriteFile(program, []byte(nodeProgram), 0o600); err != nil {
		return nil, fmt.Errorf("write the kernel's program: %w", err)
	}
	return startDriver(ctx, nodeDialect{}, l, "node", program, l.language)
}

// startBash starts the driver for bash.
func startBash(ctx context.Context, dir string, l launch) (*driver, error) {
	program := filepath.Join(dir, "bash.sh")
	if err := os.WriteFile(program, []byte(bashProgram), 0o600); err != nil {
		return nil, fmt.Errorf("write the kernel's program: %w", err)
	}
	return startDriver(ctx, bashDialect{}, l, "bash", "--noprofile", "--rcfile", program, "-i")
}

// startDriver starts a driver and runs an empty cell, which also takes away what
// the program says when it starts.
func startDriver(ctx context.Context, d dialect, l launch, command ...string) (_ *driver, err error) {
	k := &driver{dialect: d, answers: make(chan answer), output: make(chan piece), closed: make(chan struct{})}
	cmd := exec.Command(command[0], command[1:]...) //nolint:noctx // close ends it
	cmd.Dir, cmd.Env = l.cwd, l.env
	if err := k.start(cmd); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	if err := k.run(ctx, cell{}, func(line) {}); err != nil || ctx.Err() != nil {
		k.close()
		return nil, fmt.Errorf("start the %s kernel: %w", command[0], errors.Join(err, ctx.Err()))
	}
	return k, nil
}

// start makes the pipes and begins the process and its readers.
func (k *driver) start(cmd *exec.Cmd) (err error) {
	var theirs []*os.File
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
		if err != nil {
			for _, f := range k.files {
				f.Close()
			}
		}
	}()
	pipe := func() (r, w *os.File) {
		if err != nil {
			return nil, nil
		}
		r, w, err = os.Pipe()
		return r, w
	}
	reqR, reqW := pipe()
	ansR, ansW := pipe()
	outR, outW := pipe()
	errR, errW := pipe()
	for _, f := range []*os.File{reqR, ansW, outW, errW} {
		if f != nil {
			theirs = append(theirs, f)
		}
	}
	for _, f := range []*os.File{reqW, ansR, outR, errR} {
		if f != nil {
			k.files = append(k.files, f)
		}
	}
	if err != nil {
		return fmt.Errorf("make pipes: %w", err)
	}
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = outW, errW, []*os.File{reqR, ansW}
	if k.process, err = startProcess(cmd); err != nil {
		return err
	}
	k.requests = reqW
	go k.readAnswers(ansR)
	go k.readOutput(outR, lineStdout)
	go k.readOutput(errR, lineStderr)
	return nil
}

func (k *driver) close() {
	k.once.Do(func() {
		close(k.closed)
		k.kill()
		for _, f := range k.files {
			f.Close()
		}
	})
}

// readAnswers ends with the pipe, or with an answer that is none.
func (k *driver) readAnswers(f *os.File) {
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, maxAnswer)
	for lines.Scan() {
		var a answer
		if json.Unmarshal(lines.Bytes(), &a) != nil {
			continue // written by the cell, not by the driver
		}
		select {
		case k.answers <- a:
		case <-k.closed:
			return
		}
	}
	if lines.Err() != nil { // an answer without end: nothing after it can be understood
		k.kill()
	}
}

// readOutput reads a stream to its end. Whoever is slow to take a piece slows the
// program that writes.
func (k *driver) readOutput(f *os.File, kind string) {
	var s splitter
	b := make([]byte, pieceSize)
	for {
		n, err := f.Read(b)
		for _, p := range s.split(b[:n]) {
			p.kind = kind
			select {
			case k.output <- p:
			case <-k.closed:
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (k *driver) run(ctx context.Context, c cell, emit func(line)) error {
	mark := token()
	if c.count > 0 {
		emit(line{"type": lineCount, "execution_count": c.count})
	}
	if err := k.send(mark, c); err != nil {
		return err
	}
	w := &waiting{mark: mark}
	for !w.over() {
		select {
		case p := <-k.output:
			if w.take(p) {
				for _, l := range outputLines(p.kind, p.text) {
					emit(l)
				}
			}
		case a := <-k.answers:
			w.answer(a)
		case <-w.late:
			w.out, w.err = true, true // the cell closed or replaced its streams
		case <-ctx.Done():
			return k.stop(func(within time.Duration) bool { return k.drain(w, within) })
		case <-k.ended:
			return k.epilogue(emit)
		}
	}
	for _, l := range k.dialect.lines(w.said) {
		emit(l)
	}
	return nil
}

// send writes a request. A driver that is free reads it at once.
func (k *driver) send(mark string, c cell) error {
	b, err := k.dialect.request(mark, c)
	if err != nil {
		return err
	}
	if err := k.requests.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return fmt.Errorf("%w: %w", errEnded, err)
	}
	if _, err := k.requests.Write(b); err != nil {
		return fmt.Errorf("%w: %w", errEnded, err)
	}
	return nil
}

// epilogue passes on what a program wrote before it ended: an exit in a script is
// an ordinary end of it.
func (k *driver) epilogue(emit func(line)) error {
	for {
		select {
		case p := <-k.output:
			for _, l := range outputLines(p.kind, p.text) {
				emit(l)
			}
		case <-time.After(100 * time.Millisecond):
			a, usual := k.dialect.exit(k.cmd.ProcessState.ExitCode())
			if usual {
				for _, l := range k.dialect.lines(a) {
					emit(l)
				}
				return errExited
			}
			return fmt.Errorf("%w: %s", errEnded, k.state)
		}
	}
}

// drain drops output until the interrupted cell is over.
func (k *driver) drain(w *waiting, within time.Duration) bool {
	if b := k.dialect.interrupt(w.mark); b != nil {
		if _, err := k.requests.Write(b); err != nil {
			return false
		}
	}
	timer := time.NewTimer(within)
	defer timer.Stop()
	for !w.over() {
		select {
		case p := <-k.output:
			w.take(p)
		case a := <-k.answers:
			w.answer(a)
		case <-w.late:
			return true
		case <-timer.C:
			return false
		case <-k.ended:
			return false
		}
	}
	return true
}

// waiting is what a cell still has to send: its answer, and the mark that ends
// its output on each stream.
type waiting struct {
	mark     string
	said     answer
	replied  bool
	out, err bool
	late     <-chan time.Time // since the answer
}

func (w *waiting) over() bool { return w.replied && w.out && w.err }

// take notes a mark, and reports whether the piece is output.
func (w *waiting) take(p piece) bool {
	if p.mark == "" {
		return true
	}
	if p.mark == w.mark {
		w.out = w.out || p.kind == lineStdout
		w.err = w.err || p.kind == lineStderr
	}
	return false
}

func (w *waiting) answer(a answer) {
	if a.Mark == w.mark {
		w.said, w.replied, w.late = a, true, time.After(markPatience)
	}
}
