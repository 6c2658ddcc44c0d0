package command

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"banger/agent/internal/procs"
	"banger/agent/internal/wire"
)

const (
	// leftoverWait is how long background processes that hold the pipes may delay the exit.
	leftoverWait = 2 * time.Second
	// outputBuffer is a pipe's default capacity: a larger buffer would never fill.
	outputBuffer = 64 << 10
)

// hangupGrace lies between HUP and KILL after a lost connection; a test makes it longer.
var hangupGrace = 5 * time.Second

// run is one command while it runs.
type run struct {
	plan    Plan
	in      *wire.FrameReader
	out     *wire.FrameWriter
	proc    *procs.Process
	stdin   *wire.StdinQueue
	tty     *os.File // nil without a terminal
	feedTo  *os.File
	outputs []output

	// lost is closed when the connection can no longer be used, reason says why.
	lost     chan struct{}
	lostOnce sync.Once
	reason   error
}

type output struct {
	file *os.File
	kind byte
}

// Run starts the plan and carries its streams until the exit or error frame has been sent, or the
// connection was lost and the command is gone. started is called with the process's pid.
func Run(reaper *procs.Reaper, plan Plan, in *wire.FrameReader, out *wire.FrameWriter,
	started func(pid int),
) error {
	r := &run{plan: plan, in: in, out: out, stdin: wire.NewStdinQueue(), lost: make(chan struct{})}
	if plan.Program == "" {
		return r.refuse(plan.Code, plan.Reason)
	}
	if err := r.start(reaper); err != nil {
		code := 0
		switch {
		case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ENOTDIR):
			code = 127 // the file is there: its interpreter or loader is not
		case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.ENOEXEC),
			errors.Is(err, syscall.EPERM), errors.Is(err, syscall.ETXTBSY):
			code = 126
		case errors.Is(err, syscall.E2BIG):
			return out.WriteJSON(wire.Failure, wire.Errorf(wire.BadRequest, "exec: %v", err))
		default:
			return out.WriteJSON(wire.Failure, wire.Errorf(wire.OperationFailed, "exec: %v", err))
		}
		return r.refuse(code, err.Error())
	}
	if started != nil {
		started(r.proc.Pid)
	}
	go r.receive()
	go feedStdin(r.stdin, r.feedTo, r.out, r.tty != nil)
	return r.carry()
}

func (r *run) refuse(code int, reason string) error {
	if err := r.out.Write(wire.Stderr, []byte("banger: "+reason+"\n")); err != nil {
		return err
	}
	return r.out.WriteJSON(wire.Exit, map[string]int{"code": code})
}

// start forks the command on pipes or a terminal. The child's ends are closed here in any case.
func (r *run) start(reaper *procs.Reaper) error {
	attr := &syscall.ProcAttr{Dir: r.plan.Dir, Env: r.plan.Env,
		Sys: &syscall.SysProcAttr{Credential: r.plan.Cred}}
	var theirs []int
	var ours []*os.File
	defer func() {
		for _, fd := range theirs {
			syscall.Close(fd)
		}
		if r.proc == nil {
			for _, f := range ours {
				f.Close()
			}
		}
	}()
	if r.plan.TTY != nil {
		uid := os.Geteuid()
		if r.plan.Cred != nil {
			uid = int(r.plan.Cred.Uid)
		}
		terminal, peer, err := openPTY(*r.plan.TTY, uid)
		if err != nil {
			return err
		}
		ours, theirs = append(ours, terminal), append(theirs, peer)
		r.tty, r.feedTo = terminal, terminal
		r.outputs = []output{{terminal, wire.Stdout}}
		attr.Files = []uintptr{uintptr(peer), uintptr(peer), uintptr(peer)}
		attr.Sys.Setsid, attr.Sys.Setctty, attr.Sys.Ctty = true, true, 0
	} else {
		input, stdin, err := procs.InputPipe()
		if err != nil {
			return err
		}
		ours, theirs = append(ours, input), append(theirs, stdin)
		r.feedTo = input
		attr.Files = []uintptr{uintptr(stdin)}
		for _, kind := range []byte{wire.Stdout, wire.Stderr} {
			file, fd, err := procs.OutputPipe()
			if err != nil {
				return err
			}
			ours, theirs = append(ours, file), append(theirs, fd)
			r.outputs = append(r.outputs, output{file, kind})
			attr.Files = append(attr.Files, uintptr(fd))
		}
		attr.Sys.Setpgid = true
	}
	proc, err := reaper.Start(r.plan.Program, r.plan.Argv, attr)
	if err != nil {
		return err
	}
	r.proc = proc
	return nil
}

// lose marks the connection as unusable; the first reason stays.
func (r *run) lose(reason error) {
	r.lostOnce.Do(func() {
		r.reason = reason
		close(r.lost)
	})
}

// receive handles the client's frames. It never blocks on the process and never on the writer. It
// goes on after the command's end, so that what the client still sends is read, not reset.
func (r *run) receive() {
	for {
		kind, payload, err := r.in.Read()
		if err == nil {
			err = r.handle(kind, payload)
		}
		if err != nil {
			r.lose(err)
			return
		}
	}
}

