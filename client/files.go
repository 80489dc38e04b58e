package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"connectrpc.com/connect"

	"github.com/cordonhq/cordon/api/gen/agent/filesystem"
	"github.com/cordonhq/cordon/api/gen/agent/filesystem/filesystemconnect"
)

// maxRead bounds Files.Read, in octets; Open has no bound.
const maxRead = 256 << 20

// Files moves files in and out of a sandbox. Paths are absolute or relative to
// the user's home.
type Files struct {
	sandbox *Sandbox
	rpc     filesystemconnect.FilesystemClient
	user    string
}

// As returns the files as another user of the sandbox sees them.
func (f *Files) As(user string) *Files {
	return &Files{sandbox: f.sandbox, rpc: f.rpc, user: user}
}

// Entry is a file or directory. For a symbolic link it describes the target.
type Entry struct {
	Name, Path   string
	Dir          bool
	Size         int64
	Mode         uint32 // permission bits
	Owner, Group string
	Modified     time.Time
	Link         string // what a symbolic link points to
}

// Open returns a file's contents as a stream, which the caller closes.
func (f *Files) Open(ctx context.Context, path string) (io.ReadCloser, error) {
	resp, err := f.send(ctx, http.MethodGet, path, nil)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return resp.Body, nil
}

// Read returns a file's contents, up to 256 MiB.
func (f *Files) Read(ctx context.Context, path string) ([]byte, error) {
	body, err := f.Open(ctx, path)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	data, err := io.ReadAll(io.LimitReader(body, maxRead+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(data) > maxRead {
		return nil, fmt.Errorf("read %s: over %d bytes: use Open", path, maxRead)
	}
	return data, nil
}

// Write replaces a file's contents, creating it and its directories.
func (f *Files) Write(ctx context.Context, path string, contents io.Reader) error {
	resp, err := f.send(ctx, http.MethodPost, path, contents)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return resp.Body.Close()
}

func (f *Files) send(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	query := url.Values{"path": {path}}
	if f.user != "" {
		query.Set("username", f.user)
	}
	req, err := f.sandbox.NewRequest(ctx, method, agentPort, "/files?"+query.Encode(), body)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/octet-stream")
	}
	resp, err := f.sandbox.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close()
		return nil, errorOf(resp)
	}
	return resp, nil
}

// List returns what is in a directory, by name.
func (f *Files) List(ctx context.Context, dir string) ([]Entry, error) {
	req := connect.NewRequest(&filesystem.ListDirRequest{Path: dir, Depth: 1})
	asUser(req.Header(), f.user)
	resp, err := f.rpc.ListDir(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", dir, rpcError(err))
	}
	entries := make([]Entry, len(resp.Msg.GetEntries()))
	for i, e := range resp.Msg.GetEntries() {
		entries[i] = entryOf(e)
	}
	return entries, nil
}

// Stat describes one path.
func (f *Files) Stat(ctx context.Context, path string) (Entry, error) {
	req := connect.NewRequest(&filesystem.StatRequest{Path: path})
	asUser(req.Header(), f.user)
	resp, err := f.rpc.Stat(ctx, req)
	if err != nil {
		return Entry{}, fmt.Errorf("stat %s: %w", path, rpcError(err))
	}
	return entryOf(resp.Msg.GetEntry()), nil
}

// MakeDir creates a directory and its parents. One that exists is no error.
func (f *Files) MakeDir(ctx context.Context, dir string) error {
	req := connect.NewRequest(&filesystem.MakeDirRequest{Path: dir})
	asUser(req.Header(), f.user)
	_, err := f.rpc.MakeDir(ctx, req)
	if err = rpcError(err); err != nil && !errors.Is(err, ErrConflict) {
		return fmt.Errorf("make directory %s: %w", dir, err)
	}
	return nil
}

// Remove deletes a file or a whole tree. A path that does not exist is no error.
func (f *Files) Remove(ctx context.Context, path string) error {
	req := connect.NewRequest(&filesystem.RemoveRequest{Path: path})
	asUser(req.Header(), f.user)
	if _, err := f.rpc.Remove(ctx, req); err != nil {
		return fmt.Errorf("remove %s: %w", path, rpcError(err))
	}
	return nil
}

func entryOf(e *filesystem.EntryInfo) Entry {
	return Entry{
		Name: e.GetName(), Path: e.GetPath(), Dir: e.GetType() == filesystem.FileType_FILE_TYPE_DIRECTORY,
		Size: e.GetSize(), Mode: e.GetMode(), Owner: e.GetOwner(), Group: e.GetGroup(),
		Modified: e.GetModifiedTime().AsTime(), Link: e.GetSymlinkTarget(),
	}
}
