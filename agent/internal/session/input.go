package session

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"banger/agent/internal/command"
	"banger/agent/internal/wire"
)

// lastWords is how long a session gets to take what its client sent before it left.
const lastWords = time.Second

// input is what one client sends to a session. Its connection is read at all times, so that its
// leaving is noticed and a change of its window carried out while the session does not read; what
// the session has not taken yet waits in a queue, which the client's credit bounds.
type input struct {
	store  *Store
	record *Record
	out    *wire.FrameWriter
	fifo   *os.File
	queue  *wire.StdinQueue
	// whole: a message is one, from its first byte to its end; else each frame is.
	whole bool

	closed  atomic.Bool   // the client has said that it sends no more
	gone    chan struct{} // the client has gone, or said something wrong
	failure error         // why; to be read when gone is closed
	quit    chan struct{} // nothing more is written
	once    sync.Once
	done    chan struct{} // feed has ended
	sent    int64         // these two to be read when done is closed
	err     error
}

// startInput carries what comes from in to a session until the client goes or stop is called.
func (s *Store) startInput(r *Record, in *wire.FrameReader, out *wire.FrameWriter, whole bool) *input {
	i := &input{store: s, record: r, out: out, queue: wire.NewStdinQueue(), whole: whole,
		gone: make(chan struct{}), quit: make(chan struct{}), done: make(chan struct{})}
	path := filepath.Join(s.Dir, r.ID, stdinFIFO)
	fifo, err := os.OpenFile(path, os.O_WRONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		i.err = ended(r) // nobody reads it any more
	}
	i.fifo = fifo
	go i.feed()
	go i.listen(in)
	return i
}

// stop lets what is not written yet go.
func (i *input) stop() {
	i.once.Do(func() {
		close(i.quit)
		_ = i.fifo.SetWriteDeadline(time.Unix(1, 0))
		i.queue.Close()
	})
}

// listen reads the client's frames until it goes. What it sent before gets a moment to arrive.
func (i *input) listen(in *wire.FrameReader) {
	defer close(i.gone)
	for {
		kind, payload, err := in.Read()
		if err == nil {
			err = i.handle(kind, payload)
		}
		if err != nil {
			i.failure = err
			i.queue.End()
			time.AfterFunc(lastWords, i.stop)
			return
		}
	}
}

func (i *input) handle(kind byte, payload []byte) error {
	switch kind {
	case wire.Stdin:
		return i.queue.Add(payload)
	case wire.StdinClose:
		// An attached client has no more input; the session's own goes on for others.
		i.closed.Store(true)
		i.queue.End()
		return nil
	case wire.Resize:
		var size command.Size
		if err := json.Unmarshal(payload, &size); err != nil {
			return wire.Errorf(wire.BadRequest, "resize frame: %v", err)
		}
		return ignoreEnded(i.store.control(i.record, controlMessage{Resize: &size}))
	default:
		return wire.Errorf(wire.BadRequest, "session: unexpected frame of type 0x%02x", kind)
	}
}

// feed puts the queue into the FIFO until it ends. It waits while the command does not read. When
// the session ends or the input is stopped, a message ends, too; what else comes is discarded.
func (i *input) feed() {
	defer close(i.done)
	defer i.fifo.Close()
	if i.whole && i.err == nil {
		release, err := i.store.takeTurn(i.record, i.quit)
		if err != nil {
			i.err = err
			return
		}
		defer release()
	}
	for {
		chunk, ok := i.queue.Next()
		if !ok {
			return
		}
		if i.err == nil {
			i.err = i.write(chunk)
		}
		if i.err == nil {
			i.sent += int64(len(chunk))
		} else if i.whole {
			return
		}
		// Before the frame: the peer may answer it at once with as many bytes.
		i.queue.Credited(len(chunk))
		_ = i.out.WriteCredit(len(chunk))
	}
}

func (i *input) write(chunk []byte) error {
	if !i.whole {
		release, err := i.store.takeTurn(i.record, i.quit)
		if err != nil {
			return err
		}
		defer release()
	}
	if _, err := i.fifo.Write(chunk); err != nil {
		return ended(i.record)
	}
	return nil
}

// turn is the place of the one who writes to a session's input.
type turn struct {
	taken chan struct{}
	users int
}

// takeTurn waits until nobody else writes to a session. All who do are in this process: those of an
// agent that was replaced have ended with it.
//
// Errors: not_running when the session ends before, or quit is closed.
func (s *Store) takeTurn(r *Record, quit <-chan struct{}) (release func(), err error) {
	s.turnsMu.Lock()
	t := s.turns[r.ID]
	if t == nil {
		t = &turn{taken: make(chan struct{}, 1)}
		if s.turns == nil {
			s.turns = map[string]*turn{}
		}
		s.turns[r.ID] = t
	}
	t.users++
	s.turnsMu.Unlock()
	leave := func() {
		s.turnsMu.Lock()
		defer s.turnsMu.Unlock()
		if t.users--; t.users == 0 {
			delete(s.turns, r.ID)
		}
	}
	release = func() {
		<-t.taken
		leave()
	}
	select {
	case t.taken <- struct{}{}:
		return release, nil
	default:
	}
	over, forget := s.end(r)
	defer forget()
	select {
	case t.taken <- struct{}{}:
		return release, nil
	case <-quit:
	case <-over:
	}
	leave()
	return nil, ended(r)
}

// end returns a channel that is closed when the session has ended, and what stops looking.
func (s *Store) end(r *Record) (<-chan struct{}, func()) {
	over := make(chan struct{})
	w, err := newWatch(filepath.Join(s.Dir, r.ID))
	if err != nil {
		close(over) // its directory is gone
		return over, func() {}
	}
	go func() {
		for {
			if now, err := s.read(r.ID); err != nil || !now.Live() {
				close(over)
				return
			}
			if w.wait() != nil {
				return
			}
		}
	}()
	return over, w.close
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
// Errors: as CheckAttach, but in_use; not_running when the session ends before it has taken all;
// those of the connection.
func (s *Store) Send(name string, end bool, in *wire.FrameReader, out *wire.FrameWriter) (int64, error) {
	r, err := s.withInput(name)
	if err != nil {
		return 0, err
	}
	i := s.startInput(r, in, out, true)
	defer i.stop()
	<-i.done
	switch {
	case i.err != nil:
		return i.sent, i.err
	case !i.closed.Load():
		<-i.gone
		return i.sent, i.failure
	case end:
		return i.sent, s.control(r, controlMessage{End: true})
	}
	return i.sent, nil
}

func ended(r *Record) error { return wire.Errorf(wire.NotRunning, "session %s has ended", r.Name) }

func ignoreEnded(err error) error {
	var e *wire.Error
	if errors.As(err, &e) && e.Code == wire.NotRunning {
		return nil
	}
	return err
}
