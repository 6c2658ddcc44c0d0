package tree

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/agent/internal/wire"
)

var errCut = errors.New("the connection ended")

// toTheEnd: the connection lasts to the end.
const toTheEnd = 1 << 62

// cutReader ends with an error after some bytes, as a connection does.
type cutReader struct {
	r    io.Reader
	left int
}

func (c *cutReader) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, errCut
	}
	n, err := c.r.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

// peer sends a file to PutFile, from where both sides have the same, at most `most` bytes.
type peer struct {
	t       *testing.T
	content []byte
	most    int
	offered uint64
	stream  io.Reader
}

func (p *peer) Write(offer []byte) (int, error) {
	if len(offer) != 8+sha256.Size {
		p.t.Errorf("an offer of %d bytes", len(offer))
	}
	p.offered = binary.LittleEndian.Uint64(offer)
	at := p.offered
	if sum := sha256.Sum256(p.content[:at]); !bytes.Equal(sum[:], offer[8:]) {
		at = 0
	}
	chosen := binary.LittleEndian.AppendUint64(nil, at)
	p.stream = io.MultiReader(bytes.NewReader(chosen),
		&cutReader{bytes.NewReader(p.content[at:]), p.most})
	return len(offer), nil
}

func (p *peer) Read(b []byte) (int, error) { return p.stream.Read(b) }

func send(t *testing.T, dir, name string, content []byte, most int) (offered uint64, err error) {
	t.Helper()
	p := &peer{t: t, content: content, most: most}
	_, err = PutFile(File{Path: dir, Name: []byte(name), Size: int64(len(content)), Mode: 0o750,
		Mtime: 1234567890}, p, p)
	return p.offered, err
}

func mixed(size int) []byte {
	content := make([]byte, size)
	for i := 0; i < size; i += 1 << 16 {
		if rand.IntN(3) > 0 { // else zeros, which become holes
			for j := i; j < min(i+1<<16, size); j++ {
				content[j] = byte(rand.Uint32())
			}
		}
	}
	return content
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, e := range entries {
		found = append(found, e.Name())
	}
	return found
}

func TestAFileThatIsCutGoesOnAndHasItsNameOnlyWhenItIsWhole(t *testing.T) {
	for range 20 {
		dir := filepath.Join(t.TempDir(), "made/on the way")
		content, name := mixed(rand.IntN(3<<20)+1), "new \xff"
		var sent, cuts int
		for {
			most := rand.IntN(len(content)) + 1
			offered, err := send(t, dir, name, content, most)
			if int(offered) != sent {
				t.Fatalf("%d bytes are there, %d were sent", offered, sent)
			}
			if err == nil {
				break
			}
			if !errors.Is(err, errCut) {
				t.Fatal(err)
			}
			sent = min(sent+most, len(content))
			cuts++
			found := names(t, dir)
			if len(found) != 1 || !strings.HasPrefix(found[0], partPrefix) {
				t.Fatalf("after a cut: %q", found)
			}
			if tarred, err := listed(dir); err != nil || tarred != 0 {
				t.Fatalf("the part is shown to others: %d, %v", tarred, err)
			}
		}
		path := filepath.Join(dir, name)
		info, err := os.Stat(path)
		if err != nil || info.Mode() != 0o750 || info.ModTime().Unix() != 1234567890 {
			t.Fatal(info, err)
		}
		if read(t, path) != string(content) || len(names(t, dir)) != 1 {
			t.Fatalf("other content, or something is left, after %d cuts", cuts)
		}
	}
}

func listed(dir string) (int64, error) {
	counts, err := Scan(dir, true, io.Discard)
	return counts.Files, err
}

func TestAPartOfSomethingElseIsNotGoneOnWith(t *testing.T) {
	dir := t.TempDir()
	if _, err := send(t, dir, "file", mixed(300_000), 200_000); !errors.Is(err, errCut) {
		t.Fatal(err)
	}
	content := mixed(250_000)
	if offered, err := send(t, dir, "file", content, toTheEnd); offered != 200_000 || err != nil {
		t.Fatal(offered, err)
	}
	if read(t, dir+"/file") != string(content) {
		t.Fatal("it is not what was sent last")
	}
	// Longer than the whole: not even offered.
	if _, err := send(t, dir, "file", mixed(300_000), 200_000); !errors.Is(err, errCut) {
		t.Fatal(err)
	}
	if offered, err := send(t, dir, "file", content[:9], toTheEnd); offered != 0 || err != nil {
		t.Fatal(offered, err)
	}
	if read(t, dir+"/file") != string(content[:9]) {
		t.Fatal("it is not what was sent last")
	}
}

