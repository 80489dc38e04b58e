package h1

import (
	"bufio"
	"sync"
)

// buffers are what a connection needs while it has a request.
type buffers struct {
	br   *bufio.Reader
	bw   *bufio.Writer
	head []byte // of the answer, until its framing is known
	body []byte // of the answer, until it is sure to be too long for a Content-Length, or a chunk's worth
}

var bufferPool = sync.Pool{New: func() any {
	return &buffers{
		br: bufio.NewReaderSize(nil, 4<<10), bw: bufio.NewWriterSize(nil, 4<<10),
		head: make([]byte, 0, 1<<10), body: make([]byte, 0, 2<<10),
	}
}}

func (c *conn) takeBuffers() {
	if c.bufs == nil {
		c.bufs = bufferPool.Get().(*buffers)
		c.bufs.br.Reset(c)
		c.bufs.bw.Reset(c)
	}
}

func (c *conn) giveBuffers() {
	b := c.bufs
	if b == nil {
		return
	}
	c.bufs = nil
	b.br.Reset(nil)
	b.bw.Reset(nil)
	b.body = b.body[:0]
	if b.head = b.head[:0]; cap(b.head) > 8<<10 {
		b.head = nil
	}
	bufferPool.Put(b)
}
