package bench

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Client is the process that loads a way to the server.
type Client struct {
	mu   sync.Mutex // guards held
	held []net.Conn
	live net.Conn // made by Live for Watch
}

// Load is what a client does for a while.
type Load struct {
	Kind  string
	Addr  netip.AddrPort
	Name  string // shown in a hello, a Host header or both; empty: no hello
	Conns int    // at a time; 1 when zero
	For   time.Duration
	// Program is the process whose processor time is measured meanwhile; or 0.
	Program int

	hello []byte // the ClientHello that shows Name
}

// The kinds of load.
const (
	loadDown       = "down"        // octets from the server on one connection
	loadUp         = "up"          // octets to it
	loadEcho       = "echo"        // messages and answers on kept connections
	loadConnect    = "connect"     // new connection, one message, its answer
	loadTLS        = "tls"         // new connection, TLS 1.3 handshake, one octet each way
	loadHTTP       = "http"        // new connection, one request, its answer
	loadDeniedTLS  = "denied tls"  // new connection, hello, until it is ended
	loadDeniedHTTP = "denied http" // new connection, request, until it is ended
	loadRefused    = "refused"     // connect, until ECONNREFUSED
	loadH1, loadH2 = "h1", "h2"    // requests and answers on kept TLS connections
	loadPlain      = "plain"       // the same as h1 without TLS
	holdUpgraded   = "websocket"   // for Hold: an idle upgraded connection
)

// Result is what came of a load.
type Result struct {
	Rate     float64 // of steps a second; octets a second for bulk
	P50, P99 time.Duration
	Steps    int
	Spent    time.Duration // by Load.Program, for all steps
}

// deadline is when a connection that hangs fails.
const deadline = 30 * time.Second

// Do runs a load.
func (c *Client) Do(l Load, out *Result) (err error) {
	if err := l.prepare(); err != nil {
		return err
	}
	switch l.Kind {
	case loadDown, loadUp:
		*out, err = l.bulk()
	default:
		*out, err = l.steps()
	}
	return err
}

// prepare fills in what every step of a load shares.
func (l *Load) prepare() (err error) {
	l.Conns = max(l.Conns, 1)
	if l.Name != "" {
		l.hello, err = helloFor(l.Name)
	}
	return err
}

// stepper makes what one connection's worth of a load repeats, and what ends it.
type stepper func() (step func() error, end func(), err error)

// steps repeats a step on l.Conns goroutines until the time is over.
func (l Load) steps() (Result, error) {
	prepare, err := l.stepper()
	if err != nil {
		return Result{}, err
	}
	took := make([][]time.Duration, l.Conns)
	failed := make([]error, l.Conns)
	var ready, running sync.WaitGroup
	var began time.Time
	start := make(chan struct{})
	ready.Add(l.Conns)
	for i := range l.Conns {
		running.Go(func() {
			step, end, err := prepare()
			ready.Done()
			if err != nil {
				failed[i] = err
				return
			}
			defer end()
			<-start
			for now := began; now.Sub(began) < l.For; {
				if failed[i] = step(); failed[i] != nil {
					return
				}
				then := now
				now = time.Now()
				took[i] = append(took[i], now.Sub(then))
			}
		})
	}
	ready.Wait()
	before := processorTime(l.Program)
	began = time.Now()
	close(start)
	running.Wait()
	elapsed := time.Since(began)
	spent := processorTime(l.Program) - before
	all := slices.Concat(took...)
	if err := errors.Join(failed...); err != nil || len(all) == 0 {
		return Result{}, fmt.Errorf("%s: %w", l.Kind, firstOf(failed))
	}
	slices.Sort(all)
	return Result{
		Rate: float64(len(all)) / elapsed.Seconds(), P50: quantile(all, 0.5), P99: quantile(all, 0.99),
		Steps: len(all), Spent: spent,
	}, nil
}

func firstOf(failed []error) error {
	for _, err := range failed {
		if err != nil {
			return err
		}
	}
	return errors.New("nothing was measured")
}

// quantile of sorted values.
func quantile[T any](sorted []T, q float64) T {
	return sorted[int(q*float64(len(sorted)-1)+0.5)]
}

func (l Load) stepper() (stepper, error) {
	switch l.Kind {
	case loadEcho:
		return l.echo, nil
	case loadConnect:
		return once(l.connect), nil
	case loadTLS:
		return once(l.handshake), nil
	case loadHTTP:
		return once(l.request), nil
	case loadDeniedTLS, loadDeniedHTTP:
		return once(l.denied), nil
	case loadRefused:
		return once(l.refused), nil
	case loadH1, loadPlain:
		return l.keptHTTP1, nil
	case loadH2:
		return l.keptHTTP2, nil
	}
	return nil, fmt.Errorf("no load %q", l.Kind)
}

