package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// maxEdited bounds how much of an existing file is read to be edited, in bytes.
const maxEdited = 4 << 20

// writeFile makes root/path a regular file with exactly this content and mode, by rename: whatever
// was there, a symbolic link as well, is replaced and never written through. A file that is right
// already is left alone.
func writeFile(root, path string, content []byte, mode os.FileMode) error {
	full := filepath.Join(root, path)
	if info, err := os.Lstat(full); err == nil && info.Mode() == mode {
		if old, err := os.ReadFile(full); err == nil && bytes.Equal(old, content) {
			return nil
		}
	}
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	temp := fmt.Sprintf("%s.banger-%08x", full, rand.Uint32())
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Chmod(mode)
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(temp, full)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("writing %s: %w", path, err), os.Remove(temp))
	}
	return nil
}

// readFile returns the content of root/path, nil when there is no such regular file.
//
// Errors: the file exists and is unreadable or larger than 4 MiB.
func readFile(root, path string) ([]byte, error) {
	// Non-blocking, so that a FIFO in its place cannot stop the boot.
	f, err := os.OpenFile(filepath.Join(root, path), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, err
	}
	content, err := io.ReadAll(io.LimitReader(f, maxEdited+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	if len(content) > maxEdited {
		return nil, fmt.Errorf("reading %s: larger than %d bytes", path, maxEdited)
	}
	return content, nil
}

const (
	fenceBegin = "# BEGIN banger (replaced at each boot)"
	fenceEnd   = "# END banger"
)

// fence puts block between banger's markers at the top of text, in place of an earlier block.
// Every other line stays as it is. A begin marker without an end ends at the next empty line.
func fence(text string, block []string) string {
	var kept []string
	inside := false
	for line := range strings.Lines(text) {
		bare := strings.TrimRight(line, "\r\n")
		switch {
		case bare == fenceBegin:
			inside = true
		case inside && (bare == fenceEnd || bare == ""):
			inside = false
		case !inside:
			kept = append(kept, line)
		}
	}
	var b strings.Builder
	if len(block) > 0 {
		b.WriteString(fenceBegin + "\n" + strings.Join(block, "\n") + "\n" + fenceEnd + "\n")
	}
	b.WriteString(strings.Join(kept, ""))
	return b.String()
}
