package agent

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/cordonhq/cordon/api/gen/agent/filesystem"
)

// xattrPrefix is where a file's metadata is kept.
const xattrPrefix = "user.e2b."

// maxXattr is what the kernel allows for a list of names and for one value.
const maxXattr = 64 << 10

// entryOf describes what is at p.
func entryOf(p string, n names) (*pb.EntryInfo, error) {
	fi, err := os.Lstat(p)
	if err != nil {
		return nil, err
	}
	e := &pb.EntryInfo{Name: utf8(path.Base(p)), Path: utf8(p)}
	if fi.Mode()&fs.ModeSymlink == 0 {
		describe(e, fi, n)
		e.Metadata = metadataOf(p)
		return e, nil
	}
	e.IsSymlink = true
	target := linkTarget(p)
	e.SymlinkTarget = &target
	if to, err := os.Stat(p); err == nil {
		describe(e, to, n)
		e.Metadata = metadataOf(p)
		return e, nil
	}
	describe(e, fi, n) // the target is missing or not to be seen
	e.Type = pb.FileType_FILE_TYPE_SYMLINK
	return e, nil
}

// linkTarget is where a link leads, absolute even when nothing is there.
func linkTarget(p string) string {
	if t, err := filepath.EvalSymlinks(p); err == nil {
		return utf8(t)
	}
	t, err := os.Readlink(p)
	if err != nil {
		return utf8(p)
	}
	if !filepath.IsAbs(t) {
		t = filepath.Join(filepath.Dir(p), t)
	}
	return utf8(t)
}

func describe(e *pb.EntryInfo, fi fs.FileInfo, n names) {
	e.Type = pb.FileType_FILE_TYPE_FILE
	if fi.IsDir() {
		e.Type = pb.FileType_FILE_TYPE_DIRECTORY
	}
	e.Size = fi.Size()
	e.Mode = uint32(fi.Mode().Perm())
	e.Permissions = fi.Mode().String()
	e.ModifiedTime = timestamppb.New(fi.ModTime())
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		e.Owner, e.Group = nameOf(n.user, st.Uid), nameOf(n.group, st.Gid)
	}
}

// metadataOf reads the attributes below xattrPrefix. A file system without
// attributes has no metadata.
func metadataOf(p string) map[string]string {
	size, err := unix.Listxattr(p, nil)
	if err != nil || size == 0 {
		return nil
	}
	list := make([]byte, min(size, maxXattr))
	if size, err = unix.Listxattr(p, list); err != nil {
		return nil
	}
	var out map[string]string
	for name := range strings.SplitSeq(string(list[:size]), "\x00") {
		key, ours := strings.CutPrefix(name, xattrPrefix)
		if !ours || key == "" {
			continue
		}
		value := make([]byte, maxXattr)
		n, err := unix.Getxattr(p, name, value)
		if err != nil {
			continue
		}
		if out == nil {
			out = map[string]string{}
		}
		out[utf8(key)] = utf8(string(value[:n]))
	}
	return out
}

// setMetadata makes the file's metadata exactly want.
func setMetadata(fd int, want map[string]string) error {
	list := make([]byte, maxXattr)
	size, err := unix.Flistxattr(fd, list)
	if errors.Is(err, unix.ENOTSUP) && len(want) == 0 {
		return nil
	}
	if err != nil {
		return os.NewSyscallError("list attributes", err)
	}
	for name := range strings.SplitSeq(string(list[:size]), "\x00") {
		key, ours := strings.CutPrefix(name, xattrPrefix)
		if _, keep := want[key]; !ours || keep {
			continue
		}
		if err := unix.Fremovexattr(fd, name); err != nil {
			return os.NewSyscallError("remove attribute", err)
		}
	}
	for key, value := range want {
		if err := unix.Fsetxattr(fd, xattrPrefix+key, []byte(value), 0); err != nil {
			return os.NewSyscallError("set attribute", err)
		}
	}
	return nil
}

// utf8 makes s fit for a protobuf or JSON string: names of files may be any bytes.
func utf8(s string) string { return strings.ToValidUTF8(s, "�") }

// fileCode classifies an error of the file system.
func fileCode(err error) connect.Code {
	for _, c := range []struct {
		is   error
		code connect.Code
	}{
		{fs.ErrNotExist, connect.CodeNotFound},
		{fs.ErrPermission, connect.CodePermissionDenied},
		{errOurs, connect.CodePermissionDenied},
		{syscall.EROFS, connect.CodePermissionDenied},
		{fs.ErrExist, connect.CodeAlreadyExists},
		{syscall.ENOSPC, connect.CodeResourceExhausted},
		{syscall.EDQUOT, connect.CodeResourceExhausted},
		{syscall.EMFILE, connect.CodeResourceExhausted},
		{syscall.ENOTDIR, connect.CodeInvalidArgument},
		{syscall.EISDIR, connect.CodeInvalidArgument},
		{syscall.EINVAL, connect.CodeInvalidArgument},
		{syscall.ELOOP, connect.CodeInvalidArgument},
		{syscall.ENAMETOOLONG, connect.CodeInvalidArgument},
		{syscall.ENXIO, connect.CodeInvalidArgument},
		{syscall.EXDEV, connect.CodeFailedPrecondition},
		{syscall.EBUSY, connect.CodeFailedPrecondition},
		{syscall.ETXTBSY, connect.CodeFailedPrecondition},
	} {
		if errors.Is(err, c.is) {
			return c.code
		}
	}
	return connect.CodeInternal
}

// fileError makes a file system error fit for an RPC. Errors that are classified
// already pass.
func fileError(err error) error {
	var done *connect.Error
	if err == nil || errors.As(err, &done) {
		return err
	}
	return connect.NewError(fileCode(err), errors.New(utf8(err.Error())))
}
