package halt

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
)

// ExitPath is where systemd, at the very end of a shutdown, looks for a program to return to. It
// changes its root to the directory, so that the old root can be unmounted.
//
// Source: systemd, docs/INITRD_INTERFACE.md.
const ExitPath = "/run/initramfs/shutdown"

// Exit is that program, process 1 in place of systemd. By unmounting the overlay it lets go of the
// ext4 filesystem below, which no process of the old root can even see. It does not return unless
// the reboot itself fails. Whatever systemd was asked for, the machine reboots: see Reboot.
func Exit(log func(string, ...any)) error {
	if err := os.Chdir("/"); err != nil {
		log("%v", err)
	}
	if err := unmountBelow("/oldroot"); err != nil {
		log("%v", err)
		// Left mounted by something: at least clean on disk.
		_ = os.WriteFile("/proc/sysrq-trigger", []byte("u"), 0)
	}
	syscall.Sync()
	return Reboot()
}

// unmountBelow unmounts prefix and all that is mounted below it, children before parents. The order
// of mountinfo will not do: it is that of creation, and mounts were moved since.
func unmountBelow(prefix string) error {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var errs []error
	points := parseMountPoints(string(text))
	slices.Sort(points)
	for _, target := range slices.Backward(points) {
		if target != prefix && !strings.HasPrefix(target, prefix+"/") {
			continue
		}
		if err := syscall.Unmount(target, 0); err != nil {
			errs = append(errs, fmt.Errorf("unmounting %s: %w", target, err))
		}
	}
	return errors.Join(errs...)
}

// parseMountPoints returns the fifth field of each line of mountinfo, unescaped; proc(5).
func parseMountPoints(text string) []string {
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var points []string
	for line := range strings.Lines(text) {
		if fields := strings.Fields(line); len(fields) > 4 {
			points = append(points, unescape.Replace(fields[4]))
		}
	}
	return points
}
