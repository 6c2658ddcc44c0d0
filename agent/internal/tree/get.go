package tree

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"banger/agent/internal/kernel"
	"banger/agent/internal/wire"
)

// Get writes the tree at path, an absolute path, as one tar with names relative to it; a file is
// one member with its base name. Links in path itself are followed, links below never are. Sockets
// are left out, and so is what virtual filesystems show.
//
// Errors: not_found, or the reading or writing that failed. A file that changes while it is read
// is cut or filled with zeros to the size it had.
func Get(path string, w io.Writer) (Counts, error) { return GetExcept(path, nil, w) }

// GetExcept is Get without the content of some files, which the receiver has: what is another name
// of one of them is a link to it all the same.
func GetExcept(path string, except []string, w io.Writer) (Counts, error) {
	if _, err := splitPath(path); err != nil {
		return Counts{}, err
	}
	p := &packer{tar: tar.NewWriter(w), links: map[inode]string{}, buf: make([]byte, 256<<10)}
	if len(except) > 0 {
		p.except = make(map[string]bool, len(except))
		for _, name := range except {
			p.except[name] = true
		}
	}
	if err := p.root(path); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return p.counts, wire.Errorf(wire.NotFound, "get: %s does not exist", path)
		}
		return p.counts, fmt.Errorf("get from %s: %w", path, err)
	}
	return p.counts, p.tar.Close()
}

type inode struct{ dev, ino uint64 }

type packer struct {
	tar    *tar.Writer
	links  map[inode]string // first names of files with several
	except map[string]bool
	plain  bool
	whole  *whole // nil unless all of a system is packed
	counts Counts
	buf    []byte
}

func (p *packer) root(path string) error {
	fd, err := syscall.Open(path, kernel.OPath|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&syscall.S_IFMT == syscall.S_IFDIR {
		return p.directory(fd, "", st.Dev)
	}
	// The file that the last link leads to, under the name that was asked for.
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	dir, err := syscall.Open(filepath.Dir(real),
		syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(dir)
	return p.entry(dir, filepath.Base(real), filepath.Base(path), st.Dev)
}

// directory packs what is in the directory fd, in the order of names.
func (p *packer) directory(fd int, prefix string, dev uint64) error {
	names, err := readNames(fd)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := p.entry(fd, name, prefix+name, dev); err != nil {
			if errors.Is(err, syscall.ENOENT) {
				continue // removed since the directory was read
			}
			return fmt.Errorf("%s: %w", prefix+name, err)
		}
	}
	return nil
}

// sortedNames reads and closes a directory. Half of a put that runs, or ran, is left out.
func sortedNames(dir *os.File) ([]string, error) {
	names, err := dir.Readdirnames(-1)
	dir.Close()
	if err != nil {
		return nil, err
	}
	names = slices.DeleteFunc(names, func(n string) bool { return strings.HasPrefix(n, stagingPrefix) })
	slices.Sort(names)
	return names, nil
}

// GetNames is Get for some files of the directory path: names are relative to it, a directory
// stands for all that is below it. What is not there, or only through a link, is left out. Every
// file is a member with its content: no hard links, no extended attributes.
func GetNames(path string, names []string, w io.Writer) (Counts, error) {
	if _, err := splitPath(path); err != nil {
		return Counts{}, err
	}
	p := &packer{tar: tar.NewWriter(w), plain: true, buf: make([]byte, 256<<10)}
	if err := p.some(path, names); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return p.counts, wire.Errorf(wire.NotFound, "get: %s does not exist", path)
		}
		return p.counts, fmt.Errorf("get from %s: %w", path, err)
	}
	return p.counts, p.tar.Close()
}

