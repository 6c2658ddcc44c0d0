package service

import (
	"bufio"
	"fmt"
	"os"
	"strings"
)

// sshPort is where the host's `vm ssh` connects to.
const sshPort = 22

// activity tells whether somebody uses this machine: what the host asks before it stops one that
// nobody seems to need any more.
func (c *call) activity() (any, error) {
	if err := c.params(&none{}); err != nil {
		return nil, err
	}
	sessions := 0
	if c.Sessions != nil {
		records, err := c.Sessions.List()
		if err != nil {
			return nil, err
		}
		for _, r := range records {
			if r.Live() {
				sessions++
			}
		}
	}
	ssh := 0
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		n, err := countConnections(table, sshPort)
		if err != nil && !os.IsNotExist(err) { // a kernel without IPv6
			return nil, err
		}
		ssh += n
	}
	return map[string]any{"streams": c.streams.Load(), "sessions": sessions, "ssh": ssh}, nil
}

// countConnections returns how many established TCP connections of one table of /proc/net have this
// local port.
//
// Source: proc_net(5); the states are those of include/net/tcp_states.h.
func countConnections(path string, port uint16) (int, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	n := 0
	s := bufio.NewScanner(f)
	for s.Scan() {
		fields := strings.Fields(s.Text())
		if len(fields) < 4 || fields[3] != "01" { // TCP_ESTABLISHED
			continue
		}
		local, err := parseEndpoint(fields[1])
		if err != nil {
			return 0, fmt.Errorf("reading %s: %w", path, err)
		}
		if local.Port() == port {
			n++
		}
	}
	return n, s.Err()
}
