package agent

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"connectrpc.com/connect"
)

// httpError is an error with the status the SDKs map to their own.
type httpError struct {
	status int
	text   string
}

func (e httpError) Error() string { return e.text }

// fail answers with err's status, by the same classification as the RPCs.
func fail(w http.ResponseWriter, err error) {
	if h, ok := errors.AsType[httpError](err); ok {
		writeError(w, h.status, h.text)
		return
	}
	status := http.StatusInternalServerError
	switch fileCode(err) {
	case connect.CodeNotFound:
		status = http.StatusNotFound
	case connect.CodePermissionDenied:
		status = http.StatusForbidden
	case connect.CodeInvalidArgument, connect.CodeAlreadyExists:
		status = http.StatusBadRequest
	case connect.CodeFailedPrecondition:
		status = http.StatusConflict
	case connect.CodeResourceExhausted:
		status = http.StatusInsufficientStorage
	}
	text := utf8(err.Error())
	if status == http.StatusInsufficientStorage {
		text = "not enough disk space available: " + text
	}
	writeError(w, status, text)
}

// fileUser is whom a request on /files acts as.
func (a *Agent) fileUser(c *claim, name string) (user, error) {
	u, err := a.userOrDefault(c, name)
	if _, ok := errors.AsType[unknownUser](err); ok {
		return user{}, httpError{http.StatusUnauthorized, err.Error()}
	}
	return u, err
}

// getFiles serves one file's contents.
func (a *Agent) getFiles(w http.ResponseWriter, r *http.Request) {
	c := a.admitFile(w, r, opRead)
	if c == nil {
		return
	}
	q := r.URL.Query()
	u, err := a.fileUser(c, q.Get("username"))
	if err != nil {
		fail(w, err)
		return
	}
	p, err := resolve(q.Get("path"), u, c.DefaultWorkdir)
	if err != nil {
		fail(w, httpError{http.StatusBadRequest, err.Error()})
		return
	}
	f, fi, err := openRegular(p)
	if err != nil {
		fail(w, err)
		return
	}
	defer f.Close()
	w.Header().Set("Content-Disposition", disposition(path.Base(p)))
	serveFile(w, r, f, fi)
}

// disposition names a download (RFC 6266): in quotes for every client, and beside
// that, where the name needs it, in full (RFC 8187).
func disposition(name string) string {
	plain := strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' || strings.ContainsRune(`"\%`, r) {
			return '_' // clients differ in what they make of these
		}
		return r
	}, name)
	out := `inline; filename="` + plain + `"`
	if plain == name {
		return out
	}
	const attrChar = "!#$&+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	var full strings.Builder
	for _, b := range []byte(utf8(name)) {
		if strings.IndexByte(attrChar, b) >= 0 {
			full.WriteByte(b)
		} else {
			fmt.Fprintf(&full, "%%%02X", b)
		}
	}
	return out + "; filename*=UTF-8''" + full.String()
}

// openRegular opens a regular file for reading, without waiting for the other end of
// a named pipe. It asks for no user: who has the access token may read as root, and
// what is read must go nowhere but to them.
func openRegular(p string) (f *os.File, fi fs.FileInfo, err error) {
	f, err = os.OpenFile(p, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, httpError{http.StatusNotFound, fmt.Sprintf("path '%s' does not exist", utf8(p))}
	}
	if err != nil {
		return nil, nil, err
	}
	if fi, err = f.Stat(); err != nil {
		f.Close()
		return nil, nil, err
	}
	if err := errors.Join(regular(p, fi), notOurs(f, fi)); err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, fi, nil
}

func regular(p string, fi fs.FileInfo) error {
	switch {
	case fi.IsDir():
		return httpError{http.StatusBadRequest, fmt.Sprintf("path '%s' is a directory", utf8(p))}
	case !fi.Mode().IsRegular():
		return httpError{http.StatusBadRequest, fmt.Sprintf("path '%s' is not a regular file", utf8(p))}
	}
	return nil
}

// serveFile answers ranges and conditions as http.ServeContent does, and whole
// files compressed where that is asked for and pays.
func serveFile(w http.ResponseWriter, r *http.Request, f *os.File, fi fs.FileInfo) {
	h := w.Header()
	h.Set("Vary", "Accept-Encoding")
	kind := mime.TypeByExtension(filepath.Ext(fi.Name()))
	if kind == "" {
		kind = "application/octet-stream"
	}
	h.Set("Content-Type", kind)
	h.Set("X-Content-Type-Options", "nosniff")
	if fi.Size() == 0 {
		serveGenerated(w, r, f, fi)
		return
	}
	gz, plain := acceptable(r.Header.Get("Accept-Encoding"))
	whole := r.Method == http.MethodGet
	for _, name := range []string{"Range", "If-Range", "If-Modified-Since", "If-Unmodified-Since", "If-Match", "If-None-Match"} {
		whole = whole && r.Header.Get(name) == ""
	}
	switch {
	case !gz && !plain:
		writeError(w, http.StatusNotAcceptable, "Accept-Encoding refuses both identity and gzip")
	case gz && whole && (!plain || compressible(f, fi.Size())):
		h.Set("Content-Encoding", "gzip")
		h.Set("Last-Modified", fi.ModTime().UTC().Format(http.TimeFormat))
		zw, _ := gzip.NewWriterLevel(w, gzip.BestSpeed) // the level is valid
		if _, err := io.Copy(zw, f); err != nil {
			panic(http.ErrAbortHandler) // break off: a proper end would pass for the whole file
		}
		if err := zw.Close(); err != nil {
			panic(http.ErrAbortHandler)
		}
	default:
		http.ServeContent(w, r, fi.Name(), fi.ModTime(), f)
	}
}

