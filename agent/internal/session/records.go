package session

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// The output of a session lies in segments, files named <stream>.<number of the first record>. A
// record is what the command wrote at once: its number, which counts over both streams and so keeps
// their order, the bytes of this stream before it, its length, and the data. Numbers are big endian.
const (
	headerBytes  = 8 + 8 + 4
	segmentParts = 8
	// DefaultKeep is how much of a stream is kept, in bytes.
	DefaultKeep = 64 << 20
	// maxRecord is what a frame can carry.
	maxRecord = 256 << 10
)

// Streams of a session; a terminal has the first only.
const (
	Stdout = "stdout"
	Stderr = "stderr"
)

// record is one piece of output.
type record struct {
	number, offset uint64
	data           []byte
}

// recorder appends records to one stream. When the disk is full output is dropped, never the
// session: a gap in the offsets shows it.
type recorder struct {
	dir, stream string
	keep        int64
	offset      uint64
	file        *os.File
	size        int64
}

// add writes one record of at most maxRecord bytes.
func (r *recorder) add(number uint64, data []byte) {
	offset := r.offset
	r.offset += uint64(len(data))
	if r.file != nil && r.size >= r.keep/segmentParts {
		r.close()
	}
	if r.file == nil {
		r.prune()
		f, err := os.OpenFile(segmentPath(r.dir, r.stream, number),
			os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return
		}
		r.file, r.size = f, 0
	}
	buf := make([]byte, 0, headerBytes+len(data))
	buf = binary.BigEndian.AppendUint64(buf, number)
	buf = binary.BigEndian.AppendUint64(buf, offset)
	buf = binary.BigEndian.AppendUint32(buf, uint32(len(data)))
	buf = append(buf, data...)
	// In one write, so that a reader sees a record whole or at the end of the file.
	if _, err := r.file.Write(buf); err != nil {
		_ = r.file.Truncate(r.size)
		r.close()
		return
	}
	r.size += int64(len(buf))
}

func (r *recorder) close() {
	if r.file != nil {
		r.file.Close()
		r.file = nil
	}
}

// prune removes the oldest segments until one more fits.
func (r *recorder) prune() {
	segments, err := listSegments(r.dir, r.stream)
	if err != nil {
		return
	}
	total := int64(0)
	for _, s := range segments {
		total += s.size
	}
	for _, s := range segments {
		if total <= r.keep-r.keep/segmentParts {
			return
		}
		_ = os.Remove(s.path)
		total -= s.size
	}
}

type segment struct {
	path  string
	first uint64
	size  int64
}

func segmentPath(dir, stream string, number uint64) string {
	return filepath.Join(dir, fmt.Sprintf("%s.%016x", stream, number))
}

// listSegments returns the segments of a stream, oldest first.
func listSegments(dir, stream string) ([]segment, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var found []segment
	for _, e := range entries {
		text, ours := strings.CutPrefix(e.Name(), stream+".")
		first, err := strconv.ParseUint(text, 16, 64)
		if !ours || err != nil {
			continue
		}
		info, err := e.Info()
		if err != nil {
			continue // pruned meanwhile
		}
		found = append(found, segment{filepath.Join(dir, e.Name()), first, info.Size()})
	}
	slices.SortFunc(found, func(a, b segment) int {
		if a.first < b.first {
			return -1
		}
		return 1
	})
	return found, nil
}

// reader reads the records of one stream from a number on, across segments, also while they grow.
type reader struct {
	dir, stream string
	next        uint64 // records before it are skipped
	file        *os.File
	at          int64
	first       uint64 // of the open segment
	ahead       *record

	window   []byte // what was read of the open segment, from windowAt on
	windowAt int64
	reads    int
	idle     bool // there was nothing to read; idleAt says when, in reads of the other streams
	idleAt   int
}

// peek returns the next record, nil when there is none yet.
func (r *reader) peek() (*record, error) {
	for r.ahead == nil {
		if r.file == nil {
			if ok, err := r.open(0, true); err != nil || !ok {
				return nil, err
			}
		}
		rec, err := r.read()
		if err != nil {
			return nil, err
		}
		if rec == nil {
			// The end of this segment, for ever when there is a later one.
			ok, err := r.open(r.first, false)
			if err != nil || !ok {
				return nil, err
			}
			continue
		}
		if rec.number >= r.next {
			r.ahead = rec
		}
	}
	return r.ahead, nil
}

// take consumes what peek returned.
func (r *reader) take() {
	r.next = r.ahead.number + 1
	r.ahead = nil
}

func (r *reader) close() {
	if r.file != nil {
		r.file.Close()
	}
}

