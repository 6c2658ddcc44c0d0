package command

import (
	"context"
	"strings"
	"syscall"
	"time"

	"banger/agent/internal/procs"
	"banger/agent/internal/wire"
)

// preflightWait bounds a login shell's profile, which may do anything.
const preflightWait = 20 * time.Second

// missingScript prints those of its arguments that the shell would not find. The mark tells its
// words from what a profile prints.
const missingScript = `for c in "$@"; do command -v "$c" >/dev/null 2>&1 || printf '\001%s\n' "$c"; done`

// FindMissing returns those of names that a command with these params would not find: with a login
// shell in the PATH that its profile sets, else in that of its environment.
//
// Errors: as BuildPlan; operation_failed when the login shell gives no answer.
func FindMissing(reaper *procs.Reaper, p Params, host Host, names []string) ([]string, error) {
	p.TTY = nil
	if p.Login {
		p.Argv = append([]string{"sh", "-c", missingScript, "sh"}, names...)
	} else {
		p.Argv = names[:1]
	}
	plan, err := BuildPlan(p, host)
	if err != nil {
		return nil, err
	}
	var missing []string
	if !p.Login || len(plan.Argv) == len(p.Argv) {
		for _, name := range names {
			if path, _, _ := findProgram(name, plan.Dir, plan.Env); path == "" {
				missing = append(missing, name)
			}
		}
		return missing, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), preflightWait)
	defer cancel()
	said, err := reaper.RunAs(ctx, plan.Program, plan.Argv, &syscall.ProcAttr{Dir: plan.Dir,
		Env: plan.Env, Sys: &syscall.SysProcAttr{Credential: plan.Cred, Setsid: true}})
	if err != nil {
		return nil, wire.Errorf(wire.OperationFailed, "looking for %s: %v",
			strings.Join(names, ", "), err)
	}
	for _, piece := range strings.Split(said, "\x01")[1:] {
		name, _, _ := strings.Cut(piece, "\n")
		missing = append(missing, name)
	}
	return missing, nil
}
