package service

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"banger/agent/internal/command"
	"banger/agent/internal/guest"
	"banger/agent/internal/procs"
	"banger/agent/internal/wire"
)

// fakeMachine records what methods do to it.
type fakeMachine struct {
	mu      sync.Mutex
	stepped []int64
	seeds   int
	set     Settings
	stopped chan time.Duration
}

func (m *fakeMachine) Init() (string, string) { return "systemd", "running" }

func (m *fakeMachine) StepClock(ns int64) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stepped = append(m.stepped, ns)
	return true, nil
}

func (m *fakeMachine) Configure(s Settings) error { m.set = s; return nil }

func (m *fakeMachine) Grow() ([]GrownFilesystem, error) {
	return []GrownFilesystem{{"/", 1, 2}}, nil
}

func (m *fakeMachine) Filesystems() []string { return []string{"/"} }

func (m *fakeMachine) AddEntropy([]byte) error { m.seeds++; return nil }

func (m *fakeMachine) FirstBoot() string { return "" }

func (m *fakeMachine) Settle(time.Duration) {}

func (m *fakeMachine) Stop(grace time.Duration) { m.stopped <- grace }

var reaper *procs.Reaper

func TestMain(m *testing.M) {
	reaper = procs.NewReaper()
	os.Exit(m.Run())
}

type fixture struct {
	*Server
	machine *fakeMachine
	address Address
}

// serve starts a server on a Unix socket.
func serve(t *testing.T, token string) *fixture {
	t.Helper()
	m := &fakeMachine{stopped: make(chan time.Duration, 1)}
	f := &fixture{machine: m, address: Address{Kind: "unix", Path: filepath.Join(t.TempDir(), "s")},
		Server: &Server{Config: &guest.Config{VMID: "id", Name: "web"}, Version: "1.2.3", BootID: "boot",
			Token: token, Reaper: reaper, Machine: m, Log: func(string, ...any) {},
			Host: command.Host{Root: "/", VMName: "web", EUID: os.Geteuid()}}}
	l, err := Listen(f.address, netip.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = f.Serve(l) }()
	t.Cleanup(func() {
		l.Close()
		f.Wait()
	})
	return f
}

// peer is one connection of a client.
type peer struct {
	t    *testing.T
	conn Conn
	in   *bufio.Reader
}

