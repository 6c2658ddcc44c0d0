package tree

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
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
	// Write-only for nobody else until owner and mode are final.
	fd, err := kernel.Openat(dir, name,
		syscall.O_WRONLY|syscall.O_CREAT|syscall.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	n, err := copySparse(f, content, u.buf)
	u.counts.Bytes += n
	if err == nil && n != h.Size {
		err = fmt.Errorf("%d bytes, the header says %d", n, h.Size)
	}
	if err == nil {
		err = u.attributesOf(fd, h)
	}
	return errors.Join(err, f.Close())
}

// copySparse copies and leaves holes where whole blocks are zero.
func copySparse(f *os.File, r io.Reader, buf []byte) (int64, error) {
	var offset int64
	for {
		n, err := io.ReadFull(r, buf)
		if writeErr := writeBlocks(f, buf[:n], offset); writeErr != nil {
			return offset, writeErr
		}
		offset += int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			// A hole at the end exists only by the size.
			return offset, f.Truncate(offset)
		}
		if err != nil {
			return offset, tarError(err)
		}
	}
}

// writeBlocks writes the runs of data that are not whole zero blocks.
func writeBlocks(f *os.File, data []byte, offset int64) error {
	start := 0 // of the run that is not written yet
	for at := 0; at < len(data); at += holeBlock {
		end := min(at+holeBlock, len(data))
		if !bytes.Equal(data[at:end], zeroBlock[:end-at]) {
			continue
		}
		if err := writeRun(f, data[start:at], offset+int64(start)); err != nil {
			return err
		}
		start = end
	}
	return writeRun(f, data[start:], offset+int64(start))
}

func writeRun(f *os.File, data []byte, offset int64) error {
	if len(data) == 0 {
		return nil
	}
	_, err := f.WriteAt(data, offset)
	return err
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

// attributes is attributesOf for name in dir.
func (u *unpacker) attributes(dir int, name string, h *tar.Header) error {
	fd, err := kernel.Openat(dir, name, kernel.OPath|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	return u.attributesOf(fd, h)
}

// attributesOf sets owner, mode, extended attributes and time of the file behind fd. By descriptor,
// because whoever owns the tree may exchange names meanwhile. In this order, because a change of
// owner clears setuid bits and capabilities.
func (u *unpacker) attributesOf(fd int, h *tar.Header) error {
	uid, gid := h.Uid, h.Gid
	if u.owner != nil {
		uid, gid = int(u.owner.UID), int(u.owner.GID)
	}
	if u.privileged {
		if err := syscall.Fchownat(fd, "", uid, gid, kernel.AtEmptyPath); err != nil {
			return fmt.Errorf("setting the owner: %w", err)
		}
	}
	if h.Typeflag != tar.TypeSymlink {
		if err := syscall.Chmod(kernel.FdPath(fd), modeBits(h)); err != nil {
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
	return kernel.SetMtime(fd, h.ModTime.UnixNano())
}

// modeBits are permission, setuid, setgid and sticky bits as the kernel numbers them, which is
// also how tar does.
func modeBits(h *tar.Header) uint32 { return uint32(h.Mode) & 0o7777 }
