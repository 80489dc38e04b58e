// Package relay speaks HTTP/1.1 to the services of one sandbox: connections
// and their reuse, interim answers, upgrades, and what must happen to both ends when
// either side, or the sandbox itself, goes away. Answers are read by net/http.
//
// It is used instead of net/http's Transport, which cannot do three things. It hands a
// request and its answer to goroutines of their own, which costs two switches; here both
// are on the goroutine that serves the client. It keeps no time for an answer's head
// that begins and does not end. And it does not hand over the connection behind a switch of
// protocols, which a tunnel needs bare, to wait on its socket without a buffer.
package relay

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Config is what a Pool needs. Zero limits take the defaults.
type Config struct {
	// Dial opens a connection to a port of the sandbox. Its error is returned
	// from Forward inside a DialError.
	Dial func(ctx context.Context, port uint16) (net.Conn, error)
	// TLS is for the services of a port that speak HTTP inside TLS; nil, or where it
	// returns nil, they do not.
	TLS func(port uint16) *tls.Config
	Limits
}

// Limits bound what one service may hold of us.
type Limits struct {
	HeadBytes    int64         // of an answer's status line and header
	TLSTimeout   time.Duration // of the handshake with a service that speaks TLS itself
	HeadTimeout  time.Duration // from the first byte of an answer's head to its last
	StallTimeout time.Duration // without one byte accepted from or by an HTTP/1 client in the middle of a body of known length
	IdleTimeout  time.Duration // of a kept connection
	IdlePerPort  int           // kept connections to one port
	IdleTotal    int           // kept connections to the sandbox
}

// defaults are the limits used where Config has none.
var defaults = Limits{
	HeadBytes:    256 << 10,
	TLSTimeout:   10 * time.Second,
	HeadTimeout:  30 * time.Second,
	StallTimeout: 5 * time.Minute,
	IdleTimeout:  60 * time.Second,
	IdlePerPort:  128,
	IdleTotal:    256,
}

func (l *Limits) fill() {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	wait := func(v *time.Duration, d time.Duration) {
		if *v <= 0 {
			*v = d
		}
	}
	if l.HeadBytes <= 0 {
		l.HeadBytes = defaults.HeadBytes
	}
	wait(&l.TLSTimeout, defaults.TLSTimeout)
	wait(&l.HeadTimeout, defaults.HeadTimeout)
	wait(&l.StallTimeout, defaults.StallTimeout)
	wait(&l.IdleTimeout, defaults.IdleTimeout)
	def(&l.IdlePerPort, defaults.IdlePerPort)
	def(&l.IdleTotal, defaults.IdleTotal)
}

// The ways an exchange ends without a complete answer.
var (
	// ErrReset: the pool was closed, because its sandbox is gone.
	ErrReset = errors.New("the sandbox is gone")
	// ErrBody: the request's body is malformed, or stopped coming.
	ErrBody = errors.New("the request's body is not usable")
	// ErrClient: the client went away.
	ErrClient = errors.New("the client went away")
	// ErrAnswer: the service closed the connection or answered something that
	// is not HTTP.
	ErrAnswer = errors.New("the service's answer is not usable")
	// ErrHTTP2: the service speaks HTTP/2 without having been asked to, and so has
	// not understood the request. It is an ErrAnswer too.
	ErrHTTP2 = fmt.Errorf("%w: it speaks HTTP/2", ErrAnswer)
	// ErrNoTLS: the service was to speak TLS and the handshake failed. It is an
	// ErrAnswer too.
	ErrNoTLS = fmt.Errorf("%w: the TLS handshake failed", ErrAnswer)
	// ErrNoAnswer: the service closed the connection before the first byte of an
	// answer. It is an ErrAnswer too.
	ErrNoAnswer = fmt.Errorf("%w: it closed the connection without one", ErrAnswer)
)

// DialError says that no connection to the port could be opened.
type DialError struct {
	Port uint16
	Err  error
}

func (e *DialError) Error() string { return fmt.Sprintf("dial port %d: %v", e.Port, e.Err) }
func (e *DialError) Unwrap() error { return e.Err }

// Pool holds the connections to one sandbox. Its zero value is not usable.
type Pool struct {
	cfg    Config
	closed atomic.Bool
	wg     sync.WaitGroup // tunnels

	mu     sync.Mutex         // guards the fields below
	idle   map[uint16][]*conn // newest last
	idles  int
	active map[member]struct{} // exchanges, tunnels and foreign connections under way
	sweep  *time.Timer
}

// member is something that lives on the sandbox's connections and must end with it.
type member interface {
	reset() // ends it at once; must not block nor take the pool's lock
}

