// Package procs starts processes and reaps them.
//
// One Reaper owns every wait of its process. As PID 1 a wait for "any child" would take the exit
// status from whoever waits for one child by pid, so nobody else may wait: no os/exec anywhere in
// the agent. It lives as long as the agent; orphans that were handed to it are reaped as well.
package procs

import (
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// Reaper starts children and hands out their exit statuses.
type Reaper struct {
	mu       sync.Mutex
	children map[int]*Process
	orphans  int
	wake     chan os.Signal
	stop     chan struct{}
}

// Process is a child. Its pid stays its own until its status has been collected.
type Process struct {
	Pid    int
	done   chan struct{}
	status syscall.WaitStatus
	// mu orders signals against the collection of the status: afterwards the pid may be another's.
	mu     sync.Mutex
	reaped bool
}

// NewReaper starts to reap. Only one Reaper may exist in a process.
func NewReaper() *Reaper {
	r := &Reaper{
		children: map[int]*Process{},
		wake:     make(chan os.Signal, 1),
		stop:     make(chan struct{}),
	}
	signal.Notify(r.wake, syscall.SIGCHLD)
	go r.run()
	return r
}

// Close stops reaping; children that still run stay unreaped.
func (r *Reaper) Close() {
	signal.Stop(r.wake)
	close(r.stop)
}

func (r *Reaper) run() {
	for {
		r.collect()
		select {
		case <-r.wake:
		case <-r.stop:
			return
		}
	}
}

// collect takes every status that is there: one SIGCHLD may stand for many children.
func (r *Reaper) collect() {
	for r.collectOne() {
	}
}

func (r *Reaper) collectOne() bool {
	// The lock is held from fork to registration, so that no child is reaped as a stranger, and
	// while fork collects the child of a failed exec itself.
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var info siginfo
		// Look first: the process must be marked before its pid becomes free.
		if err := waitid(pAll, 0, &info, syscall.WEXITED|syscall.WNOHANG|syscall.WNOWAIT); err != nil {
			if err == syscall.EINTR {
				continue
			}
			return false
		}
		if info.pid == 0 {
			return false
		}
		pid := int(info.pid)
		p := r.children[pid]
		if p != nil {
			p.mu.Lock()
			defer p.mu.Unlock()
		}
		var status syscall.WaitStatus
		for {
			if _, err := syscall.Wait4(pid, &status, syscall.WNOHANG, nil); err != syscall.EINTR {
				break
			}
		}
		if p == nil {
			r.orphans++
			return true
		}
		delete(r.children, pid)
		p.reaped, p.status = true, status
		close(p.done)
		return true
	}
}

// Start runs argv[0], a path, with the given attributes.
//
// Errors: the syscall.Errno of fork or exec, wrapped.
func (r *Reaper) Start(path string, argv []string, attr *syscall.ProcAttr) (*Process, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := syscall.ForkExec(path, argv, attr)
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", path, err)
	}
	p := &Process{Pid: pid, done: make(chan struct{})}
	r.children[pid] = p
	return p, nil
}

// Orphans returns how many processes were reaped that the agent had not started.
func (r *Reaper) Orphans() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.orphans
}

// Done is closed when the process has ended and been reaped.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait returns the status once Done is closed.
func (p *Process) Wait() syscall.WaitStatus {
	<-p.done
	return p.status
}

// Signal sends sig to the process unless it has been reaped.
func (p *Process) Signal(sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped {
		return syscall.ESRCH
	}
	return syscall.Kill(p.Pid, sig)
}

// SignalGroup sends sig to the process group that the process leads. It reaches members that
// outlive the leader: their membership keeps the number from being given to another.
func (p *Process) SignalGroup(sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return syscall.Kill(-p.Pid, sig)
}
