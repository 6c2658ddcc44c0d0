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
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"banger/agent/internal/command"
	"banger/agent/internal/procs"
	"banger/agent/internal/wire"
)

const (
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
