package session

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

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
	input := s.startInput(r, in, out, false)
	dir := filepath.Join(s.Dir, r.ID)
	from, err := findRecent(dir)
	if err != nil {
		return err
	}
	m := newMerged(dir, "", from, false)
	defer m.close()
	if _, err := s.follow(r, m, true, input.gone, out.Write); err != nil {
		var bad *wire.Error
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			// Who cannot be written to has left, and what it had sent is still on its way.
			select {
			case <-input.gone:
			case <-time.After(lastWords):
			}
			return err
		} else if errors.As(input.failure, &bad) {
			return bad
		}
		return nil // the client has detached
	}
	input.stop()
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
	held, err := lock(filepath.Join(s.Dir, r.ID), attachFile)
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
