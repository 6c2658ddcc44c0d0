package boot

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"banger/agent/internal/kernel"
)

// deviceWait is how long a device may take to appear after its driver was loaded.
const deviceWait = 30 * time.Second

// uevents listens for the kernel's announcements of devices. It must be opened before what is
// waited for can happen, so that nothing falls between looking and listening.
type uevents struct{ fd int }

// openUevents subscribes.
//
// Source: netlink(7), NETLINK_KOBJECT_UEVENT, group 1 are the kernel's own messages.
func openUevents() (uevents, error) {
	fd, err := syscall.Socket(syscall.AF_NETLINK,
		syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, syscall.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return uevents{}, fmt.Errorf("listening for devices: %w", err)
	}
	group := &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK, Groups: 1}
	if err := syscall.Bind(fd, group); err != nil {
		syscall.Close(fd)
		return uevents{}, fmt.Errorf("listening for devices: %w", err)
	}
	return uevents{fd}, nil
}

func (u uevents) close() { syscall.Close(u.fd) }

// waitFor calls there after each batch of events until it returns nil, or an error that is not
// missing, or the deadline has passed: then the last error is returned.
func (u uevents) waitFor(there func() error, missing error, deadline time.Time) error {
	buf := make([]byte, 8192)
	for {
		err := there()
		if err == nil || !errors.Is(err, missing) {
			return err
		}
		n, pollErr := kernel.Poll([]kernel.PollFd{{Fd: int32(u.fd), Events: kernel.PollIn}}, deadline)
		if pollErr != nil {
			return pollErr
		}
		if n == 0 {
			return err
		}
		for {
			// Which device it was does not matter: there looks itself. ENOBUFS, lost events, too.
			if _, _, err := syscall.Recvfrom(u.fd, buf, 0); err == syscall.EAGAIN {
				break
			}
		}
	}
}

// waitDevices waits until all block devices exist.
func (u uevents) waitDevices(paths []string) error {
	deadline := time.Now().Add(deviceWait)
	for _, p := range paths {
		err := u.waitFor(func() error {
			_, err := os.Stat(p)
			return err
		}, os.ErrNotExist, deadline)
		if err != nil {
			return fmt.Errorf("waiting for the disk %s: %w", p, err)
		}
	}
	return nil
}
