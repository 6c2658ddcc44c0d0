package tree

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"

	"banger/agent/internal/kernel"
	"banger/agent/internal/wire"
)

// Owner replaces the owners that a tar names.
type Owner struct {
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
}

// Counts is the result of a transfer. Files are all members but directories; bytes are the
// contents of regular files.
type Counts struct {
	Files int64 `json:"files"`
	Bytes int64 `json:"bytes"`
}

// stagingPrefix starts the names of directories that a replace unpacks into.
const stagingPrefix = ".banger-put-"

// staging holds the names in use, so that what a crash left behind can be told from them.
var staging = struct {
	sync.Mutex
	names map[string]bool
}{names: map[string]bool{}}

// Mode is how a tar meets what is at the target.
type Mode string

const (
	// Replace builds the tree beside the target and renames it over the target at the end.
	Replace Mode = "replace"
	// New is Replace of a target that does not exist or is an empty directory.
	New Mode = "new"
	// Merge lays members over what is there, each file replaced atomically.
	Merge Mode = "merge"
	// Update receives the whole tar beside the target, then moves its members into the target. A
	// character device 0:0 removes the file of its name. What the tar does not name stays.
	Update Mode = "update"
)

// Options of a Put.
type Options struct {
	Mode  Mode
	Owner *Owner // nil keeps the owners of the tar
	// Report gets one record for each counted member, in their order; see appendRecord.
	Report io.Writer
}

// Put is PutWith for a Replace or a Merge without a report.
func Put(path string, r io.Reader, owner *Owner, replace bool) (Counts, error) {
	o := Options{Mode: Merge, Owner: owner}
	if replace {
		o.Mode = Replace
	}
	return PutWith(path, r, o)
}

// PutWith unpacks the tar read from r at path, an absolute path.
//
// Errors: bad_request for a member that is not allowed, already_exists for New, not_found for
// Update, connection_lost from r, operation_failed.
func PutWith(path string, r io.Reader, o Options) (Counts, error) {
	parts, err := splitPath(path)
	if err != nil {
		return Counts{}, err
	}
	if o.Mode != Merge && len(parts) == 0 {
		return Counts{}, wire.Errorf(wire.BadRequest, "put: / cannot be replaced")
	}
	root, err := kernel.Openat(-100, "/", dirFlags, 0)
	if err != nil {
		return Counts{}, fmt.Errorf("put into %s: %w", path, err)
	}
	defer syscall.Close(root)
	u := &unpacker{owner: o.Owner, privileged: os.Geteuid() == 0, report: o.Report != nil}
	switch o.Mode {
	case Merge:
		err = u.merge(root, parts, r)
	case Replace, New:
		err = u.replace(root, parts, r, o.Mode == New)
	case Update:
		err = u.update(root, parts, r)
	default:
		err = wire.Errorf(wire.BadRequest, "put: mode %q is none of replace, new, merge, update", o.Mode)
	}
	if err == nil && u.report {
		err = u.sendReport(o.Report)
	}
	if err != nil {
		var already *wire.Error
		if errors.As(err, &already) {
			return u.counts, err
		}
		return u.counts, fmt.Errorf("put into %s: %w", path, err)
	}
	return u.counts, nil
}

func (u *unpacker) merge(root int, parts []string, r io.Reader) error {
	fd, err := openDir(root, parts, u.makeParent)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	u.root, u.atomic = fd, true
	return u.unpack(r)
}

func (u *unpacker) replace(root int, parts []string, r io.Reader, onlyNew bool) error {
	parent, err := openDir(root, parts[:len(parts)-1], u.makeParent)
	if err != nil {
		return err
	}
	defer syscall.Close(parent)
	target := parts[len(parts)-1]
	if onlyNew {
		// rmdir(2) tells an empty directory from everything that somebody may need.
		err := kernel.Unlinkat(parent, target, kernel.AtRemovedir)
		if err != nil && err != syscall.ENOENT {
			return wire.Errorf(wire.AlreadyExists, "put: /%s exists already", strings.Join(parts, "/"))
		}
	}
	temp, release := newStaging(parent)
	defer release()
	if err := u.makeParent(parent, temp); err != nil {
		return fmt.Errorf("making %s: %w", temp, err)
	}
	swapped := false
	defer func() {
		if !swapped {
			_ = removeAll(parent, temp) // the first error is the one to report
		}
	}()
	fd, err := kernel.Openat(parent, temp, dirFlags, 0)
	if err != nil {
		return err
	}
	u.root = fd
	err = u.unpack(r)
	syscall.Close(fd)
	if err != nil {
		return err
	}
	if onlyNew {
		err = kernel.Renameat2(parent, temp, parent, target, kernel.RenameNoreplace)
	} else {
		err = swap(parent, temp, target)
	}
	if err != nil {
		return fmt.Errorf("renaming over %s: %w", target, err)
	}
	swapped = true
	return removeAll(parent, temp) // now the old tree, or nothing
}

