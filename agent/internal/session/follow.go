package session

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"banger/agent/internal/command"
	"banger/agent/internal/wire"
)

// LogParams are the params of session.logs. Since is the cursor that an earlier call ended with;
// Tail a number of lines. Without either it is everything that is kept.
type LogParams struct {
	Name   string `json:"name"`
	Stream string `json:"stream"`
	Since  string `json:"since"`
	Tail   *int   `json:"tail"`
	Follow bool   `json:"follow"`
}

// LogEnd is the result of session.logs: where a later call goes on, the bytes that were not kept for
// this one, and the session's state.
type LogEnd struct {
	Cursor  string `json:"cursor"`
	Dropped uint64 `json:"dropped"`
	State   string `json:"state"`
}

// Logs sends kept output as stdout and stderr frames and, when it follows, what comes, until the
// session has ended or gone is closed.
//
// Errors: not_found, bad_request; those of the connection.
func (s *Store) Logs(p LogParams, out *wire.FrameWriter, gone <-chan struct{}) (LogEnd, error) {
	if p.Stream != "" && p.Stream != Stdout && p.Stream != Stderr {
		return LogEnd{}, wire.Errorf(wire.BadRequest, "stream %q is none of stdout, stderr", p.Stream)
	}
	r, err := s.Find(p.Name)
	if err != nil {
		return LogEnd{}, err
	}
	dir := filepath.Join(s.Dir, r.ID)
	var from place
	exact, skip := true, 0
	switch {
	case p.Since != "":
		from, err = parsePlace(p.Since)
	case p.Tail != nil:
		exact = false
		from, skip, err = findTail(dir, p.Stream, *p.Tail)
	}
	if err != nil {
		return LogEnd{}, err
	}
	m := newMerged(dir, p.Stream, from, exact)
	defer m.close()
	state, err := s.follow(r, m, p.Follow, gone, func(kind byte, data []byte) error {
		cut := min(skip, len(data))
		data, skip = data[cut:], skip-cut
		if len(data) == 0 {
			return nil
		}
		return out.Write(kind, data)
	})
	return LogEnd{Cursor: m.at.String(), Dropped: m.dropped, State: state}, err
}

// follow hands out records until there is no more: at once, or with live after the session's end.
func (s *Store) follow(r *Record, m *merged, live bool, gone <-chan struct{},
	send func(kind byte, data []byte) error,
) (string, error) {
	w, err := newWatch(filepath.Join(s.Dir, r.ID))
	if err != nil {
		return r.State, err
	}
	defer w.close()
	stop := make(chan struct{})
	var waiting sync.WaitGroup
	defer waiting.Wait()
	defer close(stop)
	waiting.Go(func() {
		select {
		case <-gone:
			_ = w.file.SetReadDeadline(time.Unix(1, 0))
		case <-stop:
		}
	})
	for {
		// The state first: what a session wrote before its end is read after it.
		now, err := s.read(r.ID)
		if err != nil {
			return r.State, err
		}
		for {
			kind, rec, err := m.take()
			if err != nil {
				return now.State, err
			}
			if rec == nil {
				break
			}
			if err := send(kind, rec.data); err != nil {
				return now.State, err
			}
		}
		if !live || !now.Live() {
			return now.State, nil
		}
		if err := w.wait(); err != nil {
			return now.State, err
		}
	}
}

// Attach joins a client with a session: output of the last moments and all that comes, input, and
// the window's size. It ends with the session's exit frame, or when the client goes.
//
// Errors: those of CheckAttach; of the connection.
func (s *Store) Attach(r *Record, held *os.File, in *wire.FrameReader, out *wire.FrameWriter) error {
	defer held.Close()
	gone := make(chan struct{})
	input := &sender{store: s, record: r, out: out}
	go func() {
		defer close(gone)
		for {
			kind, payload, err := in.Read()
			if err == nil {
				err = input.handle(kind, payload)
			}
			if err != nil {
				var bad *wire.Error
				if errors.As(err, &bad) {
					_ = out.WriteJSON(wire.Failure, bad)
				}
				return
			}
		}
	}()
	dir := filepath.Join(s.Dir, r.ID)
	from, err := findRecent(dir)
	if err != nil {
		return err
	}
	m := newMerged(dir, "", from, false)
	defer m.close()
	if _, err := s.follow(r, m, true, gone, out.Write); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil // the client has detached
		}
		return err
	}
	now, err := s.read(r.ID)
	if err != nil {
		return err
	}
	return out.WriteJSON(wire.Exit, exitOf(now))
}