// once is the stepper of a step that leaves nothing for the next.
func once(step func() error) stepper {
	return func() (func() error, func(), error) { return step, func() {}, nil }
}

// dial connects; a connection that stays open has no deadline.
func (l Load) dial() (net.Conn, error) {
	d := net.Dialer{Timeout: deadline, KeepAlive: -1}
	d.SetMultipathTCP(false)
	return d.Dial("tcp", l.Addr.String())
}

// open connects to the raw service, shows a name if there is one, and asks.
func (l Load) open(op byte) (net.Conn, error) {
	c, err := l.dial()
	if err != nil {
		return nil, err
	}
	if err = l.greet(c); err == nil {
		_, err = c.Write([]byte{op})
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// greet shows the raw service the load's name and waits for the answer, as a TLS
// client does before it sends anything else.
func (l Load) greet(c net.Conn) error {
	if len(l.hello) == 0 {
		return nil
	}
	_ = c.SetDeadline(time.Now().Add(deadline))
	if _, err := c.Write(l.hello); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, make([]byte, len(helloAnswer))); err != nil {
		return fmt.Errorf("answer to the ClientHello: %w", err)
	}
	return c.SetDeadline(time.Time{})
}

// bulk moves octets on one connection.
func (l Load) bulk() (Result, error) {
	op := opDown
	if l.Kind == loadUp {
		op = opUp
	}
	c, err := l.open(op)
	if err != nil {
		return Result{}, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(l.For + deadline))
	began := time.Now()
	over := func() bool { return time.Since(began) >= l.For }
	var moved int64
	if op == opDown {
		moved = drain(c, over)
	} else if moved, err = push(c, over); err != nil {
		return Result{}, err
	}
	if !over() {
		return Result{}, fmt.Errorf("%s: ended after %v", l.Kind, time.Since(began))
	}
	return Result{Rate: float64(moved) / time.Since(began).Seconds()}, nil
}

// push writes until it is over and returns what the server says has arrived.
func push(c net.Conn, over func() bool) (int64, error) {
	for b := make([]byte, chunk); !over(); {
		if _, err := c.Write(b); err != nil {
			return 0, err
		}
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return 0, err
	}
	count := make([]byte, 8)
	_, err := io.ReadFull(c, count)
	return int64(binary.BigEndian.Uint64(count)), err
}

// exchange sends a message and reads its answer.
func exchange(c net.Conn, b []byte) error {
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b)
	return err
}

func (l Load) echo() (func() error, func(), error) {
	c, err := l.open(opEcho)
	if err != nil {
		return nil, nil, err
	}
	_ = c.SetDeadline(time.Now().Add(l.For + deadline))
	b := make([]byte, messageSize)
	if err := exchange(c, b); err != nil { // the whole way stands
		c.Close()
		return nil, nil, err
	}
	return func() error { return exchange(c, b) }, func() { c.Close() }, nil
}

// connect ends with the first answer: that to the ClientHello where a name is shown.
func (l Load) connect() error {
	if len(l.hello) > 0 {
		c, err := l.dial()
		if err != nil {
			return err
		}
		defer c.Close()
		return l.greet(c)
	}
	c, err := l.open(opEcho)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(deadline))
	return exchange(c, make([]byte, messageSize))
}

// anyServer trusts every certificate: proxies here pass bytes or have our own.
func anyServer(name string, protocols ...string) *tls.Config {
	return &tls.Config{ServerName: name, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: protocols} //nolint:gosec // nothing secret passes
}

func (l Load) handshake() error {
	raw, err := l.dial()
	if err != nil {
		return err
	}
	defer raw.Close()
	_ = raw.SetDeadline(time.Now().Add(deadline))
	return exchange(tls.Client(raw, anyServer(l.Name)), make([]byte, 1))
}

