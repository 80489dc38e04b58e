package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"connectrpc.com/connect"

	pb "github.com/cordonhq/cordon/api/gen/agent/filesystem"
	"github.com/cordonhq/cordon/api/gen/agent/filesystem/filesystemconnect"
)

var _ filesystemconnect.FilesystemHandler = filesystemService{}

// filesystemService is filesystem.Filesystem.
type filesystemService struct{ a *Agent }

// place is a path to act on and whom to act as.
type place struct {
	user  user
	path  string
	names names
}

func (a *Agent) place(h http.Header, p string) (place, error) {
	u, c, err := a.caller(h)
	if err != nil {
		return place{}, err
	}
	abs, err := resolve(p, u, c.DefaultWorkdir)
	if err != nil {
		return place{}, connect.NewError(connect.CodeInvalidArgument, err)
	}
	n, err := a.users.names()
	if err != nil {
		return place{}, connect.NewError(connect.CodeInternal, err)
	}
	return place{user: u, path: abs, names: n}, nil
}

// entry describes the place after do has run there.
func (p place) entry(do func() error) (e *pb.EntryInfo, err error) {
	if err = do(); err == nil {
		e, err = entryOf(p.path, p.names)
	}
	return e, fileError(err)
}

func (s filesystemService) Stat(_ context.Context, req *connect.Request[pb.StatRequest]) (*connect.Response[pb.StatResponse], error) {
	at, err := s.a.place(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	e, err := at.entry(func() error { return nil })
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.StatResponse{Entry: e}), nil
}

func (s filesystemService) MakeDir(_ context.Context, req *connect.Request[pb.MakeDirRequest]) (*connect.Response[pb.MakeDirResponse], error) {
	at, err := s.a.place(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	e, err := at.entry(func() error {
		switch fi, err := os.Stat(at.path); {
		case err == nil && fi.IsDir():
			return connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("directory already exists: %s", at.path))
		case err == nil:
			return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path already exists but it is not a directory: %s", at.path))
		}
		return at.user.makeDirs(at.path)
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.MakeDirResponse{Entry: e}), nil
}

func (s filesystemService) Remove(_ context.Context, req *connect.Request[pb.RemoveRequest]) (*connect.Response[pb.RemoveResponse], error) {
	at, err := s.a.place(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	if err := at.user.remove(at.path); err != nil {
		return nil, fileError(err)
	}
	return connect.NewResponse(&pb.RemoveResponse{}), nil
}

func (s filesystemService) Move(_ context.Context, req *connect.Request[pb.MoveRequest]) (*connect.Response[pb.MoveResponse], error) {
	from, err := s.a.place(req.Header(), req.Msg.GetSource())
	if err != nil {
		return nil, err
	}
	to, err := s.a.place(req.Header(), req.Msg.GetDestination())
	if err != nil {
		return nil, err
	}
	e, err := to.entry(func() error { return to.user.move(from.path, to.path) })
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.MoveResponse{Entry: e}), nil
}

// move renames, across file systems too when it is a single file.
func (u user) move(from, to string) error {
	fi, err := os.Lstat(from)
	if err != nil {
		return err
	}
	if err := u.makeDirs(path.Dir(to)); err != nil {
		return err
	}
	err = u.rename(from, to)
	if !errors.Is(err, syscall.EXDEV) {
		return err
	}
	if !fi.Mode().IsRegular() {
		return connect.NewError(connect.CodeFailedPrecondition,
			fmt.Errorf("%s and %s are on different file systems: move the directory with the command mv", from, to))
	}
	return u.as(func() error { return moveAcross(from, to, fi.Mode().Perm()) })
}

// tempName is the pattern of the copy's name until it is whole.
const tempName = ".cordon-*.part"

// moveAcross copies beside the destination and renames, so that the destination
// is never half a file.
func moveAcross(from, to string, mode fs.FileMode) error {
	src, err := os.OpenFile(from, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.CreateTemp(path.Dir(to), tempName)
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(dst.Name()) }() // renamed away when all went well
	_, err = io.Copy(dst, src)
	err = errors.Join(err, dst.Chmod(mode), dst.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(dst.Name(), to); err != nil {
		return err
	}
	return os.Remove(from)
}

func (s filesystemService) ListDir(ctx context.Context, req *connect.Request[pb.ListDirRequest]) (*connect.Response[pb.ListDirResponse], error) {
	at, err := s.a.place(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	entries, err := at.list(ctx, max(1, int(req.Msg.GetDepth())))
	if err != nil {
		return nil, fileError(err)
	}
	return connect.NewResponse(&pb.ListDirResponse{Entries: entries}), nil
}

// list walks a directory in lexical order, depth levels deep. What may not be
// read below it, or vanishes meanwhile, is left out.
func (p place) list(ctx context.Context, depth int) ([]*pb.EntryInfo, error) {
	root, err := directoryAt(p.path)
	if err != nil {
		return nil, err
	}
	var out []*pb.EntryInfo
	err = filepath.WalkDir(root, func(at string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if at == root {
			return err
		}
		rel, relErr := filepath.Rel(root, at)
		if relErr != nil {
			return relErr
		}
		if err == nil {
			if e, entryErr := entryOf(at, p.names); entryErr == nil {
				e.Path = utf8(path.Join(p.path, rel)) // as asked, not where a link led
				out = append(out, e)
			}
		}
		if len(out) > maxEntries {
			return connect.NewError(connect.CodeResourceExhausted,
				fmt.Errorf("%s has over %d entries: list its directories one by one", p.path, maxEntries))
		}
		if d != nil && d.IsDir() && (err != nil || strings.Count(rel, "/")+1 >= depth) {
			return fs.SkipDir
		}
		return nil
	})
	return out, err
}

// directoryAt resolves links and insists on a directory.
func directoryAt(p string) (string, error) {
	root, err := filepath.EvalSymlinks(p)
	if err != nil {
		return "", err
	}
	fi, err := os.Stat(root)
	if err != nil {
		return "", err
	}
	if !fi.IsDir() {
		return "", connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path is not a directory: %s", p))
	}
	return root, nil
}
