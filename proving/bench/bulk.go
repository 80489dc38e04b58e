package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
)

// bulkSize is what goes each way while the memory of the programs in front is watched.
const bulkSize = 2 << 30

// Requests for bulk, and where the service keeps an eye on them.
const bulkDown, bulkUp = "GET /bulk ", "POST /bulk "

// bulkFor is how long one direction may take.
const bulkFor = time.Minute

type nothing struct{}

func (nothing) Read(b []byte) (int, error) { return len(b), nil }

// serveBulk answers one request for bulk, whose head is read.
func serveBulk(c net.Conn, r *bufio.Reader, line string) error {
	if strings.HasPrefix(line, bulkDown) {
		if _, err := fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n", bulkSize); err != nil {
			return err
		}
		_, err := io.CopyBuffer(struct{ io.Writer }{c}, io.LimitReader(nothing{}, bulkSize), make([]byte, chunk))
		return err
	}
	if _, err := r.Discard(bulkSize); err != nil {
		return err
	}
	_, err := c.Write(answer)
	return err
}

// Bulk sends bulkSize octets through a way over HTTP/1.1 in TLS, then takes as many.
func (c *Client) Bulk(l Load, _ *struct{}) error {
	l.For = 2 * bulkFor
	conn, err := l.kept("http/1.1")
	if err != nil {
		return err
	}
	defer conn.Close()
	r := bufio.NewReaderSize(conn, 64<<10)
	head := " HTTP/1.1\r\nHost: " + l.Name + "\r\n"
	if _, err := io.WriteString(conn, strings.TrimSpace(bulkUp)+head+"Content-Length: "+strconv.Itoa(bulkSize)+"\r\n\r\n"); err != nil {
		return err
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{conn}, io.LimitReader(nothing{}, bulkSize), make([]byte, chunk)); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	if err := readAnswer(r); err != nil {
		return fmt.Errorf("after sending: %w", err)
	}
	if _, err := io.WriteString(conn, strings.TrimSpace(bulkDown)+head+"\r\n"); err != nil {
		return err
	}
	if err := readAnswer(r); err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	return nil
}

// growth watches how much more memory each way's program needs while bulk goes through
// it than before; goal is in MiB.
func (r *run) growth(ctx context.Context, ways []*way, l Load, goal float64) []figure {
	var out []figure
	for i, w := range ways {
		f := figure{name: w.name, unit: "MiB", quantile: 0.5}
		if i == 0 {
			f.most = goal
		}
		most, err := w.grows(ctx, w.addr(l))
		if err != nil {
			f.name += " (" + strings.TrimSpace(err.Error()) + ")"
		} else {
			f.values = []float64{float64(most) / (1 << 20)}
		}
		out = append(out, f)
	}
	return out
}

func (w *way) grows(ctx context.Context, l Load) (most int64, err error) {
	before, err := w.program.memory()
	if err != nil {
		return 0, err
	}
	over := make(chan error, 1)
	go func() { over <- w.client.call(ctx, "Bulk", l, nil) }()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-over:
			return most, err
		case <-tick.C:
		}
		now, merr := w.program.memory()
		if merr != nil {
			return 0, errors.Join(merr, <-over)
		}
		most = max(most, now-before)
	}
}