// swap puts temp in target's place; what was there is then at temp.
func swap(parent int, temp, target string) error {
	err := kernel.Renameat2(parent, temp, parent, target, kernel.RenameNoreplace)
	if err != syscall.EEXIST {
		return err
	}
	err = kernel.Renameat2(parent, temp, parent, target, kernel.RenameExchange)
	if err != syscall.EINVAL && err != syscall.EXDEV {
		return err
	}
	// A filesystem without exchange: for a moment nothing is there, the old tree never gets lost.
	aside := temp + "-old"
	if err := kernel.Renameat2(parent, target, parent, aside, kernel.RenameNoreplace); err != nil {
		return err
	}
	if err := kernel.Renameat2(parent, temp, parent, target, kernel.RenameNoreplace); err != nil {
		return errors.Join(err,
			kernel.Renameat2(parent, aside, parent, target, kernel.RenameNoreplace))
	}
	return kernel.Renameat2(parent, aside, parent, temp, kernel.RenameNoreplace)
}

// newStaging returns an unused name in parent and removes what an earlier, interrupted run left.
func newStaging(parent int) (name string, release func()) {
	removeStale(parent)
	return claimName()
}

// removeStale removes from parent what nobody is using.
func removeStale(parent int) {
	staging.Lock()
	defer staging.Unlock()
	if fd, err := kernel.Openat(parent, ".", dirFlags, 0); err == nil {
		dir := os.NewFile(uintptr(fd), "parent")
		names, _ := dir.Readdirnames(-1)
		dir.Close()
		for _, old := range names {
			if !strings.HasPrefix(old, stagingPrefix) || staging.names[strings.TrimSuffix(old, "-old")] ||
				strings.HasPrefix(old, partPrefix) && !isStalePart(parent, old) {
				continue
			}
			_ = removeAll(parent, old) // a stale one in the way of nothing
		}
	}
}

// claimName returns a new name that removeStale leaves alone until it is released.
func claimName() (name string, release func()) {
	staging.Lock()
	defer staging.Unlock()
	name = fmt.Sprintf("%s%016x", stagingPrefix, rand.Uint64())
	staging.names[name] = true
	return name, func() {
		staging.Lock()
		defer staging.Unlock()
		delete(staging.names, name)
	}
}

// unpacker lays one tar over the directory root.
type unpacker struct {
	root       int
	owner      *Owner
	atomic     bool // files appear by rename: someone may be using the tree
	privileged bool
	report     bool
	updating   bool // whiteouts are known, and directories get their modes only at the target
	counts     Counts
	records    []byte   // of placed members, for the report
	newest     int64    // change time of the newest of them, ns
	placed     []string // when updating: the counted members, in their order
	removed    []string // when updating: names of whiteouts

	// The directory of the last member: neighbours in a tar mostly share theirs.
	parentName string
	parentFd   int

	dirs []*tar.Header // their modes and times are set last
	buf  []byte
}

func (u *unpacker) unpack(r io.Reader) error {
	u.parentFd = -1
	u.buf = make([]byte, 256<<10)
	defer func() {
		if u.parentFd >= 0 {
			syscall.Close(u.parentFd)
		}
	}()
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return tarError(err)
		}
		if err := u.member(h, t); err != nil {
			var already *wire.Error
			if errors.As(err, &already) {
				return err
			}
			return fmt.Errorf("%q: %w", h.Name, err)
		}
	}
	// The tar is over, the data may not be: only its proper end says that nothing was cut.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return tarError(err)
	}
	if u.updating {
		return nil
	}
	return u.finishDirs()
}

// tarError keeps errors of the connection and makes the rest a bad request.
func tarError(err error) error {
	var already *wire.Error
	if errors.As(err, &already) {
		return err
	}
	return wire.Errorf(wire.BadRequest, "put: reading the tar: %v", err)
}

