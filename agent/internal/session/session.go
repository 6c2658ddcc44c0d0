// Package session runs long-lived commands of a guest: by name, with their output kept in bounded
// logs, until they end by themselves or are stopped.
//
// Each session has a directory (status, log segments, FIFOs for its input) and a supervisor, a
// process of this program that starts the command, records what it prints and how it ends. Neither
// belongs to the connection that made it, nor to the agent: an agent that is replaced finds them
// again. A supervisor holds a lock on its directory, so that a session whose guest was stopped or
// whose supervisor was killed is known to be lost.
package session

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
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

	specFile    = "spec.json"
	statusFile  = "status.json"
	lockFile    = "lock"
	attachFile  = "attach.lock"
	stdinFIFO   = "stdin"
	controlFIFO = "control"
)

// States of a session.
const (
	Starting = "starting"
	Running  = "running"
	Exited   = "exited"
	Failed   = "failed"
	Lost     = "lost"
)

// Stdin modes: no input, or input from those who attach and send.
const (
	Detached = "detached"
	Pipe     = "pipe"
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

// spec is what a supervisor starts from. It holds the environment, so its file is root's alone.
type spec struct {
	ID      string       `json:"id"`
	Name    string       `json:"name"`
	Argv    []string     `json:"argv"`
	User    string       `json:"user"`
	Stdin   string       `json:"stdin_mode"`
	Tags    []string     `json:"tags"`
	BootID  string       `json:"boot_id"`
	Created int64        `json:"created_unix_ns"`
	Keep    int64        `json:"keep_bytes"`
	Plan    command.Plan `json:"plan"`
}

// status is what a supervisor knows of its command.
type status struct {
	State   string `json:"state"`
	Pid     int    `json:"pid"`
	Code    *int   `json:"code"`
	Signal  string `json:"signal"`
	Reason  string `json:"reason"`
	Started int64  `json:"started_unix_ns"`
	Ended   int64  `json:"ended_unix_ns"`
}

// Record is a session as it is shown. Values of its environment are not.
type Record struct {
	ID       string          `json:"id"`
	Name     string          `json:"name"`
	Argv     []string        `json:"argv"`
	Cwd      string          `json:"cwd"`
	User     string          `json:"user"`
	Stdin    string          `json:"stdin_mode"`
	TTY      bool            `json:"tty"`
	Tags     []string        `json:"tags"`
	State    string          `json:"state"`
	Pid      int             `json:"pid"`
	Code     *int            `json:"code"`
	Signal   string          `json:"signal"`
	Reason   string          `json:"reason"`
	Created  int64           `json:"created_unix_ns"`
	Started  int64           `json:"started_unix_ns"`
	Ended    int64           `json:"ended_unix_ns"`
	Attached bool            `json:"attached"`
	Logs     map[string]Span `json:"logs"`
}

// Live tells whether the command may still run.
func (r *Record) Live() bool { return r.State == Running || r.State == Starting }

// Store is the sessions of a guest.
type Store struct {
	Dir    string
	BootID string
	Host   command.Host
	Reaper *procs.Reaper
	// Keep is how many bytes of each stream are kept; 0 is DefaultKeep.
	Keep int64

	mu sync.Mutex // start and remove, one at a time

	turnsMu sync.Mutex
	turns   map[string]*turn // by session id: who writes to its input, and who waits
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

// List returns every session, oldest first.
func (s *Store) List() ([]*Record, error) {
	entries, err := os.ReadDir(s.Dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var records []*Record
	for _, e := range entries {
		// A directory without a readable spec is one that is just being made or removed.
		if r, err := s.read(e.Name()); err == nil {
			records = append(records, r)
		}
	}
	slices.SortFunc(records, func(a, b *Record) int {
		return int(min(max(a.Created-b.Created, -1), 1))
	})
	return records, nil
}

// Find returns the session of a name.
//
// Errors: not_found.
func (s *Store) Find(name string) (*Record, error) {
	records, err := s.List()
	if err != nil {
		return nil, err
	}
	for _, r := range records {
		if r.Name == name || r.ID == name {
			return r, nil
		}
	}
	return nil, wire.Errorf(wire.NotFound, "there is no session %q in this VM", name)
}

// Show is Find with the sizes of the logs.
func (s *Store) Show(name string) (*Record, error) {
	r, err := s.Find(name)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(s.Dir, r.ID)
	r.Logs = map[string]Span{Stdout: span(dir, Stdout), Stderr: span(dir, Stderr)}
	return r, nil
}

func (s *Store) read(id string) (*Record, error) {
	dir := filepath.Join(s.Dir, id)
	var doc spec
	if err := readJSON(dir, specFile, &doc); err != nil {
		return nil, err
	}
	st := status{State: Starting}
	if err := readJSON(dir, statusFile, &st); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	r := &Record{ID: doc.ID, Name: doc.Name, Argv: doc.Argv, Cwd: doc.Plan.Dir, User: doc.User,
		Stdin: doc.Stdin, TTY: doc.Plan.TTY != nil, Tags: doc.Tags, State: st.State, Pid: st.Pid,
		Code: st.Code, Signal: st.Signal, Reason: st.Reason, Created: doc.Created,
		Started: st.Started, Ended: st.Ended, Attached: isLocked(dir, attachFile)}
	if r.Live() && (doc.BootID != s.BootID || !isLocked(dir, lockFile)) {
		// Its last words may have come between our two looks.
		if err := readJSON(dir, statusFile, &st); err == nil && st.State != Running {
			r.State, r.Code, r.Signal, r.Ended = st.State, st.Code, st.Signal, st.Ended
		} else if doc.BootID != s.BootID || st.State == Running {
			r.State = Lost
		}
	}
	return r, nil
}

// Remove forgets a session that has ended.
//
// Errors: not_found; operation_failed while it runs.
func (s *Store) Remove(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, err := s.Find(name)
	if err != nil {
		return err
	}
	if r.Live() {
		e := wire.Errorf(wire.OperationFailed, "session %s still runs", r.Name)
		e.Reason = "in_use"
		return e
	}
	return os.RemoveAll(filepath.Join(s.Dir, r.ID))
}

// Signal sends a signal to the command's process group.
//
// Errors: not_found, bad_request (no such signal), not_running.
func (s *Store) Signal(name, signal string) (*Record, error) {
	sig, ok := command.ParseSignal(signal)
	if !ok {
		return nil, wire.Errorf(wire.BadRequest, "no signal is named %q", signal)
	}
	r, err := s.Find(name)
	if err != nil {
		return nil, err
	}
	if !r.Live() {
		return r, nil
	}
	return r, s.control(r, controlMessage{Signal: command.FormatSignal(sig)})
}

// Stop sends TERM, and KILL after grace, and returns the record of the ended session.
func (s *Store) Stop(name string, grace time.Duration) (*Record, error) {
	r, err := s.Signal(name, "TERM")
	if err != nil || !r.Live() {
		return r, err
	}
	if r, err = s.waitEnd(r, grace); err != nil || !r.Live() {
		return r, err
	}
	return s.Kill(name, "KILL")
}

// Kill sends a signal; after KILL it waits for the end.
func (s *Store) Kill(name, signal string) (*Record, error) {
	r, err := s.Signal(name, signal)
	if err != nil || !r.Live() || strings.TrimPrefix(signal, "SIG") != "KILL" {
		return r, err
	}
	return s.waitEnd(r, 10*time.Second)
}

// waitEnd returns the record when the session has ended, or as it is after limit.
func (s *Store) waitEnd(r *Record, limit time.Duration) (*Record, error) {
	w, err := newWatch(filepath.Join(s.Dir, r.ID))
	if err != nil {
		return nil, err
	}
	defer w.close()
	_ = w.file.SetReadDeadline(time.Now().Add(limit))
	for {
		now, err := s.read(r.ID)
		if err != nil || !now.Live() {
			return now, err
		}
		if w.wait() != nil {
			return now, nil
		}
	}
}

// controlMessage is one line in the control FIFO; at most PIPE_BUF bytes, so that lines stay whole.
type controlMessage struct {
	Resize *command.Size `json:"resize,omitempty"`
	Signal string        `json:"signal,omitempty"`
	End    bool          `json:"end,omitempty"`
}

// control tells the supervisor something.
//
// Errors: not_running when it is gone.
func (s *Store) control(r *Record, m controlMessage) error {
	f, err := os.OpenFile(filepath.Join(s.Dir, r.ID, controlFIFO), os.O_WRONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return wire.Errorf(wire.NotRunning, "session %s has ended", r.Name)
	}
	defer f.Close()
	line, err := json.Marshal(m)
	if err != nil {
		return err
	}
	_, err = f.Write(append(line, '\n'))
	return err
}

func writeJSON(dir, name string, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	beside := filepath.Join(dir, "."+name)
	if err := os.WriteFile(beside, text, 0o600); err != nil {
		return err
	}
	return os.Rename(beside, filepath.Join(dir, name))
}

func readJSON(dir, name string, v any) error {
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	return json.Unmarshal(text, v)
}

// Open file description locks: they belong to the open file, as flock's do, but can be looked at
// without being taken. Source: fcntl(2), "Open file description locks".
const (
	ofdGetLock = 36
	ofdSetLock = 37
)

// lock takes a file's lock for as long as the returned file stays open; nil when another has it.
func lock(dir, name string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	err = syscall.FcntlFlock(f.Fd(), ofdSetLock, &syscall.Flock_t{Type: syscall.F_WRLCK})
	if err == nil {
		return f, nil
	}
	f.Close()
	if err == syscall.EAGAIN || err == syscall.EACCES {
		return nil, nil
	}
	return nil, fmt.Errorf("locking %s: %w", name, err)
}

// isLocked tells whether somebody holds the lock.
func isLocked(dir, name string) bool {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	held := syscall.Flock_t{Type: syscall.F_WRLCK}
	err = syscall.FcntlFlock(f.Fd(), ofdGetLock, &held)
	return err == nil && held.Type != syscall.F_UNLCK
}