func partOf(t *testing.T, dir, name string) string {
	t.Helper()
	if _, err := send(t, dir, name, []byte("content"), 3); !errors.Is(err, errCut) {
		t.Fatal(err)
	}
	return filepath.Join(dir, names(t, dir)[0])
}

func TestWhatOthersPutInThePlaceOfAPartIsNeverWrittenTo(t *testing.T) {
	needRoot(t)
	outside := filepath.Join(t.TempDir(), "outside")
	for name, plant := range map[string]func(part string) error{
		"link": func(part string) error { return os.Symlink(outside, part) },
		"name": func(part string) error { return os.Link(outside, part) },
		"fifo": func(part string) error { return syscall.Mkfifo(part, 0o666) },
		"dir":  func(part string) error { return os.MkdirAll(part+"/in it", 0o755) },
		"theirs": func(part string) error {
			return errors.Join(os.WriteFile(part, []byte("con"), 0o666), os.Chown(part, 1000, 1000))
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(outside, []byte("con"), 0o600); err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			part := partOf(t, dir, "file")
			if err := errors.Join(os.Remove(part), plant(part)); err != nil {
				t.Fatal(err)
			}
			if offered, err := send(t, dir, "file", []byte("content"), toTheEnd); offered != 0 || err != nil {
				t.Fatal(offered, err)
			}
			info, err := os.Lstat(dir + "/file")
			if err != nil || !info.Mode().IsRegular() || info.Sys().(*syscall.Stat_t).Uid != 0 {
				t.Fatal(info, err)
			}
			if read(t, outside) != "con" || read(t, dir+"/file") != "content" {
				t.Fatal("written elsewhere")
			}
		})
	}
}

