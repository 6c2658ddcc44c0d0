package wire

import "sync"

// StdinQueue holds stdin bytes between a connection and a process. Credit bounds it: the peer
// may have sent at most StartCredit bytes that were not credited again, so accepting never blocks
// and signal frames behind the data always get through.
type StdinQueue struct {
	mu     sync.Mutex
	ready  *sync.Cond
	chunks [][]byte
	held   int  // bytes accepted and not yet credited
	ended  bool // nothing more comes
	closed bool // the process has ended: what still comes is in flight and discarded
}

// NewStdinQueue returns an empty queue.
func NewStdinQueue() *StdinQueue {
	q := &StdinQueue{}
	q.ready = sync.NewCond(&q.mu)
	return q
}

// Add takes a copy of data. Errors: the peer sent more than its credit, or sent after the end.
func (q *StdinQueue) Add(data []byte) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return nil
	}
	if q.ended {
		return Errorf(BadRequest, "stdin: data after its end")
	}
	if q.held+len(data) > StartCredit {
		return Errorf(BadRequest, "stdin: %d bytes more than the credit",
			q.held+len(data)-StartCredit)
	}
	if len(data) == 0 {
		return nil
	}
	q.held += len(data)
	q.chunks = append(q.chunks, append([]byte(nil), data...))
	q.ready.Signal()
	return nil
}

// End marks the end of stdin; calling it twice is harmless.
func (q *StdinQueue) End() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ended = true
	q.ready.Signal()
}

// Close ends the queue from this side.
func (q *StdinQueue) Close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ended, q.closed = true, true
	q.ready.Signal()
}

// Next waits for a chunk; false at the end.
func (q *StdinQueue) Next() ([]byte, bool) {
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

// Credited notes that the peer may send n more bytes.
func (q *StdinQueue) Credited(n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.held -= n
}
