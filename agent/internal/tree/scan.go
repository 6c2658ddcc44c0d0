package tree

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"banger/agent/internal/kernel"
	"banger/agent/internal/wire"
)

// Scan writes what is below path, an absolute path, without reading any file: for each entry its
// mode, size, times, inode and name. Links in path itself are followed, links below never are. A
// directory called .git is an entry, what is in it only withGit.
//
// Errors: not_found, or the reading or writing that failed.
func Scan(path string, withGit bool, w io.Writer) (Counts, error) {
	if _, err := splitPath(path); err != nil {
		return Counts{}, err
	}
	s := &scanner{withGit: withGit, w: bufio.NewWriterSize(w, 128<<10)}
	err := s.root(path)
	if err == nil {
		err = s.w.Flush()
	}
	if errors.Is(err, os.ErrNotExist) {
		return s.counts, wire.Errorf(wire.NotFound, "scan: %s does not exist", path)
	}
	if err != nil {
		return s.counts, fmt.Errorf("scan of %s: %w", path, err)
	}
	return s.counts, nil
}

type scanner struct {
	w       *bufio.Writer
	withGit bool
	counts  Counts
	buf     []byte
}

func (s *scanner) root(path string) error {
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return err
	}
	return s.directory(fd, "", st.Dev)
}

func (s *scanner) directory(fd int, prefix string, dev uint64) error {
	names, err := readNames(fd)
	if err != nil {
		return err
	}
	for _, name := range names {
		st, err := kernel.Lstatat(fd, name)
		if errors.Is(err, syscall.ENOENT) {
			continue // removed since the directory was read
		}
		if err != nil {
			return fmt.Errorf("%s%s: %w", prefix, name, err)
		}
		if err := s.entry(prefix+name, st); err != nil {
			return notMissing(err)
		}
		if st.Mode&syscall.S_IFMT != syscall.S_IFDIR || name == ".git" && !s.withGit {
			continue
		}
		if err := s.below(fd, name, prefix+name+"/", st, dev); err != nil {
			return fmt.Errorf("%s%s: %w", prefix, name, notMissing(err))
		}
	}
	return nil
}

func (s *scanner) below(dir int, name, prefix string, st syscall.Stat_t, dev uint64) error {
	fd, err := kernel.Openat(dir, name, dirFlags, 0)
	if err == syscall.ENOENT || err == syscall.ENOTDIR || err == syscall.ELOOP {
		return nil // it has become something else meanwhile
	}
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	if st.Dev != dev && isVirtual(fd) {
		return nil
	}
	return s.directory(fd, prefix, st.Dev)
}

// entry writes mode (u32), size (u64), record, length of the name (u16) and the name; little endian.
func (s *scanner) entry(name string, st syscall.Stat_t) error {
	s.counts.Files++
	s.buf = binary.LittleEndian.AppendUint32(s.buf[:0], st.Mode)
	s.buf = binary.LittleEndian.AppendUint64(s.buf, uint64(st.Size))
	s.buf = appendRecord(s.buf, st)
	s.buf = binary.LittleEndian.AppendUint16(s.buf, uint16(len(name)))
	s.buf = append(s.buf, name...)
	_, err := s.w.Write(s.buf)
	return err
}

// appendRecord appends inode, modification time and change time (ns): u64 each, little endian.
// While none of them changes, neither does the file: only the kernel sets a change time.
func appendRecord(buf []byte, st syscall.Stat_t) []byte {
	buf = binary.LittleEndian.AppendUint64(buf, st.Ino)
	buf = binary.LittleEndian.AppendUint64(buf, uint64(st.Mtim.Nano()))
	return binary.LittleEndian.AppendUint64(buf, uint64(st.Ctim.Nano()))
}

// record notes the member that was placed as name in dir.
func (u *unpacker) record(dir int, name string) error {
	st, err := kernel.Lstatat(dir, name)
	if err != nil {
		return err
	}
	u.records = appendRecord(u.records, st)
	u.newest = max(u.newest, st.Ctim.Nano())
	return nil
}

// sendReport waits until the clock of file times has gone on, so that whatever changes a reported
// file from here on changes its times, too. That clock ticks every 1 to 10 ms.
func (u *unpacker) sendReport(w io.Writer) error {
	for range 100 {
		if kernel.CoarseRealtime() > u.newest {
			break
		}
		time.Sleep(time.Millisecond)
	}
	_, err := w.Write(u.records)
	return err
}

// readNames reads the names in a directory, sorted, without what a put has under way there.
func readNames(fd int) ([]string, error) {
	again, err := kernel.Openat(fd, ".", dirFlags, 0)
	if err != nil {
		return nil, err
	}
	return sortedNames(os.NewFile(uintptr(again), "."))
}
