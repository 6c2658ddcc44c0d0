package session

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"banger/agent/internal/command"
	"banger/agent/internal/procs"
	"banger/agent/internal/wire"
)

const patience = 20 * time.Second

var reaper *procs.Reaper

// TestMain is also the supervisor: a session's is this program under another name.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == Mode {
		if err := Supervise(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	reaper = procs.NewReaper()
	os.Exit(m.Run())
}

// newStore keeps sessions of its own, which end with the test.
func newStore(t *testing.T) *Store {
	t.Helper()
	s := &Store{Dir: filepath.Join(t.TempDir(), "sessions"), BootID: "boot", Reaper: reaper,
		Host: command.Host{Root: "/", VMName: "web", EUID: os.Geteuid()}}
	t.Cleanup(func() {
		records, _ := s.List()
		for _, r := range records {
			if r.Live() {
				_, _ = s.Kill(r.Name, "KILL")
			}
		}
	})
	return s
}

func start(t *testing.T, s *Store, script string) {
	t.Helper()
	_, err := s.Start(Params{Name: "one", Argv: []string{"sh", "-c", script}, Stdin: Pipe})
	if err != nil {
		t.Fatal(err)
	}
}

// client is the other end of a connection whose frames are read all the time.
type client struct {
	conn   net.Conn
	out    *wire.FrameWriter
	credit atomic.Int64
	text   chan string // what was printed
	last   chan byte   // the kind of the last frame: exit, result or error
	ended  chan error  // what the call returned
}

// connect joins a client with a call that is given its frames.
func connect(t *testing.T, call func(in *wire.FrameReader, out *wire.FrameWriter) error) *client {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ours, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c := &client{conn: ours, out: wire.NewFrameWriter(ours), text: make(chan string, 1000),
		last: make(chan byte, 1), ended: make(chan error, 1)}
	c.credit.Store(wire.StartCredit)
	go func() {
		c.ended <- call(wire.NewFrameReader(bufio.NewReader(theirs)), wire.NewFrameWriter(theirs))
		theirs.Close()
	}()
	go func() {
		in := wire.NewFrameReader(bufio.NewReader(ours))
		for {
			kind, payload, err := in.Read()
			if err != nil {
				return
			}
			switch kind {
			case wire.Credit:
				c.credit.Add(int64(binary.BigEndian.Uint32(payload)))
			case wire.Stdout:
				c.text <- string(payload)
			default:
				c.last <- kind
			}
		}
	}()
	t.Cleanup(func() { ours.Close() })
	return c
}

func attach(t *testing.T, s *Store) (*client, error) {
	t.Helper()
	r, held, err := s.CheckAttach("one")
	if err != nil {
		return nil, err
	}
	return connect(t, func(in *wire.FrameReader, out *wire.FrameWriter) error {
		return s.Attach(r, held, in, out)
	}), nil
}

func send(t *testing.T, s *Store) *client {
	t.Helper()
	return connect(t, func(in *wire.FrameReader, out *wire.FrameWriter) error {
		_, err := s.Send("one", false, in, out)
		return err
	})
}

// fill sends until the session has taken all that it takes without being read, and some of what was
// sent waits in the agent. On the way there is room for a pipe, the supervisor's credit, and a pipe.
func (c *client) fill(t *testing.T, s *Store) {
	t.Helper()
	const frame = 64 << 10
	r, err := s.Find("one")
	if err != nil {
		t.Fatal(err)
	}
	fifo, err := os.OpenFile(filepath.Join(s.Dir, r.ID, stdinFIFO), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer fifo.Close()
	sent := 0
	until(t, "the session's input is full", func() bool {
		if c.credit.Load() >= frame {
			c.credit.Add(-frame)
			sent += frame
			if err := c.out.Write(wire.Stdin, make([]byte, frame)); err != nil {
				t.Fatal(err)
			}
			return false
		}
		return sent > 64<<10+wire.StartCredit+64<<10 && unread(t, fifo) > 60<<10
	})
}

func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

func (c *client) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-c.ended:
		return err
	case <-time.After(patience):
		t.Fatal("the call has not ended")
		return nil
	}
}

func isCode(err error, code string) bool {
	var e *wire.Error
	return errors.As(err, &e) && e.Code == code
}

