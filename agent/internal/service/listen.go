package service

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// Conn is a stream connection whose halves can be closed one by one.
type Conn interface {
	io.ReadWriteCloser
	CloseWrite() error
	SetReadDeadline(t time.Time) error
}

// Listener accepts connections from the peer that may connect, and closes others unanswered.
type Listener interface {
	Accept() (Conn, error)
	Close() error
}

// Address is where to listen or to connect: unix:PATH, tcp:ADDRESS:PORT or vsock:PORT.
type Address struct {
	Kind string
	Path string // unix
	Host string // tcp, address:port
	Port uint32 // vsock
}

// ParseAddress reads the form above.
func ParseAddress(s string) (Address, error) {
	kind, rest, _ := strings.Cut(s, ":")
	switch kind {
	case "unix":
		if rest != "" {
			return Address{Kind: kind, Path: rest}, nil
		}
	case "tcp":
		if _, err := netip.ParseAddrPort(rest); err == nil {
			return Address{Kind: kind, Host: rest}, nil
		}
	case "vsock":
		if port, err := strconv.ParseUint(rest, 10, 32); err == nil {
			return Address{Kind: kind, Port: uint32(port)}, nil
		}
	}
	return Address{}, fmt.Errorf("%q is none of unix:PATH, tcp:ADDRESS:PORT, vsock:PORT", s)
}

// Listen opens a listener. peer restricts tcp to one address; vsock takes the host (CID 2) only.
func Listen(a Address, peer netip.Addr) (Listener, error) {
	switch a.Kind {
	case "vsock":
		return listenVsock(a.Port)
	case "tcp":
		l, err := net.Listen(tcpFamily(a.Host), a.Host)
		if err != nil {
			return nil, err
		}
		return netListener{l, peer}, nil
	default:
		l, err := net.Listen("unix", a.Path)
		if err != nil {
			return nil, err
		}
		return netListener{l, netip.Addr{}}, nil
	}
}

// tcpFamily keeps 0.0.0.0 from meaning IPv6 as well, where no rule about peers was made.
func tcpFamily(address string) string {
	if a, err := netip.ParseAddrPort(address); err == nil && a.Addr().Is4() {
		return "tcp4"
	}
	return "tcp"
}

// Dial connects within the given time.
func Dial(a Address, timeout time.Duration) (Conn, error) {
	if a.Kind == "vsock" {
		return dialVsock(hostCID, a.Port, timeout)
	}
	network, address := a.Kind, a.Host
	if a.Kind == "unix" {
		address = a.Path
	}
	c, err := net.DialTimeout(network, address, timeout)
	if err != nil {
		return nil, err
	}
	return c.(Conn), nil
}

type netListener struct {
	net.Listener
	peer netip.Addr // the zero value admits everyone
}

func (l netListener) Accept() (Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.admits(c) {
			return c.(Conn), nil
		}
		c.Close()
	}
}

func (l netListener) admits(c net.Conn) bool {
	if !l.peer.IsValid() {
		return true
	}
	from, ok := c.RemoteAddr().(*net.TCPAddr)
	return ok && from.AddrPort().Addr().Unmap() == l.peer.Unmap()
}

// isClosed tells the error of a listener that was closed on purpose.
func isClosed(err error) bool { return errors.Is(err, net.ErrClosed) }
