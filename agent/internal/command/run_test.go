package command

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"banger/agent/internal/procs"
	"banger/agent/internal/wire"
)

var reaper *procs.Reaper

func TestMain(m *testing.M) {
	// What the caller of the tests left open is not ours.
	for fd := 3; fd < 1024; fd++ {
		syscall.CloseOnExec(fd)
	}
	reaper = procs.NewReaper()
	os.Exit(m.Run())
}

// client is the other end of one command.
type client struct {
	t    *testing.T
	conn *net.UnixConn
	in   *wire.FrameReader
	out  *wire.FrameWriter
	done chan error
	pid  chan int
}

// socketPair returns two connected stream sockets.
func socketPair(t *testing.T) (*net.UnixConn, *net.UnixConn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return ends[0], ends[1]
}

// patience is how long a test waits for what has to happen; nothing is measured against it.
const patience = 2 * time.Minute

func start(t *testing.T, p Params) *client {
	t.Helper()
	plan, err := BuildPlan(p, Host{Root: "/", EUID: os.Geteuid()})
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := socketPair(t)
	c := &client{t: t, conn: ours, in: wire.NewFrameReader(bufio.NewReader(ours)),
		out: wire.NewFrameWriter(ours), done: make(chan error, 1), pid: make(chan int, 1)}
	go func() {
		c.done <- Run(reaper, plan, wire.NewFrameReader(bufio.NewReader(theirs)),
			wire.NewFrameWriter(theirs), func(pid int) { c.pid <- pid })
		theirs.CloseWrite()
	}()
	return c
}

func sh(t *testing.T, script string) *client {
	t.Helper()
	return start(t, Params{Argv: []string{"/bin/sh", "-c", script}})
}

// outcome is what a client sees of a command.
type outcome struct {
	stdout, stderr bytes.Buffer
	credit         int
	exit           string
	failure        *wire.Error
}

func (c *client) next() (byte, []byte) {
	c.t.Helper()
	_ = c.conn.SetReadDeadline(time.Now().Add(patience))
	kind, payload, err := c.in.Read()
	if err != nil {
		c.t.Fatalf("reading a frame: %v", err)
	}
	return kind, payload
}

func (c *client) finish() *outcome {
	c.t.Helper()
	var o outcome
	for {
		kind, payload := c.next()
		switch kind {
		case wire.Stdout:
			o.stdout.Write(payload)
		case wire.Stderr:
			o.stderr.Write(payload)
		case wire.Credit:
			o.credit += int(binary.BigEndian.Uint32(payload))
		case wire.Exit:
			o.exit = string(payload)
			return &o
		case wire.Failure:
			if err := json.Unmarshal(payload, &o.failure); err != nil {
				c.t.Fatal(err)
			}
			return &o
		default:
			c.t.Fatalf("unexpected frame 0x%02x", kind)
		}
	}
}

func (c *client) send(kind byte, payload string) {
	c.t.Helper()
	if err := c.out.Write(kind, []byte(payload)); err != nil {
		c.t.Fatal(err)
	}
}

func TestExitCodesAndSignalsAreExact(t *testing.T) {
	for script, want := range map[string]string{
		"exit 0": `{"code":0}`, "exit 1": `{"code":1}`, "exit 42": `{"code":42}`,
		"exit 255": `{"code":255}`, "kill -KILL $$": `{"signal":"KILL"}`,
		"kill -TERM $$": `{"signal":"TERM"}`, "kill -SEGV $$": `{"signal":"SEGV"}`,
	} {
		if o := sh(t, script).finish(); o.exit != want {
			t.Errorf("%s: %s", script, o.exit)
		}
	}
}

func TestStdoutAndStderrStayApart(t *testing.T) {
	o := sh(t, "echo out; echo err >&2").finish()
	if o.stdout.String() != "out\n" || o.stderr.String() != "err\n" {
		t.Fatalf("%q and %q", o.stdout.String(), o.stderr.String())
	}
}

