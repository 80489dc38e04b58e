package interpreter

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"time"
)

const tokenHeader = "X-Access-Token"

// routes is the interface of the SDKs.
//
// Running code demands the sandbox's access token, where it has one. The e2b SDKs
// send it there only; so managing contexts is open to whoever reaches the port,
// like any service of the sandbox, unless a token is sent: then it must be right.
// Pages of other sites are kept out by the content type, which they may not send
// without asking, and asking is not answered.
func (i *Interpreter) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("POST /execute", i.postExecute)
	mux.Handle("GET /contexts", i.open(i.getContexts))
	mux.Handle("POST /contexts", i.open(i.postContexts))
	mux.Handle("DELETE /contexts/{id}", i.open(i.deleteContext))
	mux.Handle("POST /contexts/{id}/restart", i.open(i.restartContext))
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { writeError(w, http.StatusNotFound, "no such route") })
	return onlyJSON(mux)
}

// onlyJSON refuses what changes something and does not say that it is JSON, as a
// form or a script of any page can send (Fetch standard, "CORS-safelisted").
func onlyJSON(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
		if changes := r.Method != http.MethodGet && r.Method != http.MethodHead; changes && (err != nil || kind != "application/json") {
			writeError(w, http.StatusUnsupportedMediaType, fmt.Sprintf("content type %.80q: send application/json", r.Header.Get("Content-Type")))
			return
		}
		next.ServeHTTP(w, r)
	})
}

// open admits requests without a token, and those with the right one.
func (i *Interpreter) open(next func(http.ResponseWriter, *http.Request) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var err error
		if token := r.Header.Get(tokenHeader); token != "" {
			_, err = i.admit(r.Context(), token)
		}
		if err == nil {
			err = next(w, r)
		}
		i.writeFault(w, err)
	})
}

// contextJSON is a context as the SDKs read it.
type contextJSON struct {
	ID       string   `json:"id"`
	Language language `json:"language"`
	Cwd      string   `json:"cwd"`
}

func (c *codeContext) json() contextJSON { return contextJSON{c.id, c.language, c.cwd} }

func (i *Interpreter) getContexts(w http.ResponseWriter, _ *http.Request) error {
	out := []contextJSON{}
	for _, c := range i.list() {
		out = append(out, c.json())
	}
	return writeJSON(w, http.StatusOK, out)
}

func (i *Interpreter) postContexts(w http.ResponseWriter, r *http.Request) error {
	var in struct {
		Language string `json:"language"`
		Cwd      string `json:"cwd"`
	}
	if err := readJSON(w, r, &in, maxSmall); err != nil {
		return err
	}
	l, err := parseLanguage(in.Language)
	if err != nil {
		return err
	}
	cwd, err := i.folder(in.Cwd)
	if err != nil {
		return err
	}
	c, err := i.add(token(), l, cwd)
	if err != nil {
		return err
	}
	if err := c.restart(r.Context()); err != nil {
		i.forget(c)
		return err
	}
	return writeJSON(w, http.StatusOK, c.json())
}

func (i *Interpreter) deleteContext(w http.ResponseWriter, r *http.Request) error {
	c, err := i.find(r.PathValue("id"))
	if err != nil {
		return err
	}
	i.forget(c)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (i *Interpreter) restartContext(w http.ResponseWriter, r *http.Request) error {
	c, err := i.find(r.PathValue("id"))
	if err != nil {
		return err
	}
	if err := c.restart(r.Context()); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// executeJSON is a request to run code.
type executeJSON struct {
	Code      *string           `json:"code"`
	ContextID string            `json:"context_id"`
	Language  string            `json:"language"`
	EnvVars   map[string]string `json:"env_vars"`
}

// check refuses what cannot be run.
func (in *executeJSON) check() error {
	switch {
	case in.Code == nil:
		return fault{http.StatusBadRequest, "code is missing: send a string"}
	case in.ContextID != "" && in.Language != "":
		return fault{http.StatusBadRequest, "context_id and language are both given: send one, a context has its language"}
	case len(in.EnvVars) > maxEnvVars:
		return fault{http.StatusBadRequest, fmt.Sprintf("env_vars has %d variables: send at most %d", len(in.EnvVars), maxEnvVars)}
	}
	for name, value := range in.EnvVars {
		if !validVariable(name, value) {
			return fault{http.StatusBadRequest, fmt.Sprintf("env_vars: %.80q is not a variable's name or its value has a NUL byte", name)}
		}
	}
	return nil
}

// target returns the context that code is to run in.
func (i *Interpreter) target(in *executeJSON) (*codeContext, error) {
	if in.ContextID != "" {
		return i.find(in.ContextID)
	}
	l, err := parseLanguage(in.Language)
	if err != nil {
		return nil, err
	}
	return i.standard(l)
}

func (i *Interpreter) postExecute(w http.ResponseWriter, r *http.Request) {
	who, err := i.admit(r.Context(), r.Header.Get(tokenHeader))
	var in executeJSON
	if err == nil {
		err = readJSON(w, r, &in, maxBody)
	}
	if err == nil {
		err = in.check()
	}
	var c *codeContext
	if err == nil {
		c, err = i.target(&in)
	}
	if err == nil {
		err = c.enter()
	}
	if err != nil {
		i.writeFault(w, err)
		return
	}
	defer c.leave()
	s := newStream(r.Context(), w)
	defer s.end()
	c.execute(s.ctx, execution{code: *in.Code, env: in.EnvVars, who: who}, s.emit)
}

// writeFault answers with an error of the caller's, or hides one of ours.
func (i *Interpreter) writeFault(w http.ResponseWriter, err error) {
	if err == nil {
		return
	}
	var f fault
	if !errors.As(err, &f) {
		i.log.Warn("request not served", "err", err)
		f = fault{http.StatusInternalServerError, err.Error()}
	}
	writeError(w, f.status, f.message)
}

// writeError answers in the SDKs' error format.
func writeError(w http.ResponseWriter, status int, message string) {
	_ = writeJSON(w, status, map[string]any{"code": status, "message": message}) // plain values
}

func writeJSON(w http.ResponseWriter, status int, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode the answer: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(body) // a client that left does not need the answer
	return nil
}

// readJSON decodes a bounded JSON body; unknown fields are ignored, because newer
// clients send them. An empty body is an empty object.
func readJSON(w http.ResponseWriter, r *http.Request, into any, most int64) error {
	if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return fmt.Errorf("bound the request: %w", err)
	}
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, most)).Decode(into)
	if err == nil || errors.Is(err, io.EOF) {
		// From here on a read waits for the client to leave, as long as that takes.
		if err := http.NewResponseController(w).SetReadDeadline(time.Time{}); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return fmt.Errorf("bound the request: %w", err)
		}
		return nil
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return fault{http.StatusRequestEntityTooLarge, fmt.Sprintf("the request body is over %d bytes", most)}
	}
	return fault{http.StatusBadRequest, "the request body is not the expected JSON: " + err.Error()}
}