// serveGenerated serves files that claim to be empty: files of procfs are not.
func serveGenerated(w http.ResponseWriter, r *http.Request, f *os.File, fi fs.FileInfo) {
	content, err := io.ReadAll(io.LimitReader(f, maxJSON))
	if err != nil {
		fail(w, err)
		return
	}
	http.ServeContent(w, r, fi.Name(), fi.ModTime(), bytes.NewReader(content))
}

// compressible tries the file's first bytes: media and archives do not shrink,
// and small files are not worth it.
func compressible(f *os.File, size int64) bool {
	const least, sample = 1 << 10, 16 << 10
	if size < least {
		return false
	}
	buf := make([]byte, min(size, sample))
	n, err := f.ReadAt(buf, 0)
	if n == 0 || err != nil && !errors.Is(err, io.EOF) {
		return false
	}
	var out counter
	zw, _ := gzip.NewWriterLevel(&out, gzip.BestSpeed) // the level is valid
	_, _ = zw.Write(buf[:n])                           // counter does not fail
	_ = zw.Close()
	return int64(out) < int64(n)*9/10
}

type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// acceptable reads an Accept-Encoding header (RFC 9110, section 12.5.3).
func acceptable(header string) (gz, plain bool) {
	plain = true
	star, starSet := false, false
	gzSet, plainSet := false, false
	for part := range strings.SplitSeq(header, ",") {
		name, params, _ := strings.Cut(part, ";")
		ok := true
		if q, found := strings.CutPrefix(strings.ReplaceAll(strings.ToLower(params), " ", ""), "q="); found {
			weight, err := strconv.ParseFloat(q, 64)
			ok = err != nil || weight > 0
		}
		switch strings.ToLower(strings.TrimSpace(name)) {
		case "gzip", "x-gzip":
			gz, gzSet = ok, true
		case "identity":
			plain, plainSet = ok, true
		case "*":
			star, starSet = ok, true
		}
	}
	if starSet && !gzSet {
		gz = star
	}
	if starSet && !plainSet {
		plain = star
	}
	return gz, plain
}

// written is one file of an upload's answer; clients compare the keys exactly.
type written struct {
	Name     string            `json:"name"`
	Path     string            `json:"path"`
	Type     string            `json:"type"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

// postCompose joins files into one and removes them: large uploads arrive in parts.
func (a *Agent) postCompose(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Sources     []string `json:"source_paths"`
		Destination string   `json:"destination"`
		Username    string   `json:"username"`
	}
	if err := readJSON(w, r, &in); err != nil {
		fail(w, httpError{http.StatusBadRequest, err.Error()})
		return
	}
	if len(in.Sources) == 0 || in.Destination == "" {
		fail(w, httpError{http.StatusBadRequest, "source_paths and destination must not be empty"})
		return
	}
	c := a.claim.Load()
	u, err := a.fileUser(c, in.Username)
	if err != nil {
		fail(w, err)
		return
	}
	paths := make([]string, 0, len(in.Sources)+1)
	for _, p := range append(in.Sources, in.Destination) {
		abs, err := resolve(p, u, c.DefaultWorkdir)
		if err != nil {
			fail(w, httpError{http.StatusBadRequest, err.Error()})
			return
		}
		paths = append(paths, abs)
	}
	sources, to := paths[:len(in.Sources)], paths[len(in.Sources)]
	up := upload{user: u, spool: a.spool, filling: &a.filling}
	if err := up.compose(sources, to); err != nil {
		fail(w, err)
		return
	}
	writeJSON(w, http.StatusOK, written{Name: utf8(path.Base(to)), Path: utf8(to), Type: "file"})
}

// compose joins the sources before it touches the destination, so that a failure
// leaves both as they were.
func (up upload) compose(sources []string, to string) error {
	for _, s := range sources {
		if s == to {
			return httpError{http.StatusBadRequest, fmt.Sprintf("source path %q is the destination", s)}
		}
	}
	c, err := up.spool.join(sources, up.user.openOwn)
	if err != nil {
		return err
	}
	defer c.close()
	if err := up.store(to, c); err != nil {
		return err
	}
	for _, s := range sources {
		if err := up.user.remove(s); err != nil {
			return err
		}
	}
	return nil
}
