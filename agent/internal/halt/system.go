package halt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"banger/agent/internal/disk"
	"banger/agent/internal/kernel"
	"banger/agent/internal/procs"
)

// supervisors are the helpers of process 1 that are left alone: when runsvdir ends, runit goes on
// to kill everything and to power off, before the filesystems are read-only.
var supervisors = map[string][]string{"runit": {"runsvdir", "runsv"}}

// New returns the System of this guest, whose process 1 is init. writable opens the roots of its
// ext4 mounts; it is called when everything else has ended.
func New(reaper *procs.Reaper, init string, writable func() []int,
	log func(string, ...any),
) System {
	victims := func() []int { return userProcesses(supervisors[init]) }
	run := func(ctx context.Context, argv ...string) (string, error) {
		path, err := findTool(argv[0])
		if err != nil {
			return "", err
		}
		return reaper.Run(ctx, append([]string{path}, argv[1:]...)...)
	}
	return System{
		Run: func(ctx context.Context, argv ...string) error {
			_, err := run(ctx, argv...)
			return err
		},
		Units: func(ctx context.Context) string {
			list, err := run(ctx, "systemctl", "list-units", "--plain", "--no-legend", "--full",
				"--state=running,listening,waiting", "--type=service,socket,timer,path")
			if err != nil {
				log("listing the services: %v", err)
			}
			return list
		},
		Services: func() []string {
			services, _ := filepath.Glob("/etc/service/*")
			if len(services) == 0 {
				services, _ = filepath.Glob("/var/service/*")
			}
			return services
		},
		SignalAll: func(sig syscall.Signal) error { return signalAll(sig, init, victims) },
		WaitGone:  func(deadline time.Time) bool { return waitGone(victims(), deadline) },
		Sync:      syscall.Sync,
		ReadOnly:  func() error { return readOnly(writable()) },
		Reboot:    Reboot,
		Expired:   time.After,
		Log:       log,
	}
}

// Reboot ends the machine; with reboot=k on the kernel's command line that ends the VMM. A guest
// that powers off only halts in Firecracker, so nothing here ever does that.
func Reboot() error { return syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART) }

func findTool(name string) (string, error) {
	for _, dir := range filepath.SplitList(procs.DefaultPath) {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("the guest has no %s", name)
}

// signalAll signals all at once where nobody is to be left out, which no fork can escape.
func signalAll(sig syscall.Signal, init string, victims func() []int) error {
	if len(supervisors[init]) == 0 {
		return syscall.Kill(-1, sig)
	}
	for _, pid := range victims() {
		if err := syscall.Kill(pid, sig); err != nil && err != syscall.ESRCH {
			return err
		}
	}
	return nil
}

// waitGone waits for these processes, not for those that a process 1 starts meanwhile.
func waitGone(pids []int, deadline time.Time) bool {
	var fds []kernel.PollFd
	defer func() {
		for _, p := range fds {
			syscall.Close(int(p.Fd))
		}
	}()
	for _, pid := range pids {
		fd, err := kernel.PidfdOpen(pid)
		if err == nil {
			fds = append(fds, kernel.PollFd{Fd: int32(fd), Events: kernel.PollIn})
		}
	}
	for len(fds) > 0 {
		n, err := kernel.Poll(fds, deadline)
		if err != nil || n == 0 {
			return false
		}
		left := fds[:0]
		for _, p := range fds {
			if p.Revents == 0 {
				left = append(left, p)
			} else {
				syscall.Close(int(p.Fd))
			}
		}
		fds = left
	}
	return true
}

// userProcesses lists the processes that are neither threads of the kernel, process 1, this one,
// nor named in spared.
func userProcesses(spared []string) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == 1 || pid == os.Getpid() {
			continue
		}
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil || isKernelThread(string(stat)) ||
			slices.Contains(spared, commandName(string(stat))) {
			continue
		}
		pids = append(pids, pid)
	}
	return pids
}

// commandName is what stands between the first "(" and the last ")" of a /proc/PID/stat line.
func commandName(stat string) string {
	first, last := strings.IndexByte(stat, '('), strings.LastIndexByte(stat, ')')
	if first < 0 || last < first {
		return ""
	}
	return stat[first+1 : last]
}

// isKernelThread looks at the flags of a /proc/PID/stat line. Fields count after the last ")",
// because a name may contain anything.
func isKernelThread(stat string) bool {
	const flagsField, pfKthread = 6, 0x00200000
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) <= flagsField {
		return false
	}
	flags, err := strconv.ParseUint(fields[flagsField], 10, 32)
	return err == nil && flags&pfKthread != 0
}

// readOnly remounts the root and then the filesystems below it. Where one refuses, because a file
// is still open for writing, the kernel's emergency remount does it for all block devices.
func readOnly(writable []int) error {
	// It may refuse because it is busy: the ext4 below it is what matters.
	_ = syscall.Mount("", "/", "", syscall.MS_REMOUNT|syscall.MS_RDONLY, "")
	var errs []error
	for _, fd := range writable {
		if err := kernel.RemountReadOnly(fd); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return emergencyRemount(writable, errors.Join(errs...))
}

// emergencyRemount asks for SysRq "u" and waits, at most two seconds, until it has worked.
//
// Source: Linux, Documentation/admin-guide/sysrq.rst, fs/super.c do_emergency_remount.
func emergencyRemount(writable []int, cause error) error {
	if err := os.WriteFile("/proc/sysrq-trigger", []byte("u"), 0); err != nil {
		return errors.Join(cause, err)
	}
	// The kernel works on it in the background and offers nothing to wait on.
	for limit := time.Now().Add(2 * time.Second); time.Now().Before(limit); {
		done := true
		for _, fd := range writable {
			done = done && disk.IsReadOnly(fd)
		}
		if done {
			return nil
		}
		time.Sleep(5 * time.Millisecond)
	}
	return errors.Join(cause, errors.New("the emergency remount did not finish within 2 s"))
}