func TestMissingProgramIs127AndUnusableOneIs126(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	broken := filepath.Join(dir, "broken")
	noformat := filepath.Join(dir, "noformat")
	for path, c := range map[string]struct {
		text string
		mode os.FileMode
	}{plain: {"x", 0o644}, broken: {"#!/no/such/interpreter\n", 0o755}, noformat: {"\x00\x01", 0o755}} {
		if err := os.WriteFile(path, []byte(c.text), c.mode); err != nil {
			t.Fatal(err)
		}
	}
	for name, code := range map[string]int{
		"no-such-program-anywhere": 127, filepath.Join(dir, "none"): 127, broken: 127,
		plain: 126, dir: 126, noformat: 126,
	} {
		o := start(t, Params{Argv: []string{name}}).finish()
		if o.exit != fmt.Sprintf(`{"code":%d}`, code) || !strings.Contains(o.stderr.String(), filepath.Base(name)) {
			t.Errorf("%s: %s, %q", name, o.exit, o.stderr.String())
		}
	}
}

func TestStdinReachesTheCommandAndEnds(t *testing.T) {
	c := sh(t, "cat; echo end")
	c.send(wire.Stdin, "hello ")
	c.send(wire.Stdin, "there\n")
	c.send(wire.StdinClose, "")
	o := c.finish()
	if o.stdout.String() != "hello there\nend\n" || o.credit != len("hello there\n") {
		t.Fatalf("%q, credit %d", o.stdout.String(), o.credit)
	}
}

func TestCreditLetsAnyAmountOfStdinThrough(t *testing.T) {
	const total = 5 << 20
	c := sh(t, "wc -c")
	allowed, sent := wire.StartCredit, 0
	for sent < total {
		for allowed > 0 && sent < total {
			n := min(allowed, total-sent, 50000)
			c.send(wire.Stdin, strings.Repeat("x", n))
			allowed, sent = allowed-n, sent+n
		}
		if sent < total {
			kind, payload := c.next()
			if kind != wire.Credit {
				t.Fatalf("frame 0x%02x", kind)
			}
			allowed += int(binary.BigEndian.Uint32(payload))
		}
	}
	c.send(wire.StdinClose, "")
	if o := c.finish(); strings.TrimSpace(o.stdout.String()) != fmt.Sprint(total) {
		t.Fatal(o.stdout.String())
	}
}

func TestSignalArrivesWhileTheCommandIgnoresItsStdin(t *testing.T) {
	c := sh(t, "trap 'exit 9' INT; echo ready; while :; do sleep 1 & wait $!; done")
	if kind, p := c.next(); kind != wire.Stdout || string(p) != "ready\n" {
		t.Fatalf("0x%02x %q", kind, p)
	}
	for range wire.StartCredit / 65536 {
		c.send(wire.Stdin, strings.Repeat("x", 65536))
	}
	c.send(wire.Signal, `{"name":"INT"}`)
	if o := c.finish(); o.exit != `{"code":9}` {
		t.Fatal(o.exit, o.failure)
	}
}

func TestStdinBeyondTheCreditIsRefused(t *testing.T) {
	c := sh(t, "sleep 60")
	for range wire.StartCredit/65536 + 3 {
		c.send(wire.Stdin, strings.Repeat("x", 65536))
	}
	if o := c.finish(); o.failure == nil || o.failure.Code != wire.BadRequest {
		t.Fatalf("%+v", o)
	}
}

func TestStdinThatNobodyReadsDoesNotHoldTheExit(t *testing.T) {
	c := sh(t, "exec <&-; exit 5")
	c.send(wire.Stdin, strings.Repeat("x", 200000))
	if o := c.finish(); o.exit != `{"code":5}` {
		t.Fatal(o.exit, o.failure)
	}
}

