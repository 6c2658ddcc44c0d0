package guest

import (
	"os"
	"syscall"

	"banger/agent/internal/kernel"
)

// Init is what becomes process 1 after the agent has set up the root.
type Init struct {
	Kind string // systemd, openrc, runit, or agent
	Path string // empty for agent
}

// FindInit decides which init of the image below root counts: systemd, or /sbin/init together with
// the parts of OpenRC or runit. A bare /sbin/init does not: busybox brings one to images that have
// no service to start, and booting into it gives nothing.
func FindInit(root string) Init {
	for _, path := range []string{"/usr/lib/systemd/systemd", "/lib/systemd/systemd"} {
		if isProgramIn(root, path) {
			return Init{"systemd", path}
		}
	}
	if isProgramIn(root, "/sbin/init") {
		if isProgramIn(root, "/sbin/openrc") {
			return Init{"openrc", "/sbin/init"}
		}
		if isProgramIn(root, "/etc/runit/2") {
			return Init{"runit", "/sbin/init"}
		}
	}
	return Init{Kind: "agent"}
}

// FindSSHD returns the path of the image's sshd, or "".
func FindSSHD(root string) string {
	for _, path := range []string{"/usr/sbin/sshd", "/usr/bin/sshd", "/sbin/sshd"} {
		if isProgramIn(root, path) {
			return path
		}
	}
	return ""
}

// isProgramIn tells whether path is an executable file when root is the root directory: absolute
// links, which images are full of, are resolved inside.
func isProgramIn(root, path string) bool {
	dir, err := syscall.Open(root, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer syscall.Close(dir)
	fd, err := kernel.Openat2(dir, path, kernel.OPath, 0, kernel.ResolveInRoot)
	if err != nil {
		return false
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	info, err := f.Stat()
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}
