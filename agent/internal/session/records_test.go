package session

import (
	"bytes"
	"math/rand"
	"os"
	"testing"
)

// write records n pieces of random size on two streams and returns what was written, by number.
func write(t *testing.T, dir string, keep int64, n int) map[uint64]string {
	t.Helper()
	out := recorder{dir: dir, stream: Stdout, keep: keep}
	errs := recorder{dir: dir, stream: Stderr, keep: keep}
	random := rand.New(rand.NewSource(int64(n)))
	written := map[uint64]string{}
	for number := range uint64(n) {
		data := bytes.Repeat([]byte{byte('a' + number%26)}, 1+random.Intn(200))
		to := &out
		if random.Intn(3) == 0 {
			to = &errs
		}
		to.add(number, data)
		written[number] = string(data)
	}
	out.close()
	errs.close()
	return written
}

// numbers reads everything from a place on and checks it against what was written.
func numbers(t *testing.T, dir, stream string, from place, written map[uint64]string) ([]uint64, *merged) {
	t.Helper()
	m := newMerged(dir, stream, from, true)
	t.Cleanup(m.close)
	var seen []uint64
	for {
		_, rec, err := m.take()
		if err != nil {
			t.Fatal(err)
		}
		if rec == nil {
			return seen, m
		}
		if written[rec.number] != string(rec.data) {
			t.Fatalf("record %d is %q, %q was written", rec.number, rec.data, written[rec.number])
		}
		seen = append(seen, rec.number)
	}
}

func TestAllRecordsComeInTheirOrder(t *testing.T) {
	dir := t.TempDir()
	written := write(t, dir, 1<<20, 500)
	seen, m := numbers(t, dir, "", place{}, written)
	if len(seen) != 500 || m.dropped != 0 {
		t.Fatalf("%d records, %d bytes dropped", len(seen), m.dropped)
	}
	for i, number := range seen {
		if uint64(i) != number {
			t.Fatalf("record %d comes at place %d", number, i)
		}
	}
}

func TestOldOutputGoesAndIsCounted(t *testing.T) {
	dir := t.TempDir()
	const keep = 8 << 10
	written := write(t, dir, keep, 2000)
	for _, stream := range []string{Stdout, Stderr} {
		seen, m := numbers(t, dir, stream, place{}, written)
		kept := uint64(0)
		for _, number := range seen {
			kept += uint64(len(written[number]))
		}
		s := span(dir, stream)
		if s.End-s.Start != kept || m.dropped != s.Start || kept > keep || kept < keep/2 {
			t.Errorf("%s: %d bytes kept, %d dropped, the span is %v", stream, kept, m.dropped, s)
		}
	}
	segments, err := listSegments(dir, Stdout)
	if err != nil || len(segments) > segmentParts+1 {
		t.Errorf("%d segments, %v", len(segments), err)
	}
}

func TestAPlaceSplitsTheOutputExactly(t *testing.T) {
	dir := t.TempDir()
	written := write(t, dir, 1<<20, 300)
	for _, at := range []uint64{0, 1, 137, 299, 300} {
		m := newMerged(dir, "", place{}, true)
		for m.at.number < at {
			if _, rec, err := m.take(); err != nil || rec == nil {
				t.Fatal(rec, err)
			}
		}
		from, err := parsePlace(m.at.String())
		m.close()
		if err != nil || from != m.at {
			t.Fatal(from, err)
		}
		seen, rest := numbers(t, dir, "", from, written)
		if len(seen) != int(300-at) || rest.dropped != 0 {
			t.Errorf("from %d: %d records, %d dropped", at, len(seen), rest.dropped)
		}
	}
}

func TestARecordThatWasCutShortIsNotShown(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, 1<<20, 40)
	segments, _ := listSegments(dir, Stdout)
	path := segments[0].path
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	all := reader{dir: dir, stream: Stdout}
	defer all.close()
	count := func() (n int) {
		r := reader{dir: dir, stream: Stdout}
		defer r.close()
		for {
			rec, err := r.peek()
			if err != nil {
				t.Fatal(err)
			}
			if rec == nil {
				return n
			}
			r.take()
			n++
		}
	}
	before := count()
	if err := os.Truncate(path, info.Size()-1); err != nil {
		t.Fatal(err)
	}
	if after := count(); after != before-1 {
		t.Errorf("%d records before, %d after", before, after)
	}
}

