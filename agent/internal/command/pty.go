package command

import (
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"banger/agent/internal/kernel"
)

// winsize is struct winsize (asm-generic/termios.h).
type winsize struct {
	rows, cols, xpixel, ypixel uint16
}

// openPTY makes a terminal of the given size that belongs to uid. The controlling side is ready
// for the runtime's poller; the other side is the child's and the caller closes it after the start.
//
// Source: pty(7), ioctl_tty(2).
func openPTY(size Size, uid int) (*os.File, int, error) {
	const tiocsptlck, tiocgptpeer = 0x40045431, 0x5441
	fd, err := syscall.Open("/dev/ptmx",
		syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, -1, fmt.Errorf("opening a terminal, /dev/ptmx: %w", err)
	}
	fail := func(doing string, err error) (*os.File, int, error) {
		syscall.Close(fd)
		return nil, -1, fmt.Errorf("opening a terminal, %s: %w", doing, err)
	}
	var unlock int32
	if err := kernel.Ioctl(fd, tiocsptlck, unsafe.Pointer(&unlock)); err != nil {
		return fail("TIOCSPTLCK", err)
	}
	// By descriptor, not through /dev/pts, which may be another instance's in this place.
	peer, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), tiocgptpeer,
		uintptr(syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC))
	if errno != 0 {
		return fail("TIOCGPTPEER", errno)
	}
	if err := setSize(fd, size); err != nil {
		syscall.Close(int(peer))
		return fail("TIOCSWINSZ", err)
	}
	if err := setUTF8(fd); err != nil {
		syscall.Close(int(peer))
		return fail("IUTF8", err)
	}
	if os.Geteuid() == 0 {
		// The group stays the one that devpts gives, tty; without this su and mesg complain.
		if err := syscall.Fchown(int(peer), uid, -1); err != nil {
			syscall.Close(int(peer))
			return fail("its owner", err)
		}
	}
	return os.NewFile(uintptr(fd), "terminal"), int(peer), nil
}

func setSize(fd int, size Size) error {
	ws := winsize{rows: size.Rows, cols: size.Cols}
	return kernel.Ioctl(fd, syscall.TIOCSWINSZ, unsafe.Pointer(&ws))
}

// setUTF8 makes the terminal's own line editing erase whole characters, termios(3).
func setUTF8(fd int) error {
	var t syscall.Termios
	if err := kernel.Ioctl(fd, syscall.TCGETS, unsafe.Pointer(&t)); err != nil {
		return err
	}
	t.Iflag |= syscall.IUTF8
	return kernel.Ioctl(fd, syscall.TCSETS, unsafe.Pointer(&t))
}

// endOfInput returns the character that ends the input of the terminal, false when it is in a mode
// in which none does.
func endOfInput(fd int) (byte, bool) {
	var t syscall.Termios
	if err := kernel.Ioctl(fd, syscall.TCGETS, unsafe.Pointer(&t)); err != nil {
		return 0, false
	}
	return t.Cc[syscall.VEOF], t.Lflag&syscall.ICANON != 0
}

// pending returns how many bytes a pipe or terminal holds for its reader.
func pending(fd int) (int, bool) {
	const fionread = 0x541b
	var n int32
	err := kernel.Ioctl(fd, fionread, unsafe.Pointer(&n))
	return int(n), err == nil
}
