package procs

import (
	"context"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var reaper *Reaper

func TestMain(m *testing.M) {
	// Orphans of this process's children come to it, as they do to process 1.
	const prSetChildSubreaper = 36
	syscall.RawSyscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0)
	reaper = NewReaper()
	os.Exit(m.Run())
}

func start(t *testing.T, script string) *Process {
	t.Helper()
	p, err := reaper.Start("/bin/sh", []string{"sh", "-c", script},
		&syscall.ProcAttr{Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setpgid: true}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestThousandDoubleForksAreReaped(t *testing.T) {
	const forks = 1000
	before := reaper.Orphans()
	p := start(t, `i=0; while [ $i -lt 1000 ]; do ( (exit 7) & ) ; i=$((i+1)); done`)
	if status := p.Wait(); status.ExitStatus() != 0 {
		t.Fatal(FormatStatus(status))
	}
	deadline := time.Now().Add(2 * time.Minute)
	for reaper.Orphans()-before < forks {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d were reaped", reaper.Orphans()-before, forks)
		}
		time.Sleep(time.Millisecond)
	}
	noneIsLeft(t)
}

// noneIsLeft waits until no zombie of ours is left: orphans of an earlier test may still be ending.
func noneIsLeft(t *testing.T) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for left := zombies(t); left != 0; left = zombies(t) {
		if time.Now().After(deadline) {
			t.Fatalf("%d zombies are left", left)
		}
		time.Sleep(time.Millisecond)
	}
}

func zombies(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, e := range entries {
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if fields[0] == "Z" && fields[1] == strconv.Itoa(os.Getpid()) {
			found++
		}
	}
	return found
}

func TestEveryChildGetsItsOwnStatusWhileOrphansAreReaped(t *testing.T) {
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			p := start(t, "( (exit 9) & ); exit "+strconv.Itoa(i))
			if got := p.Wait().ExitStatus(); got != i {
				t.Errorf("exit %d came back as %d", i, got)
			}
		})
	}
	all.Wait()
}

func TestFailedStartLeavesNoChild(t *testing.T) {
	_, err := reaper.Start("/nonexistent", []string{"x"}, &syscall.ProcAttr{})
	if err == nil || !strings.Contains(err.Error(), "/nonexistent") {
		t.Fatalf("got %v", err)
	}
	noneIsLeft(t)
}

func TestSignalAfterTheEndReachesNobody(t *testing.T) {
	p := start(t, "exit 0")
	p.Wait()
	if err := p.Signal(syscall.SIGKILL); err != syscall.ESRCH {
		t.Fatalf("got %v", err)
	}
}

func TestRunReturnsOutputAndKillsAtTheDeadline(t *testing.T) {
	out, err := reaper.Run(context.Background(), "/bin/sh", "-c", "echo one; exit 3")
	if out != "one\n" || err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Fatalf("%q, %v", out, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := reaper.Run(ctx, "/bin/sh", "-c", "sleep 3600"); err == nil {
		t.Fatal("no error")
	}
}
