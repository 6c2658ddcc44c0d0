package session

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"banger/agent/internal/command"
	"banger/agent/internal/procs"
	"banger/agent/internal/wire"
)

const (
	mostRunning = 16
	mostKept    = 128
	mostTags    = 32
	startWait   = 30 * time.Second
)

var nameRule = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// Params are the params of session.start.
type Params struct {
	Name    string            `json:"name"`
	Argv    []string          `json:"argv"`
	Cwd     string            `json:"cwd"`
	Env     map[string]string `json:"env"`
	User    string            `json:"user"`
	Login   bool              `json:"login"`
	TTY     *command.Size     `json:"tty"`
	Stdin   string            `json:"stdin_mode"`
	Require []string          `json:"require"`
	Tags    []string          `json:"tags"`
}

// Start starts a session and returns its record once the command runs.
//
// Errors: bad_request (name, mode), already_exists (name), not_found (user, directory, programs:
// every one that is missing), operation_failed (16 run already).
func (s *Store) Start(p Params) (*Record, error) {
	if !nameRule.MatchString(p.Name) {
		return nil, wire.Errorf(wire.BadRequest,
			"session name %q: 1 to 63 of a-z, 0-9 and -, no hyphen at either end", p.Name)
	}
	if len(p.Argv) == 0 {
		return nil, wire.Errorf(wire.BadRequest, "session %s: argv is empty", p.Name)
	}
	switch {
	case p.Stdin == "" && p.TTY != nil:
		p.Stdin = Pipe
	case p.Stdin == "":
		p.Stdin = Detached
	case p.Stdin != Detached && p.Stdin != Pipe:
		return nil, wire.Errorf(wire.BadRequest, "session %s: stdin_mode %q is none of detached, pipe",
			p.Name, p.Stdin)
	}
	if len(p.Tags) > mostTags {
		return nil, wire.Errorf(wire.BadRequest, "session %s: %d tags, %d are allowed",
			p.Name, len(p.Tags), mostTags)
	}
	run := command.Params{Argv: p.Argv, Cwd: p.Cwd, Env: p.Env, User: p.User, TTY: p.TTY, Login: p.Login}
	plan, err := command.BuildPlan(run, s.Host)
	if err != nil {
		return nil, err
	}
	missing, err := command.FindMissing(s.Reaper, run, s.Host, append([]string{p.Argv[0]}, p.Require...))
	if err != nil {
		return nil, err
	}
	if len(missing) > 0 {
		return nil, wire.Errorf(wire.NotFound, "session %s: not found in the guest: %s",
			p.Name, strings.Join(missing, ", "))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.makeRoom(p.Name); err != nil {
		return nil, err
	}
	return s.launch(p, plan)
}

// makeRoom refuses a name that is in use and a session too many, and removes the ended sessions
// that are too many.
func (s *Store) makeRoom(name string) error {
	records, err := s.List()
	if err != nil {
		return err
	}
	running := 0
	var ended []*Record
	for _, r := range records {
		if r.Name == name {
			e := wire.Errorf(wire.AlreadyExists, "a session named %s is there already (%s)", name, r.State)
			e.Reason = "in_use"
			return e
		}
		if r.Live() {
			running++
		} else {
			ended = append(ended, r)
		}
	}
	if running >= mostRunning {
		return wire.Errorf(wire.OperationFailed, "session %s: %d sessions run already, that is the limit",
			name, running)
	}
	slices.SortFunc(ended, func(a, b *Record) int { return int(min(max(a.Created-b.Created, -1), 1)) })
	for i := 0; len(records)-i >= mostKept && i < len(ended); i++ {
		if err := os.RemoveAll(filepath.Join(s.Dir, ended[i].ID)); err != nil {
			return err
		}
	}
	return nil
}

// launch makes the directory and the supervisor, and waits until the command runs.
func (s *Store) launch(p Params, plan command.Plan) (*Record, error) {
	var raw [8]byte
	if _, err := rand.Read(raw[:]); err != nil {
		return nil, err
	}
	id := hex.EncodeToString(raw[:])
	dir := filepath.Join(s.Dir, id)
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	keep := s.Keep
	if keep == 0 {
		keep = DefaultKeep
	}
	user := p.User
	if user == "" && plan.Cred != nil {
		user = fmt.Sprint(plan.Cred.Uid)
	}
	doc := spec{ID: id, Name: p.Name, Argv: p.Argv, User: user, Stdin: p.Stdin, Tags: p.Tags,
		BootID: s.BootID, Created: time.Now().UnixNano(), Keep: keep, Plan: plan}
	if doc.Tags == nil {
		doc.Tags = []string{}
	}
	err := s.supervise(dir, doc)
	if err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	return s.read(id)
}

// supervise starts the supervisor and returns when its command runs or has ended.
func (s *Store) supervise(dir string, doc spec) error {
	if err := writeJSON(dir, specFile, doc); err != nil {
		return err
	}
	for _, name := range []string{stdinFIFO, controlFIFO} {
		if err := syscall.Mkfifo(filepath.Join(dir, name), 0o600); err != nil {
			return fmt.Errorf("making the session's %s: %w", name, err)
		}
	}
	for _, name := range []string{lockFile, attachFile} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			return err
		}
	}
	null, err := syscall.Open(os.DevNull, syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(null)
	ready, theirs, err := procs.OutputPipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	_, err = s.Reaper.Start("/proc/self/exe", []string{"banger-vsock-agent", Mode, dir},
		&syscall.ProcAttr{
			Dir: "/", Env: []string{"PATH=" + procs.DefaultPath},
			Files: []uintptr{uintptr(null), uintptr(null), uintptr(null), uintptr(theirs)},
			Sys:   &syscall.SysProcAttr{Setsid: true},
		})
	syscall.Close(theirs)
	if err != nil {
		return err
	}
	_ = ready.SetReadDeadline(time.Now().Add(startWait))
	var word [1]byte
	if n, err := ready.Read(word[:]); n == 0 {
		return fmt.Errorf("starting the session's supervisor: it ended before its command ran: %v", err)
	}
	return nil
}