// open goes to the segment that holds r.next, or with all false to the one after the segment that
// starts at after. False when there is none.
func (r *reader) open(after uint64, all bool) (bool, error) {
	segments, err := listSegments(r.dir, r.stream)
	if err != nil {
		return false, err
	}
	chosen := -1
	for i, s := range segments {
		if all {
			if chosen < 0 || s.first <= r.next {
				chosen = i
			}
		} else if s.first > after {
			chosen = i
			break
		}
	}
	if chosen < 0 {
		return false, nil
	}
	if !all {
		// What was written between our last look and the start of the next segment.
		rec, err := r.read()
		if err != nil {
			return false, err
		}
		if rec != nil {
			r.at -= int64(headerBytes + len(rec.data))
			return true, nil
		}
	}
	f, err := os.Open(segments[chosen].path)
	if errors.Is(err, os.ErrNotExist) {
		return r.open(after, all) // pruned between the look and the open
	}
	if err != nil {
		return false, err
	}
	r.close()
	r.file, r.at, r.first = f, 0, segments[chosen].first
	r.window, r.windowAt = r.window[:0], 0
	return true, nil
}

// read returns the record at the current place; nil at the end, also in the middle of a record that
// a crash cut short. Its data is valid until the next call.
func (r *reader) read() (*record, error) {
	header, err := r.look(headerBytes)
	if header == nil || err != nil {
		return nil, err
	}
	number, offset := binary.BigEndian.Uint64(header), binary.BigEndian.Uint64(header[8:])
	size := binary.BigEndian.Uint32(header[16:])
	if size > maxRecord {
		return nil, fmt.Errorf("reading %s: a record of %d bytes", r.file.Name(), size)
	}
	whole, err := r.look(headerBytes + int(size))
	if whole == nil || err != nil {
		return nil, err
	}
	r.at += int64(len(whole))
	return &record{number, offset, whole[headerBytes:]}, nil
}

// look returns the next bytes of the file without passing them; nil where there are not so many.
// Many records are read at once: a program that writes single bytes makes millions.
func (r *reader) look(count int) ([]byte, error) {
	at := r.at - r.windowAt
	if at < 0 || at+int64(count) > int64(len(r.window)) {
		if cap(r.window) < count {
			r.window = make([]byte, 0, max(count, 64<<10))
		}
		r.reads++
		n, err := r.file.ReadAt(r.window[:cap(r.window)], r.at)
		r.window, r.windowAt, at = r.window[:n], r.at, 0
		if n < count {
			return nil, endOf(err)
		}
	}
	return r.window[at : at+int64(count)], nil
}

func endOf(err error) error {
	if err == io.EOF || err == nil {
		return nil
	}
	return err
}

// Span is how much of a stream is kept: its bytes from Start to End of all that was written.
type Span struct {
	Start uint64 `json:"start"`
	End   uint64 `json:"end"`
}

// span measures a stream; an empty one is 0 to 0.
func span(dir, stream string) Span {
	segments, err := listSegments(dir, stream)
	if err != nil || len(segments) == 0 {
		return Span{}
	}
	first := reader{dir: dir, stream: stream}
	defer first.close()
	var s Span
	if rec, err := first.peek(); err == nil && rec != nil {
		s.Start, s.End = rec.offset, rec.offset
	}
	last := reader{dir: dir, stream: stream, next: segments[len(segments)-1].first}
	defer last.close()
	for {
		rec, err := last.peek()
		if err != nil || rec == nil {
			return s
		}
		s.End = rec.offset + uint64(len(rec.data))
		last.take()
	}
}

// watch tells when something in a directory changes.
type watch struct{ file *os.File }

// newWatch watches a session's directory. Source: inotify(7).
func newWatch(dir string) (*watch, error) {
	fd, err := syscall.InotifyInit1(syscall.IN_NONBLOCK | syscall.IN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("watching %s: %w", dir, err)
	}
	const events = syscall.IN_MODIFY | syscall.IN_CREATE | syscall.IN_MOVED_TO | syscall.IN_DELETE_SELF
	if _, err := syscall.InotifyAddWatch(fd, dir, events); err != nil {
		syscall.Close(fd)
		return nil, fmt.Errorf("watching %s: %w", dir, err)
	}
	return &watch{os.NewFile(uintptr(fd), "inotify")}, nil
}

// wait returns when something has changed since the last call; os.ErrClosed after close.
func (w *watch) wait() error {
	var buf [4096]byte
	_, err := w.file.Read(buf[:])
	return err
}

func (w *watch) close() { w.file.Close() }
