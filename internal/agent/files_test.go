package agent

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"mime"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	pb "github.com/cordonhq/cordon/api/gen/agent/filesystem"
)

// form is a multipart body; names and contents alternate.
func form(t *testing.T, field string, files ...string) (string, *bytes.Buffer) {
	t.Helper()
	var buf bytes.Buffer
	w := multipart.NewWriter(&buf)
	for i := 0; i < len(files); i += 2 {
		part, err := w.CreatePart(textproto.MIMEHeader{
			"Content-Disposition": {fmt.Sprintf(`form-data; name=%q; filename=%q`, field, files[i])},
			"Content-Type":        {"application/octet-stream"},
		})
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(part, files[i+1])
	}
	w.Close()
	return w.FormDataContentType(), &buf
}

func zipped(t *testing.T, text string) string {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	io.WriteString(w, text)
	w.Close()
	return buf.String()
}

func (h *harness) put(path, content string) {
	h.t.Helper()
	got := h.do("POST", "/files?path="+url.QueryEscape(path), strings.NewReader(content), "Content-Type", "application/octet-stream")
	if got.StatusCode != 200 {
		h.t.Fatalf("write %s: %d %s", path, got.StatusCode, got.body)
	}
}

func TestUploads(t *testing.T) {
	h := claimed(t)
	one := func(path string) string {
		return fmt.Sprintf(`[{"name":%q,"path":%q,"type":"file"}]`, filepath.Base(path), path)
	}
	kind, body := form(t, "file", "/x/ignored", "by query")
	kind2, body2 := form(t, "file", h.home+"/m/a.txt", "first", "rel/b.txt", "second")
	kind3, body3 := form(t, "other", "x", "not a file")
	for _, c := range []struct {
		name, query, kind, enc string
		body                   io.Reader
		want                   string
		file, content          string
	}{
		{"a form with the path in the query", "path=q/one.txt", kind, "", body, one(h.home + "/q/one.txt"), "q/one.txt", "by query"},
		{"a form of several files with slashes in their names", "", kind2, "", body2,
			fmt.Sprintf(`[{"name":"a.txt","path":"%[1]s/m/a.txt","type":"file"},{"name":"b.txt","path":"%[1]s/rel/b.txt","type":"file"}]`, h.home), "rel/b.txt", "second"},
		{"a form with other fields only", "", kind3, "", body3, `[]`, "", ""},
		{"an octet stream", "path=o.bin", "application/octet-stream", "", strings.NewReader("\x00\x01"), one(h.home + "/o.bin"), "o.bin", "\x00\x01"},
		{"a gzipped octet stream", "path=z", "application/octet-stream", "gzip", strings.NewReader(zipped(t, "unzipped")), one(h.home + "/z"), "z", "unzipped"},
		{"an empty file", "path=e", "application/octet-stream", "", strings.NewReader(""), one(h.home + "/e"), "e", ""},
		{"a shorter file over a longer one", "path=o.bin", "application/octet-stream", "", strings.NewReader("s"), one(h.home + "/o.bin"), "o.bin", "s"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := h.do("POST", "/files?"+c.query, c.body, "Content-Type", c.kind, "Content-Encoding", c.enc)
			if got.StatusCode != 200 || got.body != c.want {
				t.Fatalf("%d %s, want %s", got.StatusCode, got.body, c.want)
			}
			if c.file == "" {
				return
			}
			content, err := os.ReadFile(filepath.Join(h.home, c.file))
			if err != nil || string(content) != c.content {
				t.Errorf("%q %v, want %q", content, err, c.content)
			}
			for p := c.file; p != "."; p = filepath.Dir(p) {
				fi, err := os.Stat(filepath.Join(h.home, p))
				if err != nil {
					t.Fatal(err)
				}
				if uid := fi.Sys().(*syscall.Stat_t).Uid; h.root && uid != testUID {
					t.Errorf("%s belongs to %d, want the user", p, uid)
				}
			}
		})
	}
}

