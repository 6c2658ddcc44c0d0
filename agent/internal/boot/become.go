package boot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"banger/agent/internal/guest"
	"banger/agent/internal/halt"
	"banger/agent/internal/kernel"
	"banger/agent/internal/procs"
)

// ServiceMode is the argument by which process 1 starts the service beside the image's init.
const ServiceMode = "guest-service"

// Descriptors that the service inherits.
const (
	handoverFd = 3
	overFd     = 4
)

// handover is what the service is told, as JSON on handoverFd: the document on disk is gone.
type handover struct {
	Config *guest.Config `json:"config"`
	Init   string        `json:"init"`
	Work   bool          `json:"work"`
}

// become turns process 1 into the image's init, with the service beside it, or serves itself.
func (m *machine) become(signals <-chan os.Signal) error {
	h := handover{m.config, m.init.Kind, m.work}
	if m.init.Kind == "agent" {
		return m.stay(h, signals)
	}
	if m.init.Kind == "systemd" {
		// Without it the overlay's disk is left as after a power cut, which ext4 survives.
		if err := installExit(); err != nil {
			m.con.Printf("preparing the shutdown: %v", err)
		}
	}
	if err := startService(h, m.over); err != nil {
		return err
	}
	m.con.Printf("starting %s as %s after %s", m.init.Path, m.init.Kind, uptime())
	if err := openConsole(); err != nil {
		m.con.Printf("%v", err)
	}
	env := append(os.Environ(), "PATH="+procs.DefaultPath, "TERM=linux", "HOME=/")
	err := syscall.Exec(m.init.Path, []string{m.init.Path}, env)
	return fmt.Errorf("starting %s: %w", m.init.Path, err)
}

// startService starts this program again as a process of its own: own session, no terminal, output
// to the kernel's log. Nobody waits for it; it belongs to the init that follows.
func startService(h handover, over int) error {
	text, err := json.Marshal(h)
	if err != nil {
		return err
	}
	memory, err := kernel.MemfdCreate("banger-handover")
	if err != nil {
		return fmt.Errorf("starting the service: %w", err)
	}
	file := os.NewFile(uintptr(memory), "handover")
	defer file.Close()
	if _, err := file.Write(text); err != nil {
		return fmt.Errorf("starting the service: %w", err)
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("starting the service: %w", err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("starting the service: %w", err)
	}
	defer null.Close()
	_, err = syscall.ForkExec("/proc/self/exe", []string{"banger-vsock-agent", ServiceMode},
		&syscall.ProcAttr{
			Dir: "/", Env: []string{"PATH=" + procs.DefaultPath},
			Files: []uintptr{null.Fd(), null.Fd(), null.Fd(), uintptr(memory), uintptr(over)},
			Sys:   &syscall.SysProcAttr{Setsid: true},
		})
	if err != nil {
		return fmt.Errorf("starting the service: %w", err)
	}
	return nil
}

// installExit copies this program to where systemd looks for it at the end.
func installExit() error {
	if err := os.MkdirAll(filepath.Dir(halt.ExitPath), 0o700); err != nil {
		return err
	}
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer self.Close()
	to, err := os.OpenFile(halt.ExitPath, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o700)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, self)
	return errors.Join(err, to.Close())
}

// openConsole gives the init the console as its standard descriptors, as the kernel does.
func openConsole() error {
	fd, err := syscall.Open("/dev/console", syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening the console: %w", err)
	}
	for std := range 3 {
		if err := syscall.Dup3(fd, std, 0); err != nil {
			return fmt.Errorf("opening the console: %w", err)
		}
	}
	if fd > 2 {
		syscall.Close(fd)
	}
	return nil
}

// stay serves as process 1 until the machine ends.
func (m *machine) stay(h handover, signals <-chan os.Signal) error {
	// Ctrl-Alt-Del, which some VMMs send, becomes SIGINT for process 1 instead of a sudden reboot.
	if err := syscall.Reboot(syscall.LINUX_REBOOT_CMD_CAD_OFF); err != nil {
		m.con.Printf("%v", err)
	}
	cgroup := mount{"cgroup2", "/sys/fs/cgroup", "cgroup2",
		syscall.MS_NOSUID | syscall.MS_NOEXEC | syscall.MS_NODEV, ""}
	if err := cgroup.do(); err != nil {
		m.con.Printf("%v", err)
	}
	g, err := newGuest(h, m.version, m.over, m.con.Printf)
	if err != nil {
		return err
	}
	if err := g.start(); err != nil {
		return err
	}
	m.con.Printf("serving as process 1 after %s", uptime())
	if path := guest.FindSSHD("/"); path != "" {
		if err := startSSHD(g.reaper, path); err != nil {
			m.con.Printf("starting sshd: %v", err)
		}
	}
	for sig := range signals {
		switch sig {
		case syscall.SIGTERM, syscall.SIGINT, syscall.SIGPWR:
			m.con.Printf("stopping on %v", sig)
			g.Stop(signalGrace)
		}
	}
	return errors.New("the signals have ended") // never: the channel is not closed
}

// signalGrace is how long processes have after a signal to process 1, which names no time.
const signalGrace = 10 * time.Second

// startSSHD starts the image's sshd in the foreground, in a session of its own.
func startSSHD(reaper *procs.Reaper, path string) error {
	// Its privilege separation directory, which a service manager would have made.
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
		return err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	p, err := reaper.Start(path, []string{path, "-D"}, &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=" + procs.DefaultPath},
		Files: []uintptr{null.Fd(), null.Fd(), null.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return err
	}
	go func() {
		kernelLog("%s has ended: %s", strings.TrimPrefix(path, "/"), procs.FormatStatus(p.Wait()))
	}()
	return nil
}