func (f *fixture) connect(t *testing.T) *peer {
	t.Helper()
	c, err := Dial(f.address, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetReadDeadline(time.Now().Add(2 * time.Minute))
	return &peer{t, c, bufio.NewReader(c)}
}

func (p *peer) send(line string) *peer {
	p.t.Helper()
	if _, err := io.WriteString(p.conn, line+"\n"); err != nil {
		p.t.Fatal(err)
	}
	return p
}

func (p *peer) reply() wire.Reply {
	p.t.Helper()
	line, err := wire.ReadLine(p.in)
	if err != nil {
		p.t.Fatal(err)
	}
	var r wire.Reply
	if err := json.Unmarshal(line, &r); err != nil {
		p.t.Fatal(err)
	}
	return r
}

func (f *fixture) call(t *testing.T, method, params string) wire.Reply {
	t.Helper()
	p := f.connect(t)
	defer p.conn.Close()
	return p.send(fmt.Sprintf(`{"version":1,"method":%q,"params":%s,"op_id":"op-1","token":%q}`,
		method, params, f.Token)).reply()
}

func TestMethodsAnswer(t *testing.T) {
	f := serve(t, "")
	for method, part := range map[string]string{
		"hello":  `"agent_version":"1.2.3"`,
		"health": `"init_state":"running"`,
		"ports":  `"listeners":[`,
		"stats":  `"filesystems":[{"path":"/"`,
		"sync":   `{}`,
		"grow":   `{"filesystems":[{"path":"/","before_bytes":1,"after_bytes":2}]}`,
	} {
		r := f.call(t, method, "{}")
		if r.Error != nil || !strings.Contains(string(r.Result), part) || r.OpID != "op-1" {
			t.Errorf("%s: %s %+v", method, r.Result, r.Error)
		}
	}
}

func TestWrongRequestsGetTheirCode(t *testing.T) {
	f := serve(t, "")
	for line, code := range map[string]string{
		`{"version":9,"method":"hello"}`:                  wire.BadVersion,
		`{"version":1,"method":"nat"}`:                    wire.UnknownMethod,
		`{"version":1,"method":"hello","params":{"x":1}}`: wire.BadRequest,
		`not json`: wire.BadRequest,
		`{"version":1,"method":"time","params":{}}`:                                     wire.BadRequest,
		`{"version":1,"method":"entropy","params":{"seed":"YQ=="}}`:                     wire.BadRequest,
		`{"version":1,"method":"entropy","params":{"seed":"*"}}`:                        wire.BadRequest,
		`{"version":1,"method":"dial","params":{"port":70000}}`:                         wire.BadRequest,
		`{"version":1,"method":"dial","params":{"port":1}}`:                             wire.OperationFailed,
		`{"version":1,"method":"configure","params":{"hostname":"a b"}}`:                wire.BadRequest,
		`{"version":1,"method":"shutdown","params":{"grace_s":-1}}`:                     wire.BadRequest,
		`{"version":1,"method":"put","params":{"path":"/x","mode":"other"}}`:            wire.BadRequest,
		`{"version":1,"method":"exec","params":{"argv":["true"],"user":"nobody-here"}}`: wire.NotFound,
	} {
		if r := f.connect(t).send(line).reply(); r.Error == nil || r.Error.Code != code || r.Error.Message == "" {
			t.Errorf("%s: %+v", line, r.Error)
		}
	}
}

func TestWithoutTheTokenNothingIsAnswered(t *testing.T) {
	f := serve(t, "secret")
	for _, token := range []string{"", "Secret", "secret ", "secre"} {
		r := f.connect(t).send(fmt.Sprintf(`{"version":1,"method":"hello","token":%q}`, token)).reply()
		if r.Error == nil || r.Error.Code != wire.Unauthorized || strings.Contains(r.Error.Message, "secret") {
			t.Errorf("%q: %+v", token, r.Error)
		}
	}
	if r := f.call(t, "hello", "{}"); r.Error != nil {
		t.Error(r.Error)
	}
}

func TestALineWithoutEndIsCutOff(t *testing.T) {
	f := serve(t, "")
	p := f.connect(t)
	go func() { _, _ = io.Copy(p.conn, strings.NewReader(strings.Repeat("x", 3<<20))) }()
	if r := p.reply(); r.Error == nil || r.Error.Code != wire.BadRequest {
		t.Fatalf("%+v", r)
	}
}

func TestClockEntropyAndSettingsReachTheMachine(t *testing.T) {
	f := serve(t, "")
	r := f.call(t, "time", `{"unix_ns":1760000000000000000}`)
	if !strings.Contains(string(r.Result), `"stepped":true`) || !slices.Equal(f.machine.stepped, []int64{1760000000000000000}) {
		t.Errorf("%s %v", r.Result, f.machine.stepped)
	}
	f.call(t, "entropy", `{"seed":"`+strings.Repeat("QUFB", 12)+`"}`)
	f.call(t, "configure", `{"hostname":"new","dns":[]}`)
	if f.machine.seeds != 1 || *f.machine.set.Hostname != "new" || len(*f.machine.set.DNS) != 0 || f.machine.set.AuthorizedKeys != nil {
		t.Errorf("%+v", f.machine)
	}
}

func TestShutdownIsAnsweredBeforeItHappens(t *testing.T) {
	f := serve(t, "")
	if r := f.call(t, "shutdown", `{"grace_s":2.5}`); r.Error != nil || string(r.Result) != "{}" {
		t.Fatalf("%+v", r)
	}
	if grace := <-f.machine.stopped; grace != 2500*time.Millisecond {
		t.Fatal(grace)
	}
}

func TestExecRunsThroughTheWholeServer(t *testing.T) {
	f := serve(t, "")
	p := f.connect(t).send(`{"version":1,"method":"exec","params":{"argv":["/bin/sh","-c","echo $BANGER_VM; exit 3"]}}`)
	if r := p.reply(); !r.Stream {
		t.Fatalf("%+v", r)
	}
	frames := wire.NewFrameReader(p.in)
	kind, out, err := frames.Read()
	if kind != wire.Stdout || string(out) != "web\n" {
		t.Fatalf("0x%02x %q %v", kind, out, err)
	}
	if kind, out, err = frames.Read(); kind != wire.Exit || string(out) != `{"code":3}` {
		t.Fatalf("0x%02x %q %v", kind, out, err)
	}
	if _, _, err = frames.Read(); err != io.EOF {
		t.Fatalf("after the exit frame: %v", err)
	}
}

func (p *peer) putTar(data []byte) (kind byte, payload string) {
	p.t.Helper()
	w := wire.NewDataWriter(wire.NewFrameWriter(p.conn))
	if _, err := w.Write(data); err != nil {
		p.t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		p.t.Fatal(err)
	}
	kind, b, err := wire.NewFrameReader(p.in).Read()
	if err != nil {
		p.t.Fatal(err)
	}
	return kind, string(b)
}

func TestPutAndGetAreReverses(t *testing.T) {
	f := serve(t, "")
	var data bytes.Buffer
	w := tar.NewWriter(&data)
	content := strings.Repeat("0123456789", 100000)
	_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "dir/file", Mode: 0o640, Size: int64(len(content))})
	_, _ = io.WriteString(w, content)
	_ = w.Close()
	to := t.TempDir() + "/t"
	p := f.connect(t).send(`{"version":1,"method":"put","params":{"path":"` + to + `","mode":"replace","owner":null}}`)
	p.reply()
	if kind, b := p.putTar(data.Bytes()); kind != wire.Result || b != `{"files":1,"bytes":1000000}` {
		t.Fatalf("0x%02x %s", kind, b)
	}
	p = f.connect(t).send(`{"version":1,"method":"get","params":{"path":"` + to + `"}}`)
	p.reply()
	frames := wire.NewFrameReader(p.in)
	r := wire.NewDataReader(frames)
	back := tar.NewReader(r)
	var names []string
	for {
		h, err := back.Next()
		if err != nil {
			break
		}
		names = append(names, h.Name)
	}
	if err := r.Drain(); err != nil || !slices.Equal(names, []string{"dir/", "dir/file"}) {
		t.Fatalf("%q, %v", names, err)
	}
	if kind, b, _ := frames.Read(); kind != wire.Result || string(b) != `{"files":1,"bytes":1000000}` {
		t.Fatalf("0x%02x %s", kind, b)
	}
}

