// Package disk tells filesystems apart by their magic numbers and grows mounted ext4 filesystems to
// the size of their devices. It reads superblocks; only the kernel writes them.
package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"unsafe"

	"banger/agent/internal/kernel"
)

// Kind is a filesystem type as mount(2) spells it.
type Kind string

// The kinds that a root filesystem image may have.
const (
	Squashfs Kind = "squashfs"
	Ext4     Kind = "ext4"
)

// Super is what the agent needs of an ext4 superblock.
type Super struct {
	Blocks    uint64
	BlockSize uint64 // bytes
}

// Bytes is the size of the filesystem.
func (s Super) Bytes() uint64 { return s.Blocks * s.BlockSize }

// FindKind tells the filesystem in r.
//
// Errors: neither squashfs nor ext4, or r cannot be read.
//
// Source: squashfs_fs.h (SQUASHFS_MAGIC), ext4.h (EXT4_SUPER_MAGIC at 1024 + 0x38).
func FindKind(r io.ReaderAt) (Kind, error) {
	head := make([]byte, 2048)
	n, err := r.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return "", err
	}
	head = head[:n]
	if n >= 4 && string(head[:4]) == "hsqs" {
		return Squashfs, nil
	}
	if n >= 1024+0x3a && binary.LittleEndian.Uint16(head[1024+0x38:]) == 0xef53 {
		return Ext4, nil
	}
	return "", errors.New("it holds neither squashfs nor ext4")
}

// ReadSuper decodes the ext4 superblock in r.
//
// Source: Linux, Documentation/filesystems/ext4/super.rst.
func ReadSuper(r io.ReaderAt) (Super, error) {
	const incompat64Bit, maxLogBlockSize = 0x80, 6
	b := make([]byte, 1024)
	if _, err := r.ReadAt(b, 1024); err != nil {
		return Super{}, fmt.Errorf("reading the superblock: %w", err)
	}
	if binary.LittleEndian.Uint16(b[0x38:]) != 0xef53 {
		return Super{}, errors.New("reading the superblock: this is no ext4 filesystem")
	}
	logSize := binary.LittleEndian.Uint32(b[0x18:])
	if logSize > maxLogBlockSize {
		return Super{}, fmt.Errorf("reading the superblock: block size 2^%d", 10+uint64(logSize))
	}
	s := Super{Blocks: uint64(binary.LittleEndian.Uint32(b[0x4:])), BlockSize: 1024 << logSize}
	if binary.LittleEndian.Uint32(b[0x60:])&incompat64Bit != 0 {
		s.Blocks |= uint64(binary.LittleEndian.Uint32(b[0x150:])) << 32
	}
	return s, nil
}

// Grown is the outcome of Grow, in bytes.
type Grown struct {
	Before, After uint64
}

// Grow grows the ext4 filesystem of device, which is mounted and on which fd is open, to the
// device's size. Nothing happens when it fills the device already.
//
// Source: EXT4_IOC_RESIZE_FS, fs/ext4/ext4.h.
func Grow(device string, fd int) (Grown, error) {
	const resizeFs = 0x40086610
	f, err := os.Open(device)
	if err != nil {
		return Grown{}, fmt.Errorf("growing %s: %w", device, err)
	}
	defer f.Close()
	size, err := deviceBytes(f)
	if err != nil {
		return Grown{}, fmt.Errorf("growing %s: its size: %w", device, err)
	}
	before, err := ReadSuper(f)
	if err != nil {
		return Grown{}, fmt.Errorf("growing %s: %w", device, err)
	}
	blocks := size / before.BlockSize
	if blocks <= before.Blocks {
		return Grown{before.Bytes(), before.Bytes()}, nil
	}
	if err := kernel.Ioctl(fd, resizeFs, unsafe.Pointer(&blocks)); err != nil {
		return Grown{}, fmt.Errorf("growing %s from %d to %d bytes: %w",
			device, before.Bytes(), blocks*before.BlockSize, err)
	}
	// The kernel may leave a last group out that is too small to hold its own tables.
	after, err := ReadSuper(f)
	if err != nil {
		return Grown{}, fmt.Errorf("growing %s: %w", device, err)
	}
	return Grown{before.Bytes(), after.Bytes()}, nil
}

// deviceBytes is the size of a block device, or of a file in tests.
func deviceBytes(f *os.File) (uint64, error) {
	const blkGetSize64 = 0x80081272
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if info.Mode()&os.ModeDevice == 0 {
		return uint64(info.Size()), nil
	}
	var size uint64
	err = kernel.Ioctl(int(f.Fd()), blkGetSize64, unsafe.Pointer(&size))
	return size, err
}

// IsReadOnly tells whether the filesystem that fd is on is mounted read-only.
func IsReadOnly(fd int) bool {
	var st syscall.Statfs_t
	const stRdonly = 1
	return syscall.Fstatfs(fd, &st) == nil && st.Flags&stRdonly != 0
}
