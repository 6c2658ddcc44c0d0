package halt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// recorder is a System whose calls are written down.
type recorder struct {
	steps []string
	gone  []bool // answers of WaitGone, in order
	fail  map[string]error
}

func (r *recorder) step(name string) error {
	r.steps = append(r.steps, name)
	return r.fail[name]
}

func (r *recorder) system() System {
	return System{
		Services: func() []string { return []string{"/etc/service/a"} },
		Units: func(context.Context) string {
			return "ssh.service loaded active running\ndbus.socket loaded active running\n\n" +
				"-.slice x\nsystemd-journald.service a b c\ncron.timer loaded active waiting\n"
		},
		Run:       func(_ context.Context, argv ...string) error { return r.step(strings.Join(argv, " ")) },
		SignalAll: func(sig syscall.Signal) error { return r.step(fmt.Sprintf("signal %d", sig)) },
		WaitGone: func(time.Time) bool {
			_ = r.step("wait")
			answer := r.gone[0]
			r.gone = r.gone[1:]
			return answer
		},
		Sync:     func() { _ = r.step("sync") },
		ReadOnly: func() error { return r.step("read-only") },
		Reboot:   func() error { return r.step("reboot") },
		Expired: func(time.Duration) <-chan time.Time {
			_ = r.step("grace")
			c := make(chan time.Time)
			close(c)
			return c
		},
		Log: func(string, ...any) {},
	}
}

var (
	ask  = []string{"signal 15", "signal 1", "signal 18", "wait"}
	kill = []string{"signal 9", "wait"}
	end  = []string{"sync", "read-only", "sync", "reboot"}
)

func TestStopTakesEveryStepInOrder(t *testing.T) {
	for name, c := range map[string]struct {
		init string
		gone []bool
		fail map[string]error
		want []string
	}{
		"quiet machine":  {"agent", []bool{true}, nil, slices.Concat(ask, end)},
		"stubborn one":   {"agent", []bool{false, true}, nil, slices.Concat(ask, kill, end)},
		"immortal one":   {"agent", []bool{false, false}, nil, slices.Concat(ask, kill, end)},
		"runit":          {"runit", []bool{true}, nil, slices.Concat([]string{"sv -w 1 force-stop /etc/service/a"}, ask, end)},
		"openrc":         {"openrc", []bool{true}, nil, slices.Concat([]string{"openrc shutdown"}, ask, end)},
		"systemd hangs":  {"systemd", []bool{true}, nil, slices.Concat([]string{"systemctl reboot", "grace"}, ask, end)},
		"systemd absent": {"systemd", []bool{true}, map[string]error{"systemctl reboot": errors.New("no bus")}, slices.Concat([]string{"systemctl reboot"}, ask, end)},
		"nobody left":    {"agent", []bool{true}, map[string]error{"signal 15": syscall.ESRCH}, slices.Concat(ask, end)},
	} {
		r := &recorder{gone: c.gone, fail: c.fail}
		if err := r.system().Stop(c.init, 0); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !slices.Equal(r.steps, c.want) {
			t.Errorf("%s: %q", name, r.steps)
		}
	}
}

func TestSettlingStopsWhatWritesAndLeavesTheMachineAlive(t *testing.T) {
	for name, c := range map[string]struct {
		init string
		gone []bool
		want []string
	}{
		"agent":    {"agent", []bool{true}, slices.Concat(ask, []string{"sync"})},
		"openrc":   {"openrc", []bool{true}, slices.Concat(ask, []string{"sync"})},
		"stubborn": {"agent", []bool{false, true}, slices.Concat(ask, kill, []string{"sync"})},
		"runit": {"runit", []bool{true}, slices.Concat(
			[]string{"sv -w 1 force-stop /etc/service/a"}, ask, []string{"sync"})},
		"systemd": {"systemd", nil, []string{"systemctl stop -- ssh.service cron.timer", "sync"}},
	} {
		r := &recorder{gone: c.gone}
		r.system().Settle(c.init, 0)
		if !slices.Equal(r.steps, c.want) {
			t.Errorf("%s: %q", name, r.steps)
		}
	}
}

func TestTheImagesOwnStopSignalComesFirst(t *testing.T) {
	r := &recorder{gone: []bool{true, true}}
	system := r.system()
	system.First = syscall.SIGQUIT
	if err := system.Stop("agent", 0); err != nil {
		t.Error(err)
	}
	if want := slices.Concat([]string{"signal 3", "wait"}, ask, end); !slices.Equal(r.steps, want) {
		t.Errorf("%q", r.steps)
	}
}

func TestEveryStepIsTriedWhenOneFails(t *testing.T) {
	bad := errors.New("bad")
	r := &recorder{gone: []bool{false, false}, fail: map[string]error{
		"signal 15": bad, "signal 9": bad, "read-only": bad, "reboot": bad}}
	err := r.system().Stop("agent", 0)
	if !slices.Equal(r.steps, slices.Concat(ask, kill, end)) {
		t.Errorf("%q", r.steps)
	}
	for _, part := range []string{"asking all", "ending all", "read-only", "rebooting"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q is missing in %v", part, err)
		}
	}
}

func TestKernelThreadsAreToldByTheirFlags(t *testing.T) {
	thread := "2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0"
	if got := commandName("77 (a) b) (c) S 1 77"); got != "a) b) (c" {
		t.Errorf("%q", got)
	}
	odd := "77 (a) b) (c) S 1 77 77 0 -1 4194304 0 0 0"
	if !isKernelThread(thread) || isKernelThread(odd) || isKernelThread("") {
		t.Fatal("wrong")
	}
}

func TestMountPointsAreUnescaped(t *testing.T) {
	text := "36 35 98:0 / / rw - ext4 /dev/root rw\n37 36 0:5 / /old\\040root/a\\134b rw - proc proc rw\nshort\n"
	if got := parseMountPoints(text); !slices.Equal(got, []string{"/", `/old root/a\b`}) {
		t.Fatalf("%q", got)
	}
}

func TestWaitingForProcessesHasAnEnd(t *testing.T) {
	begin := time.Now()
	if waitGone([]int{os.Getppid()}, begin.Add(50*time.Millisecond)) {
		t.Error("the parent is still there")
	}
	if !waitGone(nil, begin.Add(time.Hour)) {
		t.Error("nobody is left")
	}
	if time.Since(begin) > 2*time.Minute {
		t.Fatalf("it took %v", time.Since(begin))
	}
}
