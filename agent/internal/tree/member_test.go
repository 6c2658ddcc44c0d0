package tree

import (
	"archive/tar"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestModesAreThoseOfTheTarWhateverTheUmask(t *testing.T) {
	for _, umask := range []int{0, 0o022, 0o077} {
		t.Run(fmt.Sprintf("%03o", umask), func(t *testing.T) {
			old := syscall.Umask(umask)
			defer syscall.Umask(old)
			dir := filepath.Join(t.TempDir(), "tree")
			want := map[string]uint32{"a": 0o644, "b": 0o777, "c": 0o4711, "d": 0o2640, "e": 0o400}
			var members []tar.Header
			for name, mode := range want {
				h := file(name, name)
				h.Mode, h.Uid, h.Gid = int64(mode), os.Geteuid(), os.Getegid()
				members = append(members, h)
			}
			if _, err := Put(dir, pack(t, members...), nil, true); err != nil {
				t.Fatal(err)
			}
			for name, mode := range want {
				var st syscall.Stat_t
				if err := syscall.Stat(filepath.Join(dir, name), &st); err != nil {
					t.Fatal(err)
				}
				if st.Mode&0o7777 != mode {
					t.Errorf("%s has mode %04o, want %04o", name, st.Mode&0o7777, mode)
				}
			}
		})
	}
}

func TestASetuidFileOfAnotherOwnerKeepsItsBit(t *testing.T) {
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "tree")
	h := file("tool", "x")
	h.Mode, h.Uid, h.Gid = 0o4755, 1000, 1001
	if _, err := Put(dir, pack(t, h), nil, true); err != nil {
		t.Fatal(err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(dir+"/tool", &st); err != nil {
		t.Fatal(err)
	}
	if st.Mode&0o7777 != 0o4755 || st.Uid != 1000 || st.Gid != 1001 {
		t.Errorf("mode %04o, owner %d:%d", st.Mode&0o7777, st.Uid, st.Gid)
	}
}

func TestAFileMayEndInZeros(t *testing.T) {
	zeros := strings.Repeat("\x00", 3*holeBlock)
	for name, content := range map[string]string{
		"only zeros":       zeros,
		"part of a block":  strings.Repeat("\x00", 100),
		"data, then zeros": "data" + zeros,
		"zeros, then data": zeros + "data",
		"more than a read": strings.Repeat("x", 300<<10) + zeros,
		"empty":            "",
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "tree")
			h := file("f", content)
			h.Uid, h.Gid = os.Geteuid(), os.Getegid()
			if _, err := Put(dir, pack(t, h), nil, true); err != nil {
				t.Fatal(err)
			}
			if got := read(t, dir+"/f"); got != content {
				t.Errorf("%d bytes arrived, not the %d that were sent", len(got), len(content))
			}
		})
	}
}
