// Package service answers the host: it listens, checks who asks, and carries out the methods of
// docs/protocol.md. One connection is one request.
//
// It lives as long as the agent. What it owns belongs to connections: a connection that ends takes
// its command with it, everything else is finished or undone by the method itself.
package service

import (
	"bufio"
	"crypto/subtle"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"banger/agent/internal/command"
	"banger/agent/internal/guest"
	"banger/agent/internal/procs"
	"banger/agent/internal/session"
	"banger/agent/internal/wire"
)

const (
	// requestWait is how long a peer may take to send its request line.
	requestWait = 30 * time.Second
	// lingerWait is how long a finished connection waits for the peer to take the last frame.
	lingerWait = 10 * time.Second
)

// Machine is what methods may do to the machine itself. On a host, in tests, most of it is refused.
type Machine interface {
	// Init names the process 1 and its state, for health.
	Init() (kind, state string)
	// StepClock sets the clock when it differs by more than a second.
	StepClock(unixNs int64) (stepped bool, err error)
	// Configure applies and writes new settings.
	Configure(c Settings) error
	// Grow grows the guest's filesystems to their devices.
	Grow() ([]GrownFilesystem, error)
	// Filesystems are the mount points that stats reports.
	Filesystems() []string
	// AddEntropy credits seed to the kernel's generator and reseeds it.
	AddEntropy(seed []byte) error
	// FirstBoot is how what belongs to the first boot goes: running, done, failed, or nothing.
	FirstBoot() string
	// Settle stops what writes to the disks, for a capture.
	Settle(grace time.Duration)
	// Stop ends the machine; it is called after the answer has been sent.
	Stop(grace time.Duration)
}

// Settings are the params of configure; nil fields stay as they are.
type Settings struct {
	Hostname       *string   `json:"hostname"`
	DNS            *[]string `json:"dns"`
	AuthorizedKeys *[]string `json:"authorized_keys"`
}

// GrownFilesystem is one entry of the result of grow.
type GrownFilesystem struct {
	Path        string `json:"path"`
	BeforeBytes uint64 `json:"before_bytes"`
	AfterBytes  uint64 `json:"after_bytes"`
}

// Server answers requests.
type Server struct {
	Config  *guest.Config
	Host    command.Host
	Version string
	BootID  string
	Token   string // empty: no token is asked for
	Reaper  *procs.Reaper
	Machine Machine
	// Sessions is nil where none are kept.
	Sessions *session.Store
	// Started is called with the pid of every command, nil for nothing.
	Started func(pid int)
	Log     func(format string, args ...any)

	open sync.WaitGroup
	// streams counts the calls that last: commands, transfers, joined connections.
	streams atomic.Int64
}

// call is one request while it is answered.
type call struct {
	*Server
	req  wire.Request
	conn Conn
	in   *bufio.Reader
}

// Serve answers connections until l is closed.
func (s *Server) Serve(l Listener) error {
	for {
		conn, err := l.Accept()
		if isClosed(err) {
			return nil
		}
		if err != nil {
			// Out of descriptors or memory: wait for connections to end, the listener stays good.
			s.Log("accepting a connection: %v", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		s.open.Go(func() { s.Handle(conn) })
	}
}

// Wait returns when every connection has been answered.
func (s *Server) Wait() { s.open.Wait() }

// Handle answers one connection and closes it.
func (s *Server) Handle(conn Conn) {
	defer conn.Close()
	defer func() {
		// The agent may be process 1: one bad request must not end the machine.
		if r := recover(); r != nil {
			s.Log("internal error while answering a request: %v", r)
		}
	}()
	c := &call{Server: s, conn: conn, in: bufio.NewReaderSize(conn, 64<<10)}
	_ = conn.SetReadDeadline(time.Now().Add(requestWait))
	line, err := wire.ReadLine(c.in)
	if err != nil {
		var bad *wire.Error
		if errors.As(err, &bad) {
			c.fail(err)
			c.linger()
		}
		return
	}
	_ = conn.SetReadDeadline(time.Time{})
	c.req, err = wire.ParseRequest(line)
	if err == nil {
		err = s.authorize(c.req)
	}
	if err == nil {
		err = c.dispatch()
	}
	if err != nil {
		c.fail(err)
	}
	c.linger()
}

func (s *Server) authorize(req wire.Request) error {
	if s.Token == "" || subtle.ConstantTimeCompare([]byte(req.Token), []byte(s.Token)) == 1 {
		return nil
	}
	return wire.Errorf(wire.Unauthorized, "%s: the token of this VM is missing or wrong", req.Method)
}

// fail answers with an error line. A peer that has gone cannot be told, and that is all right.
func (c *call) fail(err error) {
	e := *wire.AsError(err)
	e.OpID = c.req.OpID
	if err := wire.WriteJSONLine(c.conn, wire.Reply{Error: &e, OpID: c.req.OpID}); err != nil {
		c.Log("%s: answering: %v", c.req.Method, err)
	}
}

// stream sends the line after which frames follow.
func (c *call) stream() error {
	return wire.WriteJSONLine(c.conn, wire.Reply{Stream: true, OpID: c.req.OpID})
}

// linger ends this side and reads what the peer still sends. Closing with unread bytes would reset
// the connection, and the peer could lose the last frame.
func (c *call) linger() {
	if c.conn.CloseWrite() != nil {
		return
	}
	_ = c.conn.SetReadDeadline(time.Now().Add(lingerWait))
	_, _ = io.Copy(io.Discard, c.conn)
}
