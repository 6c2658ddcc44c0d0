package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"banger/agent/internal/disk"
	"banger/agent/internal/guest"
)

// Places in the initramfs.
const (
	configPath = "/banger/config.json"
	moduleList = "/banger/modules"
	lowerDir   = "/banger/lower"
	overDir    = "/banger/over"
	newRoot    = "/banger/root"
)

// mount is one call of mount(2).
type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

func (m mount) String() string {
	return fmt.Sprintf("mounting %s from %s at %s", m.fstype, m.source, m.target)
}

// do makes the target and mounts.
func (m mount) do() error {
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return fmt.Errorf("%v: %w", m, err)
	}
	if err := syscall.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
		return fmt.Errorf("%v: %w", m, err)
	}
	return nil
}

// planKernelMounts are the filesystems that every Linux system has. /run comes now because what is
// mounted there before the switch is kept.
func planKernelMounts() []mount {
	const common = syscall.MS_NOSUID | syscall.MS_NOEXEC | syscall.MS_NODEV
	return []mount{
		{"proc", "/proc", "proc", common, ""},
		{"sysfs", "/sys", "sysfs", common, ""},
		{"devtmpfs", "/dev", "devtmpfs", syscall.MS_NOSUID, "mode=0755"},
		{"devpts", "/dev/pts", "devpts", syscall.MS_NOSUID | syscall.MS_NOEXEC,
			"gid=5,mode=620,ptmxmode=666"},
		{"tmpfs", "/dev/shm", "tmpfs", syscall.MS_NOSUID | syscall.MS_NODEV, "mode=1777"},
		// Executable, unlike the others: systemd runs the shutdown program from here.
		{"tmpfs", "/run", "tmpfs", syscall.MS_NOSUID | syscall.MS_NODEV, "mode=0755"},
	}
}

// planImage mounts the image read-only. An ext4 image that was not unmounted cleanly must not be
// repaired either, since other VMs share it: noload leaves the journal alone.
func planImage(device string, kind disk.Kind) mount {
	m := mount{device, lowerDir, string(kind), syscall.MS_RDONLY, ""}
	if kind == disk.Ext4 {
		m.data = "noload"
	}
	return m
}

func planOverlayDisk(device string) mount { return mount{device, overDir, "ext4", 0, ""} }

// planRoot lays the overlay over the image. redirect_dir: without it renaming a directory of the
// image fails with EXDEV, which few programs expect.
func planRoot() mount {
	return mount{"overlay", newRoot, "overlay", 0, "lowerdir=" + lowerDir +
		",upperdir=" + overDir + "/upper,workdir=" + overDir + "/work,redirect_dir=on"}
}

// rootDirs are the directories that images may lack.
var rootDirs = []struct {
	path string
	mode os.FileMode
}{
	{"proc", 0o755}, {"sys", 0o755}, {"dev", 0o755}, {"run", 0o755}, {"root", 0o755},
	{"tmp", 0o777 | os.ModeSticky},
}

// moved are the mounts that go along into the new root.
var moved = []string{"/proc", "/sys", "/dev", "/run"}

// dockerDirs need a plain ext4: overlay2 does not run on an overlay. Key is the directory on the
// overlay disk.
var dockerDirs = []struct{ name, target string }{
	{"docker", "/var/lib/docker"}, {"containerd", "/var/lib/containerd"},
}

// disks lists the devices of the configuration that are set.
func disks(m guest.Mounts) []string {
	var all []string
	for _, d := range []string{m.Image, m.Overlay, m.Work, m.Modules} {
		if d != "" {
			all = append(all, d)
		}
	}
	return all
}

// modulesTarget is where the modules of a release belong: where the image's /lib is no link to
// /usr/lib, tools look below /lib.
func modulesTarget(root, release string) string {
	info, err := os.Lstat(filepath.Join(root, "lib"))
	if err == nil && info.Mode()&os.ModeSymlink == 0 {
		return filepath.Join("/lib/modules", release)
	}
	return filepath.Join("/usr/lib/modules", release)
}

func mountAll(mounts []mount) error {
	for _, m := range mounts {
		// EBUSY: the kernel or an earlier stage has mounted it.
		if err := m.do(); err != nil && !errors.Is(err, syscall.EBUSY) {
			return err
		}
	}
	return nil
}