func (r *run) handle(kind byte, payload []byte) error {
	switch kind {
	case wire.Stdin:
		return r.stdin.Add(payload)
	case wire.StdinClose:
		r.stdin.End()
		return nil
	case wire.Resize:
		var size Size
		if err := json.Unmarshal(payload, &size); err != nil {
			return wire.Errorf(wire.BadRequest, "resize frame: %v", err)
		}
		return r.resize(size)
	case wire.Signal:
		var p struct {
			Name string `json:"name"`
		}
		if err := json.Unmarshal(payload, &p); err != nil {
			return wire.Errorf(wire.BadRequest, "signal frame: %v", err)
		}
		sig, ok := ParseSignal(p.Name)
		if !ok {
			return wire.Errorf(wire.BadRequest, "signal frame: no signal is named %q", p.Name)
		}
		// ESRCH: the command has ended meanwhile, and the exit frame is on its way.
		_ = r.proc.SignalGroup(sig)
		return nil
	default:
		return wire.Errorf(wire.BadRequest, "exec: unexpected frame of type 0x%02x", kind)
	}
}

func (r *run) resize(size Size) error {
	if r.tty == nil {
		return wire.Errorf(wire.BadRequest, "resize frame: the command has no terminal")
	}
	raw, err := r.tty.SyscallConn()
	if err != nil {
		return nil // closed: the command has ended
	}
	_ = raw.Control(func(fd uintptr) { _ = setSize(int(fd), size) })
	return nil
}

// carry forwards output until the end and sends the final frame.
func (r *run) carry() error {
	var pumps sync.WaitGroup
	for _, o := range r.outputs {
		pumps.Go(func() { r.pump(o) })
	}
	gone := false
	select {
	case <-r.proc.Done():
	case <-r.lost:
		gone = true
		r.hangUp()
	}
	limit := time.Now().Add(leftoverWait)
	for _, o := range r.outputs {
		_ = o.file.SetReadDeadline(limit) // a closed file has been read to its end
	}
	r.stdin.Close()
	// Unblocks a feeder whose pipe is full and held open by a leftover.
	_ = r.feedTo.SetWriteDeadline(time.Now())
	pumps.Wait()
	if gone {
		var protocol *wire.Error
		if errors.As(r.reason, &protocol) {
			return r.out.WriteJSON(wire.Failure, protocol)
		}
		return fmt.Errorf("the connection of pid %d was lost: %w", r.proc.Pid, r.reason)
	}
	status := r.proc.Wait()
	if status.Signaled() {
		return r.out.WriteJSON(wire.Exit, map[string]string{"signal": FormatSignal(status.Signal())})
	}
	return r.out.WriteJSON(wire.Exit, map[string]int{"code": status.ExitStatus()})
}

// hangUp ends a command whose connection is gone and returns when its leader has ended and nobody
// of its group is left, or KILL has been sent.
func (r *run) hangUp() {
	r.stdin.Close()
	_ = r.proc.SignalGroup(syscall.SIGHUP)
	_ = r.proc.SignalGroup(syscall.SIGCONT) // a stopped process acts on HUP only when continued
	grace := time.NewTimer(hangupGrace)
	defer grace.Stop()
	select {
	case <-r.proc.Done():
		if r.proc.SignalGroup(0) == syscall.ESRCH {
			return
		}
		<-grace.C
	case <-grace.C:
	}
	_ = r.proc.SignalGroup(syscall.SIGKILL)
	<-r.proc.Done()
}

// pump sends one output until its end. After the command's end a deadline is set: then what is in
// the pipe at that moment, all of the command's own output, is still sent. Without a usable
// connection it reads and discards, so that the command is not stuck in a write when HUP comes.
func (r *run) pump(o output) {
	buf := make([]byte, outputBuffer)
	send := func(data []byte) {
		if err := r.out.Write(o.kind, data); err != nil {
			r.lose(err)
		}
	}
	for {
		n, err := o.file.Read(buf)
		if n > 0 {
			send(buf[:n])
		}
		if err == nil {
			continue
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			_ = o.file.SetReadDeadline(time.Time{})
			drainPresent(o.file, buf, send)
			// A background process that writes on must not be killed by SIGPIPE for it.
			go discard(o.file)
			return
		}
		o.file.Close() // io.EOF, or EIO from a terminal whose last user has left
		return
	}
}

// drainPresent sends what a pipe or terminal holds now, and no byte that comes later than one
// capacity of it.
func drainPresent(f *os.File, buf []byte, send func([]byte)) {
	const mostBytes = 1 << 20 // the largest capacity of a pipe without privilege
	raw, err := f.SyscallConn()
	if err != nil {
		return
	}
	left := mostBytes
	_ = raw.Control(func(fd uintptr) {
		if n, ok := pending(int(fd)); ok {
			left = n
		}
	})
	for left > 0 {
		n := 0
		readErr := raw.Read(func(fd uintptr) bool {
			n, err = syscall.Read(int(fd), buf[:min(left, len(buf))])
			return true // EAGAIN too: nothing more is there
		})
		if readErr != nil || err != nil || n <= 0 {
			return
		}
		send(buf[:n])
		left -= n
	}
}

func discard(f *os.File) {
	buf := make([]byte, 4096)
	for {
		if _, err := f.Read(buf); err != nil {
			f.Close()
			return
		}
	}
}
