// Package kernel holds the Linux interfaces that package syscall lacks: calls relative to a
// directory descriptor, module loading, ioctls, polling. Every function is a thin wrapper of one
// system call and owns nothing; descriptors it returns belong to the caller and are close-on-exec.
package kernel

import (
	"strconv"
	"syscall"
	"unsafe"
)

// Flags of the calls below, under their kernel names.
const (
	AtSymlinkNofollow = 0x100
	AtRemovedir       = 0x200
	AtEmptyPath       = 0x1000

	OPath = 0x200000

	RenameNoreplace = 1
	RenameExchange  = 2

	ResolveNoSymlinks = 0x04
	ResolveBeneath    = 0x08
	ResolveInRoot     = 0x10
)

// openHow is struct open_how (include/uapi/linux/openat2.h).
type openHow struct {
	flags, mode, resolve uint64
}

// Openat2 opens path relative to dirfd; resolve is a set of Resolve flags.
//
// Source: openat2(2), Linux 5.6.
func Openat2(dirfd int, path string, flags int, mode uint32, resolve uint64) (int, error) {
	p, err := syscall.BytePtrFromString(path)
	if err != nil {
		return -1, err
	}
	how := openHow{uint64(flags | syscall.O_CLOEXEC), uint64(mode), resolve}
	for {
		fd, _, errno := syscall.Syscall6(sysOpenat2, uintptr(dirfd), uintptr(unsafe.Pointer(p)),
			uintptr(unsafe.Pointer(&how)), unsafe.Sizeof(how), 0, 0)
		// EAGAIN: a rename anywhere raced with a ".." of this lookup.
		if errno == syscall.EINTR || errno == syscall.EAGAIN {
			continue
		}
		if errno != 0 {
			return -1, errno
		}
		return int(fd), nil
	}
}

// Openat opens name in dirfd, close-on-exec, retrying interrupted calls.
func Openat(dirfd int, name string, flags int, mode uint32) (int, error) {
	for {
		fd, err := syscall.Openat(dirfd, name, flags|syscall.O_CLOEXEC, mode)
		if err != syscall.EINTR {
			return fd, err
		}
	}
}

// Lstatat describes name in dirfd without following a final symbolic link.
func Lstatat(dirfd int, name string) (syscall.Stat_t, error) {
	var st syscall.Stat_t
	p, err := syscall.BytePtrFromString(name)
	if err != nil {
		return st, err
	}
	_, _, errno := syscall.Syscall6(sysFstatat, uintptr(dirfd), uintptr(unsafe.Pointer(p)),
		uintptr(unsafe.Pointer(&st)), AtSymlinkNofollow, 0, 0)
	return st, noError(errno)
}

// Unlinkat removes name from dirfd; flags is 0 or AtRemovedir.
func Unlinkat(dirfd int, name string, flags int) error {
	p, err := syscall.BytePtrFromString(name)
	if err != nil {
		return err
	}
	_, _, errno := syscall.Syscall(syscall.SYS_UNLINKAT, uintptr(dirfd),
		uintptr(unsafe.Pointer(p)), uintptr(flags))
	return noError(errno)
}

// Renameat2 renames; flags is 0, RenameNoreplace or RenameExchange.
//
// Source: renameat2(2), Linux 3.15.
func Renameat2(oldfd int, oldname string, newfd int, newname string, flags uint) error {
	o, err := syscall.BytePtrFromString(oldname)
	if err != nil {
		return err
	}
	n, err := syscall.BytePtrFromString(newname)
	if err != nil {
		return err
	}
	_, _, errno := syscall.Syscall6(sysRenameat2, uintptr(oldfd), uintptr(unsafe.Pointer(o)),
		uintptr(newfd), uintptr(unsafe.Pointer(n)), uintptr(flags), 0)
	return noError(errno)
}

// Symlinkat makes name in dirfd a symbolic link to target.
func Symlinkat(target string, dirfd int, name string) error {
	t, err := syscall.BytePtrFromString(target)
	if err != nil {
		return err
	}
	n, err := syscall.BytePtrFromString(name)
	if err != nil {
		return err
	}
	_, _, errno := syscall.Syscall(syscall.SYS_SYMLINKAT, uintptr(unsafe.Pointer(t)),
		uintptr(dirfd), uintptr(unsafe.Pointer(n)))
	return noError(errno)
}

// Linkat makes a hard link; a symbolic link at oldname is linked itself, never followed.
func Linkat(oldfd int, oldname string, newfd int, newname string) error {
	o, err := syscall.BytePtrFromString(oldname)
	if err != nil {
		return err
	}
	n, err := syscall.BytePtrFromString(newname)
	if err != nil {
		return err
	}
	_, _, errno := syscall.Syscall6(syscall.SYS_LINKAT, uintptr(oldfd), uintptr(unsafe.Pointer(o)),
		uintptr(newfd), uintptr(unsafe.Pointer(n)), 0, 0)
	return noError(errno)
}

// Readlinkat returns the target of the symbolic link name in dirfd, at most PATH_MAX bytes.
func Readlinkat(dirfd int, name string) (string, error) {
	p, err := syscall.BytePtrFromString(name)
	if err != nil {
		return "", err
	}
	buf := make([]byte, 4096)
	n, _, errno := syscall.Syscall6(syscall.SYS_READLINKAT, uintptr(dirfd),
		uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0, 0)
	if errno != 0 {
		return "", errno
	}
	return string(buf[:n]), nil
}

// FdPath is a path to the file behind fd, for calls that take no descriptor or refuse one that was
// opened with O_PATH. The kernel's link leads to the file itself, also to a symbolic link.
func FdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// SetMtime sets the modification time of the open file fd; the access time stays.
//
// Source: utimensat(2): without a path it acts on the descriptor, which O_PATH forbids.
func SetMtime(fd int, unixNs int64) error { return utimensat(fd, nil, unixNs) }

// SetMtimeOfPath is SetMtime for a descriptor that was opened with O_PATH.
func SetMtimeOfPath(fd int, unixNs int64) error {
	const atFdcwd = -100
	p, err := syscall.BytePtrFromString(FdPath(fd))
	if err != nil {
		return err
	}
	return utimensat(atFdcwd, p, unixNs)
}

func utimensat(dirfd int, path *byte, unixNs int64) error {
	const utimeOmit = (1 << 30) - 2
	ts := [2]syscall.Timespec{{Nsec: utimeOmit}, syscall.NsecToTimespec(unixNs)}
	_, _, errno := syscall.Syscall6(syscall.SYS_UTIMENSAT, uintptr(dirfd),
		uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(&ts[0])), 0, 0, 0)
	return noError(errno)
}

// Pwrite writes all of data at offset, in as many calls as it takes.
func Pwrite(fd int, data []byte, offset int64) error {
	for len(data) > 0 {
		n, err := syscall.Pwrite(fd, data, offset)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		data, offset = data[n:], offset+int64(n)
	}
	return nil
}

// Ftruncate sets the size of the file behind fd.
func Ftruncate(fd int, size int64) error {
	for {
		if err := syscall.Ftruncate(fd, size); err != syscall.EINTR {
			return err
		}
	}
}

func noError(errno syscall.Errno) error {
	if errno == 0 {
		return nil
	}
	return errno
}
