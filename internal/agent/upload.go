package agent

import (
	"bufio"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"mime/multipart"
	"net/http"
	"path"
	"slices"
	"strings"
	"time"
)

// upload is one request to write files.
type upload struct {
	user     user
	workdir  string
	path     string // of the query; "" when the parts name theirs
	metadata map[string]string
	spool    spool
	filling  *turns
}

// postFiles writes one file from the body, or each part of a form.
func (a *Agent) postFiles(w http.ResponseWriter, r *http.Request) {
	c := a.admitFile(w, r, opWrite)
	if c == nil {
		return
	}
	q := r.URL.Query()
	u, err := a.fileUser(c, q.Get("username"))
	if err != nil {
		fail(w, err)
		return
	}
	up := upload{user: u, workdir: c.DefaultWorkdir, path: q.Get("path"), metadata: metadataIn(r.Header), spool: a.spool, filling: &a.filling}
	body, err := plainBody(r)
	if err != nil {
		fail(w, err)
		return
	}
	var done []written
	switch kind := mediaType(r); {
	case kind == "application/octet-stream":
		done, err = up.single(body)
	case strings.HasPrefix(kind, "multipart/"):
		done, err = up.form(r.Header.Get("Content-Type"), body)
	default:
		err = httpError{http.StatusBadRequest, fmt.Sprintf("content type %q: send multipart/form-data or application/octet-stream", kind)}
	}
	if err != nil {
		drainUpload(w, r)
		fail(w, err)
		return
	}
	writeJSON(w, http.StatusOK, done)
}

// drainUpload reads a while what is left of the body of a refused upload: many
// clients look for the answer only when all is sent, and would see a reset.
func drainUpload(w http.ResponseWriter, r *http.Request) {
	const most, wait = 64 << 20, time.Second
	if http.NewResponseController(w).SetReadDeadline(time.Now().Add(wait)) == nil {
		io.CopyN(io.Discard, r.Body, most) //nolint:errcheck // the refusal is what counts
	}
}

// plainBody undoes the body's Content-Encoding.
func plainBody(r *http.Request) (io.Reader, error) {
	switch enc := strings.ToLower(r.Header.Get("Content-Encoding")); enc {
	case "", "identity":
		return r.Body, nil
	case "gzip":
		zr, err := gzip.NewReader(r.Body)
		if err != nil {
			return nil, httpError{http.StatusBadRequest, "the body is not gzip as Content-Encoding says"}
		}
		return bodyReader{zr}, nil
	default:
		return nil, httpError{http.StatusBadRequest, fmt.Sprintf("content encoding %q: send identity or gzip", enc)}
	}
}

// bodyReader tells a broken body from a broken disk.
type bodyReader struct{ io.Reader }

func (b bodyReader) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = httpError{http.StatusBadRequest, "the request body is broken off: " + err.Error()}
	}
	return n, err
}

// metadataIn collects the X-Metadata headers. Header names have no case; keys
// are lower-case.
func metadataIn(h http.Header) map[string]string {
	out := map[string]string{}
	for name, values := range h {
		key, ours := strings.CutPrefix(strings.ToLower(name), "x-metadata-")
		if ours && key != "" && len(values) > 0 {
			out[key] = values[0]
		}
	}
	return out
}

// single writes the whole body to the query's path.
func (up upload) single(body io.Reader) ([]written, error) {
	if up.path == "" {
		return nil, httpError{http.StatusBadRequest, "the query parameter path is missing: octet-stream bodies need it"}
	}
	w, err := up.write(up.path, body, nil)
	if err != nil {
		return nil, err
	}
	return []written{w}, nil
}

// form writes each part named "file" to its own file name, or the only one to
// the query's path.
func (up upload) form(contentType string, body io.Reader) ([]written, error) {
	_, params, err := mime.ParseMediaType(contentType)
	if err != nil || params["boundary"] == "" {
		return nil, httpError{http.StatusBadRequest, "the multipart content type has no boundary"}
	}
	parts := multipart.NewReader(bufio.NewReaderSize(body, copyBuffer), params["boundary"])
	done := []written{}
	for {
		part, err := parts.NextRawPart()
		if err == io.EOF { //nolint:errorlint // a form broken off wraps io.EOF, only the bare one is its end
			return done, nil
		}
		if err != nil {
			return nil, httpError{http.StatusBadRequest, "the multipart body is broken: " + err.Error()}
		}
		if part.FormName() != "file" {
			continue
		}
		to := up.path
		if to == "" {
			if to, err = fileName(part.Header.Get("Content-Disposition")); err != nil {
				return nil, err
			}
		}
		w, err := up.write(to, part, done)
		if err != nil {
			return nil, err
		}
		done = append(done, w)
	}
}

// fileName is a part's file name with its slashes, which multipart.Part strips
// and uploads of several files depend on.
func fileName(disposition string) (string, error) {
	_, params, err := mime.ParseMediaType(disposition)
	if err != nil {
		return "", httpError{http.StatusBadRequest, "a part's Content-Disposition cannot be read: " + err.Error()}
	}
	if params["filename"] == "" {
		return "", httpError{http.StatusBadRequest, "a part has no filename and the query no path: one of them must say where to write"}
	}
	return params["filename"], nil
}

// write stores one file.
func (up upload) write(name string, from io.Reader, before []written) (written, error) {
	p, err := resolve(name, up.user, up.workdir)
	if err != nil {
		return written{}, httpError{http.StatusBadRequest, err.Error()}
	}
	w := written{Name: utf8(path.Base(p)), Path: utf8(p), Type: "file"}
	if slices.ContainsFunc(before, func(b written) bool { return b.Path == w.Path }) {
		return w, httpError{http.StatusBadRequest, fmt.Sprintf("two parts go to the same path '%s': only the first was written", w.Path)}
	}
	c, err := up.spool.collect(bodyReader{from}, func() error { return up.check(p) })
	if err != nil {
		return w, err // nothing has been touched
	}
	defer c.close()
	if err := up.store(p, c); err != nil {
		return w, err
	}
	if len(up.metadata) > 0 {
		w.Metadata = maps.Clone(up.metadata)
	}
	return w, nil
}

// store puts a whole body into its file.
func (up upload) store(p string, c *content) error {
	to, err := up.open(p)
	if err != nil {
		return err
	}
	defer to.discard()
	if err := up.filling.fill(c, to.f); err != nil {
		return err
	}
	if err := to.setMetadata(up.metadata); err != nil {
		return fmt.Errorf("write metadata of %s: %w", utf8(p), err)
	}
	return to.keep()
}

// headSize is how much of a body is kept in memory.
const headSize = 256 << 10

// copyBuffer is how much is read and written at once: forms come in pieces of
// 4 KiB, and in a sandbox each system call costs.
const copyBuffer = 128 << 10

func copyBody(to io.Writer, from io.Reader) (int64, error) {
	out := bufio.NewWriterSize(to, copyBuffer)
	n, err := io.Copy(out, from)
	if err != nil {
		return n, err
	}
	return n, out.Flush()
}
