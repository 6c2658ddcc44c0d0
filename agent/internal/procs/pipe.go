package procs

import (
	"fmt"
	"os"
	"syscall"
)

// OutputPipe returns the agent's end of a pipe, for the runtime's poller, and the child's write
// end, which stays blocking: few programs expect EAGAIN on their stdout.
func OutputPipe() (*os.File, int, error) {
	var fds [2]int
	if err := syscall.Pipe2(fds[:], syscall.O_CLOEXEC); err != nil {
		return nil, -1, fmt.Errorf("making a pipe: %w", err)
	}
	f, err := pollable(fds[0], "output")
	if err != nil {
		syscall.Close(fds[1])
		return nil, -1, err
	}
	return f, fds[1], nil
}

// InputPipe is OutputPipe the other way round: the agent writes, the child reads.
func InputPipe() (*os.File, int, error) {
	var fds [2]int
	if err := syscall.Pipe2(fds[:], syscall.O_CLOEXEC); err != nil {
		return nil, -1, fmt.Errorf("making a pipe: %w", err)
	}
	f, err := pollable(fds[1], "input")
	if err != nil {
		syscall.Close(fds[0])
		return nil, -1, err
	}
	return f, fds[0], nil
}

// pollable wraps fd, which it takes over, as a non-blocking file.
func pollable(fd int, name string) (*os.File, error) {
	if err := syscall.SetNonblock(fd, true); err != nil {
		syscall.Close(fd)
		return nil, fmt.Errorf("making a pipe: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}
