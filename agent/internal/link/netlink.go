// Package link configures the guest's network by rtnetlink: loopback and the one interface that the
// host described by its MAC address. What it sets belongs to the kernel and lives until it ends;
// the socket lives as long as one call.
package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
)

// attr encodes one rtattr.
func attr(kind uint16, value []byte) []byte {
	b := make([]byte, 4, 4+len(value)+3)
	binary.NativeEndian.PutUint16(b, uint16(4+len(value)))
	binary.NativeEndian.PutUint16(b[2:], kind)
	b = append(b, value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func u32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// request sends one message and returns the replies up to the acknowledgement or the end of a dump.
//
// Errors: the errno that the kernel answers with.
//
// Source: netlink(7), rtnetlink(7).
func request(kind, flags uint16, body []byte) ([]syscall.NetlinkMessage, error) {
	fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC,
		syscall.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	defer syscall.Close(fd)
	const seq = 1
	msg := make([]byte, syscall.NLMSG_HDRLEN, syscall.NLMSG_HDRLEN+len(body))
	binary.NativeEndian.PutUint32(msg, uint32(syscall.NLMSG_HDRLEN+len(body)))
	binary.NativeEndian.PutUint16(msg[4:], kind)
	binary.NativeEndian.PutUint16(msg[6:], flags|syscall.NLM_F_REQUEST)
	binary.NativeEndian.PutUint32(msg[8:], seq)
	msg = append(msg, body...)
	kernel := &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK}
	if err := syscall.Sendto(fd, msg, 0, kernel); err != nil {
		return nil, fmt.Errorf("sending a netlink request: %w", err)
	}
	var replies []syscall.NetlinkMessage
	buf := make([]byte, 64<<10)
	for {
		n, _, err := syscall.Recvfrom(fd, buf, 0)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading a netlink reply: %w", err)
		}
		// A copy: the parsed messages point into what they were parsed from.
		messages, err := syscall.ParseNetlinkMessage(append([]byte(nil), buf[:n]...))
		if err != nil {
			return nil, fmt.Errorf("reading a netlink reply: %w", err)
		}
		for _, m := range messages {
			switch m.Header.Type {
			case syscall.NLMSG_ERROR:
				if len(m.Data) < 4 {
					return nil, errors.New("reading a netlink reply: short acknowledgement")
				}
				if code := int32(binary.NativeEndian.Uint32(m.Data)); code != 0 {
					return nil, syscall.Errno(-code)
				}
				return replies, nil
			case syscall.NLMSG_DONE:
				return replies, nil
			default:
				replies = append(replies, m)
			}
		}
	}
}

// Link is an interface.
type Link struct {
	Index int32
	Name  string
	MAC   []byte
}

// list returns all interfaces.
func list() ([]Link, error) {
	body := make([]byte, syscall.SizeofIfInfomsg)
	replies, err := request(syscall.RTM_GETLINK, syscall.NLM_F_DUMP, body)
	if err != nil {
		return nil, fmt.Errorf("listing links: %w", err)
	}
	var links []Link
	for _, m := range replies {
		if m.Header.Type != syscall.RTM_NEWLINK || len(m.Data) < syscall.SizeofIfInfomsg {
			continue
		}
		l := Link{Index: int32(binary.NativeEndian.Uint32(m.Data[4:]))}
		attrs, err := syscall.ParseNetlinkRouteAttr(&m)
		if err != nil {
			return nil, fmt.Errorf("listing links: %w", err)
		}
		for _, a := range attrs {
			switch a.Attr.Type {
			case syscall.IFLA_IFNAME:
				l.Name = string(a.Value[:max(0, len(a.Value)-1)])
			case syscall.IFLA_ADDRESS:
				l.MAC = a.Value
			}
		}
		links = append(links, l)
	}
	return links, nil
}

// setUp sets a link's MTU, 0 to keep it, and brings it up.
func setUp(index int32, mtu int) error {
	body := make([]byte, syscall.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(body[4:], uint32(index))
	binary.NativeEndian.PutUint32(body[8:], syscall.IFF_UP)
	binary.NativeEndian.PutUint32(body[12:], syscall.IFF_UP)
	if mtu > 0 {
		body = append(body, attr(syscall.IFLA_MTU, u32(uint32(mtu)))...)
	}
	_, err := request(syscall.RTM_NEWLINK, syscall.NLM_F_ACK, body)
	return err
}

// addAddress gives a link an IPv4 address. One that is there already is no error.
func addAddress(index int32, address [4]byte, prefix int) error {
	body := make([]byte, syscall.SizeofIfAddrmsg)
	body[0], body[1] = syscall.AF_INET, byte(prefix)
	binary.NativeEndian.PutUint32(body[4:], uint32(index))
	body = append(body, attr(syscall.IFA_LOCAL, address[:])...)
	body = append(body, attr(syscall.IFA_ADDRESS, address[:])...)
	if prefix < 31 {
		broadcast := binary.BigEndian.Uint32(address[:]) | (1<<(32-prefix) - 1)
		body = append(body, attr(syscall.IFA_BROADCAST, binary.BigEndian.AppendUint32(nil, broadcast))...)
	}
	_, err := request(syscall.RTM_NEWADDR,
		syscall.NLM_F_ACK|syscall.NLM_F_CREATE|syscall.NLM_F_EXCL, body)
	if errors.Is(err, syscall.EEXIST) {
		return nil
	}
	return err
}

// setDefaultRoute makes gateway, reached through the link, the default route.
func setDefaultRoute(index int32, gateway [4]byte) error {
	body := make([]byte, syscall.SizeofRtMsg)
	body[0] = syscall.AF_INET
	body[4] = syscall.RT_TABLE_MAIN
	body[5] = syscall.RTPROT_STATIC
	body[6] = syscall.RT_SCOPE_UNIVERSE
	body[7] = syscall.RTN_UNICAST
	body = append(body, attr(syscall.RTA_GATEWAY, gateway[:])...)
	body = append(body, attr(syscall.RTA_OIF, u32(uint32(index)))...)
	_, err := request(syscall.RTM_NEWROUTE,
		syscall.NLM_F_ACK|syscall.NLM_F_CREATE|syscall.NLM_F_REPLACE, body)
	return err
}
