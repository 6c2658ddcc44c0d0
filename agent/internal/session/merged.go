package session

import (
	"fmt"
	"slices"

	"banger/agent/internal/wire"
)

// place is a point in a session's output: the next record, and the bytes of each stream before it.
type place struct {
	number uint64
	bytes  [2]uint64
}

func (p place) String() string {
	return fmt.Sprintf("%d.%d.%d", p.number, p.bytes[0], p.bytes[1])
}

func parsePlace(text string) (p place, err error) {
	if n, err := fmt.Sscanf(text, "%d.%d.%d", &p.number, &p.bytes[0], &p.bytes[1]); n != 3 ||
		err != nil || p.String() != text {
		return p, wire.Errorf(wire.BadRequest, "session logs: %q is no cursor of an earlier call", text)
	}
	return p, nil
}

// merged reads several streams in the order in which they were written.
type merged struct {
	readers []*reader
	at      place
	dropped uint64
	// exact: what lies between at and the first record was asked for and is gone.
	exact bool
}

var streamNames = [2]string{Stdout, Stderr}
var streamKinds = [2]byte{wire.Stdout, wire.Stderr}

func newMerged(dir, stream string, at place, exact bool) *merged {
	m := &merged{at: at, exact: exact}
	for _, name := range streamNames {
		if stream == "" || stream == name {
			m.readers = append(m.readers, &reader{dir: dir, stream: name, next: at.number})
		}
	}
	return m
}

// take returns the next record of all, nil when there is none yet.
func (m *merged) take() (kind byte, rec *record, err error) {
	if err := m.peek(); err != nil {
		return 0, nil, err
	}
	var chosen *reader
	for _, r := range m.readers {
		if r.ahead != nil && (chosen == nil || r.ahead.number < chosen.ahead.number) {
			chosen = r
		}
	}
	if chosen == nil {
		return 0, nil, nil
	}
	rec = chosen.ahead
	chosen.take()
	i := slices.Index(streamNames[:], chosen.stream)
	if before := m.at.bytes[i]; m.exact && rec.offset > before {
		m.dropped += rec.offset - before
	}
	m.at.number, m.at.bytes[i] = rec.number+1, rec.offset+uint64(len(rec.data))
	return streamKinds[i], rec, nil
}

// peek finds the next record of each stream that has one. Where one has none, it is looked at again
// only when another one has been read from: what was read before was written before.
func (m *merged) peek() error {
	for {
		again, some := false, false
		for _, r := range m.readers {
			if r.ahead != nil || r.idle && r.idleAt == m.reads(r) {
				continue
			}
			r.idleAt = m.reads(r)
			head, err := r.peek()
			if err != nil {
				return err
			}
			r.idle = head == nil
		}
		for _, r := range m.readers {
			some = some || r.ahead != nil
			again = again || r.ahead == nil && r.idleAt != m.reads(r)
		}
		if !some {
			for _, r := range m.readers {
				r.idle = false
			}
		}
		if !some || !again {
			return nil
		}
	}
}

// reads counts how often the streams but one were read from.
func (m *merged) reads(but *reader) (count int) {
	for _, r := range m.readers {
		if r != but {
			count += r.reads
		}
	}
	return count
}

func (m *merged) close() {
	for _, r := range m.readers {
		r.close()
	}
}
