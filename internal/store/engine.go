package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/cordonhq/cordon/internal/errs"
	"github.com/cordonhq/cordon/internal/statefile"
)

const (
	lockFile   = "lock"
	formatFile = "format.json"
	format     = 1 // of the directory as a whole; records carry their own schema

	maxValue   = 4 << 20          // bytes of one record
	markerTTL  = 1 * time.Hour    // how long a deleted key's marker is kept for watchers
	opTimeout  = 15 * time.Second // for calls whose context has no deadline
	startLimit = 30 * time.Second // for the engine to accept its own connection
)

// stateFormat is the content of format.json. Parts lists what was created here,
// so that a part which has gone missing is noticed instead of created anew and empty.
type stateFormat struct {
	Format int      `json:"format"`
	Parts  []string `json:"parts"`
}

// engine is the embedded server with one connection to it.
type engine struct {
	dir   string
	lock  *os.File
	state stateFormat
	log   *engineLog
	srv   *server.Server
	nc    *nats.Conn
	js    jetstream.JetStream
	heads []*head
}

// startEngine locks cfg.Dir, checks that it is ours and starts the server in it.
func startEngine(ctx context.Context, cfg Config) (e *engine, err error) {
	e = &engine{dir: cfg.Dir, log: &engineLog{log: cfg.Log}}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.close())
			e = nil
		}
	}()
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return e, fmt.Errorf("create state directory: %w", err)
	}
	if e.lock, err = Lock(cfg.Dir); err != nil {
		return e, err
	}
	if e.state, err = readFormat(cfg.Dir); err != nil {
		return e, err
	}
	if err := dropIndexes(cfg.Dir); err != nil {
		return e, err
	}
	if err := e.startServer(); err != nil {
		return e, err
	}
	if err := e.connect(); err != nil {
		return e, err
	}
	return e, ctx.Err()
}

func (e *engine) startServer() error {
	srv, err := server.NewServer(&server.Options{
		ServerName:             "cordon",
		DontListen:             true, // only this process can connect
		NoSigs:                 true, // signals belong to the caller
		JetStream:              true,
		DisableJetStreamBanner: true,
		StoreDir:               e.dir,
		SyncAlways:             true, // a record is on disk before its call returns
		JetStreamMaxMemory:     16 << 20,
		JetStreamMaxStore:      8 << 30,
		MaxPayload:             maxValue + 64<<10, // headers on top of the value
	})
	if err != nil {
		return fmt.Errorf("configure store engine: %w", err)
	}
	srv.SetLoggerV2(e.log, false, false, false)
	e.srv = srv
	srv.Start()
	if !srv.ReadyForConnections(startLimit) || !srv.JetStreamEnabled() {
		return fmt.Errorf("start store engine in %s: %s", e.dir, e.log.trouble())
	}
	return nil
}

func (e *engine) connect() error {
	nc, err := nats.Connect("", nats.InProcessServer(e.srv), nats.Name("cordon"), nats.NoReconnect())
	if err != nil {
		return fmt.Errorf("connect to store engine: %w", err)
	}
	e.nc = nc
	e.js, err = jetstream.New(nc, jetstream.WithDefaultTimeout(opTimeout))
	if err != nil {
		return fmt.Errorf("connect to store engine: %w", err)
	}
	return nil
}

// close stops what startEngine started, also when it got only halfway.
func (e *engine) close() error {
	if e == nil {
		return nil
	}
	if e.nc != nil {
		e.nc.Close()
	}
	if e.srv != nil {
		e.srv.Shutdown()
		e.srv.WaitForShutdown()
	}
	var err error
	for _, h := range e.heads {
		err = errors.Join(err, h.close())
	}
	if e.lock != nil {
		err = errors.Join(err, e.lock.Close()) // which frees the lock
	}
	return err
}

// openKV opens a bucket and its head, creating it in a directory that never had it.
func (e *engine) openKV(ctx context.Context, name string) (jetstream.KeyValue, *head, error) {
	last, err := e.recovered(ctx, name, "KV_"+name)
	if err != nil {
		return nil, nil, err
	}
	h, err := openHead(e.dir, name, last)
	if err != nil {
		return nil, nil, err
	}
	e.heads = append(e.heads, h)
	kv, err := e.js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket:       name,
		History:      1,
		Storage:      jetstream.FileStorage,
		MaxValueSize: maxValue,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("open bucket %s: %w", name, err)
	}
	return kv, h, nil
}

// recovered returns the last revision of part that the engine found on disk. It
// returns an error when part was created here once and its stream is gone: the
// engine skips a stream it cannot read, and creating it anew would forget every
// record in silence.
func (e *engine) recovered(ctx context.Context, part, stream string) (uint64, error) {
	s, err := e.js.Stream(ctx, stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		if !slices.Contains(e.state.Parts, part) {
			return 0, nil
		}
		return 0, fmt.Errorf("state directory %s is damaged: %s cannot be read (%s): restore the directory from a backup, or move it away to start with an empty one",
			e.dir, part, e.log.trouble())
	}
	if err != nil {
		return 0, fmt.Errorf("look up %s: %w", part, err)
	}
	st := s.CachedInfo().State
	if st.Lost != nil && len(st.Lost.Msgs) > 0 && part != eventStream {
		return 0, fmt.Errorf("state directory %s is damaged: %d records of %s are lost (%s): restore the directory from a backup",
			e.dir, len(st.Lost.Msgs), part, e.log.trouble())
	}
	return st.LastSeq, nil
}