func TestBadUploadsSayWhy(t *testing.T) {
	h := claimed(t)
	if err := os.Mkdir(h.home+"/dir", 0o777); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(h.home+"/fifo", 0o666); err != nil {
		t.Fatal(err)
	}
	h.write(h.home+"/plain", "x")
	kind, noName := form(t, "file", "", "x")
	kind2, twice := form(t, "file", "same", "1", "same", "2")
	octets := "application/octet-stream"
	for _, c := range []struct {
		name, query, kind, enc, body string
		status                       int
		text                         string
	}{
		{"no path anywhere", "", kind, "", noName.String(), 400, "no filename"},
		{"an octet stream without a path", "", octets, "", "x", 400, "path is missing"},
		{"two parts for one path", "", kind2, "", twice.String(), 400, "same path"},
		{"a directory", "path=dir", octets, "", "x", 400, "is a directory"},
		{"a named pipe", "path=fifo", octets, "", "x", 400, "not a regular file"},
		{"a file as directory", "path=plain/sub", octets, "", "x", 400, "not a directory"},
		{"a name too long", "path=" + strings.Repeat("n", 300), octets, "", "x", 400, "too long"},
		{"a NUL in the path", "path=a%00b", octets, "", "x", 400, "NUL byte"},
		{"not gzip", "path=g", octets, "gzip", "plain", 400, "not gzip"},
		{"half gzip", "path=g", octets, "gzip", zipped(t, strings.Repeat("data", 1000))[:30], 400, "broken off"},
		{"another encoding", "path=g", octets, "br", "x", 400, `content encoding \"br\"`},
		{"another content type", "path=g", "text/plain", "", "x", 400, `content type \"text/plain\"`},
		{"a form without boundary", "path=g", "multipart/form-data", "", "x", 400, "no boundary"},
		{"a form that never ends", "path=g", kind2, "", twice.String()[:60], 400, "broken"},
		{"an unknown user", "path=g&username=nobodyhere", octets, "", "x", 401, "invalid username: 'nobodyhere'"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := h.do("POST", "/files?"+c.query, strings.NewReader(c.body), "Content-Type", c.kind, "Content-Encoding", c.enc)
			if got.StatusCode != c.status || !strings.Contains(got.body, c.text) || !strings.Contains(got.body, `"code":`+strconv.Itoa(c.status)) {
				t.Errorf("%d %s, want %d with %q", got.StatusCode, got.body, c.status, c.text)
			}
		})
	}
}

func TestDownloads(t *testing.T) {
	h := claimed(t)
	text := strings.Repeat("compressible ", 1000)
	noise := make([]byte, 20000)
	for i := range noise {
		noise[i] = byte(rand.Uint32())
	}
	h.write(h.home+"/t.txt", text)
	h.write(h.home+"/noise", string(noise))
	h.write(h.home+"/small", "tiny")
	h.write(h.home+"/empty", "")
	if err := os.Mkdir(h.home+"/dir", 0o777); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(h.home+"/fifo", 0o666); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, path, accept, rng string
		status                  int
		body, enc, length       string
	}{
		{"a file", "t.txt", "", "", 200, text, "", "13000"},
		{"compressed as Node asks", "t.txt", "gzip, deflate", "", 200, text, "gzip", ""},
		{"gzip refused", "t.txt", "gzip;q=0", "", 200, text, "", "13000"},
		{"only gzip accepted", "small", "gzip, identity;q=0", "", 200, "tiny", "gzip", ""},
		{"nothing accepted", "t.txt", "br, *;q=0", "", 406, "", "", ""},
		{"noise is not compressed", "noise", "gzip", "", 200, string(noise), "", "20000"},
		{"small files are not compressed", "small", "gzip", "", 200, "tiny", "", "4"},
		{"a range", "t.txt", "gzip", "bytes=3-9", 206, text[3:10], "", "7"},
		{"a range behind the end", "small", "", "bytes=9-", 416, "", "", ""},
		{"an empty file", "empty", "gzip", "", 200, "", "", "0"},
		{"a missing file", "missing", "", "", 404, "", "", ""},
		{"a directory", "dir", "", "", 400, "", "", ""},
		{"a named pipe nobody writes", "fifo", "", "", 400, "", "", ""},
		{"home itself", "", "", "", 400, "", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := h.do("GET", "/files?path="+c.path, nil, "Accept-Encoding", c.accept, "Range", c.rng)
			if got.StatusCode != c.status || got.Header.Get("Content-Encoding") != c.enc {
				t.Fatalf("%d %v %s", got.StatusCode, got.Header, got.body)
			}
			if c.status >= 400 {
				return
			}
			body := got.body
			if c.enc == "gzip" {
				zr, err := gzip.NewReader(strings.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				raw, err := io.ReadAll(zr)
				if err != nil {
					t.Fatal(err)
				}
				body = string(raw)
			}
			if body != c.body {
				t.Errorf("%d bytes, want %d", len(body), len(c.body))
			}
			if c.length != "" && got.Header.Get("Content-Length") != c.length {
				t.Errorf("Content-Length %q, want %s", got.Header.Get("Content-Length"), c.length)
			}
			if got.Header.Get("Vary") != "Accept-Encoding" {
				t.Errorf("Vary: %q", got.Header.Get("Vary"))
			}
		})
	}
	if got := h.do("GET", "/files?path=/proc/stat", nil); got.StatusCode != 200 || !strings.HasPrefix(got.body, "cpu") {
		t.Errorf("a file of procfs: %d %q", got.StatusCode, got.body)
	}
}

