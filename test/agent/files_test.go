package agent_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "github.com/cordonhq/cordon/api/gen/agent/filesystem"
	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/proving/stand"
)

func TestFilesInside(t *testing.T) {
	s := newStand(t)
	t.Run("an upload that breaks off leaves the old file whole", s.brokenUpload)
	t.Run("a disk that is full leaves the old file whole", s.fullDisk)
	t.Run("an upload keeps descriptors, names, mode and owner", s.uploadKeeps)
	t.Run("root's rights reach what a user's do not, by root's links only", s.rootsRights)
}

// upload sends a body to a path in the sandbox.
func (s *live) upload(t *testing.T, sb *client.Sandbox, path string, body io.Reader) (status int, err error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, stand.API+"/files?path="+url.QueryEscape(path), body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	resp, err := s.via(sb).Do(req)
	if err != nil {
		return 0, err
	}
	resp.Body.Close()
	return resp.StatusCode, nil
}

// breaking reads as its content and then fails, as a client that is gone; halfway
// is called before it does.
type breaking struct {
	io.Reader
	halfway func()
}

func (b breaking) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		b.halfway()
		err = errors.New("the client is gone")
	}
	return n, err
}

// watched collects what a watch of a directory tells, and what listings show, until
// it is asked.
func (s *live) watched(t *testing.T, sb *client.Sandbox, dir string) (list func(), names func() []string) {
	t.Helper()
	f := s.files(sb)
	made, err := f.CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: dir, Recursive: true}))
	if err != nil {
		t.Fatal(err)
	}
	var seen []string
	list = func() {
		got, err := f.ListDir(t.Context(), connect.NewRequest(&pb.ListDirRequest{Path: dir, Depth: 1}))
		if err != nil {
			t.Error(err)
			return
		}
		for _, e := range got.Msg.GetEntries() {
			seen = append(seen, e.GetName())
		}
	}
	return list, func() []string {
		events, err := f.GetWatcherEvents(t.Context(), connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: made.Msg.GetWatcherId()}))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events.Msg.GetEvents() {
			seen = append(seen, e.GetName())
		}
		slices.Sort(seen)
		return slices.Compact(seen)
	}
}

func (s *live) brokenUpload(t *testing.T) {
	sb := s.sandbox(t)
	const size = 5 << 20
	for _, c := range []struct {
		dir  string
		sent int
	}{{"/home/user/d", 1000}, {"/home/user/e", 3 << 20}, {"/dev/shm/d", 3 << 20}, {"/tmp/d", 3 << 20}} {
		t.Run(fmt.Sprintf("%s, %d octets", c.dir, c.sent), func(t *testing.T) {
			run(t, sb, "mkdir -p "+c.dir, 0)
			path := c.dir + "/k"
			if status, err := s.upload(t, sb, path, bytes.NewReader(bytes.Repeat([]byte("a"), size))); err != nil || status != 200 {
				t.Fatal(status, err)
			}
			list, names := s.watched(t, sb, c.dir)
			halfway := func() {
				time.Sleep(300 * time.Millisecond) // what was sent is there
				list()
			}
			for _, to := range []string{path, c.dir + "/new"} {
				if status, err := s.upload(t, sb, to, breaking{bytes.NewReader(bytes.Repeat([]byte("b"), c.sent)), halfway}); err == nil {
					t.Fatalf("the upload ended with %d", status)
				}
			}
			run(t, sb, "for i in $(seq 50); do test -e "+c.dir+"/new || exit 0; sleep 0.1; done; exit 1", 0)
			list()
			if got := run(t, sb, "tr -d a <"+path+" | wc -c; wc -c <"+path, 0); got != "0\n5242880" {
				t.Errorf("octets that are not the old file's, and all of it: %q", got)
			}
			if got := names(); !slices.Equal(got, []string{"k"}) {
				t.Errorf("names seen: %q", got)
			}
		})
	}
}

