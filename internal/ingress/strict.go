package ingress

import (
	"bytes"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"
)

// net/http's server takes four things that another reader of the same octets may
// understand differently (RFC 9112, section 11.2): Content-Length beside
// Transfer-Encoding, Content-Length twice, Transfer-Encoding in HTTP/1.0, and folded
// fields; and its handlers do not see that they were there. A proxy in front of us
// that takes one of them otherwise would mistake whose request follows. So the
// connection looks at the octets that net/http reads, follows where messages begin
// and end, and tells the handler of such a request, which is refused. It changes
// nothing, and where it does not understand, it refuses what comes next.

// watched is a client's connection of HTTP/1 on its way into net/http.
type watched struct {
	patient
	info *connInfo

	mu     sync.Mutex // guards the fields below
	octets framing

	readBy  time.Time // deadline for reading; zero: none
	readSet time.Time // as the connection has it; see applyRead
	reading bool      // from the connection, with the lock given up
	hurry   bool      // readBy is hasten's

	resting bool // see rest
	woken   sync.Cond
	timer   *time.Timer
}

// sealed is one in TLS, as net/http wants to be told.
type sealed struct{ *watched }

func (s sealed) ConnectionState() tls.ConnectionState { return s.state() }

func watchedOf(c net.Conn) *watched {
	if s, ok := c.(sealed); ok {
		return s.watched
	}
	return c.(*watched)
}

const (
	// bodyTime is how long a client may take for the rest of a body that nothing reads.
	bodyTime = 5 * time.Second
	// watchDelay is how long a handler may take before the connection is looked at, whether
	// the client is still there. Most answer sooner.
	watchDelay = 5 * time.Millisecond
)

// errFields ends a connection whose client sends too many fields, before net/http
// makes a map of them: one of three octets takes some hundred of ours, for as long as
// the rest of the header takes to come.
var errFields = errors.New("too many header fields")

func (w *watched) Read(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(b) == 1 && !w.rest() { // net/http watches for the client's end with one octet
		return 0, os.ErrDeadlineExceeded
	}
	for {
		w.applyRead()
		w.reading = true
		w.mu.Unlock()
		n, err := w.Conn.Read(b)
		w.mu.Lock()
		w.reading = false
		if n == 0 && isTimeout(err) && !w.over() {
			continue // readSet was early
		}
		if w.octets.feed(b[:n]); w.hurry && !w.octets.midway() {
			w.setRead(time.Time{})
		}
		if w.octets.many {
			return 0, errFields
		}
		return n, err
	}
}

// rest waits for watchDelay, without touching the connection. It returns false when
// the deadline for reading is over then.
func (w *watched) rest() bool {
	if w.resting = true; w.timer == nil {
		w.woken.L = &w.mu
		w.timer = time.AfterFunc(watchDelay, func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.resting = false
			w.woken.Signal()
		})
	} else {
		w.timer.Reset(watchDelay)
	}
	for w.resting && !w.over() {
		w.woken.Wait()
	}
	if w.resting {
		w.resting = false
		w.timer.Stop()
	}
	return !w.over()
}

// over reports whether the deadline for reading is.
func (w *watched) over() bool { return !w.readBy.IsZero() && !w.readBy.After(time.Now()) }

// applyRead sees that the connection's deadline for reading is about readBy. net/http
// moves it several times with each request, and doing it costs more than looking at
// the clock: one that is earlier may stay, since Read goes on when it comes, and so
// may one that is a little later.
func (w *watched) applyRead() {
	now := time.Now()
	by := w.readBy
	if by.After(now) {
		by = by.Add(by.Sub(now) / 16)
	}
	ahead := w.readSet.After(now)
	if by.IsZero() && (ahead || w.readSet.IsZero()) || ahead && !w.readSet.After(by) {
		return
	}
	w.readSet = by
	w.Conn.SetReadDeadline(by) //nolint:errcheck // a dead connection shows in the read
}

// setRead also wakes what reads.
func (w *watched) setRead(by time.Time) {
	w.hurry, w.readBy = false, by
	switch {
	case w.resting:
		w.woken.Signal()
	case w.reading:
		w.readSet = by
		w.Conn.SetReadDeadline(by) //nolint:errcheck // a dead connection shows in the read
	}
}