// NewPool returns a pool without connections.
func NewPool(cfg Config) *Pool {
	cfg.fill()
	return &Pool{cfg: cfg, idle: map[uint16][]*conn{}, active: map[member]struct{}{}}
}

// Close resets every connection of the sandbox and, where an answer is under
// way, the client's. Forward then returns ErrReset. It may be called repeatedly.
func (p *Pool) Close() {
	p.closed.Store(true)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, list := range p.idle {
		for _, c := range list {
			abort(c.Conn)
		}
	}
	p.idle, p.idles = map[uint16][]*conn{}, 0
	if p.sweep != nil {
		p.sweep.Stop()
	}
	for m := range p.active {
		m.reset()
	}
}

// Wait returns when every tunnel has ended.
func (p *Pool) Wait() { p.wg.Wait() }

// Closed reports whether Close was called.
func (p *Pool) Closed() bool { return p.closed.Load() }

func (p *Pool) enter(m member) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed.Load() {
		return ErrReset
	}
	p.active[m] = struct{}{}
	return nil
}

// become puts a tunnel in the place of the exchange it came from. The two
// goroutines are counted here, under the lock, so that Wait after Close sees them.
func (p *Pool) become(x *exchange, t *tunnel) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed.Load() {
		return ErrReset
	}
	delete(p.active, x)
	p.active[t] = struct{}{}
	p.wg.Add(2)
	return nil
}

func (p *Pool) leave(m member) {
	p.mu.Lock()
	delete(p.active, m)
	p.mu.Unlock()
}

// Dial opens a connection that ends with the pool, for protocols that Forward
// does not speak.
func (p *Pool) Dial(ctx context.Context, port uint16) (net.Conn, error) {
	c, err := p.cfg.Dial(ctx, port)
	if err != nil {
		return nil, &DialError{Port: port, Err: err}
	}
	t := &tracked{Conn: c, pool: p}
	if err := p.enter(t); err != nil {
		abort(c)
		return nil, err
	}
	return t, nil
}

// Enter registers an exchange that Forward does not lead. reset is called when the
// pool is closed, unless leave came first; it must not block.
func (p *Pool) Enter(reset func()) (leave func(), err error) {
	g := &guest{end: reset}
	if err := p.enter(g); err != nil {
		return nil, err
	}
	return func() { p.leave(g) }, nil
}

type guest struct{ end func() }

func (g *guest) reset() { g.end() }

// tracked is a connection handed out by Dial.
type tracked struct {
	net.Conn
	pool *Pool
	once sync.Once
}

func (t *tracked) reset() { abort(t.Conn) }

// CloseWrite ends what is sent and leaves what comes back.
func (t *tracked) CloseWrite() error { return closeWrite(t.Conn) }

// SetLinger is for ending it by a reset.
func (t *tracked) SetLinger(sec int) error {
	if l, ok := t.Conn.(interface{ SetLinger(sec int) error }); ok {
		return l.SetLinger(sec)
	}
	return nil
}

func (t *tracked) Close() error {
	t.once.Do(func() { t.pool.leave(t) })
	return t.Conn.Close()
}

// conn is one connection to a service.
type conn struct {
	net.Conn
	head    headReader
	br      *bufio.Reader
	bw      *bufio.Writer
	raw     syscall.RawConn // nil when the connection cannot be looked into
	port    uint16
	reused  bool
	expires time.Time
}

// headReader ends reading when a head grows too large.
type headReader struct {
	net.Conn
	left int64
}

var errHead = fmt.Errorf("%w: its head is too large", ErrAnswer)

func (h *headReader) Read(b []byte) (int, error) {
	if h.left <= 0 {
		return 0, errHead
	}
	if int64(len(b)) > h.left {
		b = b[:h.left]
	}
	n, err := h.Conn.Read(b)
	if h.left != math.MaxInt64 {
		h.left -= int64(n)
	}
	return n, err
}

// get returns a kept connection that is still alive, or a new one.
func (p *Pool) get(ctx context.Context, port uint16, fresh bool) (*conn, error) {
	for !fresh {
		c := p.pop(port)
		if c == nil {
			break
		}
		if c.alive() {
			c.reused = true
			return c, nil
		}
		hangUp(c)
	}
	nc, err := p.cfg.Dial(ctx, port)
	if err != nil {
		if p.closed.Load() {
			return nil, ErrReset
		}
		return nil, &DialError{Port: port, Err: err}
	}
	raw := nc
	if nc, err = p.secure(ctx, nc, port); err != nil {
		return nil, err
	}
	c := &conn{Conn: nc, port: port, head: headReader{Conn: nc, left: math.MaxInt64}}
	c.br = bufio.NewReaderSize(&c.head, 4<<10)
	c.bw = bufio.NewWriterSize(nc, 4<<10)
	if sc, ok := raw.(syscall.Conn); ok {
		c.raw, _ = sc.SyscallConn() // nil: not reused, see put
	}
	return c, nil
}

