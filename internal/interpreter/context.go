package interpreter

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// language is a kernel's language, in its canonical spelling.
type language string

const (
	python3    language = "python"
	javascript language = "javascript"
	typescript language = "typescript"
	bash       language = "bash"
)

// parseLanguage normalises what callers write; empty means Python.
func parseLanguage(name string) (language, error) {
	switch strings.ToLower(strings.TrimSpace(name)) {
	case "", "python", "python3", "py":
		return python3, nil
	case "javascript", "js", "node":
		return javascript, nil
	case "typescript", "ts":
		return typescript, nil
	case "bash", "sh", "shell":
		return bash, nil
	}
	return "", fault{http.StatusBadRequest, fmt.Sprintf("language %.40q is not supported: use python, javascript, typescript or bash", name)}
}

// launch is what a kernel is started with.
type launch struct {
	language string
	cwd      string
	env      []string
}

// codeContext is a context of the SDKs: a kernel and what it was told. Its kernel
// is started when it is needed, and again when it ended.
type codeContext struct {
	i        *Interpreter
	id       string
	language language
	cwd      string

	turn chan struct{} // holds a token while somebody may use what follows
	env  identity      // what the kernel was told of its sandbox
	runs int           // executions since the kernel started
	told bool          // whether it was told anything

	mu      sync.Mutex // guards what follows; kernel is replaced only by whose turn it is
	kernel  kernel
	waiting int
	removed bool
}

func (i *Interpreter) newContext(id string, l language, cwd string) *codeContext {
	return &codeContext{i: i, id: id, language: l, cwd: cwd, turn: make(chan struct{}, 1)}
}

// fault is an error of the caller's, with its HTTP status.
type fault struct {
	status  int
	message string
}

func (f fault) Error() string { return f.message }

var errRemoved = fault{http.StatusNotFound, "the context was removed"}

// lock waits for the context's turn.
func (c *codeContext) lock(ctx context.Context) error {
	select {
	case c.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *codeContext) unlock() { <-c.turn }

// enter counts an execution that will wait for its turn.
func (c *codeContext) enter() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.removed {
		return errRemoved
	}
	if c.waiting == maxWaiting {
		return fault{http.StatusTooManyRequests, fmt.Sprintf("%d executions wait for context '%s' already", maxWaiting, c.id)}
	}
	c.waiting++
	return nil
}

func (c *codeContext) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting--
}

