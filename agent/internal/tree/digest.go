package tree

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"banger/agent/internal/kernel"
	"banger/agent/internal/wire"
)

// Wanted is a file that the peer has: its name below a directory, and its size.
type Wanted struct {
	Name string
	Size uint64
}

// Digests says of each file below path whether it may be the same: mode, owner and group (u32 each,
// little endian) and the SHA-256 of its content. All is zero where there is no regular file of that
// size and name, or only through a link.
//
// Errors: not_found, bad_request; the reading or writing that failed.
func Digests(path string, wanted []Wanted, w io.Writer) (Counts, error) {
	if _, err := splitPath(path); err != nil {
		return Counts{}, err
	}
	root, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if errors.Is(err, os.ErrNotExist) {
		return Counts{}, wire.Errorf(wire.NotFound, "digest: %s does not exist", path)
	}
	if err != nil {
		return Counts{}, fmt.Errorf("digest below %s: %w", path, err)
	}
	defer syscall.Close(root)
	from := &walker{root: root}
	defer from.close()
	out := bufio.NewWriterSize(w, 64<<10)
	var counts Counts
	buf := make([]byte, 256<<10)
	for _, file := range wanted {
		parts, err := splitName(file.Name)
		if err != nil || len(parts) == 0 {
			return counts, wire.Errorf(wire.BadRequest, "digest: the name %q is not allowed", file.Name)
		}
		record := make([]byte, 12+sha256.Size)
		dir, err := from.enter(strings.Join(parts[:len(parts)-1], "/"))
		if err == nil {
			err = digest(dir, parts[len(parts)-1], file.Size, record, buf)
		}
		if err != nil && !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ENOTDIR) &&
			!errors.Is(err, syscall.ELOOP) {
			return counts, fmt.Errorf("%s: %w", file.Name, err)
		}
		if err == nil && record[0]|record[1] != 0 {
			counts.Files++
			counts.Bytes += int64(file.Size)
		}
		if _, err := out.Write(record); err != nil {
			return counts, err
		}
	}
	return counts, out.Flush()
}

// digest fills the record of a file that has the size.
func digest(dir int, name string, size uint64, record, buf []byte) error {
	fd, err := kernel.Openat(dir, name, syscall.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err == syscall.ENXIO {
		return nil // a socket
	}
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&syscall.S_IFMT != syscall.S_IFREG || uint64(st.Size) != size {
		return nil
	}
	h := sha256.New()
	n, err := io.CopyBuffer(h, onlyReader{io.LimitReader(f, int64(size))}, buf)
	if err != nil {
		return fmt.Errorf("reading: %v", err)
	}
	if uint64(n) != size {
		return nil // it has been cut meanwhile
	}
	binary.LittleEndian.PutUint32(record, st.Mode)
	binary.LittleEndian.PutUint32(record[4:], st.Uid)
	binary.LittleEndian.PutUint32(record[8:], st.Gid)
	copy(record[12:], h.Sum(nil))
	return nil
}

// onlyReader hides WriteTo, which would ignore the buffer.
type onlyReader struct{ io.Reader }

// ReadFile sends one file from an offset: first its size (u64), its mode (u32) and the SHA-256 of
// what is before the offset (zero where the file is shorter), then the rest. name is below path and
// no link on the way to it is followed; an empty one is path itself, links followed.
//
// Errors: not_found; bad_request for what is no regular file; operation_failed when the file is cut
// while it is read.
func ReadFile(path, name string, offset int64, w io.Writer) (Counts, error) {
	f, err := openFile(path, name)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return Counts{}, wire.Errorf(wire.NotFound, "read: %s/%s does not exist", path, name)
		}
		return Counts{}, err
	}
	defer f.Close()
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		return Counts{}, err
	}
	if st.Mode&syscall.S_IFMT != syscall.S_IFREG || offset < 0 {
		return Counts{}, wire.Errorf(wire.BadRequest, "read: %s/%s is no regular file", path, name)
	}
	head := binary.LittleEndian.AppendUint64(nil, uint64(st.Size))
	head = binary.LittleEndian.AppendUint32(head, st.Mode)
	if offset > st.Size {
		_, err := w.Write(append(head, make([]byte, sha256.Size)...))
		return Counts{}, err
	}
	h := sha256.New()
	if _, err := io.CopyN(h, f, offset); err != nil {
		return Counts{}, fmt.Errorf("reading %s: %v", name, err)
	}
	if _, err := w.Write(h.Sum(head)); err != nil {
		return Counts{}, err
	}
	n, err := io.CopyBuffer(onlyWriter{w}, onlyReader{io.LimitReader(f, st.Size-offset)},
		make([]byte, 256<<10))
	if err == nil && n != st.Size-offset {
		err = wire.Errorf(wire.OperationFailed, "read: %s was cut while it was read", name)
	}
	return Counts{Files: 1, Bytes: n}, err
}

// openFile opens a file for reading; see ReadFile. It does not wait for the writer of a FIFO.
func openFile(path, name string) (*os.File, error) {
	const flags = syscall.O_RDONLY | syscall.O_NONBLOCK | syscall.O_CLOEXEC
	if _, err := splitPath(path); err != nil {
		return nil, err
	}
	if name == "" {
		return os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	}
	parts, err := splitName(name)
	if err != nil || len(parts) == 0 {
		return nil, wire.Errorf(wire.BadRequest, "read: the name %q is not allowed", name)
	}
	root, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer syscall.Close(root)
	dir, err := openDir(root, parts[:len(parts)-1], nil)
	if err != nil {
		return nil, err
	}
	defer syscall.Close(dir)
	fd, err := kernel.Openat(dir, parts[len(parts)-1], flags|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}
