package session

import (
	"os"
	"syscall"
	"testing"
	"unsafe"
)

// unread tells how many bytes wait in a pipe. Source: pipe(7), FIONREAD.
func unread(t *testing.T, pipe *os.File) int {
	t.Helper()
	var count int32
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, pipe.Fd(), 0x541b, uintptr(unsafe.Pointer(&count)))
	if errno != 0 {
		t.Fatal(errno)
	}
	return int(count)
}
