package session

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"banger/agent/internal/command"
	"banger/agent/internal/wire"
)

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
