package boot

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"banger/agent/internal/guest"
	"banger/agent/internal/kernel"
	"banger/agent/internal/tree"
)

const (
	// filledMark is the attribute of a work disk's root that says it was filled from the image.
	filledMark = "trusted.banger.filled"
	// workStage is where a new work disk is filled before it is moved to /root.
	workStage = "/run/banger/work"
)

// mountRest mounts, in the new root, what is not needed to get there. The work disk must work: its
// data would otherwise be written to the wrong place. The rest is reported and left out.
func (m *machine) mountRest() error {
	if m.config.Mounts.Work != "" {
		if err := m.mountWork(m.config.Mounts.Work); err != nil {
			return err
		}
		m.work = true
	}
	if m.config.Mounts.Modules != "" {
		if err := mountModules(m.config.Mounts.Modules); err != nil {
			m.con.Printf("%v", err)
		}
	}
	if m.config.DockerDirs {
		for _, d := range dockerDirs {
			if err := m.bindPlain(d.name, d.target); err != nil {
				m.con.Printf("%v", err)
			}
		}
	}
	// The overlay keeps the filesystem mounted for itself. Without this mount nothing else does, so
	// that unmounting the overlay, at shutdown, leaves it clean.
	if err := syscall.Unmount(kernel.FdPath(m.over), syscall.MNT_DETACH); err != nil {
		m.con.Printf("detaching the overlay disk: %v", err)
	}
	return nil
}

// mountWork mounts the work disk at /root, and at its first boot fills it from the image's /root.
func (m *machine) mountWork(device string) error {
	if err := os.MkdirAll("/run/banger", 0o700); err != nil {
		return err
	}
	stage := mount{device, workStage, "ext4", 0, ""}
	if err := stage.do(); err != nil {
		return err
	}
	fd, err := syscall.Open(workStage, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	m.grow(device, fd)
	if _, err := kernel.Getxattr(workStage, filledMark); err == syscall.ENODATA {
		if err := fillWork(fd); err != nil {
			return err
		}
	} else if err != nil {
		return fmt.Errorf("looking at the work disk: %w", err)
	}
	if err := guest.EnsureDir("/", "root", 0o755); err != nil {
		return err
	}
	if err := syscall.Mount(workStage, "/root", "", syscall.MS_MOVE, ""); err != nil {
		return fmt.Errorf("moving the work disk to /root: %w", err)
	}
	return os.Remove(workStage)
}

// fillWork copies the image's /root, as one tar from the one side of the tree package to the other.
// The mark comes after the data, so that a boot that was cut short is repeated from the start.
func fillWork(fd int) error {
	from, to := io.Pipe()
	go func() {
		_, err := tree.Get("/root", to)
		to.CloseWithError(err)
	}()
	_, err := tree.Put(workStage, from, nil, false)
	from.Close()
	if err != nil {
		return fmt.Errorf("filling the work disk from the image's /root: %w", err)
	}
	if err := kernel.Syncfs(fd); err != nil {
		return fmt.Errorf("filling the work disk from the image's /root: %w", err)
	}
	if err := kernel.Setxattr(workStage, filledMark, []byte("1")); err != nil {
		return fmt.Errorf("marking the work disk as filled: %w", err)
	}
	return nil
}

func mountModules(device string) error {
	var name syscall.Utsname
	if err := syscall.Uname(&name); err != nil {
		return err
	}
	target := modulesTarget("/", cString(name.Release[:]))
	const flags = syscall.MS_RDONLY | syscall.MS_NODEV | syscall.MS_NOSUID
	return mount{device, target, "squashfs", flags, ""}.do()
}

func cString(chars []int8) string {
	var text []byte
	for _, c := range chars {
		if c == 0 {
			break
		}
		text = append(text, byte(c))
	}
	return string(text)
}

// bindPlain mounts a directory of the overlay disk, by descriptor since the disk itself is out of
// sight, at target in the new root.
func (m *machine) bindPlain(name, target string) error {
	plain := kernel.FdPath(m.over) + "/plain/" + name
	if err := os.MkdirAll(plain, 0o711); err != nil {
		return fmt.Errorf("preparing %s: %w", target, err)
	}
	if err := guest.EnsureDir("/", filepath.Clean(target)[1:], 0o711); err != nil {
		return err
	}
	if err := syscall.Mount(plain, target, "", syscall.MS_BIND, ""); err != nil {
		return fmt.Errorf("binding %s: %w", target, err)
	}
	return nil
}
