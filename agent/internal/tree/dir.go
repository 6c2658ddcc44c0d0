// Package tree receives and sends directory trees as tar streams.
//
// Below its root no symbolic link is ever followed: every component is opened by descriptor with
// O_NOFOLLOW, because users of the guest may change the tree meanwhile. A `replace` is unpacked
// into a sibling directory and renamed over the target, so a cut stream leaves the old tree.
package tree

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"banger/agent/internal/kernel"
	"banger/agent/internal/wire"
)

const dirFlags = syscall.O_RDONLY | syscall.O_DIRECTORY | syscall.O_NOFOLLOW

// splitPath checks an absolute path and returns its components.
func splitPath(path string) ([]string, error) {
	if !strings.HasPrefix(path, "/") {
		return nil, wire.Errorf(wire.BadRequest, "path %q is not absolute", path)
	}
	parts, err := splitName(path[1:])
	if err != nil {
		return nil, wire.Errorf(wire.BadRequest, "path %q: %v", path, err)
	}
	return parts, nil
}

// splitName checks the name of a member and returns its components, none for the root itself.
//
// Errors: an absolute name, "..", NUL, or a component or name longer than the kernel takes.
func splitName(name string) ([]string, error) {
	if strings.HasPrefix(name, "/") {
		return nil, errors.New("an absolute name")
	}
	if len(name) > 4095 {
		return nil, errors.New("a name of more than 4095 bytes")
	}
	if strings.IndexByte(name, 0) >= 0 {
		return nil, errors.New("a name with a NUL byte")
	}
	var parts []string
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "" || part == ".":
		case part == "..":
			return nil, errors.New(`a name with a ".." component`)
		case len(part) > 255:
			return nil, errors.New("a component of more than 255 bytes")
		default:
			parts = append(parts, part)
		}
	}
	return parts, nil
}

// openDir opens the directory that parts name below base, following no link. With make, missing
// directories are made and given to make. The result is a new descriptor.
func openDir(base int, parts []string, make func(dirfd int, name string) error) (int, error) {
	fd, err := kernel.Openat(base, ".", dirFlags, 0)
	if err != nil {
		return -1, err
	}
	for i, part := range parts {
		next, err := kernel.Openat(fd, part, dirFlags, 0)
		if err == syscall.ENOENT && make != nil {
			if err = make(fd, part); err == nil || err == syscall.EEXIST {
				next, err = kernel.Openat(fd, part, dirFlags, 0)
			}
		}
		syscall.Close(fd)
		if err != nil {
			return -1, &pathError{strings.Join(parts[:i+1], "/"), err}
		}
		fd = next
	}
	return fd, nil
}

// pathError names the component that could not be passed.
type pathError struct {
	path string
	err  error
}

func (e *pathError) Error() string {
	switch e.err {
	case syscall.ELOOP, syscall.ENOTDIR:
		// With O_DIRECTORY and O_NOFOLLOW a symbolic link is ENOTDIR too.
		return fmt.Sprintf("%s is a symbolic link or no directory", e.path)
	default:
		return fmt.Sprintf("%s: %v", e.path, e.err)
	}
}

func (e *pathError) Unwrap() error { return e.err }

// removeAll removes name from dirfd, with all that is below it, following no link.
func removeAll(dirfd int, name string) error {
	err := kernel.Unlinkat(dirfd, name, 0)
	if err == nil || err == syscall.ENOENT {
		return nil
	}
	if err != syscall.EISDIR && err != syscall.EPERM {
		return fmt.Errorf("removing %s: %w", name, err)
	}
	fd, err := kernel.Openat(dirfd, name, dirFlags, 0)
	if err != nil {
		return fmt.Errorf("removing %s: %w", name, err)
	}
	dir := os.NewFile(uintptr(fd), name)
	defer dir.Close()
	for {
		// Removing while reading may skip entries: read again until nothing is left.
		names, err := dir.Readdirnames(1024)
		for _, child := range names {
			if err := removeAll(fd, child); err != nil {
				return err
			}
		}
		if err != nil || len(names) == 0 {
			if _, err := dir.Seek(0, 0); err != nil {
				return fmt.Errorf("removing %s: %w", name, err)
			}
			names, _ = dir.Readdirnames(1)
			if len(names) == 0 {
				break
			}
			if err := removeAll(fd, names[0]); err != nil {
				return err
			}
		}
	}
	if err := kernel.Unlinkat(dirfd, name, kernel.AtRemovedir); err != nil {
		return fmt.Errorf("removing %s: %w", name, err)
	}
	return nil
}
