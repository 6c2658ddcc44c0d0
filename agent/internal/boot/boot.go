// Package boot is the agent as process 1 of a guest: it sets up the root filesystem from the
// initramfs, starts the service, and becomes the image's init or stays process 1 itself.
//
// Everything it mounts lives until the machine ends. A failure that leaves no usable system is
// printed on the console and the machine reboots, which ends the VMM; it never waits without limit.
package boot

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"banger/agent/internal/disk"
	"banger/agent/internal/guest"
	"banger/agent/internal/link"
)

// linkWait is how long the network interface may take to appear after its driver was loaded.
const linkWait = 10 * time.Second

// machine is what the boot has found and made so far.
type machine struct {
	version string
	config  *guest.Config
	con     console
	events  uevents
	init    guest.Init
	link    string // name of the configured interface
	over    int    // root of the overlay disk, which nothing else can reach after the switch
	work    bool   // /root is a disk of its own
}

// Main is process 1. It does not return unless the boot has failed and the reboot as well.
func Main(version string) {
	// The runtime would end the process on these, and with process 1 the machine.
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPWR,
		syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGQUIT, syscall.SIGPIPE)
	m := &machine{version: version}
	err := m.boot()
	if err == nil {
		err = m.become(signals)
	}
	m.con.fatal(err)
}

// boot ends with the new root in place and all files written.
func (m *machine) boot() error {
	syscall.Umask(0o022)
	if err := mountAll(planKernelMounts()); err != nil {
		return err
	}
	m.con.Printf("agent %s", m.version)
	if err := makeDevLinks(); err != nil {
		m.con.Printf("%v", err)
	}
	if err := m.readConfig(); err != nil {
		return err
	}
	var err error
	if m.events, err = openUevents(); err != nil {
		return err
	}
	defer m.events.close()
	if err := loadModules(moduleList); err != nil {
		m.con.Printf("%v", err)
	}
	if err := m.mountRoot(); err != nil {
		return err
	}
	if err := m.switchRoot(); err != nil {
		return err
	}
	m.con.Printf("root filesystem ready after %s", uptime())
	if err := m.mountRest(); err != nil {
		return err
	}
	m.stepClock()
	if err := m.network(); err != nil {
		return err
	}
	if err := guest.WriteFiles("/", m.config, m.link); err != nil {
		m.con.Printf("%v", err)
	}
	if err := syscall.Sethostname([]byte(m.config.Hostname)); err != nil {
		m.con.Printf("setting the host name: %v", err)
	}
	m.init = guest.FindInit("/")
	return nil
}

func (m *machine) readConfig() error {
	f, err := os.Open(configPath)
	if err != nil {
		return fmt.Errorf("reading the configuration document: %w", err)
	}
	text, err := io.ReadAll(io.LimitReader(f, guest.MaxConfig+1))
	f.Close()
	if err != nil {
		return fmt.Errorf("reading the configuration document: %w", err)
	}
	// It holds the token and the host key; the initramfs can be seen by nobody later, but its
	// memory would stay in use.
	if err := os.Remove(configPath); err != nil {
		return fmt.Errorf("removing the configuration document: %w", err)
	}
	if m.config, err = guest.ParseConfig(text); err != nil {
		return err
	}
	if err := m.config.CheckTransport(); err != nil {
		return fmt.Errorf("the configuration document: %w", err)
	}
	return nil
}

// mountRoot mounts image, overlay disk and overlay at newRoot.
func (m *machine) mountRoot() error {
	devices := m.config.Mounts
	if devices.Image == "" || devices.Overlay == "" {
		return errors.New("the configuration document names no image or no overlay disk")
	}
	if err := m.events.waitDevices(disks(devices)); err != nil {
		return err
	}
	kind, err := findKind(devices.Image)
	if err != nil {
		return err
	}
	if err := planImage(devices.Image, kind).do(); err != nil {
		return err
	}
	if err := planOverlayDisk(devices.Overlay).do(); err != nil {
		return err
	}
	const flags = syscall.O_RDONLY | syscall.O_DIRECTORY | syscall.O_CLOEXEC
	if m.over, err = syscall.Open(overDir, flags, 0); err != nil {
		return err
	}
	m.grow(devices.Overlay, m.over)
	for _, dir := range []string{"upper", "work", "plain"} {
		if err := os.MkdirAll(filepath.Join(overDir, dir), 0o755); err != nil {
			return fmt.Errorf("preparing the overlay disk: %w", err)
		}
	}
	if err := planRoot().do(); err != nil {
		return err
	}
	for _, d := range rootDirs {
		if err := guest.EnsureDir(newRoot, d.path, d.mode); err != nil {
			return err
		}
	}
	return nil
}