func TestADownloadHasItsName(t *testing.T) {
	h := claimed(t)
	for name, want := range map[string]string{
		"report.pdf":      `inline; filename="report.pdf"`,
		"a b;c=d'.txt":    `inline; filename="a b;c=d'.txt"`,
		"Übersicht 漢.pdf": `inline; filename="_bersicht _.pdf"; filename*=UTF-8''%C3%9Cbersicht%20%E6%BC%A2.pdf`,
		`q"u\o%te`:        `inline; filename="q_u_o_te"; filename*=UTF-8''q%22u%5Co%25te`,
		"line\r\nbreak":   `inline; filename="line__break"; filename*=UTF-8''line%0D%0Abreak`,
		"\xff":            `inline; filename="_"; filename*=UTF-8''%EF%BF%BD`,
	} {
		h.put("names/"+name, "x")
		for _, method := range []string{"GET", "HEAD"} {
			got := h.do(method, "/files?path="+url.QueryEscape("names/"+name), nil)
			if header := got.Header.Get("Content-Disposition"); got.StatusCode != 200 || header != want {
				t.Errorf("%s %q: %d %s, want %s", method, name, got.StatusCode, header, want)
			}
			if _, params, err := mime.ParseMediaType(got.Header.Get("Content-Disposition")); err != nil || params["filename"] != strings.ToValidUTF8(name, "\ufffd") {
				t.Errorf("%q is understood as %q (%v)", name, params["filename"], err)
			}
		}
	}
	if got := h.do("GET", "/files?path=missing", nil); got.Header.Get("Content-Disposition") != "" {
		t.Error("what is missing has a name")
	}
}

func FuzzDisposition(f *testing.F) {
	for _, s := range []string{"report.pdf", "", "Ü", "\"", "a\nb", "\xff", "a'b%c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		got := disposition(name)
		_, params, err := mime.ParseMediaType(got)
		if err != nil || params["filename"] != strings.ToValidUTF8(name, "\ufffd") || strings.ContainsAny(got, "\r\n\x00") {
			t.Errorf("%q: %s: %v", name, got, err)
		}
	})
}