// markReady remembers the parts that exist from now on.
func (e *engine) markReady(parts ...string) error {
	if slices.Equal(e.state.Parts, parts) {
		return nil
	}
	return writeFormat(e.dir, stateFormat{Format: format, Parts: parts})
}

// Lock takes the exclusive lock of a state directory, as an open store has it. It is an
// [errs.Conflict] while another process has it. The lock ends when the file is closed, or
// with the process.
func Lock(dir string) (*os.File, error) {
	f, err := statefile.TryLock(filepath.Join(dir, lockFile), false)
	if err != nil {
		return nil, err
	}
	if f == nil {
		holder, _ := os.ReadFile(filepath.Join(dir, lockFile))
		return nil, errs.New(errs.Conflict, "state directory %s is in use by another cordon server (process %s): stop it first, or give this one a directory of its own",
			dir, strings.TrimSpace(string(holder[:min(len(holder), 32)])))
	}
	if err := f.Truncate(0); err != nil {
		return nil, errors.Join(fmt.Errorf("write lock: %w", err), f.Close())
	}
	if _, err := fmt.Fprintf(f, "%d\n", os.Getpid()); err != nil {
		return nil, errors.Join(fmt.Errorf("write lock: %w", err), f.Close())
	}
	return f, nil
}

// readFormat checks that dir is a state directory of this version, making an
// empty directory one.
func readFormat(dir string) (stateFormat, error) {
	b, err := os.ReadFile(filepath.Join(dir, formatFile))
	if errors.Is(err, fs.ErrNotExist) {
		return initFormat(dir)
	}
	if err != nil {
		return stateFormat{}, fmt.Errorf("read state format: %w", err)
	}
	var st stateFormat
	if err := json.Unmarshal(b, &st); err != nil {
		return st, fmt.Errorf("state directory %s is damaged: %s is not readable (%w): restore the directory from a backup", dir, formatFile, err)
	}
	if st.Format != format {
		return st, errs.New(errs.Invalid, "state directory %s has format %d, this cordon reads format %d: use the cordon that wrote it", dir, st.Format, format)
	}
	return st, nil
}

// dropIndexes removes the engine's summaries of its logs, so that it reads the
// logs themselves: it would believe a summary that speaks of records which a
// damaged log has no more. Reading 1,000 records takes milliseconds.
func dropIndexes(dir string) error {
	found, err := filepath.Glob(filepath.Join(dir, server.JetStreamStoreDir, "*", "streams", "*", "msgs", "index.db"))
	if err != nil {
		return fmt.Errorf("find indexes: %w", err)
	}
	for _, path := range found {
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("remove index: %w", err)
		}
	}
	return nil
}

func initFormat(dir string) (stateFormat, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return stateFormat{}, fmt.Errorf("read state directory: %w", err)
	}
	for _, e := range entries {
		if n := e.Name(); n != lockFile && !strings.Contains(n, formatFile+".") { // of a write that a crash cut short
			return stateFormat{}, errs.New(errs.Invalid, "%s is not a cordon state directory: it has no %s but holds %q: choose an empty directory", dir, formatFile, n)
		}
	}
	st := stateFormat{Format: format}
	return st, writeFormat(dir, st)
}

// writeFormat replaces format.json so that a crash leaves the old or the new one.
func writeFormat(dir string, st stateFormat) error {
	b, err := json.Marshal(st)
	if err != nil {
		return fmt.Errorf("encode the state format: %w", err)
	}
	return statefile.Replace(filepath.Join(dir, formatFile), append(b, '\n'), 0o600)
}

// engineLog hands the engine's lines to slog and remembers the last complaints:
// the engine reports why it would not start only there.
type engineLog struct {
	log *slog.Logger

	mu         sync.Mutex // guards complaints
	complaints []string
}

// trouble returns the engine's last complaints as one line.
func (l *engineLog) trouble() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.complaints) == 0 {
		return "no reason given"
	}
	return strings.Join(l.complaints, "; ")
}

func (l *engineLog) complain(level slog.Level, layout string, v []any) {
	line := strings.TrimSpace(fmt.Sprintf(layout, v...))
	l.mu.Lock()
	l.complaints = append(l.complaints[max(0, len(l.complaints)-3):], line)
	l.mu.Unlock()
	l.log.Log(context.Background(), level, "store engine", "line", line)
}

func (l *engineLog) quiet(layout string, v []any) {
	l.log.Debug("store engine", "line", strings.TrimSpace(fmt.Sprintf(layout, v...)))
}

// These implement server.Logger.

func (l *engineLog) Noticef(layout string, v ...any) { l.quiet(layout, v) }
func (l *engineLog) Debugf(layout string, v ...any)  { l.quiet(layout, v) }
func (l *engineLog) Tracef(layout string, v ...any)  { l.quiet(layout, v) }
func (l *engineLog) Warnf(layout string, v ...any)   { l.complain(slog.LevelDebug, layout, v) }
func (l *engineLog) Errorf(layout string, v ...any)  { l.complain(slog.LevelWarn, layout, v) }
func (l *engineLog) Fatalf(layout string, v ...any)  { l.complain(slog.LevelError, layout, v) }