func TestAReaderFollowsIntoNewSegments(t *testing.T) {
	dir := t.TempDir()
	w := recorder{dir: dir, stream: Stdout, keep: 4 << 10}
	r := reader{dir: dir, stream: Stdout}
	defer r.close()
	for number := range uint64(300) {
		w.add(number, bytes.Repeat([]byte{'x'}, 100))
		rec, err := r.peek()
		if err != nil || rec == nil || rec.number != number {
			t.Fatalf("record %d: %v, %v", number, rec, err)
		}
		r.take()
	}
	w.close()
}

func FuzzPlace(f *testing.F) {
	f.Add("1.2.3")
	f.Add("1.2.3 ")
	f.Add("-1.0.0")
	f.Fuzz(func(t *testing.T, text string) {
		if p, err := parsePlace(text); err == nil && p.String() != text {
			t.Errorf("%q is read as %v", text, p)
		}
	})
}

// from returns what is logged from a place on, without the first skip bytes.
func from(t *testing.T, dir string, at place, skip int) string {
	t.Helper()
	m := newMerged(dir, "", at, false)
	defer m.close()
	var text []byte
	for {
		_, rec, err := m.take()
		if err != nil {
			t.Fatal(err)
		}
		if rec == nil {
			return string(text[min(skip, len(text)):])
		}
		text = append(text, rec.data...)
	}
}

func TestTheLastLinesAreThoseOfTheWholeText(t *testing.T) {
	for turn := range 50 {
		dir := t.TempDir()
		random := rand.New(rand.NewSource(int64(turn)))
		logs := []*recorder{{dir: dir, stream: Stdout, keep: 1 << 20}, {dir: dir, stream: Stderr, keep: 1 << 20}}
		var text []byte
		for number := range random.Intn(40) {
			data := make([]byte, 1+random.Intn(6))
			for i := range data {
				data[i] = "ab\n"[random.Intn(3)]
			}
			logs[random.Intn(2)].add(uint64(number), data)
			text = append(text, data...)
		}
		for _, log := range logs {
			log.close()
		}
		lines := bytes.SplitAfter(text, []byte{'\n'})
		if last := lines[len(lines)-1]; len(last) == 0 {
			lines = lines[:len(lines)-1]
		}
		for count := range len(lines) + 3 {
			want := string(bytes.Join(lines[max(0, len(lines)-count):], nil))
			at, skip, err := findTail(dir, "", count)
			if got := from(t, dir, at, skip); err != nil || got != want {
				t.Fatalf("the last %d lines of %q are %q (%v)", count, text, got, err)
			}
		}
	}
}

func TestRecentOutputIsFoundFromTheEnd(t *testing.T) {
	dir := t.TempDir()
	logs := []*recorder{{dir: dir, stream: Stdout, keep: 64 << 20}, {dir: dir, stream: Stderr, keep: 64 << 20}}
	var text []byte
	random := rand.New(rand.NewSource(1))
	for number := range uint64(700_000) { // 14 MiB with their headers: several segments
		log := logs[0]
		if random.Intn(50) == 0 {
			log = logs[1]
		}
		data := []byte{byte('a' + number%26)}
		log.add(number, data)
		text = append(text, data...)
	}
	for _, log := range logs {
		log.close()
	}
	near := findNear(dir)
	at, err := findRecent(dir)
	if got := from(t, dir, at, 0); err != nil || got != string(text[len(text)-recentBytes:]) {
		t.Fatalf("%d bytes are not the last %d (%v)", len(got), recentBytes, err)
	}
	if near == 0 || at.number < near {
		t.Fatalf("begins at %d, found from %d", at.number, near)
	}
}
