package boot

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"syscall"

	"banger/agent/internal/kernel"
)

// maxModules bounds the list of modules, in lines.
const maxModules = 1024

// parseModules returns the paths of /banger/modules, one a line, in order.
func parseModules(text string) ([]string, error) {
	var paths []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if !strings.HasPrefix(line, "/") || path.Clean(line) != line {
			return nil, fmt.Errorf("the module path %q is not absolute and clean", line)
		}
		if len(paths) == maxModules {
			return nil, fmt.Errorf("more than %d modules", maxModules)
		}
		paths = append(paths, line)
	}
	return paths, nil
}

// moduleParams picks what the kernel's command line says for one module: "name.key=value", with -
// and _ alike in name. The kernel itself does so for built-in code only.
func moduleParams(cmdline, module string) string {
	canonical := func(s string) string { return strings.ReplaceAll(s, "-", "_") }
	var params []string
	quoted := false
	words := strings.FieldsFunc(cmdline, func(r rune) bool {
		if r == '"' {
			quoted = !quoted
		}
		return !quoted && (r == ' ' || r == '\t' || r == '\n')
	})
	for _, word := range words {
		if word == "--" {
			break // the rest is for init
		}
		name, param, ok := strings.Cut(word, ".")
		if ok && canonical(name) == canonical(module) {
			params = append(params, param)
		}
	}
	return strings.Join(params, " ")
}

// loadModules loads the modules listed in the initramfs and removes their files, which would keep
// occupying memory. It tries all: what a missing one breaks shows up as a missing device.
func loadModules(list string) error {
	text, err := os.ReadFile(list)
	if errors.Is(err, os.ErrNotExist) {
		return nil // a kernel with everything built in
	}
	if err != nil {
		return err
	}
	paths, err := parseModules(string(text))
	if err != nil {
		return err
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range paths {
		name := strings.TrimSuffix(path.Base(p), ".ko")
		if err := loadModule(p, moduleParams(string(cmdline), name)); err != nil {
			errs = append(errs, fmt.Errorf("loading the module %s: %w", p, err))
		}
		_ = os.Remove(p) // memory only; the whole tree goes at the switch
	}
	return errors.Join(errs...)
}

func loadModule(p, params string) error {
	fd, err := syscall.Open(p, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	if err := kernel.FinitModule(fd, params); err != syscall.EEXIST {
		return err
	}
	return nil
}
