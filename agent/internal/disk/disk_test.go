package disk

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestFilesystemsAreToldByMagic(t *testing.T) {
	ext4 := make([]byte, 4096)
	ext4[1024+0x38], ext4[1024+0x39] = 0x53, 0xef
	for _, c := range []struct {
		data []byte
		want Kind
	}{{append([]byte("hsqs"), make([]byte, 100)...), Squashfs}, {ext4, Ext4},
		{make([]byte, 4096), ""}, {nil, ""}, {ext4[:1024+0x39], ""}} {
		got, err := FindKind(bytes.NewReader(c.data))
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%d bytes: %q, %v", len(c.data), got, err)
		}
	}
}

func TestSuperblockOfARealFilesystemIsRead(t *testing.T) {
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		t.Skip("needs mkfs.ext4")
	}
	for _, size := range []int64{64 << 20, 20 << 30} {
		path := filepath.Join(t.TempDir(), "fs")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(mkfs, "-qF", "-E", "lazy_itable_init=1", path).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v", out, err)
		}
		s, err := ReadSuper(f)
		if err != nil || s.Bytes() != uint64(size) {
			t.Errorf("%d: %+v, %v", size, s, err)
		}
		if kind, err := FindKind(f); kind != Ext4 {
			t.Errorf("%q, %v", kind, err)
		}
		// It fills its device: nothing is asked of the kernel.
		if g, err := Grow(path, -1); err != nil || g.Before != uint64(size) || g.After != g.Before {
			t.Errorf("%+v, %v", g, err)
		}
	}
}

func TestSuperblocksThatCannotBeAreRefused(t *testing.T) {
	b := make([]byte, 2048)
	if _, err := ReadSuper(bytes.NewReader(b)); err == nil {
		t.Error("no magic")
	}
	b[1024+0x38], b[1024+0x39], b[1024+0x18] = 0x53, 0xef, 60
	if _, err := ReadSuper(bytes.NewReader(b)); err == nil {
		t.Error("a block size of 2^70")
	}
	if _, err := ReadSuper(bytes.NewReader(b[:1500])); err == nil {
		t.Error("half a superblock")
	}
}
