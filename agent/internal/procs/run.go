package procs

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
)

// maxToolOutput bounds what is kept of a tool's output, in bytes.
const maxToolOutput = 64 << 10

// Run runs a tool of the guest with stdin from /dev/null and returns at most 64 KiB of its stdout.
// It is killed, with its process group, when ctx ends.
//
// Errors: the tool cannot be started, ctx ended, or the exit status is not 0; the output is
// returned in the last case too.
func (r *Reaper) Run(ctx context.Context, argv ...string) (string, error) {
	return r.RunAs(ctx, argv[0], argv, &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=" + DefaultPath, "HOME=/root", "LC_ALL=C"},
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
}

// RunAs is Run with a directory, an environment and an account of its own; attr.Files is filled in.
func (r *Reaper) RunAs(ctx context.Context, path string, argv []string, attr *syscall.ProcAttr,
) (string, error) {
	null, err := syscall.Open(os.DevNull, syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("opening %s: %w", os.DevNull, err)
	}
	defer syscall.Close(null)
	out, in, err := OutputPipe()
	if err != nil {
		return "", err
	}
	defer out.Close()
	attr.Files = []uintptr{uintptr(null), uintptr(in), uintptr(null)}
	p, err := r.Start(path, argv, attr)
	syscall.Close(in)
	if err != nil {
		return "", err
	}
	text := make(chan string, 1)
	go func() {
		kept, _ := io.ReadAll(io.LimitReader(out, maxToolOutput))
		text <- string(kept)
		_, _ = io.Copy(io.Discard, out)
	}()
	select {
	case <-p.Done():
	case <-ctx.Done():
		_ = p.SignalGroup(syscall.SIGKILL)
		return "", fmt.Errorf("running %s: %w", strings.Join(argv, " "), ctx.Err())
	}
	// Something the tool left behind may hold the pipe: what it printed is there by now.
	var got string
	select {
	case got = <-text:
	case <-ctx.Done():
	}
	if status := p.Wait(); status.ExitStatus() != 0 {
		return got, fmt.Errorf("running %s: %s", strings.Join(argv, " "), FormatStatus(status))
	}
	return got, nil
}

// DefaultPath is the PATH of commands that bring none.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// FormatStatus says how a process ended.
func FormatStatus(s syscall.WaitStatus) string {
	if s.Signaled() {
		return fmt.Sprintf("ended by signal %d", int(s.Signal()))
	}
	return fmt.Sprintf("exit status %d", s.ExitStatus())
}
