package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// brokenOff is a body whose connection ends in the middle.
type brokenOff struct{ io.Reader }

func (b brokenOff) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		err = errors.New("the client is gone")
	}
	return n, err
}

// give creates a file of the tester's.
func (h *harness) give(path, content string) string {
	h.t.Helper()
	full := filepath.Join(h.home, path)
	h.write(full, content)
	if h.root {
		if err := os.Lchown(full, testUID, testUID); err != nil {
			h.t.Fatal(err)
		}
	}
	return full
}

func TestAnUploadThatBreaksOffLeavesWhatWasThere(t *testing.T) {
	h := claimed(t)
	for name, size := range map[string]int{"few": 10, "many": 3 * headSize} {
		for _, there := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s octets, over a file %v", name, there), func(t *testing.T) {
				// A folder of its own: the agent may still be about the one before.
				folder := fmt.Sprintf("%s-%v", name, there)
				d := h.dir(folder)
				if there {
					h.give(folder+"/f", "good")
				}
				req, err := http.NewRequest("POST", h.url+"/files?path="+folder+"/f", brokenOff{bytes.NewReader(make([]byte, size))})
				if err != nil {
					t.Fatal(err)
				}
				req.Header.Set("X-Access-Token", testToken)
				req.Header.Set("Content-Type", "application/octet-stream")
				if resp, err := h.http.Do(req); err == nil {
					resp.Body.Close()
					t.Errorf("the upload ended with %d", resp.StatusCode)
				}
				eventually(t, "what was there is all there is", func() bool {
					left, err := os.ReadDir(d)
					if err != nil || len(left) > 1 || there != (len(left) == 1) {
						return false
					}
					raw, _ := os.ReadFile(d + "/f")
					return !there || string(raw) == "good"
				})
			})
		}
	}
}

func TestAnUploadKeepsWhatAFileIs(t *testing.T) {
	h := claimed(t)
	d := h.dir("kept")
	body := strings.Repeat("x", 2*headSize)
	upload := func(path string) answer {
		t.Helper()
		return h.do("POST", "/files?path="+path, strings.NewReader(body), "Content-Type", "application/octet-stream", "X-Metadata-A", "b")
	}
	whole := func(path string) {
		t.Helper()
		if raw, err := os.ReadFile(path); string(raw) != body {
			t.Errorf("%s has %d octets (%v), want %d", path, len(raw), err, len(body))
		}
	}
	if err := os.Chmod(h.give("kept/mode", "old"), 0o751); err != nil {
		t.Fatal(err)
	}
	h.give("kept/one", "old")
	if err := os.Link(d+"/one", d+"/two"); err != nil {
		t.Fatal(err)
	}
	h.give("kept/to", "old")
	if err := os.Symlink("to", d+"/link"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nothing", d+"/dangling"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"mode", "one", "link", "dangling", strings.Repeat("n", 255)} {
		if got := upload("kept/" + name); got.StatusCode != 200 {
			t.Errorf("%s: %d %s", name, got.StatusCode, got.body)
		}
		whole(d + "/" + name)
	}
	whole(d + "/two") // one's other name
	whole(d + "/to")  // where link leads
	whole(d + "/nothing")
	if fi, err := os.Stat(d + "/mode"); err != nil || fi.Mode().Perm() != 0o751 {
		t.Errorf("the mode is now %v (%v)", fi.Mode(), err)
	}
	if fi, err := os.Lstat(d + "/link"); err != nil || fi.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link is now %v (%v)", fi.Mode(), err)
	}
	if h.root {
		if err := os.Chmod(h.give("kept/readonly", "old"), 0o444); err != nil {
			t.Fatal(err)
		}
		if got := upload("kept/readonly"); got.StatusCode != 200 {
			t.Errorf("a file without the right to write: %d %s", got.StatusCode, got.body)
		}
		whole(d + "/readonly")
	}
	for _, dir := range []string{d, h.agent.cfg.Spool} {
		left, err := filepath.Glob(dir + "/*[0-9]*")
		if err != nil || len(left) > 0 {
			t.Errorf("left behind: %v %v", left, err)
		}
	}
}