// secure makes TLS of a connection to a service that wants it.
func (p *Pool) secure(ctx context.Context, nc net.Conn, port uint16) (net.Conn, error) {
	if p.cfg.TLS == nil {
		return nc, nil
	}
	conf := p.cfg.TLS(port)
	if conf == nil {
		return nc, nil
	}
	leave, err := p.Enter(func() { abort(nc) })
	if err != nil {
		abort(nc)
		return nil, err
	}
	defer leave()
	return p.Handshake(ctx, nc, conf)
}

// Handshake makes TLS of a connection to a service, within TLSTimeout: a service must
// not keep what waits for it. The connection must end with the pool; it is closed when
// the handshake fails.
func (p *Pool) Handshake(ctx context.Context, nc net.Conn, conf *tls.Config) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, p.cfg.TLSTimeout)
	defer cancel()
	c := tls.Client(nc, conf)
	err := c.HandshakeContext(ctx)
	if err == nil {
		return c, nil
	}
	abort(nc)
	if p.closed.Load() {
		return nil, fmt.Errorf("%w: %w", ErrReset, err)
	}
	return nil, fmt.Errorf("%w: %w", ErrNoTLS, err)
}

func (p *Pool) pop(port uint16) *conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := p.idle[port]
	if len(list) == 0 {
		return nil
	}
	c := list[len(list)-1]
	list[len(list)-1] = nil
	p.idle[port] = list[:len(list)-1]
	p.idles--
	return c
}

// put keeps c for the next request, or closes it.
func (p *Pool) put(c *conn, keep time.Duration) {
	if keep <= 0 || keep > p.cfg.IdleTimeout {
		keep = p.cfg.IdleTimeout
	}
	c.expires = time.Now().Add(keep)
	if c.raw == nil || c.br.Buffered() > 0 || !p.keep(c) {
		hangUp(c)
	}
}

func (p *Pool) keep(c *conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed.Load() || p.idles >= p.cfg.IdleTotal || len(p.idle[c.port]) >= p.cfg.IdlePerPort {
		return false
	}
	p.idle[c.port] = append(p.idle[c.port], c)
	p.idles++
	if p.sweep == nil {
		p.sweep = time.AfterFunc(p.cfg.IdleTimeout, p.expire)
	}
	return true
}

// expire closes connections that were kept too long, and comes back while some are left.
func (p *Pool) expire() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed.Load() {
		return
	}
	now := time.Now()
	for port, list := range p.idle {
		kept := list[:0]
		for _, c := range list {
			if now.Before(c.expires) {
				kept = append(kept, c)
				continue
			}
			hangUp(c)
			p.idles--
		}
		clear(list[len(kept):])
		if p.idle[port] = kept; len(kept) == 0 {
			delete(p.idle, port)
		}
	}
	p.sweep = nil
	if p.idles > 0 {
		p.sweep = time.AfterFunc(p.cfg.IdleTimeout, p.expire)
	}
}

// alive reports whether a kept connection can carry another request: not too
// old, not closed by the service, and nothing unasked for waiting on it.
func (c *conn) alive() bool {
	if !time.Now().Before(c.expires) {
		return false
	}
	open := false
	err := c.raw.Read(func(fd uintptr) bool {
		var b [1]byte
		n, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		open = n <= 0 && (errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EINTR))
		return true
	})
	return err == nil && open
}

// abort closes a connection by a reset, so that the peer cannot take a cut
// stream for a finished one, and so that nothing queued is sent any more.
func abort(c net.Conn) {
	type inner interface{ NetConn() net.Conn }
	for {
		n, ok := c.(inner)
		if !ok {
			break
		}
		c = n.NetConn()
	}
	if t, ok := c.(interface{ SetLinger(sec int) error }); ok {
		t.SetLinger(0) //nolint:errcheck // a connection that is closed already needs no reset
	}
	hangUp(c)
}

// hangUp closes a connection whose error, if any, shows in what is read from it.
func hangUp(c io.Closer) { c.Close() }

// Abort resets a client's connection, through TLS too.
func Abort(c net.Conn) { abort(c) }

// buffers are for copying bodies; they are held only while bytes move.
var buffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}