const deaf = "exec sleep 600"

func TestAClientThatLeavesASessionThatDoesNotReadLetsGoOfIt(t *testing.T) {
	s := newStore(t)
	start(t, s, deaf)
	first, err := attach(t, s)
	if err != nil {
		t.Fatal(err)
	}
	first.fill(t, s)
	if _, err := attach(t, s); !isCode(err, wire.AlreadyExists) {
		t.Fatalf("attached twice: %v", err)
	}
	first.conn.Close()
	if err := first.wait(t); err != nil {
		t.Errorf("the first: %v", err)
	}
	second, err := attach(t, s)
	if err != nil {
		t.Fatalf("the second: %v", err)
	}
	// Also while it has sent what cannot be taken.
	if err := second.out.Write(wire.Stdin, []byte("more")); err != nil {
		t.Fatal(err)
	}
	third := send(t, s)
	if err := third.out.Write(wire.Stdin, []byte("and more")); err != nil {
		t.Fatal(err)
	}
	fourth := send(t, s)
	fourth.conn.Close()
	_ = fourth.wait(t)
	third.conn.Close()
	_ = third.wait(t)
	if r, err := s.Kill("one", "KILL"); err != nil || r.Live() {
		t.Fatalf("%+v, %v", r, err)
	}
	if err := second.wait(t); err != nil {
		t.Errorf("the second: %v", err)
	}
	if kind := <-second.last; kind != wire.Exit {
		t.Errorf("the last frame of the second is of type 0x%02x", kind)
	}
	until(t, "nobody writes or waits", func() bool {
		s.turnsMu.Lock()
		defer s.turnsMu.Unlock()
		return len(s.turns) == 0
	})
}

func TestAMessageThatWaitsEndsWithItsSession(t *testing.T) {
	s := newStore(t)
	start(t, s, deaf)
	first := send(t, s)
	first.fill(t, s)
	// This one waits for the first, which is in the middle of its message.
	second := send(t, s)
	if err := second.out.Write(wire.Stdin, []byte("words")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Kill("one", "KILL"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*client{first, second} {
		// It may have written all that it had before the end, and learns of that with the next word.
		until(t, "the call ends", func() bool {
			if c.credit.Add(-1) >= 0 {
				_ = c.out.Write(wire.Stdin, []byte("x"))
			}
			return len(c.ended) > 0
		})
		if err := c.wait(t); !isCode(err, wire.NotRunning) {
			t.Errorf("%v", err)
		}
	}
}

func TestWhatAClientSentBeforeItLeftArrives(t *testing.T) {
	s := newStore(t)
	start(t, s, "while read -r x; do echo got $x; done")
	for n := range 20 {
		var c *client
		until(t, "the last one has let go", func() bool {
			var err error
			c, err = attach(t, s)
			return err == nil
		})
		if err := c.out.Write(wire.Stdin, fmt.Appendf(nil, "%d\n", n)); err != nil {
			t.Fatal(err)
		}
		c.conn.Close()
	}
	c, err := attach(t, s)
	for end := time.Now().Add(patience); err != nil && time.Now().Before(end); {
		c, err = attach(t, s)
	}
	if err != nil {
		t.Fatal(err)
	}
	seen := ""
	for !strings.Contains(seen, "got 19\n") {
		select {
		case text := <-c.text:
			seen += text
		case <-time.After(patience):
			t.Fatalf("%q", seen)
		}
	}
	for n := range 20 {
		if !strings.Contains(seen, fmt.Sprintf("got %d\n", n)) {
			t.Errorf("%d did not arrive: %q", n, seen)
		}
	}
}

func TestMoreThanTheCreditIsRefusedAndTheSessionGoesOn(t *testing.T) {
	s := newStore(t)
	start(t, s, deaf)
	c, err := attach(t, s)
	if err != nil {
		t.Fatal(err)
	}
	c.fill(t, s)
	for c.out.Write(wire.Stdin, make([]byte, 64<<10)) == nil {
		if len(c.ended) > 0 {
			break
		}
	}
	if err := c.wait(t); !isCode(err, wire.BadRequest) {
		t.Errorf("%v", err)
	}
	if r, err := s.Find("one"); err != nil || r.State != Running || r.Attached {
		t.Errorf("%+v, %v", r, err)
	}
}