func TestFilesAreReachedWithRootsRightsAndBecomeTheUsers(t *testing.T) {
	needRoot(t)
	h := claimed(t)
	outer := filepath.Dir(h.home) // root's, readable
	secret := outer + "/secret"
	if err := os.Mkdir(secret, 0o700); err != nil {
		t.Fatal(err)
	}
	put := func(path string, mode os.FileMode) {
		t.Helper()
		if err := errors.Join(os.WriteFile(path, []byte("root's"), 0o600), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	put(secret+"/key", 0o600)
	put(outer+"/tool", 0o755|os.ModeSetuid)
	put(outer+"/shared", 0o666)
	if err := errors.Join(os.Symlink(secret, outer+"/rootslink"), os.Symlink("rootslink/new", outer+"/tonew")); err != nil {
		t.Fatal(err)
	}
	if got := h.do("GET", "/files?path="+secret+"/key", nil); got.body != "root's" {
		t.Errorf("reading: %d %s", got.StatusCode, got.body)
	}
	long := strings.Repeat("new", headSize)
	for _, path := range []string{outer + "/x", outer + "/deep/down/x", secret + "/key", outer + "/tool", outer + "/rootslink/a", outer + "/tonew", outer + "/shared"} {
		for _, body := range []string{"new", long} {
			if got := h.do("POST", "/files?path="+path, strings.NewReader(body), "Content-Type", "application/octet-stream"); got.StatusCode != 200 {
				t.Errorf("writing %s: %d %s", path, got.StatusCode, got.body)
			}
			if raw, _ := os.ReadFile(path); string(raw) != body {
				t.Errorf("%s has %d octets, want %d", path, len(raw), len(body))
			}
		}
	}
	owner := func(path string) string {
		fi, err := os.Stat(path)
		if err != nil {
			t.Error(err)
			return ""
		}
		st := fi.Sys().(*syscall.Stat_t)
		return fmt.Sprintf("%d:%d %v", st.Uid, st.Gid, fi.Mode())
	}
	for path, want := range map[string]string{
		outer + "/x": "4242:4242 -rw-r--r--", outer + "/deep": "4242:4242 drwxr-xr-x", outer + "/deep/down": "4242:4242 drwxr-xr-x", outer + "/deep/down/x": "4242:4242 -rw-r--r--",
		secret: "0:0 drwx------", secret + "/key": "4242:4242 -rw-------", outer + "/tool": "4242:4242 -rwxr-xr-x", secret + "/new": "4242:4242 -rw-r--r--",
		outer + "/shared": "0:0 -rw-rw-rw-", // the user needed no rights but his own
	} {
		if got := owner(path); got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
	f, ctx := h.files(), t.Context()
	if _, err := f.MakeDir(ctx, connect.NewRequest(&pb.MakeDirRequest{Path: outer + "/made/here"})); err != nil || owner(outer+"/made/here") != "4242:4242 drwxr-xr-x" {
		t.Errorf("MakeDir: %v, %s", err, owner(outer+"/made/here"))
	}
	if _, err := f.Move(ctx, connect.NewRequest(&pb.MoveRequest{Source: outer + "/tonew", Destination: outer + "/made/link"})); err != nil {
		t.Errorf("Move: %v", err)
	}
	if fi, err := os.Lstat(outer + "/made/link"); err != nil || fi.Mode()&os.ModeSymlink == 0 {
		t.Errorf("a link was moved: %v, %v", fi, err)
	}
	if _, err := f.Remove(ctx, connect.NewRequest(&pb.RemoveRequest{Path: outer + "/rootslink"})); err != nil {
		t.Errorf("Remove: %v", err)
	}
	if raw, err := os.ReadFile(secret + "/new"); err != nil || len(raw) == 0 {
		t.Errorf("removing a link removed what it leads to: %v", err)
	}
	if _, err := f.Remove(ctx, connect.NewRequest(&pb.RemoveRequest{Path: secret})); err != nil {
		t.Errorf("Remove: %v", err)
	}
	if _, err := os.Stat(secret); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
	if got := h.do("POST", "/files/compose", strings.NewReader(`{"source_paths":["`+outer+`/x"],"destination":"`+outer+`/composed"}`)); got.StatusCode != 200 || owner(outer+"/composed") != "4242:4242 -rw-r--r--" {
		t.Errorf("compose: %d %s", got.StatusCode, got.body)
	}
}

// The programs of a sandbox, who have no token, lay links in the way of a request.
func TestAUsersLinksDoNotLendRootsRights(t *testing.T) {
	needRoot(t)
	h := claimed(t)
	outer := filepath.Dir(h.home)
	secret := outer + "/secret"
	if err := errors.Join(os.Mkdir(secret, 0o700), os.WriteFile(secret+"/key", []byte("root's"), 0o600), os.WriteFile(outer+"/readonly", []byte("ro"), 0o600)); err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{"link": secret + "/key", "linkdir": secret, "ro": outer + "/readonly", "dangling": outer + "/made", "chain": "linkdir/key"} {
		if err := errors.Join(os.Symlink(to, h.home+"/"+link), os.Lchown(h.home+"/"+link, testUID, testUID)); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{"link", "linkdir/new", "linkdir/d/new", "ro", "dangling", "chain"} {
		for _, size := range []int{4, 2 * headSize} {
			if got := h.do("POST", "/files?path="+path, bytes.NewReader(make([]byte, size)), "Content-Type", "application/octet-stream"); got.StatusCode != 403 {
				t.Errorf("POST %s: %d %s, want 403", path, got.StatusCode, got.body)
			}
		}
	}
	f, ctx := h.files(), t.Context()
	for name, call := range map[string]func() error{
		"MakeDir": func() error {
			_, err := f.MakeDir(ctx, connect.NewRequest(&pb.MakeDirRequest{Path: "linkdir/d"}))
			return err
		},
		"Remove": func() error {
			_, err := f.Remove(ctx, connect.NewRequest(&pb.RemoveRequest{Path: "linkdir/key"}))
			return err
		},
		"Move from": func() error {
			_, err := f.Move(ctx, connect.NewRequest(&pb.MoveRequest{Source: "linkdir/key", Destination: "mine"}))
			return err
		},
		"Move to": func() error {
			_, err := f.Move(ctx, connect.NewRequest(&pb.MoveRequest{Source: "ro", Destination: "linkdir/ro"}))
			return err
		},
	} {
		if err := call(); code(err) != "permission_denied" {
			t.Errorf("%s: %v, want permission_denied", name, err)
		}
	}
	if got := h.do("POST", "/files/compose", strings.NewReader(`{"source_paths":["link"],"destination":"linkdir/composed"}`)); got.StatusCode != 403 {
		t.Errorf("compose: %d %s", got.StatusCode, got.body)
	}
	if raw, _ := os.ReadFile(secret + "/key"); string(raw) != "root's" {
		t.Errorf("root's file is now %q", raw)
	}
	if left, err := os.ReadDir(secret); err != nil || len(left) != 1 {
		t.Errorf("root's folder has %v (%v)", left, err)
	}
	// Root may, and leaves the agent's own rights as they were.
	if got := h.do("POST", "/files?username=root&path=link", strings.NewReader("mine"), "Content-Type", "application/octet-stream"); got.StatusCode != 200 {
		t.Errorf("as root: %d %s", got.StatusCode, got.body)
	}
}

func TestRightsReturnToEveryThread(t *testing.T) {
	needRoot(t)
	u := user{Name: "tester", UID: testUID, GID: testUID, Groups: []uint32{testUID, 4243}, Home: "/"}
	done := make(chan error, 50)
	for range cap(done) {
		go func() {
			done <- u.as(func() error {
				if unix.Geteuid() != testUID || unix.Getegid() != testUID {
					return fmt.Errorf("acts as %d:%d", unix.Geteuid(), unix.Getegid())
				}
				return nil
			})
		}()
	}
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if err := u.as(func() error { panic("boom") }); err == nil || !strings.Contains(err.Error(), "boom") {
		t.Errorf("a panic under a user: %v", err)
	}
	eventually(t, "every thread is root's again, or gone", func() bool {
		tasks, err := filepath.Glob("/proc/self/task/*/status")
		if err != nil || len(tasks) == 0 {
			t.Fatal(err)
		}
		for _, task := range tasks {
			raw, err := os.ReadFile(task)
			uid, gid := strings.Contains(string(raw), "Uid:\t0\t0\t0\t0\n"), strings.Contains(string(raw), "Gid:\t0\t0\t0\t0\n")
			if err == nil && (!uid || !gid) {
				return false
			}
		}
		return true
	})
}

func TestAccountsAreThoseOfTheMoment(t *testing.T) {
	h := claimed(t)
	for range 2 {
		if got := h.do("GET", "/files?path=x&username=added", nil); got.StatusCode != 401 {
			t.Fatalf("before: %d %s", got.StatusCode, got.body)
		}
	}
	h.write(h.etc+"/passwd", read(t, h.etc+"/passwd")+"added:x:4244:4244::/nowhere:/bin/sh\n")
	if got := h.do("GET", "/files?path=/x&username=added", nil); got.StatusCode != 404 {
		t.Errorf("an added user: %d %s", got.StatusCode, got.body)
	}
	h.write(h.etc+"/group", read(t, h.etc+"/group")+"late:x:4245:added\n")
	if u, err := h.agent.users.lookup("added"); err != nil || !slices.Equal(u.Groups, []uint32{4244, 4245}) {
		t.Errorf("an added group: %+v %v", u, err)
	}
}

func TestMetadataTravelsInAttributes(t *testing.T) {
	h := claimed(t)
	if err := unix.Setxattr(h.home, "user.e2b.probe", []byte("1"), 0); err != nil {
		t.Skipf("the temporary directory has no extended attributes: %v", err)
	}
	up := func(headers ...string) answer {
		return h.do("POST", "/files?path=f", strings.NewReader("x"), append([]string{"Content-Type", "application/octet-stream"}, headers...)...)
	}
	got := up("X-Metadata-Author", "me", "x-metadata-b", "2")
	if want := fmt.Sprintf(`[{"name":"f","path":"%s/f","type":"file","metadata":{"author":"me","b":"2"}}]`, h.home); got.body != want {
		t.Errorf("%s, want %s", got.body, want)
	}
	if err := unix.Setxattr(h.home+"/f", "user.other", []byte("stays"), 0); err != nil {
		t.Fatal(err)
	}
	stat := func() map[string]string {
		resp, err := h.files().Stat(t.Context(), connect.NewRequest(&pb.StatRequest{Path: "f"}))
		if err != nil {
			t.Fatal(err)
		}
		return resp.Msg.GetEntry().GetMetadata()
	}
	if diff := cmp.Diff(map[string]string{"author": "me", "b": "2"}, stat()); diff != "" {
		t.Error(diff)
	}
	up("X-Metadata-B", "3")
	if diff := cmp.Diff(map[string]string{"b": "3"}, stat()); diff != "" {
		t.Errorf("a new write must replace the whole set: %s", diff)
	}
	up()
	if got := stat(); len(got) != 0 {
		t.Errorf("a write without metadata left %v", got)
	}
	buf := make([]byte, 10)
	if n, err := unix.Getxattr(h.home+"/f", "user.other", buf); err != nil || string(buf[:n]) != "stays" {
		t.Errorf("another attribute: %q %v", buf[:n], err)
	}
}

func TestSignedURLs(t *testing.T) {
	// The vector is that of the published SDKs.
	const vector = "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E"
	if got := sign("hello.txt", opRead, "user", testToken, ""); got != vector {
		t.Fatalf("sign: %s, want %s", got, vector)
	}
	h := claimed(t)
	h.put("hello.txt", "signed")
	soon, past := strconv.FormatInt(time.Now().Add(time.Minute).Unix(), 10), strconv.FormatInt(time.Now().Add(-time.Minute).Unix(), 10)
	q := func(sig, exp, user string) string {
		v := url.Values{"path": {"hello.txt"}}
		for k, val := range map[string]string{"signature": sig, "signature_expiration": exp, "username": user} {
			if val != "" {
				v.Set(k, val)
			}
		}
		return v.Encode()
	}
	for _, c := range []struct {
		name, method, query, token string
		status                     int
		text                       string
	}{
		{"a signature for reading", "GET", q(sign("hello.txt", opRead, "", testToken, ""), "", ""), "", 200, "signed"},
		{"with a user", "GET", q(sign("hello.txt", opRead, "tester", testToken, ""), "", "tester"), "", 200, "signed"},
		{"not yet expired", "GET", q(sign("hello.txt", opRead, "", testToken, soon), soon, ""), "", 200, "signed"},
		{"expired", "GET", q(sign("hello.txt", opRead, "", testToken, past), past, ""), "", 401, `{"code":401,"message":"signature is already expired"}`},
		{"an expiry that was not signed", "GET", q(sign("hello.txt", opRead, "", testToken, past), soon, ""), "", 401, `{"code":401,"message":"invalid signature"}`},
		{"an expiry taken away", "GET", q(sign("hello.txt", opRead, "", testToken, past), "", ""), "", 401, `{"code":401,"message":"invalid signature"}`},
		{"an expiry that is no number", "GET", q(sign("hello.txt", opRead, "", testToken, "x"), "x", ""), "", 401, `{"code":401,"message":"invalid signature"}`},
		{"none at all", "GET", q("", "", ""), "", 401, `{"code":401,"message":"missing signature query parameter"}`},
		{"for another user", "GET", q(sign("hello.txt", opRead, "", testToken, ""), "", "root"), "", 401, `{"code":401,"message":"invalid signature"}`},
		{"for reading used to write", "POST", q(sign("hello.txt", opRead, "", testToken, ""), "", ""), "", 401, `{"code":401,"message":"invalid signature"}`},
		{"for writing", "POST", q(sign("hello.txt", opWrite, "", testToken, ""), "", ""), "", 200, `"name":"hello.txt"`},
		{"a token instead", "GET", q("", "", ""), testToken, 200, ""},
		{"a wrong token is not saved by a signature", "GET", q(sign("hello.txt", opRead, "", testToken, ""), "", ""), "wrong", 401, "unauthorized access"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := h.do(c.method, "/files?"+c.query, strings.NewReader("new"), "X-Access-Token", c.token, "Content-Type", "application/octet-stream")
			if got.StatusCode != c.status || !strings.Contains(got.body, c.text) {
				t.Errorf("%d %s, want %d %s", got.StatusCode, got.body, c.status, c.text)
			}
		})
	}
	// uploadUrl() without a path signs the empty one; the form names the file.
	kind, body := form(t, "file", "from-form", "x")
	got := h.do("POST", "/files?signature="+url.QueryEscape(sign("", opWrite, "", testToken, "")), body, "X-Access-Token", "", "Content-Type", kind)
	if got.StatusCode != 200 {
		t.Errorf("an upload URL without path: %d %s", got.StatusCode, got.body)
	}
}

func TestCompose(t *testing.T) {
	h := claimed(t)
	h.put("p1", "one ")
	h.put("p2", "two")
	h.put("out/old", "old")
	body := func(dst string, src ...string) io.Reader {
		raw, _ := json.Marshal(map[string]any{"source_paths": src, "destination": dst})
		return bytes.NewReader(raw)
	}
	for name, c := range map[string]struct {
		body   io.Reader
		status int
	}{
		"no sources":                {body("x"), 400},
		"no destination":            {body("", "p1"), 400},
		"a source that is missing":  {body("out/old", "p1", "missing"), 404},
		"a source that is a folder": {body("out/old", "p1", "out"), 400},
		"the destination itself":    {body("p1", "p1"), 400},
		"not JSON":                  {strings.NewReader("x"), 400},
		"over 1 MiB":                {strings.NewReader(`{"destination":"` + strings.Repeat("x", 1<<20) + `"}`), 400},
	} {
		if got := h.do("POST", "/files/compose", c.body); got.StatusCode != c.status {
			t.Errorf("%s: %d %s, want %d", name, got.StatusCode, got.body, c.status)
		}
	}
	if raw, _ := os.ReadFile(h.home + "/out/old"); string(raw) != "old" {
		t.Errorf("a failed composition left %q", raw)
	}
	got := h.do("POST", "/files/compose", body("out/new", "p1", "p2"))
	if want := fmt.Sprintf(`{"name":"new","path":"%s/out/new","type":"file"}`, h.home); got.StatusCode != 200 || got.body != want {
		t.Errorf("%d %s, want %s", got.StatusCode, got.body, want)
	}
	if raw, _ := os.ReadFile(h.home + "/out/new"); string(raw) != "one two" {
		t.Errorf("composed %q", raw)
	}
	left, err := filepath.Glob(h.home + "/*")
	if err != nil || len(left) != 1 {
		t.Errorf("left: %v %v", left, err)
	}
}

func TestFilesystemAnswers(t *testing.T) {
	h := claimed(t)
	f, ctx := h.files(), t.Context()
	h.put("d/a.txt", "12345")
	h.put("d/sub/deep/x", "")
	h.put("d/\xff\xfe", "odd name")
	for link, to := range map[string]string{"d/l": "a.txt", "d/dang": "nowhere", "dirlink": "d"} {
		if err := os.Symlink(to, filepath.Join(h.home, link)); err != nil {
			t.Fatal(err)
		}
	}
	at := time.Date(2024, 5, 6, 7, 8, 9, 123000000, time.UTC)
	if err := os.Chtimes(h.home+"/d/a.txt", at, at); err != nil {
		t.Fatal(err)
	}

	got := h.do("POST", "/filesystem.Filesystem/Stat", strings.NewReader(`{"path":"d/a.txt"}`), "Content-Type", "application/json")
	var compact bytes.Buffer
	if err := json.Compact(&compact, []byte(got.body)); err != nil {
		t.Fatal(got.body)
	}
	want := fmt.Sprintf(`{"entry":{"name":"a.txt","type":"FILE_TYPE_FILE","path":"%s/d/a.txt","size":"5","mode":420,"permissions":"-rw-r--r--","owner":"tester","group":"testers","modifiedTime":"2024-05-06T07:08:09.123Z"}}`, h.home)
	if compact.String() != want {
		t.Errorf("Stat: %s, want %s", compact.String(), want)
	}

	list := func(path string, depth uint32) []string {
		t.Helper()
		resp, err := f.ListDir(ctx, connect.NewRequest(&pb.ListDirRequest{Path: path, Depth: depth}))
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, e := range resp.Msg.GetEntries() {
			line := strings.TrimPrefix(e.GetPath(), h.home+"/") + " " + strings.TrimPrefix(e.GetType().String(), "FILE_TYPE_")
			if e.GetIsSymlink() {
				line += " -> " + strings.TrimPrefix(e.GetSymlinkTarget(), h.home+"/")
			}
			out = append(out, line)
		}
		return out
	}
	shallow := []string{"d/a.txt FILE", "d/dang SYMLINK -> d/nowhere", "d/l FILE -> d/a.txt", "d/sub DIRECTORY", "d/� FILE"}
	if diff := cmp.Diff(shallow, list("d", 0)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"d/a.txt FILE", "d/dang SYMLINK -> d/nowhere", "d/l FILE -> d/a.txt", "d/sub DIRECTORY", "d/sub/deep DIRECTORY", "d/� FILE"}, list("d", 2)); diff != "" {
		t.Error(diff)
	}
	if got := list("dirlink", 1)[0]; got != "dirlink/a.txt FILE" {
		t.Errorf("a listing through a link names %q", got)
	}

	for name, c := range map[string]struct {
		call func() error
		want string
	}{
		"stat of a missing path": {func() error { _, err := f.Stat(ctx, connect.NewRequest(&pb.StatRequest{Path: "no"})); return err }, "not_found"},
		"listing a missing path": {func() error { _, err := f.ListDir(ctx, connect.NewRequest(&pb.ListDirRequest{Path: "no"})); return err }, "not_found"},
		"listing a file": {func() error {
			_, err := f.ListDir(ctx, connect.NewRequest(&pb.ListDirRequest{Path: "d/a.txt"}))
			return err
		}, "invalid_argument"},
		"making a directory": {func() error {
			_, err := f.MakeDir(ctx, connect.NewRequest(&pb.MakeDirRequest{Path: "n/e/w"}))
			return err
		}, ""},
		"making an existing directory": {func() error { _, err := f.MakeDir(ctx, connect.NewRequest(&pb.MakeDirRequest{Path: "d"})); return err }, "already_exists"},
		"making a directory of a file": {func() error {
			_, err := f.MakeDir(ctx, connect.NewRequest(&pb.MakeDirRequest{Path: "d/a.txt"}))
			return err
		}, "invalid_argument"},
		"making a directory in a file": {func() error {
			_, err := f.MakeDir(ctx, connect.NewRequest(&pb.MakeDirRequest{Path: "d/a.txt/x"}))
			return err
		}, "invalid_argument"},
		"removing what is missing": {func() error { _, err := f.Remove(ctx, connect.NewRequest(&pb.RemoveRequest{Path: "no"})); return err }, ""},
		"removing a tree": {func() error {
			_, err := f.Remove(ctx, connect.NewRequest(&pb.RemoveRequest{Path: "d/sub"}))
			return err
		}, ""},
		"moving with new parents": {func() error {
			_, err := f.Move(ctx, connect.NewRequest(&pb.MoveRequest{Source: "dirlink", Destination: "p/q/r"}))
			return err
		}, ""},
		"moving what is missing": {func() error {
			_, err := f.Move(ctx, connect.NewRequest(&pb.MoveRequest{Source: "no", Destination: "x"}))
			return err
		}, "not_found"},
		"a NUL in a path": {func() error { _, err := f.Stat(ctx, connect.NewRequest(&pb.StatRequest{Path: "a\x00"})); return err }, "invalid_argument"},
		"a name that is too long": {func() error {
			_, err := f.Stat(ctx, connect.NewRequest(&pb.StatRequest{Path: strings.Repeat("x", 300)}))
			return err
		}, "invalid_argument"},
		"an unknown watcher": {func() error {
			_, err := f.GetWatcherEvents(ctx, connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: "no"}))
			return err
		}, "not_found"},
		"removing an unknown watcher": {func() error {
			_, err := f.RemoveWatcher(ctx, connect.NewRequest(&pb.RemoveWatcherRequest{WatcherId: "no"}))
			return err
		}, "not_found"},
		"watching a file": {func() error {
			_, err := f.CreateWatcher(ctx, connect.NewRequest(&pb.CreateWatcherRequest{Path: "d/a.txt"}))
			return err
		}, "invalid_argument"},
		"watching what is missing": {func() error {
			_, err := f.CreateWatcher(ctx, connect.NewRequest(&pb.CreateWatcherRequest{Path: "no"}))
			return err
		}, "not_found"},
	} {
		if err := c.call(); code(err) != c.want {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func TestMovingAcrossFileSystems(t *testing.T) {
	h := claimed(t)
	shm, err := os.MkdirTemp("/dev/shm", "cordon-agent-test-")
	if err != nil {
		t.Skip("no second file system at /dev/shm")
	}
	t.Cleanup(func() { os.RemoveAll(shm) })
	if err := os.Chmod(shm, 0o777); err != nil {
		t.Fatal(err)
	}
	var a, b unix.Stat_t
	if unix.Stat(shm, &a) != nil || unix.Stat(h.home, &b) != nil || a.Dev == b.Dev {
		t.Skip("/dev/shm is the same file system")
	}
	h.put(shm+"/f", "content")
	if err := os.Chmod(shm+"/f", 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := h.files().Move(t.Context(), connect.NewRequest(&pb.MoveRequest{Source: shm + "/f", Destination: "here/f"})); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(h.home + "/here/f")
	fi, _ := os.Stat(h.home + "/here/f")
	if err != nil || string(raw) != "content" || fi.Mode().Perm() != 0o640 {
		t.Errorf("%q %v %v", raw, fi.Mode(), err)
	}
	if _, err := os.Stat(shm + "/f"); !os.IsNotExist(err) {
		t.Errorf("the source is still there: %v", err)
	}
	h.put(shm+"/dir/f", "content")
	if _, err := h.files().Move(t.Context(), connect.NewRequest(&pb.MoveRequest{Source: shm + "/dir", Destination: "dir"})); code(err) != "failed_precondition" || !strings.Contains(err.Error(), "command mv") {
		t.Errorf("a directory: %v", err)
	}
}

func TestLargeFilesPassInLittleMemory(t *testing.T) {
	h := claimed(t)
	const size = 64 << 20
	got := h.do("POST", "/files?path=big", io.LimitReader(zeros{}, size), "Content-Type", "application/octet-stream")
	if got.StatusCode != http.StatusOK {
		t.Fatalf("%d %s", got.StatusCode, got.body)
	}
	if fi, err := os.Stat(h.home + "/big"); err != nil || fi.Size() != size {
		t.Fatalf("%v %v", fi, err)
	}
	for _, accept := range []string{"identity", "gzip"} {
		req, _ := http.NewRequestWithContext(t.Context(), "GET", h.url+"/files?path=big", nil)
		req.Header.Set("X-Access-Token", testToken)
		req.Header.Set("Accept-Encoding", accept)
		resp, err := h.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if err != nil || accept == "identity" && n != size || accept == "gzip" && (n == 0 || n > size/50) {
			t.Errorf("%s: %d bytes, %v", accept, n, err)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
