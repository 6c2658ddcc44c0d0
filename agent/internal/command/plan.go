// Package command runs commands for the host: it decides what to run as whom (plan.go), starts it
// on pipes or a terminal, and carries its streams as frames until it ends (run.go).
//
// A command belongs to its connection: when that is lost the command's process group gets HUP and,
// five seconds later, KILL. What a finished command left running stays.
package command

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"banger/agent/internal/account"
	"banger/agent/internal/guest"
	"banger/agent/internal/procs"
	"banger/agent/internal/wire"
)

// Params are the params of the method exec.
type Params struct {
	Argv  []string          `json:"argv"`
	Cwd   string            `json:"cwd"`
	Env   map[string]string `json:"env"`
	User  string            `json:"user"`
	TTY   *Size             `json:"tty"`
	Login bool              `json:"login"`
}

// Size is a terminal's size in characters.
type Size struct {
	Rows uint16 `json:"rows"`
	Cols uint16 `json:"cols"`
}

// Host is what a plan needs to know about this machine.
type Host struct {
	Root   string // where /etc/passwd and the shells are found, "/" outside tests
	VMName string
	Image  *guest.ImageConfig
	EUID   int
}

// Plan is a command, completely decided. Program is empty when there is nothing to run; Code and
// Reason then say what the client sees.
type Plan struct {
	Program string
	Argv    []string
	Env     []string
	Dir     string
	Cred    *syscall.Credential
	TTY     *Size
	Code    int
	Reason  string
}

// BuildPlan decides what exec does with its params. A working directory that the image names and
// lacks is made here; nothing else is changed.
//
// Errors: bad_request (NUL bytes, size), not_found (user, directory, shell).
func BuildPlan(p Params, host Host) (Plan, error) {
	if err := checkStrings(p); err != nil {
		return Plan{}, err
	}
	image := host.Image
	if image == nil {
		image = &guest.ImageConfig{}
	}
	user, err := chooseUser(p.User, image.User, host)
	if err != nil {
		return Plan{}, err
	}
	shell := findShell(host.Root, user.Shell)
	env := buildEnv(user, shell, host.VMName, image.Env, p)
	plan := Plan{Env: env, TTY: p.TTY}
	if host.EUID == 0 {
		plan.Cred = &syscall.Credential{Uid: user.UID, Gid: user.GID, Groups: user.Groups}
	} else if int(user.UID) != host.EUID {
		return Plan{}, wire.Errorf(wire.OperationFailed,
			"running a command as uid %d: the agent itself runs as uid %d", user.UID, host.EUID)
	}
	if plan.Dir, err = chooseDir(p.Cwd, image.Workdir, user.Home); err != nil {
		return Plan{}, err
	}
	// A login shell's profile would overwrite the PATH that the image's configuration sets.
	login := len(image.Env) == 0
	switch {
	case len(p.Argv) == 0 && shell == "":
		e := wire.Errorf(wire.NotFound, "starting a login shell: the guest has none")
		e.Hint = "banger vm exec"
		return Plan{}, e
	case len(p.Argv) == 0:
		plan.Program, plan.Argv = shell, []string{shell}
		if login {
			plan.Argv = append(plan.Argv, "-l")
		}
	case p.Login && login && posixShell(host.Root, shell) != "":
		sh := posixShell(host.Root, shell)
		plan.Program = sh
		plan.Argv = append([]string{sh, "-l", "-c", `exec "$@"`, sh}, p.Argv...)
	default:
		plan.Argv = p.Argv
		plan.Program, plan.Code, plan.Reason = findProgram(p.Argv[0], plan.Dir, env)
	}
	if err := checkSize(plan.Argv, plan.Env); err != nil {
		return Plan{}, err
	}
	return plan, nil
}

func checkStrings(p Params) error {
	for i, arg := range p.Argv {
		if strings.IndexByte(arg, 0) >= 0 {
			return wire.Errorf(wire.BadRequest, "exec: argv[%d] contains a NUL byte", i)
		}
	}
	if len(p.Argv) > 0 && p.Argv[0] == "" {
		return wire.Errorf(wire.BadRequest, "exec: argv[0] is empty")
	}
	for name, value := range p.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.IndexByte(value, 0) >= 0 {
			return wire.Errorf(wire.BadRequest, "exec: env[%q] is not a valid variable", name)
		}
	}
	if strings.IndexByte(p.Cwd, 0) >= 0 || p.Cwd != "" && !filepath.IsAbs(p.Cwd) {
		return wire.Errorf(wire.BadRequest, "exec: cwd %q is not an absolute path", p.Cwd)
	}
	return nil
}