func TestAFailedPutIsReportedToAClientThatSendsOn(t *testing.T) {
	f := serve(t, "")
	p := f.connect(t).send(`{"version":1,"method":"put","params":{"path":"` + t.TempDir() + `/t","mode":"replace"}}`)
	p.reply()
	kind, b := p.putTar(bytes.Repeat([]byte("garbage!"), 4<<20/8))
	if kind != wire.Failure || !strings.Contains(b, `"code":"bad_request"`) {
		t.Fatalf("0x%02x %s", kind, b)
	}
}

func TestGetOfNothingIsNotFound(t *testing.T) {
	f := serve(t, "")
	p := f.connect(t).send(`{"version":1,"method":"get","params":{"path":"/no/such/path"}}`)
	p.reply()
	if kind, b, _ := wire.NewFrameReader(p.in).Read(); kind != wire.Failure || !strings.Contains(string(b), wire.NotFound) {
		t.Fatalf("0x%02x %s", kind, b)
	}
}

func TestDialPassesBytesAndHalfCloses(t *testing.T) {
	f := serve(t, "")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		all, _ := io.ReadAll(c) // ends only when the half-close has arrived
		fmt.Fprintf(c, "got %d", len(all))
	}()
	port := l.Addr().(*net.TCPAddr).Port
	p := f.connect(t)
	// The first bytes may come with the request itself.
	p.send(fmt.Sprintf(`{"version":1,"method":"dial","params":{"port":%d}}`+"\nearly", port))
	if r := p.reply(); !r.Stream {
		t.Fatalf("%+v", r.Error)
	}
	if err := p.conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(p.in); err != nil || string(got) != "got 6" {
		t.Fatalf("%q, %v", got, err)
	}
}

// deafConn keeps the end of its data to itself, as a vsock does in some VMMs.
type deafConn struct{ Conn }

func (deafConn) CloseWrite() error { return nil }

func (deafConn) endsWhole() {}