func TestHundredMegabytesArriveCompleteAtASlowReader(t *testing.T) {
	t.Parallel()
	const total = 100 << 20
	c := sh(t, fmt.Sprintf("head -c %d /dev/zero; echo end >&2", total))
	got, pause := 0, 0
	for {
		kind, payload := c.next()
		if kind == wire.Stdout {
			got += len(payload)
			if pause++; pause%200 == 0 {
				time.Sleep(10 * time.Millisecond)
			}
		}
		if kind == wire.Exit {
			break
		}
	}
	if got != total {
		t.Fatalf("%d of %d bytes", got, total)
	}
}

func TestASlowReaderStopsTheWriter(t *testing.T) {
	marker := filepath.Join(t.TempDir(), "written")
	c := sh(t, "head -c 4000000 /dev/zero; echo done > "+marker)
	c.next()
	time.Sleep(200 * time.Millisecond)
	if _, err := os.Stat(marker); err == nil {
		t.Fatal("the command wrote 4 MB to a reader that took one frame")
	}
	if o := c.finish(); o.exit != `{"code":0}` {
		t.Fatal(o.exit)
	}
}

func TestManyCommandsAtOnceKeepTheirStreamsApart(t *testing.T) {
	var all sync.WaitGroup
	for i := range 40 {
		all.Go(func() {
			c := sh(t, fmt.Sprintf("cat; yes line%d | head -n 5000; exit %d", i, i))
			c.send(wire.Stdin, "in\n")
			c.send(wire.StdinClose, "")
			o := c.finish()
			want := "in\n" + strings.Repeat(fmt.Sprintf("line%d\n", i), 5000)
			if o.exit != fmt.Sprintf(`{"code":%d}`, i) || o.stdout.String() != want {
				t.Errorf("command %d: %s, %d bytes", i, o.exit, o.stdout.Len())
			}
		})
	}
	all.Wait()
}

func TestLeftoversHoldTheExitByTwoSecondsAtMostAndLiveOn(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	marker, goOn := filepath.Join(dir, "alive"), filepath.Join(dir, "go on")
	if err := syscall.Mkfifo(goOn, 0o600); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	// What holds the pipes lives on until it is told, which is after the exit: that it comes at all
	// says that they do not hold it for ever.
	c := sh(t, "(read x < '"+goOn+"'; echo late; echo late >&2; echo yes > "+marker+") & head -c 300000 /dev/zero; exit 4")
	o := c.finish()
	took := time.Since(begin)
	if o.exit != `{"code":4}` || o.stdout.Len() != 300000 {
		t.Fatalf("%s, %d bytes", o.exit, o.stdout.Len())
	}
	if took < time.Second {
		t.Fatalf("the exit came after %v", took)
	}
	if err := os.WriteFile(goOn, []byte("go\n"), 0); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if _, err := os.Stat(marker); err == nil {
			return
		}
	}
	t.Fatal("the background process was killed by its own output")
}

func TestABusyLeftoverDoesNotKeepTheStreamGoing(t *testing.T) {
	t.Parallel()
	begin := time.Now()
	c := sh(t, "yes & echo $! >&2; exit 0")
	o := c.finish()
	var pid int
	fmt.Sscan(o.stderr.String(), &pid)
	defer syscall.Kill(pid, syscall.SIGKILL)
	if o.exit != `{"code":0}` || time.Since(begin) > patience {
		t.Fatal(o.exit, time.Since(begin))
	}
}

func TestLostConnectionHangsUp(t *testing.T) {
	// Not in parallel: nobody else loses a connection meanwhile.
	before := hangupGrace
	hangupGrace = patience
	defer func() { hangupGrace = before }()
	heard := filepath.Join(t.TempDir(), "heard")
	// It has no children, which would be waited for.
	c := sh(t, fmt.Sprintf("trap 'echo hup > %s; exit' HUP; echo ready; while :; do :; done", heard))
	c.next()
	pid := <-c.pid
	c.conn.Close()
	if err := <-c.done; err == nil {
		t.Fatal("no error")
	}
	if _, err := os.Stat(heard); err != nil {
		t.Error("no HUP came before the KILL")
	}
	groupEnds(t, pid)
}

