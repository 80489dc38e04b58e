package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
)

// content is what a file is to hold, all of it at hand.
type content struct {
	io.ReaderAt
	size int64
	// spool is the nameless file that holds it; nil when something else does.
	spool *os.File
}

// spool collects bodies until each is whole: only then is a file touched, and
// what is left to go wrong is the disk. It keeps small ones in memory, larger ones
// in files without a name, so that no listing and no watch shows them and nothing
// is left when the agent ends.
type spool struct{ dir string }

// collect reads a body to its end. It calls check before it takes in more than a
// small one.
func (s spool) collect(from io.Reader, check func() error) (*content, error) {
	head := make([]byte, headSize)
	n, err := io.ReadFull(from, head)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) { // a body's own errors are bodyReader's
		return &content{ReaderAt: bytes.NewReader(head[:n]), size: int64(n)}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := check(); err != nil {
		return nil, err
	}
	f, err := s.file()
	if err != nil {
		return nil, err
	}
	size, err := copyBody(f, io.MultiReader(bytes.NewReader(head), from))
	if err != nil {
		f.Close()
		return nil, err
	}
	return &content{ReaderAt: f, size: size, spool: f}, nil
}

// file returns an empty file without a name.
func (s spool) file() (*os.File, error) {
	if s.dir != "" { // made each time, because root in the sandbox may remove it
		if err := os.MkdirAll(s.dir, 0o700); err != nil {
			return nil, fmt.Errorf("make the folder of unfinished uploads: %w", err)
		}
	}
	f, err := os.CreateTemp(s.dir, "")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// join collects files, one behind the other.
func (s spool) join(paths []string, open func(string) (*os.File, error)) (*content, error) {
	f, err := s.file()
	if err != nil {
		return nil, err
	}
	c := &content{ReaderAt: f, spool: f}
	for _, p := range paths {
		n, err := appendFile(f, p, open)
		if err != nil {
			c.close()
			return nil, err
		}
		c.size += n
	}
	return c, nil
}

func appendFile(to *os.File, from string, open func(string) (*os.File, error)) (int64, error) {
	f, err := open(from)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return io.Copy(to, f)
}

func (c *content) close() {
	if c.spool != nil {
		c.spool.Close()
	}
}

// fill makes the content the file's, in place, so that the file stays what it is to
// whoever has it open or knows it by another name. What is beyond the file's old end
// is written first: that is where the disk may turn out to be full, and then the
// old content is whole still. It is written from its end on, and taken from the
// spool as it goes, so that both together need no more room than one.
func (c *content) fill(f *os.File) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	old := fi.Size()
	buf := make([]byte, min(c.size, copyBuffer))
	for end := c.size; end > old; {
		from := max(end-copyBuffer, old)
		if err := c.copyPiece(f, buf[:end-from], from); err != nil {
			return errors.Join(err, f.Truncate(old))
		}
		if c.spool != nil {
			if err := c.spool.Truncate(from); err != nil {
				return errors.Join(err, f.Truncate(old))
			}
		}
		end = from
	}
	for from := int64(0); from < min(c.size, old); from += copyBuffer {
		end := min(from+copyBuffer, c.size, old)
		if err := c.copyPiece(f, buf[:end-from], from); err != nil {
			return err
		}
	}
	if c.size < old {
		return f.Truncate(c.size)
	}
	return nil
}

func (c *content) copyPiece(to *os.File, buf []byte, at int64) error {
	if _, err := c.ReadAt(buf, at); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	_, err := to.WriteAt(buf, at)
	return err
}

// turns lets one content at a time into a file: of two uploads to one path, each is
// whole or not there at all.
type turns [32]sync.Mutex // by the file's number

func (t *turns) fill(c *content, f *os.File) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		turn := &t[st.Ino%uint64(len(t))]
		turn.Lock()
		defer turn.Unlock()
	}
	return c.fill(f)
}
