package tree

import (
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"syscall"

	"banger/agent/internal/kernel"
	"banger/agent/internal/wire"
)

// update receives the tar beside the target and then moves it in, so that a stream that is cut
// changes nothing. Names that the tar does not hold are left alone.
func (u *unpacker) update(root int, parts []string, r io.Reader) error {
	parent, err := openDir(root, parts[:len(parts)-1], nil)
	if err == nil {
		defer syscall.Close(parent)
		u.root, err = kernel.Openat(parent, parts[len(parts)-1], dirFlags, 0)
	}
	if errors.Is(err, syscall.ENOENT) {
		return wire.Errorf(wire.NotFound, "put: /%s does not exist", strings.Join(parts, "/"))
	}
	if err != nil {
		return err
	}
	target := u.root
	defer syscall.Close(target)
	temp, release := newStaging(parent)
	defer release()
	if err := syscall.Mkdirat(parent, temp, 0o700); err != nil {
		return fmt.Errorf("making %s: %w", temp, err)
	}
	defer func() { _ = removeAll(parent, temp) }() // the first error is the one to report
	staging, err := kernel.Openat(parent, temp, dirFlags, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(staging)
	u.updating, u.root = true, staging
	if err := u.unpack(r); err != nil {
		return err
	}
	u.root = target
	u.parentFd = -1
	for _, name := range u.removed {
		if err := u.remove(target, name); err != nil {
			return fmt.Errorf("removing %q: %w", name, err)
		}
	}
	if err := u.moveAll(staging, target); err != nil {
		return err
	}
	return u.placeDirs(target)
}

// remove removes a file, and the directories that it leaves empty, as git does. A directory of that
// name is somebody else's and stays.
func (u *unpacker) remove(root int, name string) error {
	parts := strings.Split(name, "/")
	for len(parts) > 0 {
		dir, err := openDir(root, parts[:len(parts)-1], nil)
		if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
			return nil
		}
		if err != nil {
			return err
		}
		flags := 0
		if len(parts) < strings.Count(name, "/")+1 {
			flags = kernel.AtRemovedir
		}
		err = kernel.Unlinkat(dir, parts[len(parts)-1], flags)
		syscall.Close(dir)
		switch {
		case err == nil || err == syscall.ENOENT:
			parts = parts[:len(parts)-1]
		case err == syscall.EISDIR || err == syscall.EPERM && flags == 0 || flags != 0:
			return nil
		default:
			return err
		}
	}
	return nil
}

// moveAll moves the placed members from one directory to the same names in another.
func (u *unpacker) moveAll(from, to int) error {
	moved := map[string]bool{}
	source, dest := &walker{root: from}, &walker{root: to, make: u.clearedParent}
	defer source.close()
	defer dest.close()
	for _, name := range u.placed {
		directory, base := path.Split(name)
		dir, err := dest.enter(directory)
		if err == nil && !moved[name] {
			moved[name] = true
			err = moveOne(source, dir, directory, base)
		}
		if err == nil && u.report {
			err = u.record(dir, base)
		}
		if err != nil {
			return fmt.Errorf("placing %q: %w", name, err)
		}
	}
	return nil
}

func moveOne(source *walker, to int, directory, base string) error {
	from, err := source.enter(directory)
	if err != nil {
		return err
	}
	for {
		err := kernel.Renameat2(from, base, to, base, 0)
		if err != syscall.EISDIR && err != syscall.ENOTEMPTY && err != syscall.EEXIST {
			return err
		}
		if err := removeAll(to, base); err != nil {
			return err
		}
	}
}

// clearedParent makes a directory where a file or a link may stand in its way.
func (u *unpacker) clearedParent(dirfd int, name string) error {
	if st, err := kernel.Lstatat(dirfd, name); err == nil && st.Mode&syscall.S_IFMT != syscall.S_IFDIR {
		if err := kernel.Unlinkat(dirfd, name, 0); err != nil {
			return err
		}
	}
	return u.makeParent(dirfd, name)
}

// placeDirs makes the directories of the tar that are not there yet, and sets the modes of all.
func (u *unpacker) placeDirs(target int) error {
	w := &walker{root: target, make: u.clearedParent}
	defer w.close()
	for _, h := range u.dirs {
		parts, err := splitName(h.Name)
		if err != nil {
			return err
		}
		if _, err := w.enter(strings.Join(parts, "/")); err != nil {
			return fmt.Errorf("%q: %w", h.Name, err)
		}
	}
	defer func() {
		if u.parentFd >= 0 {
			syscall.Close(u.parentFd)
		}
	}()
	return u.finishDirs()
}

// walker keeps the directory it was last asked for open: neighbours in a tar share theirs.
type walker struct {
	root   int
	make   func(dirfd int, name string) error
	name   string
	fd     int
	opened bool
}

// enter opens the directory of that name below the root, following no link. The descriptor is
// valid until the next call.
func (w *walker) enter(name string) (int, error) {
	if w.opened && w.name == name {
		return w.fd, nil
	}
	parts, err := splitName(name)
	if err != nil {
		return -1, err
	}
	fd, err := w.open(parts)
	if err != nil {
		return -1, err
	}
	w.close()
	w.name, w.fd, w.opened = name, fd, true
	return fd, nil
}

// open is openDir, where a file in the way gives way if directories may be made.
func (w *walker) open(parts []string) (int, error) {
	fd, err := openDir(w.root, parts, w.make)
	if w.make == nil || !errors.Is(err, syscall.ENOTDIR) && !errors.Is(err, syscall.ELOOP) {
		return fd, err
	}
	fd, err = kernel.Openat(w.root, ".", dirFlags, 0)
	if err != nil {
		return -1, err
	}
	for _, part := range parts {
		next, err := kernel.Openat(fd, part, dirFlags, 0)
		if err == syscall.ENOTDIR || err == syscall.ELOOP || err == syscall.ENOENT {
			if err = w.make(fd, part); err == nil || err == syscall.EEXIST {
				next, err = kernel.Openat(fd, part, dirFlags, 0)
			}
		}
		syscall.Close(fd)
		if err != nil {
			return -1, err
		}
		fd = next
	}
	return fd, nil
}

func (w *walker) close() {
	if w.opened {
		syscall.Close(w.fd)
		w.opened = false
	}
}
