package session

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"banger/agent/internal/command"
	"banger/agent/internal/procs"
	"banger/agent/internal/wire"
)

// Mode is the argument that makes this program a supervisor.
const Mode = "session"

// readyFD is where a supervisor writes one byte when its command runs or cannot.
const readyFD = 3

// supervisor is one session while it runs, in a process of its own. The command is run exactly as
// one of exec; what would be its client is on the other side of two pipes in this process.
type supervisor struct {
	dir    string
	doc    spec
	number uint64
	logs   map[byte]*recorder

	mu     sync.Mutex
	freed  *sync.Cond
	credit int
}

// Supervise runs the session in dir to its end. It is the whole life of a supervisor's process.
func Supervise(dir string) error {
	syscall.CloseOnExec(readyFD)
	ready := os.NewFile(readyFD, "ready")
	defer ready.Close()
	held, err := lock(dir, lockFile)
	if err != nil {
		return err
	}
	if held == nil {
		return errors.New("another supervisor has this session")
	}
	defer held.Close()
	// Ours was the agent's own, which nothing may end; a session is no better than other commands.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("0"), 0)
	s := &supervisor{dir: dir, credit: wire.StartCredit}
	s.freed = sync.NewCond(&s.mu)
	if err := readJSON(dir, specFile, &s.doc); err != nil {
		return err
	}
	s.logs = map[byte]*recorder{
		wire.Stdout: {dir: dir, stream: Stdout, keep: s.doc.Keep},
		wire.Stderr: {dir: dir, stream: Stderr, keep: s.doc.Keep},
	}
	// Open for both directions: it never ends, and those who write find a reader at all times.
	control, err := os.OpenFile(filepath.Join(dir, controlFIFO), os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	stdin, err := os.OpenFile(filepath.Join(dir, stdinFIFO), os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	in, toCommand := io.Pipe()
	fromCommand, out := io.Pipe()
	frames := wire.NewFrameWriter(toCommand)
	started := func(pid int) {
		_ = writeJSON(dir, statusFile,
			status{State: Running, Pid: pid, Started: time.Now().UnixNano()})
		_, _ = ready.Write([]byte{1})
		ready.Close()
	}
	reaper := procs.NewReaper()
	go func() {
		_ = command.Run(reaper, s.doc.Plan, wire.NewFrameReader(bufio.NewReader(in)),
			wire.NewFrameWriter(out), started)
		out.Close()
	}()
	input := &inputFIFO{file: stdin}
	go s.listen(control, input, frames)
	if s.doc.Stdin == Pipe {
		go s.feed(input, frames)
	} else {
		_ = frames.Write(wire.StdinClose, nil)
	}
	end := s.record(wire.NewFrameReader(bufio.NewReader(fromCommand)))
	var begin status // none where the command could not be started
	if readJSON(dir, statusFile, &begin) == nil {
		end.Pid, end.Started = begin.Pid, begin.Started
	}
	if err := writeJSON(dir, statusFile, end); err != nil {
		return err
	}
	_, _ = ready.Write([]byte{1})
	return nil
}

// record keeps what the command prints until it has ended, and returns how it did.
func (s *supervisor) record(frames *wire.FrameReader) status {
	st := status{State: Failed, Reason: "the command's end was not seen"}
	for {
		kind, payload, err := frames.Read()
		if err != nil {
			break
		}
		switch kind {
		case wire.Stdout, wire.Stderr:
			s.logs[kind].add(s.number, payload)
			s.number++
		case wire.Credit:
			s.mu.Lock()
			s.credit += int(binary.BigEndian.Uint32(payload))
			s.freed.Signal()
			s.mu.Unlock()
		case wire.Exit:
			var end struct {
				Code   *int   `json:"code"`
				Signal string `json:"signal"`
			}
			if json.Unmarshal(payload, &end) == nil {
				st.State, st.Reason, st.Code, st.Signal = Exited, "", end.Code, end.Signal
			}
		case wire.Failure:
			var e wire.Error
			if json.Unmarshal(payload, &e) == nil {
				st.Reason = e.Message
			}
		}
	}
	st.Ended = time.Now().UnixNano()
	for _, log := range s.logs {
		log.close()
	}
	return st
}

// listen carries out what comes through the control FIFO.
func (s *supervisor) listen(control *os.File, input *inputFIFO, frames *wire.FrameWriter) {
	lines := bufio.NewScanner(control)
	for lines.Scan() {
		var m controlMessage
		if json.Unmarshal(lines.Bytes(), &m) != nil {
			continue
		}
		if m.Resize != nil && s.doc.Plan.TTY != nil {
			_ = frames.WriteJSON(wire.Resize, m.Resize)
		}
		if _, ok := command.ParseSignal(m.Signal); ok {
			_ = frames.WriteJSON(wire.Signal, map[string]string{"name": m.Signal})
		}
		if m.End && s.doc.Stdin == Pipe {
			input.end()
		}
	}
}

// feed carries the input FIFO to the command, as much as it reads.
func (s *supervisor) feed(input *inputFIFO, frames *wire.FrameWriter) {
	buf := make([]byte, 64<<10)
	for {
		s.mu.Lock()
		for s.credit == 0 {
			s.freed.Wait()
		}
		room := min(s.credit, len(buf))
		s.mu.Unlock()
		n, err := input.read(buf[:room])
		if n > 0 {
			s.mu.Lock()
			s.credit -= n
			s.mu.Unlock()
			if frames.Write(wire.Stdin, buf[:n]) != nil {
				return
			}
			continue
		}
		if err != nil {
			_ = frames.Write(wire.StdinClose, nil)
			return
		}
	}
}

// inputFIFO is read until somebody says that it ends: a FIFO that is open for both directions has no
// end of its own.
type inputFIFO struct {
	file  *os.File
	mu    sync.Mutex
	ended bool
}

// end makes what is in the FIFO now the last of the input.
func (f *inputFIFO) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	_ = f.file.SetReadDeadline(time.Unix(1, 0))
}

// read returns input, or io.EOF when it has ended and everything was read.
func (f *inputFIFO) read(buf []byte) (int, error) {
	n, err := f.file.Read(buf)
	if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		return n, err
	}
	raw, err := f.file.SyscallConn()
	if err != nil {
		return 0, io.EOF
	}
	// A deadline that has passed keeps Read from looking at all.
	if control := raw.Control(func(fd uintptr) { n, err = syscall.Read(int(fd), buf) }); control != nil ||
		err != nil || n <= 0 {
		return 0, io.EOF
	}
	return n, nil
}
