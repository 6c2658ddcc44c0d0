package command

import (
	"os"
	"sync"

	"banger/agent/internal/wire"
)

// stdinQueue holds stdin bytes between the connection and the process. Credit bounds it: the peer
// may have sent at most StartCredit bytes that were not credited again, so accepting never blocks
// and signal frames behind the data always get through.
type stdinQueue struct {
	mu     sync.Mutex
	ready  *sync.Cond
	chunks [][]byte
	held   int  // bytes accepted and not yet credited
	ended  bool // nothing more comes
	closed bool // the command has ended: what still comes is in flight and discarded
}

func newStdinQueue() *stdinQueue {
	q := &stdinQueue{}
	q.ready = sync.NewCond(&q.mu)
	return q
}

// add takes a copy of data. Errors: the peer sent more than its credit, or sent after the end.
func (q *stdinQueue) add(data []byte) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return nil
	}
	if q.ended {
		return wire.Errorf(wire.BadRequest, "stdin: data after its end")
	}
	if q.held+len(data) > wire.StartCredit {
		return wire.Errorf(wire.BadRequest, "stdin: %d bytes more than the credit",
			q.held+len(data)-wire.StartCredit)
	}
	if len(data) == 0 {
		return nil
	}
	q.held += len(data)
	q.chunks = append(q.chunks, append([]byte(nil), data...))
	q.ready.Signal()
	return nil
}

// end marks the end of stdin; calling it twice is harmless.
func (q *stdinQueue) end() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ended = true
	q.ready.Signal()
}

// close ends the queue from this side.
func (q *stdinQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ended, q.closed = true, true
	q.ready.Signal()
}

// next waits for a chunk; false at the end.
func (q *stdinQueue) next() ([]byte, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.chunks) == 0 {
		if q.ended {
			return nil, false
		}
		q.ready.Wait()
	}
	chunk := q.chunks[0]
	q.chunks[0] = nil
	q.chunks = q.chunks[1:]
	return chunk, true
}

func (q *stdinQueue) credited(n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.held -= n
}

// feed writes the queue to the process and credits what it took. When the process has closed its
// stdin the rest is discarded and still credited, so that the peer can finish. On a terminal the
// end of stdin is the terminal's end-of-input character.
func (q *stdinQueue) feed(to *os.File, out *wire.FrameWriter, terminal bool) {
	broken := false
	for {
		chunk, ok := q.next()
		if !ok {
			break
		}
		if !broken {
			if _, err := to.Write(chunk); err != nil {
				broken = true
			}
		}
		// Before the frame: the peer may answer it at once with as many bytes.
		q.credited(len(chunk))
		if err := out.WriteCredit(len(chunk)); err != nil {
			broken = true // the connection is gone; what is queued is still consumed
		}
	}
	if !terminal {
		to.Close()
		return
	}
	if raw, err := to.SyscallConn(); err == nil && !broken {
		var eof byte
		var canonical bool
		if raw.Control(func(fd uintptr) { eof, canonical = endOfInput(int(fd)) }) == nil && canonical {
			_, _ = to.Write([]byte{eof})
		}
	}
}