func TestContentFillsAFileWhateverItHeld(t *testing.T) {
	dir := t.TempDir()
	for _, size := range []int{0, 1, copyBuffer - 1, copyBuffer, copyBuffer + 1, 3*copyBuffer + 7} {
		want := make([]byte, size)
		for i := range want {
			want[i] = byte(i * 7 / 3)
		}
		for _, old := range []int{0, 1, copyBuffer, 2*copyBuffer + 5, 4 * copyBuffer} {
			f, err := os.Create(dir + "/f")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.Write(bytes.Repeat([]byte{0xff}, old)); err != nil {
				t.Fatal(err)
			}
			c, err := spool{dir: dir + "/spool"}.collect(bytes.NewReader(want), func() error { return nil })
			if err != nil {
				t.Fatal(err)
			}
			if err := new(turns).fill(c, f); err != nil {
				t.Error(err)
			}
			c.close()
			f.Close()
			if got, err := os.ReadFile(dir + "/f"); !bytes.Equal(got, want) {
				t.Errorf("%d octets over %d: %d, or others (%v)", size, old, len(got), err)
			}
		}
	}
}

func TestNamesMayHoldEveryOctet(t *testing.T) {
	h := claimed(t)
	d := h.dir("names")
	for b := 1; b < 256; b++ {
		if b == '/' {
			continue
		}
		name := "n" + string([]byte{byte(b)}) + "m"
		at := "/files?path=" + url.QueryEscape("names/"+name)
		want := fmt.Sprint("contents ", b)
		if got := h.do("POST", at, strings.NewReader(want), "Content-Type", "application/octet-stream"); got.StatusCode != 200 {
			t.Errorf("octet %#x: %d %s", b, got.StatusCode, got.body)
		}
		if raw, err := os.ReadFile(d + "/" + name); string(raw) != want {
			t.Errorf("octet %#x: %q %v", b, raw, err)
		}
		if got := h.do("GET", at, nil); got.body != want {
			t.Errorf("octet %#x comes back as %q", b, got.body)
		}
	}
	if got := h.do("GET", "/files?path=names/a%00b", nil); got.StatusCode != 400 || !strings.Contains(got.body, "NUL") {
		t.Errorf("NUL: %d %s", got.StatusCode, got.body)
	}
	if got := h.do("POST", "/files?path=names/"+strings.Repeat("n", 256), strings.NewReader(""), "Content-Type", "application/octet-stream"); got.StatusCode != 400 {
		t.Errorf("a name of 256 octets: %d %s", got.StatusCode, got.body)
	}
	deep := "names" + strings.Repeat("/d", 1500)
	if got := h.do("POST", "/files?path="+deep, strings.NewReader("x"), "Content-Type", "application/octet-stream"); got.StatusCode != 200 {
		t.Errorf("1500 levels deep: %d %s", got.StatusCode, got.body)
	}
	if got := h.do("POST", "/files?path=names"+strings.Repeat("/d", 2100), strings.NewReader("x"), "Content-Type", "application/octet-stream"); got.StatusCode != 400 {
		t.Errorf("a path beyond the kernel's: %d %s", got.StatusCode, got.body)
	}
}

func TestTheAgentsOwnMemoryIsNobodysFile(t *testing.T) {
	h := claimed(t)
	h.dir("w")
	for name, to := range map[string]string{"environ": "/proc/self/environ", "maps": "/proc/thread-self/maps", "mem": "/proc/self/mem"} {
		if err := os.Symlink(to, filepath.Join(h.home, name)); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{name, to} {
			if got := h.do("GET", "/files?path="+path, nil); got.StatusCode != 403 {
				t.Errorf("GET %s: %d %.80q, want 403", path, got.StatusCode, got.body)
			}
			if got := h.do("POST", "/files?path="+path, strings.NewReader("x"), "Content-Type", "application/octet-stream"); got.StatusCode != 403 {
				t.Errorf("POST %s: %d %.80q, want 403", path, got.StatusCode, got.body)
			}
		}
	}
}
