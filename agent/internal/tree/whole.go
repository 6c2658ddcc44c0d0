package tree

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"banger/agent/internal/wire"
)

const (
	// leastSparse is the size below which holes are not worth a map.
	leastSparse = 1 << 20
	// mostPieces bounds the map of one file; what is behind them is sent as data.
	mostPieces     = 1 << 14
	seekData       = 3 // lseek(2)
	seekHole       = 4
	mostHeaderSize = 1 << 33 // sizes from here on need more than 11 octal digits
	mostHeaderID   = 1 << 21
)

// Selection says what of a system becomes an image. Names are relative to its root.
type Selection struct {
	// Exclude are patterns as path.Match has them, whose "*" ends at a slash; what is below a
	// directory that is left out is left out too.
	Exclude []string
	// Enter are mount points that belong to the system; of all others only the directory is kept.
	Enter []string
}

func (s Selection) check() error {
	for _, p := range s.Exclude {
		if _, err := path.Match(p, "x"); err != nil {
			return wire.Errorf(wire.BadRequest, "capture: the pattern %q is none", p)
		}
	}
	return nil
}

// whole is the selection in the form that is asked for each entry.
type whole struct {
	names    map[string]bool
	patterns []string
	enter    []string
	raw      io.Writer
}

// Whole writes a whole system at root, for an image: parents before what is in them, the first name
// of a file before its links, holes as holes, every attribute but the overlay's own bookkeeping.
// Nothing may write to it meanwhile.
//
// Errors: as Get; a pattern that is none.
func Whole(root string, s Selection, w io.Writer) (Counts, error) {
	if _, err := splitPath(root); err != nil {
		return Counts{}, err
	}
	if err := s.check(); err != nil {
		return Counts{}, err
	}
	all := &whole{names: map[string]bool{}, enter: s.Enter, raw: w}
	for _, p := range s.Exclude {
		if strings.ContainsAny(p, `*?[\`) {
			all.patterns = append(all.patterns, p)
		} else {
			all.names[p] = true
		}
	}
	p := &packer{tar: tar.NewWriter(w), links: map[inode]string{}, buf: make([]byte, 256<<10),
		whole: all}
	fd, err := syscall.Open(root, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return p.counts, fmt.Errorf("capture of %s: %w", root, err)
	}
	defer syscall.Close(fd)
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return p.counts, fmt.Errorf("capture of %s: %w", root, err)
	}
	h := header("./", st)
	h.Typeflag = tar.TypeDir
	if err := p.tar.WriteHeader(h); err != nil {
		return p.counts, err
	}
	if err := p.directory(fd, "", st.Dev); err != nil {
		return p.counts, fmt.Errorf("capture of %s: %w", root, err)
	}
	return p.counts, p.tar.Close()
}

func (a *whole) leavesOut(name string) bool {
	if a.names[name] {
		return true
	}
	return slices.ContainsFunc(a.patterns, func(p string) bool {
		matched, _ := path.Match(p, name)
		return matched
	})
}

// isModules tells the mount of the kernel's modules, which every machine brings itself.
//
// Source: include/uapi/linux/magic.h.
func isModules(fd int) bool {
	const squashfs = 0x73717368
	var st syscall.Statfs_t
	return syscall.Fstatfs(fd, &st) == nil && uint32(st.Type) == squashfs
}

// pieces are the runs of data of a file with holes, nil for a file without any.
func pieces(fd int, size int64) ([][2]int64, error) {
	var found [][2]int64
	for at := int64(0); at < size; {
		start, err := syscall.Seek(fd, at, seekData)
		if errors.Is(err, syscall.ENXIO) {
			break // a hole up to the end
		}
		if err != nil {
			return nil, err
		}
		if start >= size {
			break
		}
		end, err := syscall.Seek(fd, start, seekHole)
		if err != nil {
			return nil, err
		}
		if end = min(end, size); len(found) == mostPieces-1 {
			end = size
		}
		found = append(found, [2]int64{start, end - start})
		at = end
	}
	if len(found) == 1 && found[0] == [2]int64{0, size} {
		return nil, nil
	}
	if found == nil {
		found = [][2]int64{}
	}
	return found, nil
}

// sparse writes a file with holes; it returns false, having written nothing, for one without.
//
// Source: GNU tar manual, "Storing Sparse Files", PAX format 1.0, which archive/tar reads but does
// not write.
func (p *packer) sparse(fd int, h *tar.Header) (bool, error) {
	runs, err := pieces(fd, h.Size)
	if err != nil || runs == nil {
		return false, nil // a filesystem that does not tell
	}
	if last := len(runs) - 1; last < 0 || runs[last][0]+runs[last][1] != h.Size {
		runs = append(runs, [2]int64{h.Size, 0})
	}
	var m strings.Builder
	fmt.Fprintf(&m, "%d\n", len(runs))
	size := int64(0)
	for _, run := range runs {
		fmt.Fprintf(&m, "%d\n%d\n", run[0], run[1])
		size += run[1]
	}
	m.WriteString(strings.Repeat("\x00", padding(int64(m.Len()))))
	size += int64(m.Len())
	if err := p.tar.Flush(); err != nil {
		return true, err
	}
	if _, err := io.WriteString(p.whole.raw, sparseHeader(h, size)+m.String()); err != nil {
		return true, err
	}
	for _, run := range runs {
		if err := p.copyRun(fd, run[0], run[1]); err != nil {
			return true, notMissing(err)
		}
	}
	p.counts.Bytes += h.Size
	_, err = p.whole.raw.Write(zeroBlock[:padding(size)])
	return true, err
}

// copyRun copies one run of data; what is not there any more becomes zeros.
func (p *packer) copyRun(fd int, at, length int64) error {
	for length > 0 {
		piece := p.buf[:min(length, int64(len(p.buf)))]
		n, err := syscall.Pread(fd, piece, at)
		if err != nil {
			return err
		}
		if n == 0 {
			clear(piece)
			n = len(piece)
		}
		if _, err := p.whole.raw.Write(piece[:n]); err != nil {
			return err
		}
		at, length = at+int64(n), length-int64(n)
	}
	return nil
}

// sparseHeader is the header of a sparse member, with the records in front of it.
func sparseHeader(h *tar.Header, size int64) string {
	records := map[string]string{
		"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": h.Name,
		"GNU.sparse.realsize": strconv.FormatInt(h.Size, 10),
	}
	for key, value := range h.PAXRecords {
		records[key] = value
	}
	uid, gid, stored := int64(h.Uid), int64(h.Gid), size
	if uid >= mostHeaderID {
		records["uid"], uid = strconv.FormatInt(uid, 10), 0
	}
	if gid >= mostHeaderID {
		records["gid"], gid = strconv.FormatInt(gid, 10), 0
	}
	if stored >= mostHeaderSize {
		records["size"], stored = strconv.FormatInt(size, 10), 0
	}
	keys := make([]string, 0, len(records))
	for key := range records {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	var data strings.Builder
	for _, key := range keys {
		data.WriteString(paxRecord(key, records[key]))
	}
	text := data.String()
	mtime := max(h.ModTime.Unix(), 0)
	return block("pax", 'x', 0o644, 0, 0, int64(len(text)), 0) + text +
		strings.Repeat("\x00", padding(int64(len(text)))) +
		block("sparse", '0', h.Mode, uid, gid, stored, mtime)
}

// paxRecord is a pax record, whose length counts its own digits.
func paxRecord(key, value string) string {
	rest := len(key) + len(value) + 3
	length := rest + len(strconv.Itoa(rest))
	length = rest + len(strconv.Itoa(length))
	return strconv.Itoa(length) + " " + key + "=" + value + "\n"
}

// block is a ustar header.
func block(name string, flag byte, mode, uid, gid, size, mtime int64) string {
	var b [512]byte
	copy(b[:100], name)
	copy(b[100:], fmt.Sprintf("%07o\x00%07o\x00%07o\x00%011o\x00%011o\x00        ", mode, uid, gid,
		size, mtime))
	b[156] = flag
	copy(b[257:], "ustar\x0000")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return string(b[:])
}

func padding(size int64) int { return int(-size & 511) }

// keepsXattr tells the attributes that a packer carries: those that mean something elsewhere, or,
// of a whole system, all that a squashfs can hold and the overlay does not keep for itself.
func (p *packer) keepsXattr(name string) bool {
	if strings.Contains(name, "=") {
		return false
	}
	if p.whole == nil {
		return strings.HasPrefix(name, "user.") || name == "security.capability"
	}
	return (strings.HasPrefix(name, "user.") || strings.HasPrefix(name, "trusted.") ||
		strings.HasPrefix(name, "security.")) && !strings.HasPrefix(name, "trusted.overlay.") &&
		!strings.HasPrefix(name, "trusted.banger.")
}
