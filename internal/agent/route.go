package agent

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/cordonhq/cordon/api/gen/agent/filesystem/filesystemconnect"
	"github.com/cordonhq/cordon/api/gen/agent/process/processconnect"
	"github.com/cordonhq/cordon/internal/agent/proof"
	"github.com/cordonhq/cordon/internal/agent/wire"
)

// routes builds the one handler: steady wraps every exchange with deadlines,
// cors lets browsers in, and each route states its guard.
func (a *Agent) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("GET "+proof.Path, a.getChallenge)
	mux.Handle("POST "+wire.ClaimPath, a.control(a.postInit))
	mux.Handle("POST "+wire.StartPath, a.control(a.postStart))
	mux.Handle("POST "+wire.ReadyPath, a.control(a.postReady))
	mux.Handle("GET /cordon/tunnel", a.control(a.getTunnel))
	mux.Handle("GET /cordon/kills", a.control(a.getKills))

	mux.HandleFunc("GET /files", a.getFiles)
	mux.HandleFunc("POST /files", a.postFiles)
	mux.Handle("POST /files/compose", a.private(http.HandlerFunc(a.postCompose)))
	mux.Handle("GET /metrics", a.private(http.HandlerFunc(a.getMetrics)))
	mux.Handle("GET /envs", a.private(http.HandlerFunc(a.getEnvs)))

	opts := []connect.HandlerOption{
		connect.WithReadMaxBytes(maxMessage),
		connect.WithCompressMinBytes(1 << 10),
	}
	mux.Handle(rpc(processconnect.NewProcessHandler(processService{a: a}, opts...)).guarded(a))
	mux.Handle(rpc(filesystemconnect.NewFilesystemHandler(filesystemService{a: a}, opts...)).guarded(a))
	mux.HandleFunc("/", notFound)
	return cors(steady(mux))
}

// mounted is an RPC service and the path it lives at.
type mounted struct {
	path    string
	handler http.Handler
}

func rpc(path string, h http.Handler) mounted { return mounted{path, h} }

// guarded admits only callers with the access token.
func (m mounted) guarded(a *Agent) (string, http.Handler) { return m.path, a.private(m.handler) }

// private admits callers with the access token, once the sandbox is claimed.
func (a *Agent) private(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := a.claim.Load()
		switch {
		case c == nil:
			writeError(w, http.StatusServiceUnavailable, unclaimedText)
		case c.admits(r.Header.Get("X-Access-Token")) || a.isControl(r):
			next.ServeHTTP(w, r)
		default:
			writeError(w, http.StatusUnauthorized, unauthorizedText)
		}
	})
}

// control admits the host only. To everybody else the route does not exist.
func (a *Agent) control(next http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !a.isControl(r) {
			notFound(w, r)
			return
		}
		next(w, r)
	})
}

func notFound(w http.ResponseWriter, _ *http.Request) {
	writeError(w, http.StatusNotFound, "no such route")
}

// writeError answers in the SDKs' error format.
func writeError(w http.ResponseWriter, status int, message string) {
	writeJSON(w, status, map[string]any{"code": status, "message": message})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil { // only plain maps and structs come here
		status, body = http.StatusInternalServerError, []byte(`{"code":500,"message":"encode the answer"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(body) // a client that left does not need the answer
}

// readJSON decodes a bounded JSON body; unknown fields are ignored, because
// newer clients send them.
func readJSON(w http.ResponseWriter, r *http.Request, into any) error {
	body := http.MaxBytesReader(w, r.Body, maxJSON)
	if err := json.NewDecoder(body).Decode(into); err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			return errors.New("the request body is over 1 MiB")
		}
		return errors.New("the request body is not the expected JSON: " + err.Error())
	}
	return nil
}

// cors opens the agent to pages of any origin: the token is the protection, and
// it does not travel in cookies.
func cors(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Origin") == "" {
			next.ServeHTTP(w, r)
			return
		}
		h := w.Header()
		h.Set("Access-Control-Allow-Origin", "*")
		h.Set("Access-Control-Expose-Headers", "*")
		if r.Method != http.MethodOptions || r.Header.Get("Access-Control-Request-Method") == "" {
			next.ServeHTTP(w, r)
			return
		}
		h.Set("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, PATCH, DELETE")
		if asked := r.Header.Get("Access-Control-Request-Headers"); asked != "" {
			h.Set("Access-Control-Allow-Headers", asked) // "*" would not cover Authorization
		}
		h.Set("Access-Control-Max-Age", "7200")
		w.WriteHeader(http.StatusNoContent)
	})
}

// steady gives every read and every write of an exchange its own deadline, so
// that transfers may last for hours but a stalled peer is let go.
func steady(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		sw := &steadyWriter{ResponseWriter: w, rc: rc}
		sw.extend()
		if r.Body != nil && r.Body != http.NoBody {
			r.Body = &steadyBody{ReadCloser: r.Body, rc: rc}
		}
		next.ServeHTTP(sw, r)
	})
}

type steadyWriter struct {
	http.ResponseWriter
	rc *http.ResponseController
}

// extend's error is left alone: without deadlines (in tests with a recorder)
// there is nothing to stall on.
func (w *steadyWriter) extend() { _ = w.rc.SetWriteDeadline(time.Now().Add(stallTimeout)) }

func (w *steadyWriter) WriteHeader(status int) {
	w.extend()
	w.ResponseWriter.WriteHeader(status)
}

func (w *steadyWriter) Write(p []byte) (int, error) {
	w.extend()
	return w.ResponseWriter.Write(p)
}

// ReadFrom keeps sendfile for file contents, in pieces that each get a deadline.
func (w *steadyWriter) ReadFrom(src io.Reader) (int64, error) {
	const piece = 256 << 10 // a reader below 4 KiB/s counts as stalled
	to, ok := w.ResponseWriter.(io.ReaderFrom)
	if !ok {
		return io.Copy(struct{ io.Writer }{w}, src)
	}
	left := int64(-1)
	if lr, isLimited := src.(*io.LimitedReader); isLimited {
		src, left = lr.R, lr.N // sendfile sees through one LimitedReader, not two
	}
	var total int64
	for left != 0 {
		want := int64(piece)
		if left > 0 {
			want = min(want, left)
		}
		w.extend()
		n, err := to.ReadFrom(&io.LimitedReader{R: src, N: want})
		total += n
		if left > 0 {
			left -= n
		}
		if err != nil || n < want {
			return total, err
		}
	}
	return total, nil
}

func (w *steadyWriter) Flush() { _ = w.FlushError() }

func (w *steadyWriter) FlushError() error {
	w.extend()
	return w.rc.Flush()
}

// Unwrap lets http.ResponseController reach the connection.
func (w *steadyWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

type steadyBody struct {
	io.ReadCloser
	rc *http.ResponseController
}

func (b *steadyBody) Read(p []byte) (int, error) {
	_ = b.rc.SetReadDeadline(time.Now().Add(stallTimeout))
	n, err := b.ReadCloser.Read(p)
	// Off again: the server watches the connection for the client's departure
	// while the handler works, and must not take the deadline for it.
	_ = b.rc.SetReadDeadline(time.Time{})
	return n, err
}

// mediaType is the part of a Content-Type before its parameters.
func mediaType(r *http.Request) string {
	t, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	return strings.ToLower(strings.TrimSpace(t))
}