// exitOf is the exit frame of an ended session.
func exitOf(r *Record) map[string]any {
	switch {
	case r.Signal != "":
		return map[string]any{"signal": r.Signal}
	case r.Code != nil:
		return map[string]any{"code": *r.Code}
	}
	return map[string]any{"code": 1}
}

// CheckAttach finds a session that can be attached to and takes the one place there is.
//
// Errors: not_found; bad_request without an input; not_running; already_exists (reason in_use).
func (s *Store) CheckAttach(name string) (*Record, *os.File, error) {
	r, err := s.withInput(name)
	if err != nil {
		return nil, nil, err
	}
	held, err := lock(filepath.Join(s.Dir, r.ID), attachFile, false)
	if err != nil {
		return nil, nil, err
	}
	if held == nil {
		e := wire.Errorf(wire.AlreadyExists, "somebody is attached to session %s already", r.Name)
		e.Reason = "in_use"
		return nil, nil, e
	}
	return r, held, nil
}

// CheckInput tells whether a session takes input.
//
// Errors: as CheckAttach, but in_use.
func (s *Store) CheckInput(name string) error {
	_, err := s.withInput(name)
	return err
}

func (s *Store) withInput(name string) (*Record, error) {
	r, err := s.Find(name)
	if err != nil {
		return nil, err
	}
	if r.Stdin != Pipe {
		e := wire.Errorf(wire.BadRequest, "session %s was started without an input", r.Name)
		e.Hint = "banger vm session start --stdin-mode pipe"
		return nil, e
	}
	if !r.Live() {
		return nil, wire.Errorf(wire.NotRunning, "session %s has ended (%s)", r.Name, r.State)
	}
	return r, nil
}

// Send carries one message, all stdin frames up to stdin_close, to a session's input. Messages of
// several clients follow each other whole.
//
// Errors: as CheckAttach, but in_use; not_running when the session ends before it has taken all.
func (s *Store) Send(name string, end bool, in *wire.FrameReader, out *wire.FrameWriter) (int64, error) {
	r, err := s.withInput(name)
	if err != nil {
		return 0, err
	}
	dir := filepath.Join(s.Dir, r.ID)
	held, err := lock(dir, sendFile, true)
	if err != nil {
		return 0, err
	}
	defer held.Close()
	input := &sender{store: s, record: r, out: out, locked: true}
	for {
		kind, payload, err := in.Read()
		if err == nil && kind == wire.StdinClose {
			break
		}
		if err == nil {
			err = input.handle(kind, payload)
		}
		if err != nil {
			return input.sent, err
		}
	}
	if end {
		return input.sent, s.control(r, controlMessage{End: true})
	}
	return input.sent, nil
}

// sender writes a client's frames to a session.
type sender struct {
	store  *Store
	record *Record
	out    *wire.FrameWriter
	locked bool
	sent   int64
}

func (c *sender) handle(kind byte, payload []byte) error {
	switch kind {
	case wire.Stdin:
		if err := c.write(payload); err != nil {
			return err
		}
		c.sent += int64(len(payload))
		return c.out.WriteCredit(len(payload))
	case wire.StdinClose:
		// The client has no more input; the session's own goes on for others.
		return nil
	case wire.Resize:
		var size command.Size
		if err := json.Unmarshal(payload, &size); err != nil {
			return wire.Errorf(wire.BadRequest, "resize frame: %v", err)
		}
		return ignoreEnded(c.store.control(c.record, controlMessage{Resize: &size}))
	default:
		return wire.Errorf(wire.BadRequest, "session: unexpected frame of type 0x%02x", kind)
	}
}

// write puts data into the FIFO, one message at a time. It waits while the command does not read,
// and gives up when the session ends.
func (c *sender) write(data []byte) error {
	dir := filepath.Join(c.store.Dir, c.record.ID)
	if !c.locked {
		held, err := lock(dir, sendFile, true)
		if err != nil {
			return err
		}
		defer held.Close()
	}
	f, err := os.OpenFile(filepath.Join(dir, stdinFIFO), os.O_WRONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return c.ended()
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return c.ended()
	}
	return nil
}

func (c *sender) ended() error {
	return wire.Errorf(wire.NotRunning, "session %s has ended", c.record.Name)
}

func ignoreEnded(err error) error {
	var e *wire.Error
	if errors.As(err, &e) && e.Code == wire.NotRunning {
		return nil
	}
	return err
}