// ready returns the kernel, starting it if there is none. It is the caller's turn.
func (c *codeContext) ready(ctx context.Context) (kernel, error) {
	c.mu.Lock()
	k, removed := c.kernel, c.removed
	c.mu.Unlock()
	if removed {
		return nil, errRemoved
	}
	if k != nil {
		return k, nil
	}
	// What a program reads only when it starts, such as PYTHONHASHSEED, is there then.
	who := c.i.known.Load()
	k, err := c.start(ctx, who)
	if err != nil {
		return nil, err
	}
	c.runs, c.told, c.env = 0, who != nil, identity{}
	if who != nil {
		c.env = *who
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.removed {
		k.close()
		return nil, errRemoved
	}
	c.kernel = k
	return k, nil
}

// start starts a kernel in a folder of its own.
func (c *codeContext) start(ctx context.Context, who *identity) (kernel, error) {
	dir, err := os.MkdirTemp(c.i.cfg.Dir, "")
	if err != nil {
		return nil, fmt.Errorf("make the kernel's folder: %w", err)
	}
	l := launch{language: string(c.language), cwd: c.cwd, env: slices.Clone(c.i.cfg.Env)}
	if who != nil {
		for name, value := range who.vars { // of two with one name, the last counts: os/exec
			l.env = append(l.env, name+"="+value)
		}
	}
	var k kernel
	switch c.language {
	case bash:
		k, err = startBash(ctx, dir, l)
	case javascript, typescript:
		k, err = startNode(ctx, dir, l)
	default:
		k, err = startPython(ctx, dir, l)
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return owned{k, dir}, nil
}

// owned is a kernel and its folder.
type owned struct {
	kernel
	dir string
}

func (o owned) close() {
	o.kernel.close()
	_ = os.RemoveAll(o.dir) // emptied by the next start of the interpreter otherwise
}

// drop ends the kernel. Whoever's turn it is sees that it ended.
func (c *codeContext) drop() {
	c.mu.Lock()
	k := c.kernel
	c.kernel = nil
	c.mu.Unlock()
	if k != nil {
		k.close()
	}
}

// remove ends the context for good.
func (c *codeContext) remove() {
	c.mu.Lock()
	c.removed = true
	c.mu.Unlock()
	c.drop()
}

// restart replaces the kernel; an execution under way ends.
func (c *codeContext) restart(ctx context.Context) error {
	c.drop()
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	_, err := c.ready(ctx)
	return err
}

// execution is one request to run code.
type execution struct {
	code string
	env  map[string]string
	who  identity
}

// execute waits for the context's turn and runs code; its errors are lines too.
func (c *codeContext) execute(ctx context.Context, e execution, emit func(line)) {
	if err := c.lock(ctx); err != nil {
		return
	}
	k, err := c.ready(ctx)
	if err != nil {
		c.unlock()
		c.i.log.Warn("kernel not started", "context", c.id, "err", err)
		emit(errorLine("KernelError", "the kernel could not be started", err.Error()))
		return
	}
	err = k.run(ctx, c.next(e), emit)
	if err == nil {
		c.unlock()
		return
	}
	switch {
	case errors.Is(err, errExited):
		c.i.wg.Go(c.replace)
	case errors.Is(err, errEnded), errors.Is(err, errStuck):
		c.i.log.Warn("kernel ended", "context", c.id, "err", err)
		emit(errorLine("KernelEnded", "the kernel ended and is started again: its variables are lost", err.Error()))
		emit(line{"type": lineUnexpected})
		c.i.wg.Go(c.replace)
	default: // the cell, not the kernel
		c.unlock()
		emit(errorLine("ExecutionError", err.Error(), ""))
	}
}

// next makes the cell of an execution, with what the kernel does not know yet of
// the sandbox it is in.
func (c *codeContext) next(e execution) cell {
	c.runs++
	out := cell{code: e.code, count: c.runs, env: map[string]*string{}, sandbox: map[string]*string{}}
	for name, value := range e.env {
		out.env[name] = &value
	}
	if c.told && maps.Equal(c.env.vars, e.who.vars) {
		return out
	}
	for name, value := range e.who.vars {
		if old, ok := c.env.vars[name]; !ok || old != value {
			out.sandbox[name] = &value
		}
	}
	for name := range c.env.vars {
		if _, ok := e.who.vars[name]; !ok {
			out.sandbox[name] = nil
		}
	}
	// A kernel that was told of another sandbox, or of none, may have twins.
	out.reseed = !c.told || c.env.sandbox() != e.who.sandbox()
	c.told, c.env = true, e.who
	return out
}

// replace starts a kernel in place of one that ended, and gives the turn back.
func (c *codeContext) replace() {
	defer c.unlock()
	c.drop()
	if _, err := c.ready(c.i.life); err != nil && !errors.Is(err, errRemoved) {
		c.i.log.Warn("kernel not started", "context", c.id, "err", err)
	}
}

// list returns the contexts in the order of their making.
func (i *Interpreter) list() []*codeContext {
	i.mu.Lock()
	defer i.mu.Unlock()
	return slices.Clone(i.contexts)
}

// find returns a context by its ID.
func (i *Interpreter) find(id string) (*codeContext, error) {
	for _, c := range i.list() {
		if c.id == id {
			return c, nil
		}
	}
	return nil, fault{http.StatusNotFound, fmt.Sprintf("context %.80q not found", id)}
}

// standard returns the context of a language that code runs in when its caller
// names none. Its ID is the language's name.
func (i *Interpreter) standard(l language) (*codeContext, error) {
	if c, err := i.find(string(l)); err == nil {
		return c, nil
	}
	return i.add(string(l), l, i.cfg.Home)
}

// add makes a context.
func (i *Interpreter) add(id string, l language, cwd string) (*codeContext, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, c := range i.contexts {
		if c.id == id { // made by a request beside this one
			return c, nil
		}
	}
	if len(i.contexts) >= maxContexts {
		return nil, fault{http.StatusTooManyRequests, fmt.Sprintf("there are %d contexts already: remove one", maxContexts)}
	}
	c := i.newContext(id, l, cwd)
	i.contexts = append(i.contexts, c)
	return c, nil
}

// forget removes a context.
func (i *Interpreter) forget(c *codeContext) {
	i.mu.Lock()
	i.contexts = slices.DeleteFunc(i.contexts, func(o *codeContext) bool { return o == c })
	i.mu.Unlock()
	c.remove()
}

// folder checks the working directory of a new context.
func (i *Interpreter) folder(cwd string) (string, error) {
	switch {
	case cwd == "":
		return i.cfg.Home, nil
	case strings.ContainsRune(cwd, 0):
		return "", fault{http.StatusBadRequest, "cwd has a NUL byte"}
	case !filepath.IsAbs(cwd):
		cwd = filepath.Join(i.cfg.Home, cwd)
	}
	if fi, err := os.Stat(cwd); err != nil || !fi.IsDir() {
		return "", fault{http.StatusBadRequest, fmt.Sprintf("cwd %.200q is not a directory: create it first", cwd)}
	}
	return filepath.Clean(cwd), nil
}
