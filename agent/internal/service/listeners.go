package service

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// socketEntry is one entry of the result of ports. pid is 0 when no process shows the socket.
type socketEntry struct {
	Proto   string `json:"proto"`
	Address string `json:"address"`
	Port    uint16 `json:"port"`
	PID     int    `json:"pid"`
	Process string `json:"process"`
	inode   uint64
}

// maxListeners bounds the reply line.
const maxListeners = 4096

func (c *call) ports() (any, error) {
	if err := c.params(&none{}); err != nil {
		return nil, err
	}
	found := []socketEntry{}
	for _, proto := range []string{"tcp", "tcp6", "udp", "udp6"} {
		entries, err := readSockets("/proc/net/"+proto, proto)
		if os.IsNotExist(err) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, err
		}
		found = append(found, entries...)
	}
	if len(found) > maxListeners {
		found = found[:maxListeners]
	}
	nameOwners(found)
	return map[string]any{"listeners": found}, nil
}

// readSockets returns the sockets of one table of /proc/net that wait for peers: TCP in LISTEN, UDP
// unconnected.
//
// Source: proc_net(5); the states are those of include/net/tcp_states.h.
func readSockets(path, proto string) ([]socketEntry, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	want := "0A" // TCP_LISTEN
	if strings.HasPrefix(proto, "udp") {
		want = "07" // TCP_CLOSE, which is what an unconnected datagram socket is in
	}
	var found []socketEntry
	s := bufio.NewScanner(f)
	for s.Scan() {
		fields := strings.Fields(s.Text())
		if len(fields) < 10 || fields[3] != want {
			continue
		}
		local, err := parseEndpoint(fields[1])
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", path, err)
		}
		inode, err := strconv.ParseUint(fields[9], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", path, err)
		}
		found = append(found, socketEntry{Proto: strings.TrimSuffix(proto, "6"),
			Address: local.Addr().Unmap().String(), Port: local.Port(), inode: inode})
	}
	return found, s.Err()
}

// parseEndpoint decodes the kernel's "0100007F:1F90": 32-bit words in the machine's byte order.
func parseEndpoint(s string) (netip.AddrPort, error) {
	address, port, ok := strings.Cut(s, ":")
	raw, err := hex.DecodeString(address)
	number, portErr := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil || portErr != nil || len(raw) != 4 && len(raw) != 16 {
		return netip.AddrPort{}, fmt.Errorf("malformed address %q", s)
	}
	for i := 0; i < len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	addr, _ := netip.AddrFromSlice(raw)
	return netip.AddrPortFrom(addr, uint16(number)), nil
}

// nameOwners fills in the lowest pid that has each socket open. Processes come and go meanwhile;
// what cannot be read is left out.
func nameOwners(sockets []socketEntry) {
	wanted := map[string][]int{}
	for i, s := range sockets {
		key := fmt.Sprintf("socket:[%d]", s.inode)
		wanted[key] = append(wanted[key], i)
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	for _, pid := range pids {
		if len(wanted) == 0 {
			return
		}
		dir := filepath.Join("/proc", strconv.Itoa(pid))
		fds, err := os.ReadDir(dir + "/fd")
		if err != nil {
			continue
		}
		for _, fd := range fds {
			target, err := os.Readlink(dir + "/fd/" + fd.Name())
			if err != nil {
				continue
			}
			for _, i := range wanted[target] {
				comm, _ := os.ReadFile(dir + "/comm")
				sockets[i].PID = pid
				sockets[i].Process = strings.ToValidUTF8(strings.TrimSpace(string(comm)), "?")
			}
			delete(wanted, target)
		}
	}
}
