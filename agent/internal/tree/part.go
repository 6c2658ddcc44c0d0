package tree

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"banger/agent/internal/kernel"
	"banger/agent/internal/wire"
)

// partPrefix starts the names of files and directories that are received in pieces. What an
// interrupted copy left under it is where the next one of the same name goes on.
const partPrefix = stagingPrefix + "part-"

// partKept is how long the part of an interrupted copy waits for the next one.
const partKept = 7 * 24 * time.Hour

// partWait is how long a call waits for another one of the same name: its connection may have been
// cut, and it has not heard of that yet.
const partWait = 5 * time.Second

// gathering holds the parts that a call is at: directory and name.
var gathering = struct {
	sync.Mutex
	held map[string]chan struct{}
}{held: map[string]chan struct{}{}}

// claimPart makes a part the caller's until it is released.
func claimPart(dir int, name string) (release func(), err error) {
	var st syscall.Stat_t
	if err := syscall.Fstat(dir, &st); err != nil {
		return nil, err
	}
	key := fmt.Sprintf("%d:%d/%s", st.Dev, st.Ino, name)
	late := time.NewTimer(partWait)
	defer late.Stop()
	for {
		gathering.Lock()
		other, held := gathering.held[key]
		if !held {
			done := make(chan struct{})
			gathering.held[key] = done
			gathering.Unlock()
			return func() {
				gathering.Lock()
				defer gathering.Unlock()
				delete(gathering.held, key)
				close(done)
			}, nil
		}
		gathering.Unlock()
		select {
		case <-other:
		case <-late.C:
			e := wire.Errorf(wire.AlreadyExists, "another copy to this name is under way")
			e.Reason = "in_use"
			return nil, e
		}
	}
}

// isHeld tells whether a call is at a part.
func isHeld(dir int, name string) bool {
	var st syscall.Stat_t
	if syscall.Fstat(dir, &st) != nil {
		return true
	}
	gathering.Lock()
	defer gathering.Unlock()
	_, held := gathering.held[fmt.Sprintf("%d:%d/%s", st.Dev, st.Ino, name)]
	return held
}

// File is what is to be received: name is below the directory path, size in bytes.
type File struct {
	Path  string `json:"path"`
	Name  []byte `json:"name"` // base64 in JSON: any bytes
	Size  int64  `json:"size"`
	Mode  uint32 `json:"mode"`
	Mtime int64  `json:"mtime"` // seconds since 1970
}

// PutFile receives one file, going on with what an earlier call of the same name has left. It says
// how much that is and the SHA-256 of it (u64, 32 bytes); the first 8 bytes from r are where the
// peer goes on: there, or at 0. The file gets its name, its mode and root as its owner when it is
// whole. A part stays when r fails. No link is followed, missing directories are made.
//
// Errors: bad_request; already_exists (reason in_use) while another call receives the same name;
// those of r.
func PutFile(f File, r io.Reader, answer io.Writer) (Counts, error) {
	name, err := splitName(string(f.Name))
	if err != nil || len(name) == 0 || f.Size < 0 {
		return Counts{}, wire.Errorf(wire.BadRequest, "put_file: name %q or size %d is not allowed",
			f.Name, f.Size)
	}
	parts, err := splitPath(f.Path)
	if err != nil {
		return Counts{}, err
	}
	counts, err := putFile(append(parts, name...), f, r, answer)
	var already *wire.Error
	if err != nil && !errors.As(err, &already) {
		err = fmt.Errorf("receiving %s: %w", strings.Join(append(parts, name...), "/"), err)
	}
	return counts, err
}

func putFile(parts []string, f File, r io.Reader, answer io.Writer) (Counts, error) {
	root, err := kernel.Openat(-100, "/", dirFlags, 0)
	if err != nil {
		return Counts{}, err
	}
	defer syscall.Close(root)
	u := &unpacker{owner: &Owner{}, privileged: os.Geteuid() == 0}
	dir, err := openDir(root, parts[:len(parts)-1], u.makeParent)
	if err != nil {
		return Counts{}, err
	}
	defer syscall.Close(dir)
	removeStale(dir)
	name := parts[len(parts)-1]
	release, err := claimPart(dir, PartName(name))
	if err != nil {
		return Counts{}, err
	}
	defer release()
	p, err := openPart(dir, name)
	if err != nil {
		return Counts{}, err
	}
	defer p.file.Close()
	at, err := p.agree(f.Size, r, answer)
	if err != nil {
		return Counts{}, err
	}
	received, err := p.receive(at, f.Size, r)
	counts := Counts{Files: 1, Bytes: received}
	if err != nil {
		return counts, err
	}
	fd := int(p.file.Fd())
	if err := syscall.Fchmod(fd, f.Mode&0o777); err != nil {
		return counts, err
	}
	if err := kernel.SetMtime(fd, f.Mtime*int64(time.Second)); err != nil {
		return counts, err
	}
	return counts, placePart(dir, p.name, name)
}

// PartName is the name beside name under which its pieces are gathered.
func PartName(name string) string {
	sum := sha256.Sum256([]byte(name))
	return partPrefix + hex.EncodeToString(sum[:16])
}