func TestTwoCopiesToOneNameDoNotMix(t *testing.T) {
	dir := t.TempDir()
	first := &peer{t: t, content: []byte("content"), most: toTheEnd}
	pass, entered := make(chan struct{}), make(chan struct{})
	slow := readerFunc(func(b []byte) (int, error) {
		if entered != nil {
			close(entered)
			entered = nil
			<-pass
		}
		return first.Read(b)
	})
	done := make(chan error)
	started := entered
	go func() {
		_, err := PutFile(File{Path: dir, Name: []byte("file"), Size: 7, Mode: 0o644}, slow, first)
		done <- err
	}()
	<-started
	_, err := send(t, dir, "file", []byte("another"), toTheEnd)
	var e *wire.Error
	if !errors.As(err, &e) || e.Reason != "in_use" {
		t.Fatal(err)
	}
	close(pass)
	if err := <-done; err != nil || read(t, dir+"/file") != "content" {
		t.Fatal(err)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

func TestPartsWaitForTheNextCopyButNotForEver(t *testing.T) {
	dir := t.TempDir()
	part := partOf(t, dir, "one")
	if _, err := Put(dir+"/tree", pack(t, file("f", "x")), nil, true); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(part); err != nil {
		t.Fatal("the part has gone", err)
	}
	old := time.Now().Add(-partKept - time.Hour)
	if err := os.Chtimes(part, old, old); err != nil {
		t.Fatal(err)
	}
	if _, err := send(t, dir, "two", []byte("content"), toTheEnd); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(part); !errors.Is(err, os.ErrNotExist) {
		t.Fatal("the part is there still", err)
	}
}

func TestMoreOrLessThanWasSaidIsRefused(t *testing.T) {
	dir := t.TempDir()
	for _, sent := range []string{"conten", "content."} {
		p := &peer{t: t, content: []byte(sent), most: toTheEnd}
		_, err := PutFile(File{Path: dir, Name: []byte("file"), Size: 7, Mode: 0o644}, p, p)
		var e *wire.Error
		if !errors.As(err, &e) || e.Code != wire.BadRequest {
			t.Fatal(err)
		}
		if _, err := os.Stat(dir + "/file"); !errors.Is(err, os.ErrNotExist) {
			t.Fatal("it has its name")
		}
	}
	for _, name := range []string{"", "..", "a/../b", "/etc/x"} {
		if _, err := PutFile(File{Path: dir, Name: []byte(name)}, nil, nil); err == nil {
			t.Fatalf("%q was taken", name)
		}
	}
}

func TestDigestsKnowOnlyRegularFilesOfThatSizeBehindNoLink(t *testing.T) {
	dir := t.TempDir()
	for _, step := range []error{
		os.WriteFile(dir+"/file", []byte("content"), 0o640), os.Mkdir(dir+"/sub", 0o755),
		os.WriteFile(dir+"/sub/in", []byte("inside"), 0o600), os.Symlink("sub", dir+"/alias"),
		os.Symlink("file", dir+"/link"), syscall.Mkfifo(dir+"/fifo", 0o644),
	} {
		if step != nil {
			t.Fatal(step)
		}
	}
	wanted := []Wanted{{"file", 7}, {"file", 6}, {"sub/in", 6}, {"alias/in", 6}, {"link", 7}, {"fifo", 0},
		{"sub", 0}, {"none", 1}, {"file/below", 1}}
	var b bytes.Buffer
	if counts, err := Digests(dir, wanted, &b); err != nil || counts.Files != 2 {
		t.Fatal(counts, err)
	}
	for i, want := range []string{"content", "", "inside", "", "", "", "", "", ""} {
		record := b.Next(12 + sha256.Size)
		sum := sha256.Sum256([]byte(want))
		if want == "" && !bytes.Equal(record, make([]byte, len(record))) {
			t.Errorf("%v: %x", wanted[i], record)
		}
		if want != "" && !bytes.Equal(record[12:], sum[:]) {
			t.Errorf("%v: %x", wanted[i], record)
		}
	}
	if _, err := Digests(dir, []Wanted{{"../x", 1}}, io.Discard); err == nil {
		t.Error("a name that leads upwards was taken")
	}
}

func TestAFileIsReadFromAnOffsetWithTheHashOfWhatIsBefore(t *testing.T) {
	dir := t.TempDir()
	content := mixed(700_000)
	if err := errors.Join(os.WriteFile(dir+"/file", content, 0o600), os.Symlink("file", dir+"/link"),
		syscall.Mkfifo(dir+"/fifo", 0o644)); err != nil {
		t.Fatal(err)
	}
	for _, offset := range []int{0, 1, 300_000, 700_000, 700_001} {
		var b bytes.Buffer
		if _, err := ReadFile(dir, "file", int64(offset), &b); err != nil {
			t.Fatal(err)
		}
		head := b.Next(12 + sha256.Size)
		if size := binary.LittleEndian.Uint64(head); size != 700_000 {
			t.Fatal(size)
		}
		if offset > len(content) {
			if b.Len() != 0 || !bytes.Equal(head[12:], make([]byte, sha256.Size)) {
				t.Fatal("more than there is")
			}
			continue
		}
		sum := sha256.Sum256(content[:offset])
		if !bytes.Equal(head[12:], sum[:]) || !bytes.Equal(b.Bytes(), content[offset:]) {
			t.Fatalf("from %d it is something else", offset)
		}
	}
	for _, name := range []string{"link", "fifo", "none", ".."} {
		if _, err := ReadFile(dir, name, 0, io.Discard); err == nil {
			t.Errorf("%s was read", name)
		}
	}
	if _, err := ReadFile(dir+"/link", "", 0, io.Discard); err != nil {
		t.Error("the link that was named is not followed", err)
	}
}

func TestFilesThatTheReceiverHasAreLeftOutAndLinkedToAllTheSame(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.WriteFile(dir+"/a", []byte("one"), 0o644), os.Link(dir+"/a", dir+"/b"),
		os.WriteFile(dir+"/c", []byte("two"), 0o644)); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := GetExcept(dir, []string{"a"}, &b); err != nil {
		t.Fatal(err)
	}
	r := tar.NewReader(&b)
	var found []string
	for h, err := r.Next(); err == nil; h, err = r.Next() {
		found = append(found, h.Name+"→"+h.Linkname)
	}
	if strings.Join(found, " ") != "b→a c→" {
		t.Fatal(found)
	}
}

func TestATreeGetsItsNameWhenAllHasCome(t *testing.T) {
	dir := t.TempDir()
	part := filepath.Join(dir, PartName("tree"))
	if _, err := Put(part, pack(t, file("f", "x")), nil, false); err != nil {
		t.Fatal(err)
	}
	if count, err := listed(dir); err != nil || count != 0 {
		t.Fatalf("it is shown to others: %d, %v", count, err)
	}
	if err := PlaceTree(dir + "/tree"); err != nil || read(t, dir+"/tree/f") != "x" {
		t.Fatal(err)
	}
	var e *wire.Error
	if err := PlaceTree(dir + "/tree"); !errors.As(err, &e) || e.Code != wire.NotFound {
		t.Fatal(err)
	}
	if err := os.Mkdir(part, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := PlaceTree(dir + "/tree"); !errors.As(err, &e) || e.Code != wire.AlreadyExists {
		t.Fatal(err)
	}
}