func (p *packer) some(path string, names []string) error {
	root, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(root)
	var st syscall.Stat_t
	if err := syscall.Fstat(root, &st); err != nil {
		return err
	}
	from := &walker{root: root}
	defer from.close()
	for _, name := range names {
		parts, err := splitName(name)
		if err != nil || len(parts) == 0 {
			return wire.Errorf(wire.BadRequest, "get: the name %q is not allowed", name)
		}
		dir, err := from.enter(strings.Join(parts[:len(parts)-1], "/"))
		if err == nil {
			err = p.entry(dir, parts[len(parts)-1], strings.Join(parts, "/"), st.Dev)
		}
		if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func header(path string, st syscall.Stat_t) *tar.Header {
	return &tar.Header{
		Name: path, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		// Whole seconds: a fraction would cost every member a header of 1 KiB of its own.
		ModTime: time.Unix(st.Mtim.Sec, 0),
	}
}

func (p *packer) entry(dir int, name, path string, dev uint64) error {
	if p.whole != nil && p.whole.leavesOut(path) {
		return nil
	}
	st, err := kernel.Lstatat(dir, name)
	if err != nil {
		return err
	}
	h := header(path, st)
	switch st.Mode & syscall.S_IFMT {
	case syscall.S_IFDIR:
		return p.subdirectory(dir, name, h, dev)
	case syscall.S_IFREG:
		return p.regular(dir, name, h, st)
	case syscall.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		if h.Linkname, err = kernel.Readlinkat(dir, name); err != nil {
			return err
		}
	case syscall.S_IFCHR:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, major(st.Rdev), minor(st.Rdev)
	case syscall.S_IFBLK:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeBlock, major(st.Rdev), minor(st.Rdev)
	case syscall.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	default:
		return nil
	}
	if p.linked(h, st) {
		return p.tar.WriteHeader(h)
	}
	p.counts.Files++
	return p.tar.WriteHeader(h)
}

func (p *packer) subdirectory(dir int, name string, h *tar.Header, dev uint64) error {
	fd, err := kernel.Openat(dir, name, dirFlags, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return err
	}
	mounted := st.Dev != dev
	if p.whole != nil && mounted && isModules(fd) {
		return nil
	}
	path := h.Name
	h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
	p.addXattrs(h, fd)
	if err := p.tar.WriteHeader(h); err != nil {
		return err
	}
	if mounted && (isVirtual(fd) || p.whole != nil && !slices.Contains(p.whole.enter, path)) {
		return nil
	}
	return p.directory(fd, h.Name, st.Dev)
}

func (p *packer) regular(dir int, name string, h *tar.Header, st syscall.Stat_t) error {
	h.Typeflag = tar.TypeReg
	if p.linked(h, st) {
		return p.tar.WriteHeader(h)
	}
	if p.except[h.Name] {
		return nil
	}
	// Non-blocking: the name may be a FIFO by now.
	fd, err := kernel.Openat(dir, name, syscall.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	var now syscall.Stat_t
	if err := syscall.Fstat(fd, &now); err != nil {
		return err
	}
	if now.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return syscall.ENOENT // replaced since it was looked at
	}
	h.Size = now.Size
	p.addXattrs(h, fd)
	p.counts.Files++
	if p.whole != nil && h.Size >= leastSparse && now.Blocks*512 < h.Size {
		if done, err := p.sparse(fd, h); done {
			return err
		}
	}
	if err := p.tar.WriteHeader(h); err != nil {
		return err
	}
	n, err := io.CopyBuffer(onlyWriter{p.tar}, io.LimitReader(f, h.Size), p.buf)
	p.counts.Bytes += h.Size
	if err != nil {
		return notMissing(err)
	}
	for n < h.Size {
		fill := min(h.Size-n, int64(len(zeroBlock)))
		if _, err := p.tar.Write(zeroBlock[:fill]); err != nil {
			return notMissing(err)
		}
		n += fill
	}
	return nil
}

// onlyWriter hides ReadFrom, which would ignore the buffer.
type onlyWriter struct{ io.Writer }

// notMissing keeps an error after the header from being taken for a file that has vanished.
func notMissing(err error) error {
	if errors.Is(err, syscall.ENOENT) {
		return fmt.Errorf("reading: %v", err)
	}
	return err
}

// linked makes h a hard link when the file was packed before under another name.
func (p *packer) linked(h *tar.Header, st syscall.Stat_t) bool {
	if st.Nlink < 2 || p.plain {
		return false
	}
	key := inode{st.Dev, st.Ino}
	if first, ok := p.links[key]; ok {
		h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		p.counts.Files++
		return true
	}
	p.links[key] = h.Name
	return false
}

// addXattrs reads the extended attributes that mean something elsewhere: overlayfs keeps its own
// bookkeeping in trusted.overlay, and ACLs have a form of their own in tar.
func (p *packer) addXattrs(h *tar.Header, fd int) {
	if p.plain {
		return
	}
	path := kernel.FdPath(fd)
	list, err := kernel.Listxattr(path)
	if err != nil || len(list) == 0 {
		return // ENOTSUP on filesystems without any, or the file has gone
	}
	for raw := range bytes.SplitSeq(bytes.TrimRight(list, "\x00"), []byte{0}) {
		name := string(raw)
		if !p.keepsXattr(name) {
			continue
		}
		value, err := kernel.Getxattr(path, name)
		if err != nil || len(value) == 0 {
			continue
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrPrefix+name] = string(value)
	}
}

// isVirtual tells filesystems whose contents are the kernel's or live in memory.
//
// Source: include/uapi/linux/magic.h.
func isVirtual(fd int) bool {
	var st syscall.Statfs_t
	if err := syscall.Fstatfs(fd, &st); err != nil {
		return false
	}
	switch uint32(st.Type) {
	case 0x9fa0, // proc
		0x62656572,           // sysfs
		0x01021994,           // tmpfs, devtmpfs
		0x1cd1,               // devpts
		0x27e0eb, 0x63677270, // cgroup, cgroup2
		0x64626720, 0x74726163, // debugfs, tracefs
		0x73636673, 0xcafe4a11, // securityfs, bpf
		0x6e736673, 0x19800202, // nsfs, mqueue
		0x958458f6, 0x62656570, // hugetlbfs, configfs
		0x6165676c, 0x42494e4d: // pstore, binfmt_misc
		return true
	}
	return false
}

// major and minor split a device number, as the macros of the C library do.
func major(dev uint64) int64 { return int64(dev>>8&0xfff | dev>>32&^uint64(0xfff)) }
func minor(dev uint64) int64 { return int64(dev&0xff | dev>>12&^uint64(0xff)) }