func TestWhoDoesNotHangUpIsKilledWithItsGroup(t *testing.T) {
	t.Parallel()
	c := sh(t, "trap '' HUP; echo ready; while :; do sleep 1; done")
	c.next()
	pid := <-c.pid
	begin := time.Now()
	c.conn.Close()
	if err := <-c.done; err == nil {
		t.Fatal("no error")
	}
	if took := time.Since(begin); took < 4*time.Second {
		t.Errorf("it ended after %v", took)
	}
	groupEnds(t, pid)
}

func groupEnds(t *testing.T, pid int) {
	t.Helper()
	// What was killed stays a zombie until its new parent has reaped it.
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if syscall.Kill(-pid, 0) == syscall.ESRCH {
			return
		}
	}
	t.Error("the group is still there")
}

func TestTerminalHasItsSizeBeforeTheFirstByteAndCanBeResized(t *testing.T) {
	c := start(t, Params{Argv: []string{"/bin/sh", "-c",
		"stty size; tty; trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.1; done"},
		TTY: &Size{Rows: 33, Cols: 111}})
	var seen bytes.Buffer
	for !strings.Contains(seen.String(), "ready") {
		_, p := c.next()
		seen.Write(p)
	}
	if !strings.HasPrefix(seen.String(), "33 111\r\n/dev/pts/") {
		t.Fatalf("%q", seen.String())
	}
	c.send(wire.Resize, `{"rows":20,"cols":40}`)
	if o := c.finish(); o.stdout.String() != "20 40\r\n" || o.exit != `{"code":0}` {
		t.Fatalf("%q %s", o.stdout.String(), o.exit)
	}
}

func TestTerminalPassesControlCharactersAndTheEndOfInput(t *testing.T) {
	c := start(t, Params{Argv: []string{"/bin/sh", "-c", "trap 'echo int' INT; echo ready; cat; echo over"},
		TTY: &Size{Rows: 24, Cols: 80}})
	for {
		if _, p := c.next(); strings.Contains(string(p), "ready") {
			break
		}
	}
	c.send(wire.StdinClose, "")
	if o := c.finish(); !strings.Contains(o.stdout.String(), "over") || o.exit != `{"code":0}` {
		t.Fatalf("%q %s", o.stdout.String(), o.exit)
	}
	c = start(t, Params{Argv: []string{"/bin/sh", "-c", "echo ready; exec sleep 60"},
		TTY: &Size{Rows: 24, Cols: 80}})
	c.next()
	c.send(wire.Stdin, "\x03")
	if o := c.finish(); o.exit != `{"signal":"INT"}` {
		t.Fatal(o.exit)
	}
}

func TestLargeTerminalOutputIsComplete(t *testing.T) {
	c := start(t, Params{Argv: []string{"/bin/sh", "-c", "stty -opost; head -c 3000000 /dev/zero; exit 6"},
		TTY: &Size{Rows: 24, Cols: 80}})
	if o := c.finish(); o.stdout.Len() != 3000000 || o.exit != `{"code":6}` {
		t.Fatalf("%d bytes, %s", o.stdout.Len(), o.exit)
	}
}

func TestFramesThatMakeNoSenseEndTheCommand(t *testing.T) {
	for kind, payload := range map[byte]string{
		wire.Signal: `{"name":"NOSUCH"}`, wire.Resize: `{"rows":1,"cols":1}`, wire.Data: "x",
	} {
		c := sh(t, "exec sleep 60")
		c.send(kind, payload)
		if o := c.finish(); o.failure == nil || o.failure.Code != wire.BadRequest {
			t.Errorf("0x%02x: %+v", kind, o)
		}
	}
}

func TestNoDescriptorLeaksIntoCommands(t *testing.T) {
	o := sh(t, "ls /proc/self/fd").finish()
	if got := strings.Fields(o.stdout.String()); len(got) != 4 { // 0, 1, 2 and the directory
		t.Fatalf("%v", got)
	}
}