func (l Load) request() error {
	c, err := l.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(deadline))
	if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nUser-Agent: bench\r\nAccept: */*\r\nConnection: close\r\n\r\n", l.Name); err != nil {
		return err
	}
	got, err := io.ReadAll(c)
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(got, []byte("HTTP/1.1 200")) {
		return fmt.Errorf("answer %.40q", got)
	}
	return nil
}

// denied connects, shows the name and waits until the connection is ended, by
// whichever way.
func (l Load) denied() error {
	first := []byte("GET / HTTP/1.1\r\nHost: " + l.Name + "\r\n\r\n")
	if l.Kind == loadDeniedTLS {
		first = l.hello
	}
	c, err := l.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(deadline))
	_, werr := c.Write(first)
	got, err := io.ReadAll(c)
	if werr == nil && err != nil && !errors.Is(err, syscall.ECONNRESET) {
		return err
	}
	if bytes.HasPrefix(got, []byte("HTTP/1.1 2")) || len(got) > 500 {
		return fmt.Errorf("it was not denied: %.40q", got)
	}
	return nil
}

// refused connects by bare system calls: at tens of microseconds a runtime's
// poller would show.
func (l Load) refused() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(l.Addr.Port()), Addr: l.Addr.Addr().As4()})
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("connect: %s, want it refused", fmt.Sprint(err))
	}
	return nil
}

// helloFor is the first flight of a TLS client that shows name.
func helloFor(name string) ([]byte, error) {
	w := &firstWrite{}
	err := tls.Client(w, anyServer(name, "h2", "http/1.1")).Handshake()
	if len(w.b) == 0 {
		return nil, fmt.Errorf("make a hello: %w", err)
	}
	return w.b, nil
}

// firstWrite is a connection that keeps what is written to it and ends.
type firstWrite struct {
	net.Conn
	b []byte
}

func (w *firstWrite) Write(b []byte) (int, error)      { w.b = append(w.b, b...); return len(b), nil }
func (w *firstWrite) Read([]byte) (int, error)         { return 0, io.EOF }
func (w *firstWrite) SetWriteDeadline(time.Time) error { return nil }
func (w *firstWrite) Close() error                     { return nil }

// Hold opens l.Conns connections, uses each once and keeps them; Release ends them.
func (c *Client) Hold(l Load, _ *struct{}) error {
	if err := l.prepare(); err != nil {
		return err
	}
	open := func() (net.Conn, error) { return l.open(opEcho) }
	if l.Kind == holdUpgraded {
		open = l.upgraded
	}
	const openers = 16
	var left atomic.Int64
	left.Store(int64(l.Conns))
	failed := make([]error, openers)
	var running sync.WaitGroup
	for i := range openers {
		running.Go(func() {
			for left.Add(-1) >= 0 && failed[i] == nil {
				var conn net.Conn
				if conn, failed[i] = open(); failed[i] != nil {
					return
				}
				c.mu.Lock()
				c.held = append(c.held, conn)
				c.mu.Unlock()
				if l.Kind != holdUpgraded {
					_ = conn.SetReadDeadline(time.Now().Add(deadline))
					failed[i] = exchange(conn, make([]byte, messageSize))
				}
			}
		})
	}
	running.Wait()
	if errors.Join(failed...) != nil {
		return firstOf(failed)
	}
	return nil
}

// Release ends what Hold opened.
func (c *Client) Release(struct{}, *struct{}) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.held {
		conn.Close()
	}
	c.held = nil
	return nil
}

// upgraded is a TLS connection that was switched to another protocol.
func (l Load) upgraded() (net.Conn, error) {
	raw, err := l.dial()
	if err != nil {
		return nil, err
	}
	c := tls.Client(raw, anyServer(l.Name, "http/1.1"))
	_ = c.SetDeadline(time.Now().Add(deadline))
	_, err = fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", l.Name)
	if err == nil {
		var line string
		if line, err = bufio.NewReaderSize(c, 512).ReadString('\n'); err == nil && !strings.Contains(line, " 101 ") {
			err = fmt.Errorf("answer %q", line)
		}
	}
	if err != nil {
		raw.Close()
	}
	return c, err
}

// Watched is when a client noticed a policy update, by the clock all processes share.
type Watched struct {
	Refused time.Time // the first new connection that was refused
	Cut     time.Time // the live one ended
}

// Live opens the connection that Watch watches, and uses it once.
func (c *Client) Live(l Load, _ *struct{}) error {
	if err := l.prepare(); err != nil {
		return err
	}
	live, err := l.open(opEcho)
	if err != nil {
		return err
	}
	_ = live.SetDeadline(time.Now().Add(deadline))
	if err := exchange(live, make([]byte, messageSize)); err != nil {
		live.Close()
		return err
	}
	c.live = live
	return nil
}

// Watch waits for the end of the connection that Live opened and makes new ones
// until they are refused.
func (c *Client) Watch(l Load, out *Watched) error {
	live := c.live
	defer live.Close()
	ctx, cancel := context.WithTimeout(context.Background(), l.For)
	defer cancel()
	_ = live.SetDeadline(time.Now().Add(l.For))
	cut := make(chan error, 1)
	go func() {
		_, err := live.Read(make([]byte, 1))
		out.Cut = time.Now()
		cut <- err
	}()
	for ctx.Err() == nil {
		fresh, err := l.dial()
		if errors.Is(err, syscall.ECONNREFUSED) {
			out.Refused = time.Now()
			break
		}
		if err != nil {
			return err
		}
		fresh.Close()
	}
	if err := <-cut; !errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("the live connection: %s, want a reset", fmt.Sprint(err))
	}
	return ctx.Err()
}
