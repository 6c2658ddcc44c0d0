package kernel

import (
	"syscall"
	"time"
	"unsafe"
)

// FinitModule loads the module behind fd with the given parameters.
//
// Source: finit_module(2).
func FinitModule(fd int, params string) error {
	p, err := syscall.BytePtrFromString(params)
	if err != nil {
		return err
	}
	_, _, errno := syscall.Syscall(sysFinitModule, uintptr(fd), uintptr(unsafe.Pointer(p)), 0)
	return noError(errno)
}

// Syncfs writes back the filesystem that fd is on.
func Syncfs(fd int) error {
	_, _, errno := syscall.Syscall(sysSyncfs, uintptr(fd), 0, 0)
	return noError(errno)
}

// MemfdCreate makes an anonymous file in memory.
func MemfdCreate(name string) (int, error) {
	p, err := syscall.BytePtrFromString(name)
	if err != nil {
		return -1, err
	}
	const mfdCloexec = 1
	fd, _, errno := syscall.Syscall(sysMemfdCreate, uintptr(unsafe.Pointer(p)), mfdCloexec, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// PidfdOpen returns a descriptor that becomes readable when the process ends.
//
// Source: pidfd_open(2), Linux 5.3.
func PidfdOpen(pid int) (int, error) {
	fd, _, errno := syscall.Syscall(sysPidfdOpen, uintptr(pid), 0, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// RemountReadOnly makes the superblock below fd read-only, also when the mount that fd belongs to
// is detached from the tree, where mount(2) with MS_REMOUNT refuses.
//
// Errors: EBUSY while a file is open for writing.
//
// Source: fspick(2), fsconfig(2), Linux 5.2.
func RemountReadOnly(fd int) error {
	const (
		fspickCloexec, fspickEmptyPath       = 0x1, 0x8
		fsconfigSetFlag, fsconfigReconfigure = 0, 7
	)
	empty, ro := []byte{0}, []byte("ro\x00")
	ctx, _, errno := syscall.Syscall(sysFspick, uintptr(fd), uintptr(unsafe.Pointer(&empty[0])),
		fspickCloexec|fspickEmptyPath)
	if errno != 0 {
		return errno
	}
	defer syscall.Close(int(ctx))
	_, _, errno = syscall.Syscall6(sysFsconfig, ctx, fsconfigSetFlag,
		uintptr(unsafe.Pointer(&ro[0])), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	_, _, errno = syscall.Syscall6(sysFsconfig, ctx, fsconfigReconfigure, 0, 0, 0, 0)
	return noError(errno)
}

// Ioctl performs an ioctl whose argument is a pointer.
func Ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
	return noError(errno)
}

// IoctlValue performs an ioctl whose argument is a number.
func IoctlValue(fd int, request, arg uintptr) error {
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), request, arg)
	return noError(errno)
}

// Poll events, poll(2).
const (
	PollIn  = 0x1
	PollOut = 0x4
)

// PollFd is struct pollfd.
type PollFd struct {
	Fd      int32
	Events  int16
	Revents int16
}

// Poll waits until one descriptor is ready or the deadline has passed; it returns how many are
// ready, 0 at the deadline. Interrupted waits go on with the time that is left.
func Poll(fds []PollFd, deadline time.Time) (int, error) {
	var first unsafe.Pointer
	if len(fds) > 0 {
		first = unsafe.Pointer(&fds[0])
	}
	for {
		ts := syscall.NsecToTimespec(int64(max(0, time.Until(deadline))))
		n, _, errno := syscall.Syscall6(syscall.SYS_PPOLL, uintptr(first), uintptr(len(fds)),
			uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
		if errno == syscall.EINTR {
			continue
		}
		return int(n), noError(errno)
	}
}

// Getxattr returns one extended attribute of what path leads to; for an open file that is FdPath.
func Getxattr(path, name string) ([]byte, error) {
	buf := make([]byte, 256)
	for {
		n, err := xattrCall(syscall.SYS_GETXATTR, path, name, buf)
		if err == syscall.ERANGE && len(buf) < 65536 { // XATTR_SIZE_MAX
			buf = make([]byte, 65536)
			continue
		}
		if err != nil {
			return nil, err
		}
		return buf[:n], nil
	}
}

// Setxattr sets one extended attribute of what path leads to.
func Setxattr(path, name string, value []byte) error {
	_, err := xattrCall(syscall.SYS_SETXATTR, path, name, value)
	return err
}

// Listxattr returns the names of the extended attributes, each ended by NUL.
func Listxattr(path string) ([]byte, error) {
	buf := make([]byte, 65536) // XATTR_LIST_MAX
	p, err := syscall.BytePtrFromString(path)
	if err != nil {
		return nil, err
	}
	n, _, errno := syscall.Syscall(syscall.SYS_LISTXATTR, uintptr(unsafe.Pointer(p)),
		uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
	if errno != 0 {
		return nil, errno
	}
	return buf[:n], nil
}

func xattrCall(number uintptr, path, name string, value []byte) (int, error) {
	p, err := syscall.BytePtrFromString(path)
	if err != nil {
		return 0, err
	}
	q, err := syscall.BytePtrFromString(name)
	if err != nil {
		return 0, err
	}
	var first unsafe.Pointer
	if len(value) > 0 {
		first = unsafe.Pointer(&value[0])
	}
	n, _, errno := syscall.Syscall6(number, uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(q)),
		uintptr(first), uintptr(len(value)), 0, 0)
	return int(n), noError(errno)
}

// CoarseRealtime is the clock that file times are taken from, in nanoseconds since 1970.
//
// Source: clock_gettime(2), CLOCK_REALTIME_COARSE.
func CoarseRealtime() int64 {
	const clockRealtimeCoarse = 5
	var ts syscall.Timespec
	_, _, errno := syscall.Syscall(syscall.SYS_CLOCK_GETTIME, clockRealtimeCoarse,
		uintptr(unsafe.Pointer(&ts)), 0)
	if errno != 0 {
		return time.Now().UnixNano()
	}
	return ts.Nano()
}
