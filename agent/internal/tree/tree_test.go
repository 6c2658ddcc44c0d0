package tree

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/agent/internal/kernel"
	"banger/agent/internal/wire"
)

// pack makes a tar of the headers; a regular file's content is its Linkname.
func pack(t *testing.T, members ...tar.Header) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range members {
		content := ""
		if h.Typeflag == tar.TypeReg {
			content, h.Linkname = h.Linkname, ""
			h.Size = int64(len(content))
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func file(name, content string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Linkname: content}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs CAP_CHOWN")
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestATreeComesBackWithModesOwnersTimesAndLinks(t *testing.T) {
	needRoot(t)
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "new")
	when := time.Unix(1234567890, 0)
	for _, step := range []error{
		os.MkdirAll(from+"/d/empty", 0o755),
		os.WriteFile(from+"/d/tool", []byte("#!/bin/sh\n"), 0o755),
		os.Chown(from+"/d/tool", 1000, 1001),
		os.Chmod(from+"/d/tool", 0o4755|os.ModeSetuid),
		os.WriteFile(from+"/odd \n\"name\xff", []byte("x"), 0o600),
		os.Symlink("/etc/passwd", from+"/absolute"),
		os.Symlink("nowhere", from+"/dangling"),
		os.Link(from+"/d/tool", from+"/zz-hard"),
		syscall.Mkfifo(from+"/pipe", 0o640),
		kernel.Setxattr(from+"/d/tool", "user.note", []byte("a\x00b")),
		os.Chtimes(from+"/d/tool", when, when),
		os.Chmod(from+"/d/empty", 0o1700|os.ModeSticky),
		os.Chtimes(from+"/d", when, when),
	} {
		if step != nil && !errors.Is(step, syscall.ENOTSUP) {
			t.Fatal(step)
		}
	}
	var stream bytes.Buffer
	sent, err := Get(from, &stream)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Put(to, &stream, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	if sent != got || got.Files != 6 || got.Bytes != 11 {
		t.Fatalf("sent %+v, got %+v", sent, got)
	}
	if a, b := list(t, from), list(t, to); a != b {
		t.Fatalf("sent\n%s\ngot\n%s", a, b)
	}
	if v, err := kernel.Getxattr(to+"/d/tool", "user.note"); err != syscall.ENOTSUP && string(v) != "a\x00b" {
		t.Fatalf("%q, %v", v, err)
	}
}

// list describes a tree as find(1) sees it, an independent reader.
func list(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.Walk(root, func(path string, info os.FileInfo, err error) error {
		if err != nil || path == root {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		target, _ := os.Readlink(path)
		stamp := st.Mtim.Sec
		if info.Mode().IsRegular() {
			target = read(t, path)
		}
		b.WriteString(strings.Join([]string{strings.TrimPrefix(path, root), info.Mode().String(),
			time.Unix(stamp, 0).String(), target}, " | "))
		b.WriteString(" | " + time.Duration(st.Uid).String() + time.Duration(st.Gid).String() +
			time.Duration(st.Nlink).String() + "\n")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestHostileNamesAreRefusedAndNothingIsWrittenOutside(t *testing.T) {
	for name, members := range map[string][]tar.Header{
		"absolute":          {file("/etc/evil", "x")},
		"parent":            {file("../evil", "x")},
		"inner parent":      {file("a/../../evil", "x")},
		"parent only":       {file("..", "x")},
		"through a link":    {{Typeflag: tar.TypeSymlink, Name: "l", Linkname: ".."}, file("l/evil", "x")},
		"absolute link":     {{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "/tmp"}, file("l/evil", "x")},
		"hard link out":     {{Typeflag: tar.TypeLink, Name: "h", Linkname: "../secret"}},
		"hard link abs":     {{Typeflag: tar.TypeLink, Name: "h", Linkname: "/etc/passwd"}},
		"hard link by link": {{Typeflag: tar.TypeSymlink, Name: "l", Linkname: ".."}, {Typeflag: tar.TypeLink, Name: "h", Linkname: "l/secret"}},
		"long component":    {file(strings.Repeat("n", 256), "x")},
	} {
		for _, replace := range []bool{true, false} {
			base := t.TempDir()
			if err := os.WriteFile(base+"/secret", []byte("s"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(base+"/t", 0o755); err != nil {
				t.Fatal(err)
			}
			_, err := Put(base+"/t", pack(t, members...), nil, replace)
			if err == nil {
				t.Errorf("%s: accepted", name)
			}
			entries, _ := os.ReadDir(base)
			if len(entries) != 2 {
				t.Errorf("%s: %v beside the target", name, entries)
			}
		}
	}
}

func TestPutFollowsNoLinkInItsOwnPath(t *testing.T) {
	base := t.TempDir()
	if err := os.Mkdir(base+"/real", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("real", base+"/link"); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{base + "/link", base + "/link/below"} {
		_, err := Put(path, pack(t, file("f", "x")), nil, false)
		if err == nil || !strings.Contains(err.Error(), "symbolic link") {
			t.Errorf("%s: %v", path, err)
		}
	}
	if entries, _ := os.ReadDir(base + "/real"); len(entries) != 0 {
		t.Fatal("it was written through the link")
	}
}

func TestMergeReplacesFilesAndNeverWritesThroughLinks(t *testing.T) {
	base := t.TempDir()
	for _, step := range []error{
		os.WriteFile(base+"/outside", []byte("keep"), 0o600),
		os.MkdirAll(base+"/t/kept", 0o755),
		os.WriteFile(base+"/t/kept/old", []byte("old"), 0o600),
		os.Symlink("../outside", base+"/t/file"),
		os.Symlink("kept", base+"/t/dir"),
		os.Link(base+"/outside", base+"/t/hard"),
	} {
		if step != nil {
			t.Fatal(step)
		}
	}
	_, err := Put(base+"/t", pack(t, file("file", "new"), tar.Header{Typeflag: tar.TypeDir, Name: "dir/", Mode: 0o755},
		file("dir/in", "in"), file("hard", "new"), file("kept/more", "m")), nil, false)
	if err != nil {
		t.Fatal(err)
	}
	if read(t, base+"/outside") != "keep" || read(t, base+"/t/file") != "new" ||
		read(t, base+"/t/kept/old") != "old" || read(t, base+"/t/kept/more") != "m" ||
		read(t, base+"/t/dir/in") != "in" {
		t.Fatal(list(t, base))
	}
	if _, err := os.Lstat(base + "/t/kept/in"); err == nil {
		t.Fatal("a member went through a link")
	}
	entries, _ := filepath.Glob(base + "/t/" + stagingPrefix + "*")
	if len(entries) != 0 {
		t.Fatalf("left: %v", entries)
	}
}

func TestReplaceSwapsTheWholeTree(t *testing.T) {
	base := t.TempDir()
	for _, step := range []error{
		os.MkdirAll(base+"/t/old/deep", 0o755),
		os.WriteFile(base+"/t/old/deep/f", []byte("old"), 0o400),
		os.Symlink("/etc", base+"/t/old/link"),
		os.Mkdir(base+"/"+stagingPrefix+"stale", 0o700),
	} {
		if step != nil {
			t.Fatal(step)
		}
	}
	if _, err := Put(base+"/t", pack(t, file("new", "n"), file("new", "twice")), nil, true); err != nil {
		t.Fatal(err)
	}
	entries, _ := os.ReadDir(base)
	if len(entries) != 1 || read(t, base+"/t/new") != "twice" {
		t.Fatal(list(t, base))
	}
	if _, err := os.Lstat(base + "/t/old"); err == nil {
		t.Fatal("the old tree is still there")
	}
}

func TestAReplaceLeavesAMergeBesideItAlone(t *testing.T) {
	dir := t.TempDir()
	big := pack(t, file("big", strings.Repeat("x", 1<<20))).Bytes()
	stream, client := io.Pipe()
	merged := make(chan error, 1)
	go func() {
		_, err := Put(dir, stream, nil, false)
		stream.Close()
		merged <- err
	}()
	if _, err := client.Write(big[:len(big)/2]); err != nil { // returns when it was read
		t.Fatal(err)
	}
	if _, err := Put(filepath.Join(dir, "tree"), pack(t, file("f", "1")), nil, true); err != nil {
		t.Fatal(err)
	}
	_, _ = client.Write(big[len(big)/2:]) // a failure is the merge's to tell
	client.Close()
	if err := <-merged; err != nil {
		t.Error(err)
	}
	if got := len(read(t, filepath.Join(dir, "big"))); got != 1<<20 {
		t.Errorf("the merged file has %d bytes", got)
	}
}

func TestACutStreamLeavesTheOldTree(t *testing.T) {
	base := t.TempDir()
	if err := os.MkdirAll(base+"/t", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(base+"/t/old", []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	whole := pack(t, file("a", strings.Repeat("x", 5000)), file("b", "y")).Bytes()
	lost := &wire.Error{Code: wire.OperationFailed, Reason: "connection_lost", Message: "lost"}
	for _, size := range []int{0, 100, 512, 3000, 5632, len(whole) - 600, len(whole)} {
		_, err := Put(base+"/t", io.MultiReader(bytes.NewReader(whole[:size]), failing{lost}), nil, true)
		if wire.AsError(err).Reason != "connection_lost" {
			t.Errorf("cut at %d: %v", size, err)
		}
		if entries, _ := os.ReadDir(base); len(entries) != 1 || read(t, base+"/t/old") != "old" {
			t.Fatalf("cut at %d: %s", size, list(t, base))
		}
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func TestOwnerIsForcedOnEveryMember(t *testing.T) {
	needRoot(t)
	to := t.TempDir() + "/a/b/t"
	_, err := Put(to, pack(t, tar.Header{Typeflag: tar.TypeDir, Name: "d", Mode: 0o755, Uid: 5},
		file("d/f", "x"), file("implied/f", "x"),
		tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "x", Uid: 9}), &Owner{1234, 4321}, true)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "/d", "/d/f", "/implied", "/implied/f", "/l"} {
		info, err := os.Lstat(to + name)
		if err != nil {
			t.Fatal(err)
		}
		if st := info.Sys().(*syscall.Stat_t); st.Uid != 1234 || st.Gid != 4321 {
			t.Errorf("%s belongs to %d:%d", name, st.Uid, st.Gid)
		}
	}
}

func TestHolesStayHoles(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()+"/t"
	f, err := os.Create(from + "/sparse")
	if err != nil {
		t.Fatal(err)
	}
	for _, offset := range []int64{0, 3 << 20, 5<<20 + 100} {
		if _, err := f.WriteAt([]byte("data"), offset); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Truncate(20<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	go func() {
		_, err := Get(from, w)
		w.CloseWithError(err)
	}()
	if _, err := Put(to, r, nil, true); err != nil {
		t.Fatal(err)
	}
	if read(t, from+"/sparse") != read(t, to+"/sparse") {
		t.Fatal("the content differs")
	}
	info, err := os.Stat(to + "/sparse")
	if err != nil {
		t.Fatal(err)
	}
	if blocks := info.Sys().(*syscall.Stat_t).Blocks; blocks > 2048 {
		t.Fatalf("%d blocks are allocated", blocks)
	}
}

func TestASingleFileIsOneMemberWithItsBaseName(t *testing.T) {
	from := t.TempDir()
	if err := os.WriteFile(from+"/real", []byte("text"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("real", from+"/link"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"real", "link"} {
		var b bytes.Buffer
		if _, err := Get(from+"/"+name, &b); err != nil {
			t.Fatal(err)
		}
		r := tar.NewReader(&b)
		h, err := r.Next()
		if err != nil || h.Name != name || h.Typeflag != tar.TypeReg || h.Size != 4 {
			t.Fatalf("%s: %+v, %v", name, h, err)
		}
		if _, err := r.Next(); err != io.EOF {
			t.Fatal(err)
		}
	}
}

func TestGetOfWhatIsNotThereIsNotFound(t *testing.T) {
	_, err := Get(t.TempDir()+"/none", io.Discard)
	if err == nil || wire.AsError(err).Code != wire.NotFound {
		t.Fatal(err)
	}
	if _, err := Get("relative", io.Discard); wire.AsError(err).Code != wire.BadRequest {
		t.Fatal(err)
	}
}

func TestGetShowsNothingOfVirtualFilesystems(t *testing.T) {
	fd, err := syscall.Open("/proc", syscall.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if !isVirtual(fd) {
		t.Fatal("/proc would be packed")
	}
}

func TestGarbageIsABadRequest(t *testing.T) {
	_, err := Put(t.TempDir()+"/t", strings.NewReader(strings.Repeat("garbage ", 200)), nil, true)
	if err == nil || wire.AsError(err).Code != wire.BadRequest {
		t.Fatal(err)
	}
}
