package service

import (
	"bytes"
	"io"
	"math/rand"
	"os"
	"syscall"
	"testing"
)

// packets gives a vsockConn whose every write is one packet, as on a vsock, and the other end.
func packets(t *testing.T) (vsockConn, *os.File) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX,
		syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn := vsockConn{os.NewFile(uintptr(fds[0]), "conn")}
	peer := os.NewFile(uintptr(fds[1]), "peer")
	t.Cleanup(func() { conn.Close(); peer.Close() })
	return conn, peer
}

func TestVsockPacketsAreOnesThatTheKernelKeepsInOnePiece(t *testing.T) {
	// What is left of 32 KiB beside struct skb_shared_info and the packet's header.
	const onePiece = 32<<10 - 320 - 44
	data := make([]byte, 300<<10+1)
	rand.New(rand.NewSource(1)).Read(data)
	for name, write := range map[string]func(vsockConn) (int64, error){
		"write": func(c vsockConn) (int64, error) {
			n, err := c.Write(data)
			return int64(n), err
		},
		"copy": func(c vsockConn) (int64, error) {
			return io.Copy(c, bytes.NewReader(data))
		},
		"copy of a pipe": func(c vsockConn) (int64, error) {
			r, w, err := os.Pipe()
			if err != nil {
				return 0, err
			}
			defer r.Close()
			go func() {
				defer w.Close()
				w.Write(data)
			}()
			return io.Copy(c, r)
		},
	} {
		t.Run(name, func(t *testing.T) {
			conn, peer := packets(t)
			var got []byte
			done := make(chan struct{})
			go func() {
				defer close(done)
				packet := make([]byte, 1<<20)
				for len(got) < len(data) {
					n, err := peer.Read(packet)
					if err != nil || n > onePiece {
						t.Errorf("a packet of %d bytes: %v", n, err)
						peer.Close()
						break
					}
					got = append(got, packet[:n]...)
				}
			}()
			n, err := write(conn)
			conn.Close() // the peer waits for no more
			<-done
			if n != int64(len(data)) || err != nil || !bytes.Equal(got, data) {
				t.Errorf("wrote %d: %v; %d arrived", n, err, len(got))
			}
		})
	}
	conn, peer := packets(t)
	if n, err := conn.Write(nil); n != 0 || err != nil {
		t.Errorf("nothing: %d, %v", n, err)
	}
	peer.Close()
	if n, err := conn.Write(data); n != 0 || err == nil {
		t.Errorf("to nobody: %d, %v", n, err)
	}
}
