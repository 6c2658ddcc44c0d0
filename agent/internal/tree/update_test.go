package tree

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"banger/agent/internal/wire"
)

func gone(name string) tar.Header { return tar.Header{Typeflag: tar.TypeChar, Name: name} }

func must(t *testing.T, steps ...error) {
	t.Helper()
	for _, err := range steps {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// record is one of a report, or of a scan when it has a name.
type record struct {
	mode                    uint32
	size, ino, mtime, ctime uint64
	name                    string
}

func scanOf(t *testing.T, path string) map[string]record {
	t.Helper()
	var b bytes.Buffer
	counts, err := Scan(path, false, &b)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]record{}
	for b.Len() > 0 {
		var r record
		var length uint16
		for _, field := range []any{&r.mode, &r.size, &r.ino, &r.mtime, &r.ctime, &length} {
			must(t, binary.Read(&b, binary.LittleEndian, field))
		}
		r.name = string(b.Next(int(length)))
		found[r.name] = r
	}
	if int64(len(found)) != counts.Files {
		t.Fatalf("%d entries, counted %+v", len(found), counts)
	}
	return found
}

func TestAnUpdateChangesWhatTheTarNamesAndNothingElse(t *testing.T) {
	base := t.TempDir()
	target := base + "/t"
	must(t,
		os.MkdirAll(target+"/kept/deep", 0o755),
		os.MkdirAll(target+"/gone/deep", 0o755),
		os.MkdirAll(target+"/becomes-file/inside", 0o755),
		os.WriteFile(target+"/becomes-file/inside/old", nil, 0o600),
		os.WriteFile(target+"/kept/deep/own", []byte("own"), 0o600),
		os.WriteFile(target+"/gone/deep/file", nil, 0o600),
		os.WriteFile(target+"/old", []byte("old"), 0o600),
		os.WriteFile(target+"/becomes-dir", nil, 0o600),
		os.WriteFile(base+"/outside", []byte("keep"), 0o600),
		os.Symlink("../outside", target+"/link"),
		os.Symlink("..", target+"/up"))
	var report bytes.Buffer
	counts, err := PutWith(target, pack(t,
		tar.Header{Typeflag: tar.TypeDir, Name: "new/", Mode: 0o750}, file("new/a", "a"),
		tar.Header{Typeflag: tar.TypeReg, Name: "old", Linkname: "newer", Mode: 0o755},
		file("link", "file now"), file("up/outside", "inside now"), file("becomes-dir/f", "x"),
		gone("becomes-file/inside/old"), file("becomes-file", "y"), gone("gone/deep/file"), gone("kept"), gone("never/there")),
		Options{Mode: Update, Report: &report})
	if err != nil {
		t.Fatal(err)
	}
	if counts.Files != 6 || report.Len() != 6*24 {
		t.Fatalf("%+v, %d bytes of report", counts, report.Len())
	}
	for path, want := range map[string]string{
		"t/new/a": "a", "t/old": "newer", "t/link": "file now", "t/up/outside": "inside now",
		"t/becomes-dir/f": "x", "t/becomes-file": "y", "t/kept/deep/own": "own", "outside": "keep",
	} {
		if got := read(t, filepath.Join(base, path)); got != want {
			t.Errorf("%s: %q", path, got)
		}
	}
	if _, err := os.Lstat(target + "/gone"); !os.IsNotExist(err) {
		t.Error("a directory that became empty is left")
	}
	if info, _ := os.Stat(target + "/new"); info.Mode().Perm() != 0o750 {
		t.Error(info.Mode())
	}
	if entries, _ := os.ReadDir(base); len(entries) != 2 {
		t.Error("something is left beside the target", entries)
	}
	// The report is what a later scan sees, in the order of the members.
	now := scanOf(t, target)
	for i, name := range []string{"new/a", "old", "link", "up/outside", "becomes-dir/f", "becomes-file"} {
		var ino, mtime, ctime uint64
		for _, field := range []any{&ino, &mtime, &ctime} {
			must(t, binary.Read(&report, binary.LittleEndian, field))
		}
		if r := now[name]; r.ino != ino || r.mtime != mtime || r.ctime != ctime {
			t.Errorf("%d %s: %+v, reported %d %d %d", i, name, r, ino, mtime, ctime)
		}
	}
}

func TestACutUpdateChangesNothing(t *testing.T) {
	target := t.TempDir() + "/t"
	must(t, os.Mkdir(target, 0o755), os.WriteFile(target+"/f", []byte("old"), 0o600))
	whole := pack(t, file("f", "new"), file("g", strings.Repeat("x", 4096))).Bytes()
	for _, cut := range []int{600, 1100, len(whole) - 1100} {
		_, err := PutWith(target, io.MultiReader(bytes.NewReader(whole[:cut]), broken{}),
			Options{Mode: Update})
		if err == nil {
			t.Fatal("accepted")
		}
		if entries, _ := os.ReadDir(target); len(entries) != 1 || read(t, target+"/f") != "old" {
			t.Fatalf("cut at %d: %v", cut, entries)
		}
	}
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, &wire.Error{Code: wire.OperationFailed} }

func TestNewTakesAnAbsentOrEmptyTargetOnly(t *testing.T) {
	base := t.TempDir()
	must(t, os.Mkdir(base+"/empty", 0o755), os.Mkdir(base+"/full", 0o755),
		os.WriteFile(base+"/full/f", []byte("old"), 0o600), os.WriteFile(base+"/file", nil, 0o600))
	for name, ok := range map[string]bool{"absent": true, "empty": true, "full": false, "file": false} {
		_, err := PutWith(base+"/"+name, pack(t, file("f", "new")), Options{Mode: New})
		var e *wire.Error
		if ok != (err == nil) || !ok && (!errors.As(err, &e) || e.Code != wire.AlreadyExists) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if read(t, base+"/full/f") != "old" {
		t.Error("the full directory was changed")
	}
	_, err := PutWith(base+"/nowhere", pack(t, file("f", "x")), Options{Mode: Update})
	var e *wire.Error
	if !errors.As(err, &e) || e.Code != wire.NotFound {
		t.Error(err)
	}
}

func TestAScanSeesEverythingButTheInsideOfGitDirectories(t *testing.T) {
	base := t.TempDir()
	must(t, os.MkdirAll(base+"/.git/objects", 0o755), os.MkdirAll(base+"/d/.git/x", 0o755),
		os.MkdirAll(base+"/d/empty", 0o700), os.WriteFile(base+"/d/odd \n\xff", []byte("xyz"), 0o640),
		os.Symlink("d", base+"/link"), syscall.Mkfifo(base+"/pipe", 0o600))
	kinds := map[string]uint32{}
	for name, r := range scanOf(t, base) {
		kinds[name] = r.mode & syscall.S_IFMT
	}
	want := map[string]uint32{".git": syscall.S_IFDIR, "d": syscall.S_IFDIR, "d/.git": syscall.S_IFDIR,
		"d/empty": syscall.S_IFDIR, "d/odd \n\xff": syscall.S_IFREG, "link": syscall.S_IFLNK,
		"pipe": syscall.S_IFIFO}
	if !reflect.DeepEqual(kinds, want) {
		t.Fatalf("%v", kinds)
	}
	if r := scanOf(t, base)["d/odd \n\xff"]; r.size != 3 || r.mode&0o777 != 0o640 {
		t.Errorf("%+v", r)
	}
}

func TestNamedFilesComeWithoutFollowingLinks(t *testing.T) {
	base := t.TempDir()
	must(t, os.MkdirAll(base+"/t/d/e", 0o755), os.WriteFile(base+"/secret", []byte("s"), 0o600),
		os.WriteFile(base+"/t/d/e/f", []byte("f"), 0o600), os.WriteFile(base+"/t/a", []byte("a"), 0o600),
		os.Link(base+"/t/a", base+"/t/b"), os.Symlink("..", base+"/t/up"),
		os.Symlink("d", base+"/t/link"))
	var b bytes.Buffer
	_, err := GetNames(base+"/t", []string{"b", "a", "up/secret", "link/e/f", "link", "no/such", "d"}, &b)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for r := tar.NewReader(&b); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		must(t, err)
		content, _ := io.ReadAll(r)
		got = append(got, h.Name+"="+h.Linkname+string(content))
	}
	if want := []string{"b=a", "a=a", "link=d", "d/=", "d/e/=", "d/e/f=f"}; !reflect.DeepEqual(got, want) {
		t.Fatalf("%q", got)
	}
	if _, err := GetNames(base+"/t", []string{"../secret"}, io.Discard); err == nil {
		t.Fatal("a name with .. was accepted")
	}
}
