package session

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

func writeJSON(dir, name string, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	beside := filepath.Join(dir, "."+name)
	if err := os.WriteFile(beside, text, 0o600); err != nil {
		return err
	}
	return os.Rename(beside, filepath.Join(dir, name))
}

func readJSON(dir, name string, v any) error {
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	return json.Unmarshal(text, v)
}

// Open file description locks: they belong to the open file, as flock's do, but can be looked at
// without being taken. Source: fcntl(2), "Open file description locks".
const (
	ofdGetLock = 36
	ofdSetLock = 37
)

// lock takes a file's lock for as long as the returned file stays open; nil when another has it.
func lock(dir, name string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	err = syscall.FcntlFlock(f.Fd(), ofdSetLock, &syscall.Flock_t{Type: syscall.F_WRLCK})
	if err == nil {
		return f, nil
	}
	f.Close()
	if err == syscall.EAGAIN || err == syscall.EACCES {
		return nil, nil
	}
	return nil, fmt.Errorf("locking %s: %w", name, err)
}

// isLocked tells whether somebody holds the lock.
func isLocked(dir, name string) bool {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	held := syscall.Flock_t{Type: syscall.F_WRLCK}
	err = syscall.FcntlFlock(f.Fd(), ofdGetLock, &held)
	return err == nil && held.Type != syscall.F_UNLCK
}
