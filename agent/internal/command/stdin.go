package command

import (
	"os"

	"banger/agent/internal/wire"
)

// feedStdin writes the queue to the process and credits what it took. When the process has closed its
// stdin the rest is discarded and still credited, so that the peer can finish. On a terminal the
// end of stdin is the terminal's end-of-input character.
func feedStdin(q *wire.StdinQueue, to *os.File, out *wire.FrameWriter, terminal bool) {
	broken := false
	for {
		chunk, ok := q.Next()
		if !ok {
			break
		}
		if !broken {
			if _, err := to.Write(chunk); err != nil {
				broken = true
			}
		}
		// Before the frame: the peer may answer it at once with as many bytes.
		q.Credited(len(chunk))
		if err := out.WriteCredit(len(chunk)); err != nil {
			broken = true // the connection is gone; what is queued is still consumed
		}
	}
	if !terminal {
		to.Close()
		return
	}
	if raw, err := to.SyscallConn(); err == nil && !broken {
		var eof byte
		var canonical bool
		if raw.Control(func(fd uintptr) { eof, canonical = endOfInput(int(fd)) }) == nil && canonical {
			_, _ = to.Write([]byte{eof})
		}
	}
}
