package tree

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"banger/agent/internal/kernel"
	"banger/agent/internal/wire"
)

// captured packs a whole system and returns its members by name, with their content.
func captured(t *testing.T, root string, s Selection) (map[string]*tar.Header, map[string]string, []byte) {
	t.Helper()
	var b bytes.Buffer
	if _, err := Whole(root, s, &b); err != nil {
		t.Fatal(err)
	}
	headers, contents := map[string]*tar.Header{}, map[string]string{}
	stream := bytes.Clone(b.Bytes())
	for r := tar.NewReader(&b); ; {
		h, err := r.Next()
		if err == io.EOF {
			return headers, contents, stream
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		headers[h.Name], contents[h.Name] = h, string(content)
	}
}

func TestWhatASelectionExcludesIsLeftOutWithAllBelow(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"tmp/deep/er", "etc/ssh", "var/lib/banger/x", "keep/tmp"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"tmp/deep/file", "etc/ssh/ssh_host_rsa_key", "etc/ssh/sshd_config",
		"var/lib/banger/x/y", "keep/tmp/z", "odd\xff\nname"} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	headers, _, _ := captured(t, root, Selection{
		Exclude: []string{"tmp/*", "etc/ssh/ssh_host_*", "var/lib/banger"}})
	var names []string
	for name := range headers {
		names = append(names, name)
	}
	slices.Sort(names)
	want := []string{"./", "etc/", "etc/ssh/", "etc/ssh/sshd_config", "keep/", "keep/tmp/",
		"keep/tmp/z", "odd\xff\nname", "tmp/", "var/", "var/lib/"}
	if !slices.Equal(names, want) {
		t.Fatalf("%q", names)
	}
}

func TestHolesTravelAsHoles(t *testing.T) {
	root := t.TempDir()
	path := filepath.Join(root, "sparse "+strings.Repeat("long", 40))
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	const size = 64 << 20
	for _, step := range []error{
		f.Truncate(size),
		kernel.Pwrite(int(f.Fd()), []byte("in the middle"), 32<<20),
		kernel.Setxattr(path, "user.note", []byte("kept")),
		os.WriteFile(filepath.Join(root, "empty"), nil, 0o600),
		os.Truncate(filepath.Join(root, "empty"), 1<<20),
		os.WriteFile(filepath.Join(root, "zz-after"), []byte("next"), 0o600),
		f.Close(),
	} {
		if step != nil && !errors.Is(step, syscall.ENOTSUP) {
			t.Fatal(step)
		}
	}
	headers, contents, stream := captured(t, root, Selection{})
	if len(stream) > 1<<20 {
		t.Fatalf("64 MiB of holes became %d bytes", len(stream))
	}
	name := filepath.Base(path)
	if got := contents[name]; len(got) != size || strings.Trim(got, "\x00") != "in the middle" ||
		got[32<<20] != 'i' {
		t.Fatalf("%d bytes came back", len(got))
	}
	if contents["empty"] != strings.Repeat("\x00", 1<<20) || contents["zz-after"] != "next" {
		t.Fatal("what surrounds a sparse file is damaged")
	}
	if note, ok := headers[name].PAXRecords[xattrPrefix+"user.note"]; ok && note != "kept" {
		t.Fatalf("%q", note)
	}
}

func TestOnlyNamedMountsAreEntered(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	for _, name := range []string{"root", "srv", "mnt"} {
		dir := filepath.Join(root, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if name == "srv" {
			continue
		}
		// ramfs is not among the virtual ones, so that it stands for a disk here.
		if err := syscall.Mount("none", dir, "ramfs", 0, ""); err != nil {
			t.Skipf("mounting is not allowed here: %v", err)
		}
		defer syscall.Unmount(dir, syscall.MNT_DETACH)
	}
	for _, name := range []string{"root/in", "srv/in", "mnt/in"} {
		if err := os.WriteFile(filepath.Join(root, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	headers, _, _ := captured(t, root, Selection{Enter: []string{"root"}})
	if headers["root/in"] == nil || headers["srv/in"] == nil || headers["mnt/"] == nil ||
		headers["mnt/in"] != nil {
		t.Fatalf("%v", headers)
	}
}

func TestAPatternThatIsNoneIsRefused(t *testing.T) {
	_, err := Whole(t.TempDir(), Selection{Exclude: []string{"["}}, io.Discard)
	var bad *wire.Error
	if !errors.As(err, &bad) || bad.Code != wire.BadRequest {
		t.Fatal(err)
	}
}
