package halt

import (
	"context"
	"errors"
	"slices"
	"strings"
	"syscall"
	"time"
)

// essential are units that go on while the machine is captured: the log that the others write to,
// and what systemd itself asks or is asked through. What they keep is not part of an image.
var essential = []string{"systemd-journald", "systemd-udevd", "systemd-networkd", "dbus",
	"systemd-logind", "systemd-userdbd", "user@"}

// Settle stops what writes to the disks, so that they can be read as a whole, and lets the machine
// live on: the services of the init first, then every process that is not the init's own or the
// agent's. By the deadline of grace whoever is left is killed. What fails is reported only: a
// capture reads what is there.
func (s System) Settle(init string, grace time.Duration) {
	deadline := time.Now().Add(grace)
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	switch init {
	case "systemd":
		if units := stoppable(s.Units(ctx)); len(units) > 0 {
			if err := s.Run(ctx, append([]string{"systemctl", "stop", "--"}, units...)...); err != nil {
				s.Log("stopping the services: %v", err)
			}
		}
	case "runit":
		s.stopRunit(ctx, grace)
	}
	// Not the openrc runlevel "shutdown": it takes down the network and the filesystems as well.
	if init != "systemd" {
		s.endProcesses(deadline)
	}
	s.Sync()
}

func (s System) endProcesses(deadline time.Time) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGCONT} {
		if err := s.SignalAll(sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			s.Log("asking all processes to end: %v", err)
		}
	}
	if s.WaitGone(deadline) {
		return
	}
	if err := s.SignalAll(syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		s.Log("ending all processes: %v", err)
	}
	s.WaitGone(time.Now().Add(killWait))
}

// stoppable reads the first column of systemctl's list and leaves the essential ones out.
func stoppable(list string) []string {
	var units []string
	for line := range strings.Lines(list) {
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(fields[0], "-") || slices.ContainsFunc(essential,
			func(e string) bool { return strings.HasPrefix(fields[0], e) }) {
			continue
		}
		units = append(units, fields[0])
	}
	return units
}