func (u *unpacker) member(h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	parts, err := splitName(h.Name)
	if err != nil {
		return wire.Errorf(wire.BadRequest, "put: the member %q has %v", h.Name, err)
	}
	if len(parts) == 0 {
		if h.Typeflag != tar.TypeDir {
			return wire.Errorf(wire.BadRequest, "put: the member %q has no name", h.Name)
		}
		u.dirs = append(u.dirs, h)
		return nil
	}
	if u.updating && h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0 {
		// Before its directory would be made: a file may have that name by now.
		u.removed = append(u.removed, strings.Join(parts, "/"))
		return nil
	}
	dir, err := u.parent(parts[:len(parts)-1])
	if err != nil {
		return err
	}
	name := parts[len(parts)-1]
	if h.Typeflag == tar.TypeDir {
		u.dirs = append(u.dirs, h)
		return u.directory(dir, name)
	}
	u.counts.Files++
	if u.updating {
		u.placed = append(u.placed, strings.Join(parts, "/"))
	}
	place := func(create func(name string) error) error { return u.place(dir, name, create) }
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		return place(func(n string) error { return u.regular(dir, n, h, content) })
	case tar.TypeSymlink:
		if h.Linkname == "" || strings.IndexByte(h.Linkname, 0) >= 0 {
			return wire.Errorf(wire.BadRequest, "put: the link %q has no valid target", h.Name)
		}
		return place(func(n string) error {
			if err := kernel.Symlinkat(h.Linkname, dir, n); err != nil {
				return err
			}
			return u.attributes(dir, n, h)
		})
	case tar.TypeLink:
		return place(func(n string) error { return u.hardLink(dir, n, h.Linkname) })
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return place(func(n string) error { return u.node(dir, n, h) })
	default:
		return wire.Errorf(wire.BadRequest, "put: the member %q has the unknown type %q",
			h.Name, h.Typeflag)
	}
}

// parent opens the directory of a member; the descriptor stays the unpacker's.
func (u *unpacker) parent(parts []string) (int, error) {
	name := strings.Join(parts, "/")
	if u.parentFd >= 0 && name == u.parentName {
		return u.parentFd, nil
	}
	fd, err := openDir(u.root, parts, u.makeParent)
	if err != nil {
		return -1, err
	}
	if u.parentFd >= 0 {
		syscall.Close(u.parentFd)
	}
	u.parentName, u.parentFd = name, fd
	return fd, nil
}

// makeParent makes a directory that no member describes.
func (u *unpacker) makeParent(dirfd int, name string) error {
	if err := syscall.Mkdirat(dirfd, name, 0o755); err != nil {
		return err
	}
	if u.owner == nil || !u.privileged {
		return nil
	}
	return syscall.Fchownat(dirfd, name, int(u.owner.UID), int(u.owner.GID),
		kernel.AtSymlinkNofollow)
}

func (u *unpacker) directory(dir int, name string) error {
	err := syscall.Mkdirat(dir, name, 0o700)
	if err != syscall.EEXIST {
		return err
	}
	st, err := kernel.Lstatat(dir, name)
	if err != nil || st.Mode&syscall.S_IFMT == syscall.S_IFDIR {
		return err
	}
	if err := kernel.Unlinkat(dir, name, 0); err != nil {
		return err
	}
	return syscall.Mkdirat(dir, name, 0o700)
}

// place makes a member that is no directory.
func (u *unpacker) place(dir int, name string, create func(name string) error) error {
	if err := u.create(dir, name, create); err != nil || !u.report || u.updating {
		return err
	}
	return u.record(dir, name)
}

// create makes a file. In a tree in use it gets a temporary name first.
func (u *unpacker) create(dir int, name string, create func(name string) error) error {
	if !u.atomic {
		err := create(name)
		if !errors.Is(err, syscall.EEXIST) {
			return err
		}
		// The same name again: as in every tar, the later member counts.
		if err := kernel.Unlinkat(dir, name, 0); err != nil {
			return err
		}
		return create(name)
	}
	temp, release := claimName()
	defer release()
	if err := create(temp); err != nil {
		_ = kernel.Unlinkat(dir, temp, 0) // may not exist yet
		return err
	}
	err := kernel.Renameat2(dir, temp, dir, name, 0)
	// Two names of one file: rename does nothing and leaves both (rename(2)).
	_ = kernel.Unlinkat(dir, temp, 0)
	return err
}

// finishDirs sets what making entries inside would have changed, deepest first.
func (u *unpacker) finishDirs() error {
	for _, h := range slices.Backward(u.dirs) {
		parts, err := splitName(h.Name)
		if err != nil {
			return err
		}
		dir, name := u.root, "."
		if len(parts) > 0 {
			if dir, err = u.parent(parts[:len(parts)-1]); err != nil {
				return err
			}
			name = parts[len(parts)-1]
		}
		fd, err := kernel.Openat(dir, name, dirFlags, 0)
		if err != nil {
			// A later member of the same name may have replaced the directory.
			if err == syscall.ENOTDIR || err == syscall.ELOOP || err == syscall.ENOENT {
				continue
			}
			return fmt.Errorf("%q: %w", h.Name, err)
		}
		err = u.attributesOf(fd, h, false)
		syscall.Close(fd)
		if err != nil {
			return fmt.Errorf("%q: %w", h.Name, err)
		}
	}
	return nil
}
