package link

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"banger/agent/internal/guest"
)

// inNamespace runs f on a thread in a network namespace of its own, which ends with the thread.
func inNamespace(t *testing.T, f func(ip func(...string) string)) {
	t.Helper()
	path, err := exec.LookPath("ip")
	if err != nil {
		t.Skip("needs ip, the judge of what was configured")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread goes, and the namespace with it
		if err := syscall.Unshare(syscall.CLONE_NEWNET); err != nil {
			t.Logf("needs CAP_SYS_ADMIN: %v", err)
			return
		}
		f(func(args ...string) string {
			out, err := exec.Command(path, args...).CombinedOutput()
			if err != nil {
				t.Errorf("ip %v: %s", args, out)
			}
			return string(out)
		})
	}()
	<-done
	if os.Geteuid() != 0 {
		t.Skip("needs CAP_SYS_ADMIN")
	}
}

type ipAddr struct {
	Ifname   string   `json:"ifname"`
	MTU      int      `json:"mtu"`
	Flags    []string `json:"flags"`
	AddrInfo []struct {
		Local     string `json:"local"`
		Prefixlen int    `json:"prefixlen"`
		Broadcast string `json:"broadcast"`
	} `json:"addr_info"`
}

func TestALinkIsConfiguredAsIpSeesIt(t *testing.T) {
	inNamespace(t, func(ip func(...string) string) {
		const mac = "06:00:ac:10:00:02"
		ip("link", "add", "near", "address", mac, "type", "veth", "peer", "name", "far")
		ip("link", "set", "far", "up")
		if err := LoopbackUp(); err != nil {
			t.Error(err)
		}
		n := &guest.Network{MAC: strings.ToUpper(mac), Address: "172.16.0.2", Prefix: 24, Gateway: "172.16.0.1", MTU: 1400}
		heard := listenARP(t, "far")
		for range 2 { // again changes nothing
			l, err := Find(n.MAC)
			if err != nil {
				t.Error(err)
				return
			}
			if err := Configure(l, n); err != nil {
				t.Error(err)
			}
		}
		var links []ipAddr
		if err := json.Unmarshal([]byte(ip("-j", "-4", "addr")), &links); err != nil {
			t.Error(err)
		}
		for _, l := range links {
			switch l.Ifname {
			case "near":
				if l.MTU != 1400 || len(l.AddrInfo) != 1 || l.AddrInfo[0].Local != "172.16.0.2" ||
					l.AddrInfo[0].Prefixlen != 24 || l.AddrInfo[0].Broadcast != "172.16.0.255" {
					t.Errorf("%+v", l)
				}
			case "lo":
				if len(l.AddrInfo) != 1 || l.AddrInfo[0].Local != "127.0.0.1" {
					t.Errorf("%+v", l)
				}
			}
		}
		if len(links) != 2 {
			t.Errorf("%+v", links)
		}
		if got := ip("route", "show", "default"); strings.TrimSpace(got) != "default via 172.16.0.1 dev near proto static" {
			t.Errorf("%q", got)
		}
		if heard != nil && !bytes.Contains(heard(), buildARP([]byte{6, 0, 0xac, 0x10, 0, 2}, [4]byte{172, 16, 0, 2})) {
			t.Error("the neighbour heard no gratuitous ARP")
		}
	})
}

// listenARP returns a function that reads the next ARP packet of a link.
func listenARP(t *testing.T, name string) func() []byte {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_PACKET, syscall.SOCK_DGRAM, int(htons(syscall.ETH_P_ARP)))
	if err != nil {
		t.Logf("not judged: the gratuitous ARP, which needs packet sockets: %v", err)
		return nil
	}
	links, err := list()
	if err != nil {
		t.Error(err)
	}
	for _, l := range links {
		if l.Name == name {
			err = syscall.Bind(fd, &syscall.SockaddrLinklayer{Protocol: htons(syscall.ETH_P_ARP), Ifindex: int(l.Index)})
		}
	}
	if err != nil {
		t.Error(err)
	}
	limit := syscall.Timeval{Sec: 5}
	if err := syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &limit); err != nil {
		t.Error(err)
	}
	return func() []byte {
		defer syscall.Close(fd)
		buf := make([]byte, 1500)
		n, _, err := syscall.Recvfrom(fd, buf, 0)
		if err != nil {
			t.Errorf("listening for ARP: %v", err)
			return nil
		}
		return buf[:n]
	}
}

func TestFailuresNameTheLinkAndTheKernelsReason(t *testing.T) {
	inNamespace(t, func(ip func(...string) string) {
		if _, err := Find("06:00:00:00:00:01"); !errors.Is(err, ErrNoLink) || !strings.Contains(err.Error(), "06:00:00:00:00:01") {
			t.Errorf("%v", err)
		}
		if _, err := Find("not a mac"); err == nil || errors.Is(err, ErrNoLink) {
			t.Errorf("%v", err)
		}
		ip("link", "add", "d0", "address", "06:00:00:00:00:02", "type", "veth", "peer", "name", "d1")
		l, err := Find("06:00:00:00:00:02")
		if err != nil {
			t.Error(err)
			return
		}
		n := &guest.Network{Address: "172.16.0.2", Prefix: 24, Gateway: "10.9.9.9"}
		err = Configure(l, n)
		if !errors.Is(err, syscall.ENETUNREACH) || !strings.Contains(err.Error(), "d0") || !strings.Contains(err.Error(), "10.9.9.9") {
			t.Errorf("a gateway outside: %v", err)
		}
		n.Address = "fe80::1"
		if err := Configure(l, n); err == nil {
			t.Error("IPv6 was accepted")
		}
	})
}
