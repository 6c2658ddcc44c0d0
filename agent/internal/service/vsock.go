package service

import (
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
	"unsafe"

	"banger/agent/internal/kernel"
)

const (
	afVsock = 40
	anyCID  = 0xffffffff
	hostCID = 2
	// vsockWrite is what one write to a vsock takes. More than 32 KiB with the kernel's own overhead
	// becomes a packet in several pieces (Linux 6.12.y and 6.17, virtio_vsock_alloc_skb), and a
	// Firecracker before 1.14 sends the first of them again when the host's socket has no room for
	// the second: the host would get data twice (its issue 5475).
	vsockWrite = 28 << 10
)

// sockaddrVM is struct sockaddr_vm (include/uapi/linux/vm_sockets.h), 16 bytes.
type sockaddrVM struct {
	family    uint16
	reserved  uint16
	port, cid uint32
	_         [4]byte
}

// vsockConn is a connected vsock. Package net refuses the family; a non-blocking file works with
// the runtime's poller, deadlines included.
type vsockConn struct{ *os.File }

// Write implements io.Writer in packets that the kernel keeps in one piece. Writers at the same
// time have a lock of their own.
func (c vsockConn) Write(p []byte) (int, error) {
	sent := 0
	for {
		n, err := c.File.Write(p[sent:min(sent+vsockWrite, len(p))])
		sent += n
		if err != nil || sent == len(p) {
			return sent, err
		}
	}
}

// ReadFrom implements io.ReaderFrom by Write: the file's own would have the kernel move pages, in
// packets of its choice.
func (c vsockConn) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{c}, r)
}

// CloseWrite ends this side's data.
func (c vsockConn) CloseWrite() error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var shutErr error
	if err := raw.Control(func(fd uintptr) {
		shutErr = syscall.Shutdown(int(fd), syscall.SHUT_WR)
	}); err != nil {
		return err
	}
	return shutErr
}

// endsWhole implements wholeEnder: a VMM with a Unix socket on the host's side keeps the end of one
// direction to itself (Firecracker, vsock/csm/connection.rs, PeerClosed).
func (vsockConn) endsWhole() {}

type vsockListener struct{ f *os.File }

func vsockSocket() (int, error) {
	fd, err := syscall.Socket(afVsock,
		syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("opening a vsock: %w", err)
	}
	return fd, nil
}

func addressCall(number uintptr, fd int, a *sockaddrVM) error {
	_, _, errno := syscall.Syscall(number, uintptr(fd), uintptr(unsafe.Pointer(a)),
		unsafe.Sizeof(*a))
	if errno != 0 {
		return errno
	}
	return nil
}

func listenVsock(port uint32) (Listener, error) {
	fd, err := vsockSocket()
	if err != nil {
		return nil, err
	}
	a := sockaddrVM{family: afVsock, port: port, cid: anyCID}
	if err := addressCall(syscall.SYS_BIND, fd, &a); err != nil {
		syscall.Close(fd)
		return nil, fmt.Errorf("binding vsock port %d: %w", port, err)
	}
	if err := syscall.Listen(fd, 128); err != nil {
		syscall.Close(fd)
		return nil, fmt.Errorf("listening on vsock port %d: %w", port, err)
	}
	return vsockListener{os.NewFile(uintptr(fd), "vsock listener")}, nil
}

// Accept returns the next connection from the host.
func (l vsockListener) Accept() (Conn, error) {
	raw, err := l.f.SyscallConn()
	if err != nil {
		return nil, net.ErrClosed
	}
	for {
		var a sockaddrVM
		var fd uintptr
		var errno syscall.Errno
		err := raw.Read(func(listener uintptr) bool {
			// syscall.Accept4 closes what it cannot decode the address of.
			size := uint32(unsafe.Sizeof(a))
			fd, _, errno = syscall.Syscall6(syscall.SYS_ACCEPT4, listener,
				uintptr(unsafe.Pointer(&a)), uintptr(unsafe.Pointer(&size)),
				syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0, 0)
			return errno != syscall.EAGAIN
		})
		if err != nil {
			return nil, net.ErrClosed
		}
		if errno == syscall.EINTR || errno == syscall.ECONNABORTED {
			continue
		}
		if errno != 0 {
			return nil, fmt.Errorf("accepting a vsock connection: %w", errno)
		}
		if a.cid != hostCID {
			syscall.Close(int(fd))
			continue
		}
		return vsockConn{os.NewFile(fd, "vsock")}, nil
	}
}

func (l vsockListener) Close() error { return l.f.Close() }

func dialVsock(cid, port uint32, timeout time.Duration) (Conn, error) {
	fd, err := vsockSocket()
	if err != nil {
		return nil, err
	}
	fail := func(err error) (Conn, error) {
		syscall.Close(fd)
		return nil, fmt.Errorf("connecting to vsock %d:%d: %w", cid, port, err)
	}
	a := sockaddrVM{family: afVsock, port: port, cid: cid}
	err = addressCall(syscall.SYS_CONNECT, fd, &a)
	if err == syscall.EINPROGRESS {
		wait := []kernel.PollFd{{Fd: int32(fd), Events: kernel.PollOut}}
		n, pollErr := kernel.Poll(wait, time.Now().Add(timeout))
		if pollErr != nil {
			return fail(pollErr)
		}
		if n == 0 {
			return fail(syscall.ETIMEDOUT)
		}
		code, optErr := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_ERROR)
		if optErr != nil {
			return fail(optErr)
		}
		err = nil
		if code != 0 {
			err = syscall.Errno(code)
		}
	}
	if err != nil {
		return fail(err)
	}
	return vsockConn{os.NewFile(uintptr(fd), "vsock")}, nil
}
