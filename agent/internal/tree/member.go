package tree

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"

	"banger/agent/internal/kernel"
	"banger/agent/internal/wire"
)

const (
	xattrPrefix = "SCHILY.xattr."
	holeBlock   = 4096
)

var zeroBlock [holeBlock]byte

func (u *unpacker) regular(dir int, name string, h *tar.Header, content io.Reader) error {
	// The final mode at once saves a call for most files. It would be wrong while the file still
	// belongs to another owner than it will: then it is nobody else's until all is final.
	perm := modeBits(h) & 0o777
	if uid, gid := u.ownerOf(h); u.privileged && (uid != 0 || gid != 0) {
		perm = 0o600
	}
	// A raw descriptor: an os.File would ask what kind of file it is, ten thousand times.
	fd, err := kernel.Openat(dir, name,
		syscall.O_WRONLY|syscall.O_CREAT|syscall.O_EXCL|syscall.O_NOFOLLOW, perm)
	if err != nil {
		return err
	}
	n, err := copySparse(fd, content, u.buf)
	u.counts.Bytes += n
	if err == nil && n != h.Size {
		err = fmt.Errorf("%d bytes, the header says %d", n, h.Size)
	}
	if err == nil {
		err = u.attributesOf(fd, h, false)
	}
	return errors.Join(err, syscall.Close(fd))
}

// copySparse copies to the empty file behind fd and leaves holes where whole blocks are zero.
func copySparse(fd int, r io.Reader, buf []byte) (int64, error) {
	var offset, written int64 // written is where the last run of data ends
	for {
		n, err := io.ReadFull(r, buf)
		end, writeErr := writeBlocks(fd, buf[:n], offset)
		if writeErr != nil {
			return offset, writeErr
		}
		written = max(written, end)
		offset += int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			if written == offset {
				return offset, nil
			}
			// A hole at the end exists only by the size.
			return offset, kernel.Ftruncate(fd, offset)
		}
		if err != nil {
			return offset, tarError(err)
		}
	}
}

// writeBlocks writes the runs of data that are not whole zero blocks; it returns the offset behind
// the last one, 0 without any.
func writeBlocks(fd int, data []byte, offset int64) (int64, error) {
	var written int64
	start := 0 // of the run that is not written yet
	run := func(end int) error {
		if start == end {
			return nil
		}
		written = offset + int64(end)
		return kernel.Pwrite(fd, data[start:end], offset+int64(start))
	}
	for at := 0; at < len(data); at += holeBlock {
		end := min(at+holeBlock, len(data))
		if !bytes.Equal(data[at:end], zeroBlock[:end-at]) {
			continue
		}
		if err := run(at); err != nil {
			return written, err
		}
		start = end
	}
	err := run(len(data))
	return written, err
}

// hardLink links to a member that came before, found without following a link.
func (u *unpacker) hardLink(dir int, name, target string) error {
	parts, err := splitName(target)
	if err != nil || len(parts) == 0 {
		return wire.Errorf(wire.BadRequest, "put: the hard link target %q is not allowed", target)
	}
	from, err := openDir(u.root, parts[:len(parts)-1], nil)
	if err != nil {
		return err
	}
	defer syscall.Close(from)
	return kernel.Linkat(from, parts[len(parts)-1], dir, name)
}

func (u *unpacker) node(dir int, name string, h *tar.Header) error {
	kind := map[byte]uint32{tar.TypeChar: syscall.S_IFCHR, tar.TypeBlock: syscall.S_IFBLK,
		tar.TypeFifo: syscall.S_IFIFO}[h.Typeflag]
	if err := syscall.Mknodat(dir, name, kind|0o600, makedev(h.Devmajor, h.Devminor)); err != nil {
		return err
	}
	return u.attributes(dir, name, h)
}

// makedev encodes a device number as mknod(2) takes it; makedev(3).
func makedev(major, minor int64) int {
	return int(minor&0xff | (major&0xfff)<<8 | (minor&^0xff)<<12 | (major&^0xfff)<<32)
}

// ownerOf is who shall own the member.
func (u *unpacker) ownerOf(h *tar.Header) (uid, gid int) {
	if u.owner != nil {
		return int(u.owner.UID), int(u.owner.GID)
	}
	return h.Uid, h.Gid
}

// attributes is attributesOf for name in dir.
func (u *unpacker) attributes(dir int, name string, h *tar.Header) error {
	fd, err := kernel.Openat(dir, name, kernel.OPath|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	return u.attributesOf(fd, h, true)
}

// attributesOf sets owner, mode, extended attributes and time of the file behind fd, which is only
// a path when it was opened with O_PATH. By descriptor, because whoever owns the tree may exchange
// names meanwhile. In this order, because a change of owner clears setuid bits and capabilities.
// What is right already is not set again: each change is a transaction of the filesystem.
func (u *unpacker) attributesOf(fd int, h *tar.Header, onlyPath bool) error {
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return err
	}
	uid, gid := u.ownerOf(h)
	chown := u.privileged && (int(st.Uid) != uid || int(st.Gid) != gid)
	if chown {
		if err := syscall.Fchownat(fd, "", uid, gid, kernel.AtEmptyPath); err != nil {
			return fmt.Errorf("setting the owner: %w", err)
		}
	}
	if mode := modeBits(h); h.Typeflag != tar.TypeSymlink && (chown || st.Mode&0o7777 != mode) {
		if err := chmod(fd, mode, onlyPath); err != nil {
			return fmt.Errorf("setting the mode: %w", err)
		}
	}
	for key, value := range h.PAXRecords {
		attr, ok := strings.CutPrefix(key, xattrPrefix)
		if !ok {
			continue
		}
		err := kernel.Setxattr(kernel.FdPath(fd), attr, []byte(value))
		// Attributes that this filesystem or user cannot have are left out, as tar does.
		if err != nil && err != syscall.ENOTSUP && !(err == syscall.EPERM && !u.privileged) {
			return fmt.Errorf("setting the attribute %s: %w", attr, err)
		}
	}
	if h.ModTime.IsZero() {
		return nil
	}
	if onlyPath {
		return kernel.SetMtimeOfPath(fd, h.ModTime.UnixNano())
	}
	return kernel.SetMtime(fd, h.ModTime.UnixNano())
}

// chmod changes the mode of the file behind fd; fchmod(2) refuses O_PATH.
func chmod(fd int, mode uint32, onlyPath bool) error {
	if onlyPath {
		return syscall.Chmod(kernel.FdPath(fd), mode)
	}
	return syscall.Fchmod(fd, mode)
}

// modeBits are permission, setuid, setgid and sticky bits as the kernel numbers them, which is
// also how tar does.
func modeBits(h *tar.Header) uint32 { return uint32(h.Mode) & 0o7777 }