// PlaceTree gives the directory that was gathered under the part name of path's last component its
// own. No link is followed.
//
// Errors: not_found; already_exists when something has that name by now.
func PlaceTree(path string) error {
	parts, err := splitPath(path)
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		return wire.Errorf(wire.BadRequest, "place: / is in its place")
	}
	root, err := kernel.Openat(-100, "/", dirFlags, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(root)
	name := parts[len(parts)-1]
	dir, err := openDir(root, parts[:len(parts)-1], nil)
	if err == nil {
		defer syscall.Close(dir)
		err = kernel.Renameat2(dir, PartName(name), dir, name, kernel.RenameNoreplace)
	}
	switch {
	case errors.Is(err, syscall.ENOENT):
		return wire.Errorf(wire.NotFound, "place: nothing was received for %s", path)
	case errors.Is(err, syscall.EEXIST):
		return wire.Errorf(wire.AlreadyExists, "place: %s is there by now", path)
	case err != nil:
		return fmt.Errorf("placing %s: %w", path, err)
	}
	return nil
}

// placePart gives a whole part its name. A directory of that name must be empty, as for rename(2).
func placePart(dir int, part, name string) error {
	err := kernel.Renameat2(dir, part, dir, name, 0)
	if err == syscall.EISDIR {
		return wire.Errorf(wire.BadRequest, "put_file: %s is a directory", name)
	}
	return err
}

// part is an open part file.
type part struct {
	name string
	file *os.File
}

// openPart opens or makes the part of a name. It is never a link, and nobody else's file: whoever
// may write to the directory could have put one there.
func openPart(dir int, name string) (*part, error) {
	p := &part{name: PartName(name)}
	for range 10 {
		fd, err := kernel.Openat(dir, p.name,
			syscall.O_RDWR|syscall.O_CREAT|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
		if err == syscall.ELOOP || err == syscall.EISDIR || err == syscall.ENXIO {
			if err := removeAll(dir, p.name); err != nil {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		p.file = os.NewFile(uintptr(fd), p.name)
		ours, err := p.isOurs(dir)
		if ours {
			return p, nil
		}
		p.file.Close()
		if err != nil {
			return nil, err
		}
	}
	return nil, wire.Errorf(wire.OperationFailed, "put_file: somebody keeps exchanging %s", p.name)
}

// isOurs tells whether the part is a file of our own, and still has its name. What is not, goes.
func (p *part) isOurs(dir int) (bool, error) {
	fd := int(p.file.Fd())
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return false, err
	}
	there, err := kernel.Lstatat(dir, p.name)
	if err == syscall.ENOENT || err == nil && there.Ino != st.Ino {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if st.Mode&syscall.S_IFMT != syscall.S_IFREG || st.Nlink != 1 || int(st.Uid) != os.Geteuid() {
		return false, removeAll(dir, p.name)
	}
	return true, nil
}

// agree finds out with the peer where it goes on.
func (p *part) agree(size int64, r io.Reader, answer io.Writer) (int64, error) {
	st, err := p.file.Stat()
	if err != nil {
		return 0, err
	}
	have := st.Size()
	if have > size {
		have = 0
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(p.file, 0, have)); err != nil {
		return 0, err
	}
	offer := h.Sum(binary.LittleEndian.AppendUint64(nil, uint64(have)))
	if _, err := answer.Write(offer); err != nil {
		return 0, err
	}
	var chosen [8]byte
	if _, err := io.ReadFull(r, chosen[:]); err != nil {
		return 0, cutError(err)
	}
	at := int64(binary.LittleEndian.Uint64(chosen[:]))
	if at != 0 && at != have {
		return 0, wire.Errorf(wire.BadRequest, "put_file: %d is neither 0 nor %d", at, have)
	}
	return at, kernel.Ftruncate(int(p.file.Fd()), at)
}

// receive writes from at up to size. After a failure the part is as long as what has come.
func (p *part) receive(at, size int64, r io.Reader) (received int64, err error) {
	fd, buf, from := int(p.file.Fd()), make([]byte, 256<<10), at
	for at < size {
		n, readErr := io.ReadFull(r, buf[:min(int64(len(buf)), size-at)])
		if _, err = writeBlocks(fd, buf[:n], at); err != nil {
			break
		}
		at += int64(n)
		if readErr != nil {
			err = cutError(readErr)
			break
		}
	}
	// A hole at the end exists only by the size.
	if cutErr := kernel.Ftruncate(fd, at); err == nil {
		err = cutErr
	}
	if err == nil {
		var one [1]byte
		if _, end := io.ReadFull(r, one[:]); end == nil {
			err = wire.Errorf(wire.BadRequest, "put_file: more came than %d bytes", size)
		} else if end != io.EOF {
			err = end
		}
	}
	return at - from, err
}

// cutError is the error of data that ended too early.
func cutError(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return wire.Errorf(wire.BadRequest, "put_file: the data ended before the file did")
	}
	return err
}

// isStalePart tells the part of a copy that nobody has gone on with, and nobody is at.
func isStalePart(dir int, name string) bool {
	fd, err := kernel.Openat(dir, name, syscall.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return true
	}
	defer syscall.Close(fd)
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return false
	}
	return time.Since(time.Unix(st.Mtim.Unix())) > partKept && !isHeld(dir, name)
}
