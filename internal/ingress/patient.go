package ingress

import (
	"crypto/tls"
	"net"
	"sync"
	"time"
)

// patient is a client's connection that ends when the client does not take what is
// written to it.
type patient struct {
	net.Conn
	stall time.Duration // for the client to take a piece

	writing sync.Mutex // guards the fields below
	writeBy time.Time  // deadline for writing, as Write last set it
	told    bool       // the handler has set one
}

// writePiece is what a client has stall for.
const writePiece = 64 << 10

func (p *patient) Write(b []byte) (n int, err error) {
	for {
		p.limit()
		var taken int
		taken, err = p.Conn.Write(b[n:min(len(b), n+writePiece)])
		if n += taken; err != nil || n == len(b) {
			return n, err
		}
	}
}

// limit sets the deadline for a piece. Doing it costs more than looking at the clock: it
// is moved only when it would come too early, and then a little too far.
func (p *patient) limit() {
	p.writing.Lock()
	defer p.writing.Unlock()
	if now := time.Now(); !p.told && p.writeBy.Before(now.Add(p.stall)) {
		p.writeBy = now.Add(p.stall + p.stall/16)
		p.Conn.SetWriteDeadline(p.writeBy) //nolint:errcheck // a dead connection shows in the write
	}
}

// SetWriteDeadline is the handler's, or takes it back.
func (p *patient) SetWriteDeadline(t time.Time) error {
	p.writing.Lock()
	defer p.writing.Unlock()
	if p.told = !t.IsZero(); !p.told && p.writeBy.After(time.Now().Add(p.stall)) {
		return nil // Write's own is good
	}
	p.writeBy = time.Time{}
	return p.Conn.SetWriteDeadline(t)
}

// SetDeadline is for what takes the connection over.
func (p *patient) SetDeadline(t time.Time) error {
	p.writing.Lock()
	defer p.writing.Unlock()
	p.told, p.writeBy = !t.IsZero(), time.Time{}
	return p.Conn.SetDeadline(t)
}

// NetConn returns the connection itself, for what takes it over.
func (p *patient) NetConn() net.Conn { return p.Conn }

// CloseWrite is for net/http, which ends some connections that way.
func (p *patient) CloseWrite() error {
	if half, ok := p.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

func (p *patient) state() tls.ConnectionState { return p.Conn.(*tls.Conn).ConnectionState() }

// patientTLS is one in TLS, as x/net/http2 wants to be told.
type patientTLS struct{ *patient }

func (p patientTLS) ConnectionState() tls.ConnectionState { return p.state() }