// fullDisk uploads to a file system that has room for less than what the file grows.
func (s *live) fullDisk(t *testing.T) {
	sb := s.sandbox(t)
	run(t, sb, `cd /dev/shm; head -c 1M /dev/zero | tr '\0' a >k; cat /dev/zero >filler 2>/dev/null; truncate -s -2M filler`, 0)
	for _, to := range []string{"/dev/shm/k", "/dev/shm/new"} {
		if status, err := s.upload(t, sb, to, bytes.NewReader(bytes.Repeat([]byte("b"), 5<<20))); err != nil || status != http.StatusInsufficientStorage {
			t.Errorf("%s: %d, %v", to, status, err)
		}
	}
	if got := run(t, sb, "cd /dev/shm; tr -d a <k | wc -c; wc -c <k; ls", 0); got != "0\n1048576\nfiller\nk" {
		t.Errorf("afterwards: %q", got)
	}
	// What fits, fits: the body and the file together need no more than either.
	if status, err := s.upload(t, sb, "/dev/shm/k", bytes.NewReader(bytes.Repeat([]byte("b"), 2<<20))); err != nil || status != 200 {
		t.Errorf("%d, %v", status, err)
	}
}

func (s *live) uploadKeeps(t *testing.T) {
	sb := s.sandbox(t)
	for _, size := range []int{10, 300 << 10, 5 << 20} {
		for _, before := range []int{0, 100, 6 << 20} {
			t.Run(fmt.Sprintf("%d octets over %d", size, before), func(t *testing.T) {
				run(t, sb, fmt.Sprintf("rm -rf d; mkdir d; head -c %d /dev/zero >d/k; chmod 0751 d/k; ln d/k d/other; ln -s k d/link", before), 0)
				_, names := s.watched(t, sb, "d")
				// Held open, it is read when the upload is done.
				held, err := sb.Commands.Start(t.Context(), "exec 3<d/k; touch ready; while ! test -e go; do sleep 0.05; done; rm -f go ready; tr -d b <&3 | wc -c; wc -c <d/k", client.RunOptions{})
				if err != nil {
					t.Fatal(err)
				}
				run(t, sb, "for i in $(seq 100); do test -e ready && exit 0; sleep 0.05; done; exit 1", 0)
				if status, err := s.upload(t, sb, "d/link", bytes.NewReader(bytes.Repeat([]byte("b"), size))); err != nil || status != 200 {
					t.Fatal(status, err)
				}
				run(t, sb, "touch go", 0)
				r, err := held.Wait(t.Context())
				if err != nil || strings.Fields(r.Stdout)[0] != "0" || strings.Fields(r.Stdout)[1] != fmt.Sprint(size) {
					t.Errorf("the open descriptor has other octets, or not all: %+v, %v", r, err)
				}
				if got := run(t, sb, "cmp d/k d/other && stat -c '%a %U %h' d/k; test -L d/link && ls d", 0); got != "751 user 2\nk\nlink\nother" {
					t.Errorf("afterwards: %q", got)
				}
				if got := names(); !slices.Equal(got, []string{"k"}) {
					t.Errorf("names seen: %q", got)
				}
			})
		}
	}
}

func (s *live) rootsRights(t *testing.T) {
	sb := s.sandbox(t)
	run(t, sb, `sudo sh -c 'mkdir -m 700 /vault && echo secret >/vault/key && chmod 600 /vault/key && ln -s /vault /roots && cp /vault/key ~user/moved && chmod 600 ~user/moved'
ln -s /vault theirs; echo mine >part`, 0)
	for path, want := range map[string]int{"/roots/new": 200, "/roots/deep/down/new": 200, "/vault/other": 200, "theirs/new": 403} {
		if status, err := s.upload(t, sb, path, strings.NewReader("x")); err != nil || status != want {
			t.Errorf("upload to %s: %d, %v, want %d", path, status, err, want)
		}
	}
	for source, want := range map[string]int{"theirs/key": 403, "moved": 403, "/roots/key": 403, "/roots/new": 200} {
		body := fmt.Sprintf(`{"source_paths":["part",%q],"destination":"whole"}`, source)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, stand.API+"/files/compose", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := s.via(sb).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("compose with %s: %d, want %d", source, resp.StatusCode, want)
		}
		run(t, sb, "echo mine >part", 0)
	}
	if got := run(t, sb, "cat whole; sudo find /vault -printf '%u %m %y %P\\n' | sort", 0); got != "mine\nxroot 600 f key\nroot 700 d \nuser 644 f deep/down/new\nuser 644 f other\nuser 755 d deep\nuser 755 d deep/down" {
		t.Errorf("afterwards: %q", got)
	}
}