// hasten gives the client bodyTime for the rest of its body, if some of it has not
// come: before an answer goes out, net/http reads what the handler has left.
func (w *watched) hasten() {
	w.mu.Lock()
	defer w.mu.Unlock()
	by := time.Now().Add(bodyTime)
	if w.octets.midway() && (w.readBy.IsZero() || w.readBy.After(by)) {
		w.setRead(by)
		w.hurry = true
	}
}

// cut ends the reading of a body of which some has not come. Nothing may do so to
// the reading behind it, by which net/http notices that the client has left.
func (w *watched) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.octets.midway() {
		w.setRead(longAgo)
	}
}

// SetReadDeadline takes the place of hasten's.
func (w *watched) SetReadDeadline(t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.setRead(t)
	return nil
}

// SetDeadline is for what takes the connection over.
func (w *watched) SetDeadline(t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.setRead(t)
	w.readSet = t
	return w.patient.SetDeadline(t)
}

// begun reports whether anything has come.
func (w *watched) begun() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.octets.begun
}

// admits is called once for each request, by its handler.
func (w *watched) admits(r *http.Request) *refusal {
	w.mu.Lock()
	why := w.octets.next()
	w.mu.Unlock()
	switch {
	case r.ProtoMajor != 1 || r.ProtoMinor > 1:
		return &refusal{Code: http.StatusHTTPVersionNotSupported, Message: "HTTP/1.0, HTTP/1.1 and HTTP/2 are spoken here"}
	case why != "":
		return &refusal{Code: http.StatusBadRequest, Message: "The request is malformed: " + why + "."}
	}
	return nil
}

// framing follows the messages of a connection.
type framing struct {
	begun bool
	many  bool // too many fields of one head
	at    phase
	left  uint64 // octets of a body or chunk
	line  []byte // the beginning of a line whose end has not come
	late  []byte // what followed a request for another protocol; not looked at yet

	head   headSeen // of the message under way
	heads  int      // complete ones
	taken  int      // by next
	wrong  int      // the number of the head that is refused first, from 1; 0: none
	reason string
}

// phase is what the next octet belongs to.
type phase uint8

const (
	inHead phase = iota
	inBody
	inChunkSize
	inChunk
	afterChunk // its line end
	inTrailer
	inDoubt // another protocol, if the service agrees to it
	lost
)

// headSeen is what counts of a head.
type headSeen struct {
	lines, lengths, codings int
	length                  string
	old                     bool // HTTP/1.0
	upgrade                 bool
}

const (
	// lineMost is how much of a line is kept; net/http gives up a header before.
	lineMost = 1 << 20
	// lateMost is how much may follow a request for another protocol before that is
	// answered; net/http reads less ahead.
	lateMost = 64 << 10
)

// next takes the next request.
func (f *framing) next() string {
	f.taken++
	if f.taken > f.heads && f.at == inDoubt { // the service has not switched
		late := f.late
		f.late, f.at = nil, inHead
		f.feed(late)
	}
	if f.wrong != 0 && f.taken >= f.wrong {
		return f.reason
	}
	return ""
}

// midway reports whether a part of a body has not come.
func (f *framing) midway() bool { return f.at > inHead && f.at < inDoubt }

// feed takes the octets that come next.
func (f *framing) feed(b []byte) {
	f.begun = f.begun || len(b) > 0
	for len(b) > 0 {
		switch f.at {
		case inHead, inChunkSize, afterChunk, inTrailer:
			line, rest, whole := f.cut(b)
			if b = rest; whole {
				f.take(line)
			}
		case inBody, inChunk:
			n := min(uint64(len(b)), f.left)
			b = b[n:]
			if f.left -= n; f.left > 0 {
				return
			}
			if f.at == inChunk {
				f.at = afterChunk
			} else {
				f.end()
			}
		case inDoubt:
			if f.late = append(f.late, b...); len(f.late) > lateMost {
				f.lose("too much follows a request for another protocol")
			}
			return
		case lost:
			return
		}
	}
}