func chooseUser(asked, image string, host Host) (account.User, error) {
	spec := asked
	if spec == "" {
		spec = image
	}
	if spec == "" {
		spec = strconv.Itoa(host.EUID)
	}
	user, err := account.Lookup(host.Root, spec)
	if err != nil {
		return user, wire.Errorf(wire.NotFound, "running a command as %q: %v", spec, err)
	}
	return user, nil
}

// buildEnv lays the variables over each other: account, image, caller.
func buildEnv(user account.User, shell, vm string, image []string, p Params) []string {
	name := user.Name
	if name == "" {
		name = strconv.Itoa(int(user.UID))
	}
	env := map[string]string{
		"HOME": user.Home, "USER": name, "LOGNAME": name, "PATH": procs.DefaultPath,
	}
	if shell != "" {
		env["SHELL"] = shell
	}
	if vm != "" {
		env["BANGER_VM"] = vm
	}
	if p.TTY != nil {
		env["TERM"] = "xterm"
	}
	for _, pair := range image {
		if key, value, ok := strings.Cut(pair, "="); ok && key != "" {
			env[key] = value
		}
	}
	maps.Copy(env, p.Env)
	list := make([]string, 0, len(env))
	for _, key := range slices.Sorted(maps.Keys(env)) {
		list = append(list, key+"="+env[key])
	}
	return list
}

func chooseDir(asked, image, home string) (string, error) {
	switch {
	case asked != "":
		if !isDir(asked) {
			return "", wire.Errorf(wire.NotFound, "exec: the directory %s does not exist", asked)
		}
		return asked, nil
	case image != "":
		dir := filepath.Join("/", image)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", wire.Errorf(wire.OperationFailed,
				"exec: making the image's working directory: %v", err)
		}
		return dir, nil
	case isDir(home):
		return home, nil
	default:
		return "/", nil
	}
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// isProgram tells whether path is a file that someone may execute.
func isProgram(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// findShell returns the account's shell when it can be used, else bash, else sh, else "".
func findShell(root, accounts string) string {
	candidates := []string{"/bin/bash", "/bin/sh"}
	// The shell of a service account refuses to run anything; who asks for a command as that
	// account wants it to run.
	if base := filepath.Base(accounts); accounts != "" && base != "nologin" && base != "false" {
		candidates = append([]string{accounts}, candidates...)
	}
	for _, shell := range candidates {
		if filepath.IsAbs(shell) && isProgram(filepath.Join(root, shell)) {
			return shell
		}
	}
	return ""
}

// posixShell returns shell when it understands `exec "$@"`, else one that does, else "".
func posixShell(root, shell string) string {
	switch filepath.Base(shell) {
	case "sh", "bash", "dash", "ash", "zsh", "ksh", "ksh93", "mksh", "yash", "busybox":
		return shell
	}
	return findShell(root, "")
}

// findProgram looks name up in the PATH of the command's own environment.
func findProgram(name, dir string, env []string) (path string, code int, reason string) {
	if strings.Contains(name, "/") {
		path := name
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		if _, err := os.Stat(path); err != nil {
			return "", 127, fmt.Sprintf("%s: not found", name)
		}
		if !isProgram(path) {
			return "", 126, fmt.Sprintf("%s: not an executable file", name)
		}
		return path, 0, ""
	}
	code, reason = 127, fmt.Sprintf("%s: command not found", name)
	for _, entry := range filepath.SplitList(lookupEnv(env, "PATH")) {
		if !filepath.IsAbs(entry) {
			entry = filepath.Join(dir, entry)
		}
		path := filepath.Join(entry, name)
		if isProgram(path) {
			return path, 0, ""
		}
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			code, reason = 126, fmt.Sprintf("%s: not an executable file", path)
		}
	}
	return "", code, reason
}

func lookupEnv(env []string, name string) string {
	for _, pair := range env {
		if value, ok := strings.CutPrefix(pair, name+"="); ok {
			return value
		}
	}
	return ""
}

// checkSize applies the kernel's limits before anything runs: 128 KiB for one string, and for all
// of them a quarter of the stack limit, at most 6 MiB, at least 128 KiB.
//
// Source: Linux, fs/exec.c, bprm_stack_limits.
func checkSize(argv, env []string) error {
	const maxString, maxAll, pointer = 128 << 10, 6 << 20, 8
	limit := uint64(maxAll)
	var stack syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_STACK, &stack); err == nil {
		limit = max(maxString, min(limit, stack.Cur/4))
	}
	total := uint64(0)
	for _, s := range slices.Concat(argv, env) {
		if len(s)+1 > maxString {
			return wire.Errorf(wire.BadRequest,
				"exec: an argument or variable of %d bytes, the kernel's limit is %d", len(s), maxString-1)
		}
		total += uint64(len(s)) + 1 + pointer
	}
	if total > limit {
		return wire.Errorf(wire.BadRequest,
			"exec: arguments and environment of %d bytes, the kernel's limit is %d", total, limit)
	}
	return nil
}
