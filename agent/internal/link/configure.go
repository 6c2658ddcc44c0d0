package link

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"banger/agent/internal/guest"
)

// ErrNoLink is returned while no interface has the MAC address that the host configured.
var ErrNoLink = errors.New("no link has this MAC address")

// Find returns the link with the given MAC address.
//
// Errors: ErrNoLink; the device may still appear.
func Find(mac string) (Link, error) {
	want, err := net.ParseMAC(mac)
	if err != nil {
		return Link{}, fmt.Errorf("finding the link %s: %w", mac, err)
	}
	links, err := list()
	if err != nil {
		return Link{}, err
	}
	for _, l := range links {
		if bytes.Equal(l.MAC, want) {
			return l, nil
		}
	}
	return Link{}, fmt.Errorf("finding the link %s: %w", mac, ErrNoLink)
}

// LoopbackUp brings up lo, to which the kernel then gives its addresses.
func LoopbackUp() error {
	links, err := list()
	if err != nil {
		return err
	}
	for _, l := range links {
		if l.Name == "lo" {
			if err := setUp(l.Index, 0); err != nil {
				return fmt.Errorf("bringing up lo: %w", err)
			}
		}
	}
	return nil
}

// Configure sets MTU, address and default route of l, and brings it up. The neighbours are told by
// a gratuitous ARP: the address may have belonged to another MAC a moment ago. Where packet
// sockets are missing that is left out.
func Configure(l Link, n *guest.Network) error {
	address, err := ipv4(n.Address)
	if err != nil {
		return fmt.Errorf("configuring %s: address: %w", l.Name, err)
	}
	if err := setUp(l.Index, n.MTU); err != nil {
		return fmt.Errorf("configuring %s: bringing it up with MTU %d: %w", l.Name, n.MTU, err)
	}
	if err := addAddress(l.Index, address, n.Prefix); err != nil {
		return fmt.Errorf("configuring %s: adding %s/%d: %w", l.Name, n.Address, n.Prefix, err)
	}
	if n.Gateway != "" {
		gateway, err := ipv4(n.Gateway)
		if err != nil {
			return fmt.Errorf("configuring %s: gateway: %w", l.Name, err)
		}
		if err := setDefaultRoute(l.Index, gateway); err != nil {
			return fmt.Errorf("configuring %s: default route by %s: %w", l.Name, n.Gateway, err)
		}
	}
	err = announceAddress(l, address)
	if err != nil && !errors.Is(err, syscall.EAFNOSUPPORT) && !errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("configuring %s: gratuitous ARP: %w", l.Name, err)
	}
	return nil
}

func ipv4(s string) ([4]byte, error) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		return [4]byte{}, err
	}
	if !a.Is4() {
		return [4]byte{}, fmt.Errorf("%s is not an IPv4 address", s)
	}
	return a.As4(), nil
}

// announceAddress broadcasts an ARP request for the link's own address.
//
// Source: RFC 5227 section 2.3 (ARP announcement), packet(7).
func announceAddress(l Link, address [4]byte) error {
	if len(l.MAC) != 6 {
		return nil
	}
	arp := htons(syscall.ETH_P_ARP)
	fd, err := syscall.Socket(syscall.AF_PACKET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, int(arp))
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	to := &syscall.SockaddrLinklayer{Protocol: arp, Ifindex: int(l.Index), Halen: 6}
	copy(to.Addr[:], []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	return syscall.Sendto(fd, buildARP(l.MAC, address), 0, to)
}

func buildARP(mac []byte, address [4]byte) []byte {
	p := []byte{0, 1, 8, 0, 6, 4, 0, 1} // Ethernet, IPv4, sizes, request
	p = append(p, mac...)
	p = append(p, address[:]...)
	p = append(p, 0, 0, 0, 0, 0, 0)
	return append(p, address[:]...)
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }
