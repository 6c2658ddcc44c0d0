package boot

import (
	"fmt"
	"os"
	"syscall"
	"time"

	"banger/agent/internal/guest"
	"banger/agent/internal/packages"
	"banger/agent/internal/procs"
)

const (
	// firstBootLog keeps what the installation of sshd has said.
	firstBootLog = "/var/log/banger-first-boot.log"
	// installWait bounds the installation as a whole, and initWait how long it waits for the init,
	// which the package may want to talk to.
	installWait = 15 * time.Minute
	initWait    = 2 * time.Minute
	initLook    = 250 * time.Millisecond
)

// enable makes the init start sshd now and at each boot; Debian calls the service ssh.
var enable = map[string]string{
	"systemd": `for u in ssh sshd; do if systemctl cat "$u.service" >/dev/null 2>&1; then ` +
		`systemctl enable "$u.service" && exec systemctl restart "$u.service"; fi; done; ` +
		`echo "there is no unit for sshd"; exit 1`,
	"openrc": `rc-update add sshd default; exec rc-service sshd restart`,
	"runit":  `mkdir -p /var/service && ln -sfn /etc/sv/sshd /var/service/sshd`,
}

// installSSHD installs an sshd into an image that has none, and starts it. A failure leaves a
// machine that works through the agent: it is said in the kernel's log, and tried again at the next
// boot.
func (g *resident) installSSHD() {
	if guest.FindSSHD("/") != "" {
		return
	}
	g.firstBoot.Store("running")
	if err := g.tryInstallSSHD(); err != nil {
		g.firstBoot.Store("failed")
		g.log("installing sshd: %v; see %s", err, firstBootLog)
		return
	}
	g.firstBoot.Store("done")
	g.log("sshd is installed after %s", uptime())
}

func (g *resident) tryInstallSSHD() error {
	log, err := os.OpenFile(firstBootLog, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	end := time.Now().Add(installWait)
	g.waitInit(time.Now().Add(initWait))
	release := packages.ReadRelease("/")
	manager := release.Find()
	if manager == "" {
		err := fmt.Errorf("no package manager is known for ID=%q of its os-release", release.ID)
		fmt.Fprintf(log, "%v\n", err)
		return err
	}
	argv, env, err := manager.Install([]string{manager.SSHServer()})
	if err != nil {
		return err
	}
	if err := g.logged(log, argv, env, end); err != nil {
		return err
	}
	path := guest.FindSSHD("/")
	if path == "" {
		return fmt.Errorf("%s has brought no sshd", manager)
	}
	// Its configuration exists only now.
	if err := guest.WriteSSHD("/", g.Config); err != nil {
		return err
	}
	if script, ok := enable[g.handover.Init]; ok {
		return g.logged(log, []string{"sh", "-c", script}, nil, end)
	}
	if err := g.logged(log, []string{"sh", "-c", "ssh-keygen -A"}, nil, end); err != nil {
		g.log("making the other host keys: %v", err) // banger's own is enough
	}
	return startSSHD(g.reaper, path)
}

// waitInit waits until the init has started its services. It has no event for that which all of
// them share.
func (g *resident) waitInit(deadline time.Time) {
	for time.Now().Before(deadline) {
		switch _, state := g.Init(); state {
		case "starting", "initializing", "unknown":
			time.Sleep(initLook)
		default:
			return
		}
	}
}

// logged runs a command of the guest with its output in the log.
func (g *resident) logged(log *os.File, argv []string, env map[string]string, end time.Time) error {
	fmt.Fprintf(log, "+ %q\n", argv)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	all := []string{"PATH=" + procs.DefaultPath, "HOME=/root", "LC_ALL=C"}
	for key, value := range env {
		all = append(all, key+"="+value)
	}
	p, err := g.reaper.Start("/bin/sh", argv, &syscall.ProcAttr{
		Dir: "/", Env: all,
		Files: []uintptr{null.Fd(), log.Fd(), log.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("running %s: %w", argv[0], err)
	}
	select {
	case <-p.Done():
	case <-time.After(time.Until(end)):
		_ = p.SignalGroup(syscall.SIGKILL)
		return fmt.Errorf("running %s: it did not end within %v", argv[0], installWait)
	}
	if status := p.Wait(); status.ExitStatus() != 0 {
		return fmt.Errorf("running %s: %s", argv[0], procs.FormatStatus(status))
	}
	return nil
}
