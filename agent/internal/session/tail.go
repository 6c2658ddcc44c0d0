package session

import (
	"bytes"
	"cmp"
	"slices"
)

// recentBytes is what an attach shows of the output before it.
const recentBytes = 64 << 10

// findTail returns the record in which the last lines begin, and the bytes of it before them. It
// reads the log twice and keeps nothing of it: a record may be a single byte, and there are millions.
func findTail(dir, stream string, lines int) (from place, skip int, err error) {
	for range 3 {
		from, skip, found, err := lookForTail(dir, stream, lines)
		if err != nil || found {
			return from, skip, err
		}
	}
	// It grows faster than it can be read; what is dropped meanwhile is not missed.
	return place{}, 0, nil
}

// lookForTail is findTail; found is false when the beginning of the log was dropped meanwhile.
func lookForTail(dir, stream string, lines int) (from place, skip int, found bool, err error) {
	first, end, ends, unended, err := countLines(dir, stream)
	if err != nil || lines <= 0 {
		return end, 0, true, err
	}
	// So many newlines are before the wanted lines; a last line without its own is a line too.
	before := ends - lines
	if unended {
		before++
	}
	if before <= 0 {
		return place{}, 0, true, nil
	}
	m := newMerged(dir, stream, place{}, false)
	defer m.close()
	for start := true; ; start = false {
		at := m.at
		_, rec, err := m.take()
		if err != nil || rec == nil || start && rec.number != first {
			return place{}, 0, false, err
		}
		here := bytes.Count(rec.data, []byte{'\n'})
		if here < before {
			before -= here
			continue
		}
		at.number = rec.number
		for ; before > 0; before-- {
			skip += bytes.IndexByte(rec.data[skip:], '\n') + 1
		}
		return at, skip, true, nil
	}
}

// countLines reads a log to its end: the number of the first record, the place behind the last one,
// the newlines, and whether something follows the last of them.
func countLines(dir, stream string) (first uint64, end place, ends int, unended bool, err error) {
	m := newMerged(dir, stream, place{}, false)
	defer m.close()
	for start := true; ; start = false {
		_, rec, err := m.take()
		if err != nil || rec == nil {
			return first, m.at, ends, unended, err
		}
		if start {
			first = rec.number
		}
		ends += bytes.Count(rec.data, []byte{'\n'})
		if len(rec.data) > 0 {
			unended = rec.data[len(rec.data)-1] != '\n'
		}
	}
}

// findRecent returns the place from which an attach shows the output.
func findRecent(dir string) (place, error) {
	type piece struct {
		before place
		size   int
	}
	var recent []piece
	total := 0
	m := newMerged(dir, "", place{number: findNear(dir)}, false)
	defer m.close()
	for {
		before := m.at
		_, rec, err := m.take()
		if err != nil {
			return place{}, err
		}
		if rec == nil {
			break
		}
		before.number = rec.number
		recent = append(recent, piece{before, len(rec.data)})
		total += len(rec.data)
		for total-recent[0].size >= recentBytes {
			total -= recent[0].size
			recent = recent[1:]
		}
	}
	if len(recent) == 0 {
		return m.at, nil
	}
	return recent[0].before, nil
}

// findNear returns the number of a record so near the end that the recent output is not before it
// and the rest need not be read.
func findNear(dir string) uint64 {
	var all []segment
	for _, stream := range streamNames {
		found, err := listSegments(dir, stream)
		if err != nil {
			return 0
		}
		all = append(all, found...)
	}
	slices.SortFunc(all, func(a, b segment) int { return cmp.Compare(b.first, a.first) })
	size := int64(0)
	for _, s := range all {
		// Each byte may be a record of its own.
		if size += s.size; size >= recentBytes*(headerBytes+1) {
			return s.first
		}
	}
	return 0
}