func findKind(device string) (disk.Kind, error) {
	f, err := os.Open(device)
	if err != nil {
		return "", fmt.Errorf("reading the image: %w", err)
	}
	defer f.Close()
	kind, err := disk.FindKind(f)
	if err != nil {
		return "", fmt.Errorf("reading the image %s: %w", device, err)
	}
	return kind, nil
}

// grow grows a filesystem. Failing is no reason to stop: it works at its old size.
func (m *machine) grow(device string, fd int) {
	grown, err := disk.Grow(device, fd)
	if err != nil {
		m.con.Printf("%v", err)
	} else if grown.After > grown.Before {
		m.con.Printf("%s grown from %d to %d MiB", device, grown.Before>>20, grown.After>>20)
	}
}

// switchRoot makes newRoot the root of this process, and thereby of all that follow. The program
// itself stays reachable as /proc/self/exe.
func (m *machine) switchRoot() error {
	for _, dir := range moved {
		if err := syscall.Mount(dir, newRoot+dir, "", syscall.MS_MOVE, ""); err != nil {
			return fmt.Errorf("moving %s into the new root: %w", dir, err)
		}
	}
	removeInitramfs()
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := syscall.Mount(".", "/", "", syscall.MS_MOVE, ""); err != nil {
		return fmt.Errorf("moving the new root to /: %w", err)
	}
	// Not pivot_root: the root of the initramfs cannot be exchanged.
	if err := syscall.Chroot("."); err != nil {
		return fmt.Errorf("changing the root: %w", err)
	}
	return os.Chdir("/")
}

// removeInitramfs frees the memory of the initramfs. Only known places: everything else below / is
// the new root.
func removeInitramfs() {
	for _, path := range []string{"/init", "/lib/modules", "/usr/lib/modules", moduleList} {
		_ = os.RemoveAll(path) // what stays costs memory, nothing else
	}
}

// stepClock sets a clock that is behind the host's: a machine without a real-time clock starts
// in 1970.
func (m *machine) stepClock() {
	if m.config.TimeUnixNs <= time.Now().UnixNano() {
		return
	}
	if err := setClock(m.config.TimeUnixNs); err != nil {
		m.con.Printf("%v", err)
	}
}

func setClock(unixNs int64) error {
	tv := syscall.NsecToTimeval(unixNs)
	if err := syscall.Settimeofday(&tv); err != nil {
		return fmt.Errorf("setting the clock: %w", err)
	}
	return nil
}

// network configures loopback and the link. Only the tcp transport depends on it.
func (m *machine) network() error {
	if err := link.LoopbackUp(); err != nil {
		m.con.Printf("%v", err)
	}
	n := m.config.Network
	if n == nil {
		return nil
	}
	var found link.Link
	err := m.events.waitFor(func() (err error) {
		found, err = link.Find(n.MAC)
		return err
	}, link.ErrNoLink, time.Now().Add(linkWait))
	if err == nil {
		m.link = found.Name
		err = link.Configure(found, n)
	}
	if err != nil && m.config.Transport.Kind != "tcp" {
		m.con.Printf("%v", err)
		return nil
	}
	return err
}

// makeDevLinks makes the links that programs expect beside the device nodes.
func makeDevLinks() error {
	var errs []error
	for _, l := range [][2]string{{"/proc/self/fd", "/dev/fd"}, {"/proc/self/fd/0", "/dev/stdin"},
		{"/proc/self/fd/1", "/dev/stdout"}, {"/proc/self/fd/2", "/dev/stderr"}} {
		if err := os.Symlink(l[0], l[1]); err != nil && !errors.Is(err, os.ErrExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// uptime is the time since the kernel started, for messages.
func uptime() string {
	var info syscall.Sysinfo_t
	if syscall.Sysinfo(&info) != nil {
		return "?"
	}
	return fmt.Sprintf("%d s", info.Uptime)
}
