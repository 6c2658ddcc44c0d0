// Package halt ends the machine so that nothing written before is lost: services stop, processes
// end, data is written back, the ext4 filesystems become read-only and thereby clean, and the
// kernel reboots, which is what ends the VMM. Every wait has a limit.
package halt

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"syscall"
	"time"
)

const (
	killWait     = 2 * time.Second // for processes to vanish after KILL
	shortestTerm = time.Second     // for processes to end after TERM, however little grace is left
)

// System is the machine as far as ending it goes. Tests put recorders in.
type System struct {
	// Run runs a tool of the guest.
	Run func(ctx context.Context, argv ...string) error
	// Units lists what systemd runs or listens for, a unit a line.
	Units func(ctx context.Context) string
	// Services lists runit's service directories.
	Services func() []string
	// First is what the image asks its processes to be stopped with, 0 for nothing special; only
	// where no init of its own stops them.
	First syscall.Signal
	// SignalAll signals every process but this one, process 1, and what supervises for it.
	SignalAll func(sig syscall.Signal) error
	// WaitGone waits until none of these is left, false at the deadline.
	WaitGone func(deadline time.Time) bool
	Sync     func()
	// ReadOnly makes every filesystem read-only that can be written.
	ReadOnly func() error
	Reboot   func() error
	// Expired is closed or receives when d has passed.
	Expired func(d time.Duration) <-chan time.Time
	Log     func(format string, args ...any)
}

// Stop ends a machine whose process 1 is init (systemd, openrc, runit, agent). With systemd it
// mostly does not return, since systemd ends the caller; the rest happens when it does not.
func (s System) Stop(init string, grace time.Duration) error {
	deadline := time.Now().Add(grace)
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	switch init {
	case "systemd":
		if err := s.Run(ctx, "systemctl", "reboot"); err != nil {
			s.Log("asking systemd to reboot: %v; stopping everything directly", err)
		} else {
			<-s.Expired(time.Until(deadline))
			s.Log("systemd did not end within %v; stopping everything directly", grace)
		}
	case "openrc":
		// Not "reboot": its last steps know nothing of the filesystem below the overlay.
		if err := s.Run(ctx, "openrc", "shutdown"); err != nil {
			s.Log("stopping the services: %v", err)
		}
	case "runit":
		s.stopRunit(ctx, grace)
	}
	if s.First != 0 {
		// Half of the time is for what it asks for; a TERM right behind it would undo that.
		if err := s.SignalAll(s.First); err != nil && !errors.Is(err, syscall.ESRCH) {
			s.Log("asking all processes to end with %v: %v", s.First, err)
		}
		s.WaitGone(time.Now().Add(time.Until(deadline) / 2))
	}
	return s.Force(deadline)
}

// stopRunit gives runit's services half of the grace.
func (s System) stopRunit(ctx context.Context, grace time.Duration) {
	services := s.Services()
	if len(services) == 0 {
		return
	}
	half := strconv.Itoa(int(max(1, grace.Seconds()/2)))
	stop := append([]string{"sv", "-w", half, "force-stop"}, services...)
	if err := s.Run(ctx, stop...); err != nil {
		s.Log("stopping the services: %v", err)
	}
}

// Force ends all processes by the deadline, at the latest a second after it when that is nearer,
// and reboots. What fails is reported and does not stop the rest.
func (s System) Force(deadline time.Time) error {
	var errs []error
	attempt := func(doing string, err error) {
		if err != nil && !errors.Is(err, syscall.ESRCH) {
			errs = append(errs, fmt.Errorf("%s: %w", doing, err))
			s.Log("%s: %v", doing, err)
		}
	}
	// HUP for interactive shells, which ignore TERM; CONT because a stopped process acts on neither.
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGCONT} {
		attempt("asking all processes to end", s.SignalAll(sig))
	}
	if earliest := time.Now().Add(shortestTerm); deadline.Before(earliest) {
		deadline = earliest
	}
	if !s.WaitGone(deadline) {
		attempt("ending all processes", s.SignalAll(syscall.SIGKILL))
		s.WaitGone(time.Now().Add(killWait))
	}
	s.Sync()
	attempt("making the filesystems read-only", s.ReadOnly())
	s.Sync()
	attempt("rebooting", s.Reboot())
	return errors.Join(errs...)
}