// cut takes a line off b, with its end.
func (f *framing) cut(b []byte) (line, rest []byte, whole bool) {
	i := bytes.IndexByte(b, '\n')
	if i < 0 {
		if len(f.line)+len(b) > lineMost {
			f.lose("its header is too long")
			return nil, nil, false
		}
		f.line = append(f.line, b...)
		return nil, nil, false
	}
	line, rest = b[:i+1], b[i+1:]
	if len(f.line) > 0 {
		line = append(f.line, line...)
		f.line = nil
	}
	return line, rest, true
}

func (f *framing) take(line []byte) {
	crlf := len(line) > 1 && line[len(line)-2] == '\r'
	text := bytes.TrimSuffix(line[:len(line)-1], []byte("\r"))
	switch f.at {
	case inChunkSize:
		f.chunkSize(text, crlf)
	case afterChunk:
		if f.at = inChunkSize; len(text) > 0 || !crlf {
			f.lose("a chunk before it does not end where it says")
		}
	case inTrailer:
		switch {
		case !crlf, len(text) > 0 && isBlank(text[0]):
			f.lose("the trailer before it is malformed")
		case len(text) == 0:
			f.end()
		}
	default:
		f.headLine(text)
	}
}

func (f *framing) headLine(text []byte) {
	h := &f.head
	switch {
	case len(text) == 0 && h.lines == 0:
		return // a line end before a request: net/http decides
	case len(text) == 0:
		f.headEnd()
		return
	case h.lines == 0:
		h.lines, h.old = 1, bytes.HasSuffix(text, []byte(" HTTP/1.0"))
		return
	}
	if h.lines++; h.lines-1 > fieldsMost {
		f.many = true
	}
	if isBlank(text[0]) {
		f.lose("a field of it goes on in a second line")
		return
	}
	name, value, ok := bytes.Cut(text, []byte{':'})
	if !ok {
		return // net/http refuses it
	}
	switch name = bytes.TrimRight(name, " \t"); {
	case bytes.EqualFold(name, []byte("Content-Length")):
		h.lengths++
		h.length = string(bytes.Trim(value, " \t"))
	case bytes.EqualFold(name, []byte("Transfer-Encoding")):
		h.codings++
	case bytes.EqualFold(name, []byte("Upgrade")):
		h.upgrade = true
	}
}

func isBlank(c byte) bool { return c == ' ' || c == '\t' }

func (f *framing) headEnd() {
	switch h := f.head; {
	case h.codings > 0 && h.lengths > 0:
		f.lose("it has both Transfer-Encoding and Content-Length")
	case h.codings > 0 && h.old:
		f.lose("it has Transfer-Encoding in HTTP/1.0")
	case h.lengths > 1:
		f.lose("it has more than one Content-Length")
	case h.codings > 0:
		f.at = inChunkSize // net/http takes no other coding
	case h.lengths == 0:
		f.end()
	default:
		n, err := strconv.ParseUint(h.length, 10, 63)
		if err != nil {
			f.lose("its Content-Length is malformed")
		} else if f.at, f.left = inBody, n; n == 0 {
			f.end()
		}
	}
	if f.at != lost {
		f.heads++
	}
}

func (f *framing) chunkSize(text []byte, crlf bool) {
	size, _, _ := bytes.Cut(text, []byte(";"))
	n, err := strconv.ParseUint(string(bytes.TrimRight(size, " \t")), 16, 63)
	switch {
	case !crlf, err != nil, bytes.IndexByte(text, '\r') >= 0:
		f.lose("a chunk's size before it is malformed")
	case n == 0:
		f.at = inTrailer
	default:
		f.at, f.left = inChunk, n
	}
}

// end begins the next message.
func (f *framing) end() {
	upgrade := f.head.upgrade
	f.head = headSeen{}
	if f.at = inHead; upgrade {
		f.at = inDoubt
	}
}

// lose has the request whose head is not complete refused, and all behind it.
func (f *framing) lose(why string) {
	if f.wrong == 0 {
		f.wrong, f.reason = f.heads+1, why
	}
	f.at, f.line, f.late = lost, nil, nil
}
