package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"time"

	"github.com/cordonhq/cordon/client"
	"github.com/cordonhq/cordon/internal/errs"
)

// remote is where the verbs that are clients find the server: CORDON_API_URL and
// CORDON_API_KEY, or this machine's server and its admin key.
func (a *app) remote() (url, key string, err error) {
	cfg, err := a.config()
	if err != nil {
		return "", "", err
	}
	url, key = a.environ["CORDON_API_URL"], a.environ["CORDON_API_KEY"]
	if url == "" {
		url = cfg.APIURL()
	}
	if key != "" {
		return url, key, nil
	}
	key, err = cfg.AdminKey()
	switch {
	case errors.Is(err, fs.ErrPermission):
		return "", "", errs.New(errs.Unauthorized, "%s is root's: run this with sudo, or set CORDON_API_KEY", cfg.AdminKeyFile())
	case errors.Is(err, fs.ErrNotExist):
		return "", "", errs.New(errs.Unauthorized, "no API key: set CORDON_API_KEY, or start the server once (sudo cordon serve)")
	}
	return url, key, err
}

// client returns a client of the server. Sandboxes are reached through the same
// address, told apart by headers, so no name has to resolve here.
func (a *app) client() (*client.Client, error) {
	url, key, err := a.remote()
	if err != nil {
		return nil, err
	}
	return client.New(client.Options{APIURL: url, APIKey: key, SandboxURL: url})
}

// callTimeout has room for a call that writes the memory of a large sandbox to disk.
const callTimeout = 5 * time.Minute

// call is one request to the control API that the Go client has no method for;
// in and out may be nil.
func (a *app) call(ctx context.Context, method, path string, in, out any) error {
	url, key, err := a.remote()
	if err != nil {
		return err
	}
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, url+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("X-API-KEY", key)
	req.Header.Set("Content-Type", "application/json")
	res, err := (&http.Client{Timeout: callTimeout}).Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, 16<<20))
	if err != nil {
		return err
	}
	if res.StatusCode >= 300 {
		var said struct {
			Message string `json:"message"`
		}
		if json.Unmarshal(answer, &said) != nil || said.Message == "" {
			said.Message = string(answer)
		}
		return fmt.Errorf("%s: %s", res.Status, said.Message)
	}
	if out == nil || len(answer) == 0 {
		return nil
	}
	return json.Unmarshal(answer, out)
}