func TestAClientThatHearsNoHalfCloseHearsTheLocalEnd(t *testing.T) {
	dir := t.TempDir()
	pair := func(name string) (ours, theirs Conn) {
		l, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		theirs, err = Dial(Address{Kind: "unix", Path: filepath.Join(dir, name)}, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return c.(Conn), theirs
	}
	agent, client := pair("client")
	local, program := pair("local")
	done := make(chan struct{})
	go func() {
		join(deafConn{agent}, agent, local)
		close(done)
	}()
	if _, err := program.Write([]byte("bye")); err != nil {
		t.Fatal(err)
	}
	program.Close()
	_ = client.SetReadDeadline(time.Now().Add(2 * time.Minute))
	if got, err := io.ReadAll(client); err != nil || string(got) != "bye" {
		t.Fatalf("%q, %v", got, err)
	}
	<-done
}

func TestAnnouncementIsRepeatedUntilTheHostListens(t *testing.T) {
	f := serve(t, "")
	f.Config.Token = "tok"
	to := Address{Kind: "unix", Path: filepath.Join(t.TempDir(), "host")}
	done := make(chan error, 1)
	go func() { done <- f.Announce(context.Background(), to) }()
	time.Sleep(120 * time.Millisecond)
	l, err := net.Listen("unix", to.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for try := range 2 { // the first connection ends without an answer
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		in := bufio.NewReader(c)
		line, err := wire.ReadLine(in)
		if err != nil {
			t.Fatal(err)
		}
		if try == 0 {
			c.Close()
			continue
		}
		want := `{"version":1,"method":"announce","params":{"vm_id":"id","boot_id":"boot","agent_version":"1.2.3","protocol":1},"token":"tok"}`
		if string(line) != want {
			t.Errorf("%s", line)
		}
		fmt.Fprintln(c, `{"result":{"time_unix_ns":1760000000000000000}}`)
		if line, err = wire.ReadLine(in); err != nil || string(line) != `{"ready":true}` {
			t.Errorf("%s, %v", line, err)
		}
		c.Close()
	}
	if err := <-done; err != nil || len(f.machine.stepped) != 1 {
		t.Fatal(err, f.machine.stepped)
	}
}

func TestAnnouncementEndsWithItsContext(t *testing.T) {
	f := serve(t, "")
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if err := f.Announce(ctx, Address{Kind: "unix", Path: "/no/such/socket"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
}

func TestTCPAdmitsItsPeerOnly(t *testing.T) {
	for peer, admitted := range map[string]bool{"127.0.0.1": true, "172.16.0.1": false} {
		l, err := Listen(Address{Kind: "tcp", Host: "127.0.0.1:0"}, netip.MustParseAddr(peer))
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			if c, err := l.Accept(); err == nil {
				_, _ = io.WriteString(c, "hello")
				c.Close()
			}
		}()
		c, err := net.Dial("tcp", l.(netListener).Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(2 * time.Minute))
		got, _ := io.ReadAll(c)
		if (string(got) == "hello") != admitted {
			t.Errorf("peer %s: %q", peer, got)
		}
		c.Close()
		l.Close()
	}
}

func TestAddressesAreParsed(t *testing.T) {
	for s, want := range map[string]Address{
		"unix:/a:b": {Kind: "unix", Path: "/a:b"}, "tcp:127.0.0.1:80": {Kind: "tcp", Host: "127.0.0.1:80"},
		"vsock:7000": {Kind: "vsock", Port: 7000},
	} {
		if got, err := ParseAddress(s); err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "unix:", "tcp:host:80", "tcp:127.0.0.1", "vsock:x", "vsock:4294967296", "udp:1"} {
		if got, err := ParseAddress(s); err == nil {
			t.Errorf("%s: %+v", s, got)
		}
	}
}

func TestKernelTablesAreDecoded(t *testing.T) {
	for s, want := range map[string]string{
		"0100007F:1F90":                         "127.0.0.1:8080",
		"00000000000000000000000001000000:0016": "[::1]:22",
		"0000000000000000FFFF0000020010AC:0050": "[::ffff:172.16.0.2]:80",
	} {
		if got, err := parseEndpoint(s); err != nil || got.String() != want {
			t.Errorf("%s: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "zz:1", "0100007F", "0100:1", "0100007F:12345"} {
		if got, err := parseEndpoint(s); err == nil {
			t.Errorf("%s: %v", s, got)
		}
	}
	m := parseMemory("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:\t500 kB\nHugePages_Total: 0\n")
	if m.TotalBytes != 1024000 || m.AvailableBytes != 512000 {
		t.Errorf("%+v", m)
	}
}

func TestOwnListenerIsListedWithItsProcess(t *testing.T) {
	f := serve(t, "")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	want := fmt.Sprintf(`{"proto":"tcp","address":"127.0.0.1","port":%d,"pid":%d,"process":"service.test"}`,
		l.Addr().(*net.TCPAddr).Port, os.Getpid())
	if r := f.call(t, "ports", "{}"); !strings.Contains(string(r.Result), want) {
		t.Fatalf("%s is not in %s", want, r.Result)
	}
}

func TestVsockRefusalsAreErrorsNotHangs(t *testing.T) {
	l, err := listenVsock(4294967290)
	if err != nil {
		t.Skipf("needs AF_VSOCK: %v", err)
	}
	l.Close()
	begin := time.Now()
	if c, err := dialVsock(1, 4294967291, 2*time.Second); err == nil {
		c.Close()
		t.Error("connected to nobody")
	}
	if time.Since(begin) > 2*time.Minute {
		t.Error("it took too long")
	}
}
