package service

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
)

type memoryStats struct {
	TotalBytes     uint64 `json:"total_bytes"`
	AvailableBytes uint64 `json:"available_bytes"`
}

type filesystemStats struct {
	Path       string `json:"path"`
	TotalBytes uint64 `json:"total_bytes"`
	FreeBytes  uint64 `json:"free_bytes"`
}

func (c *call) stats() (any, error) {
	if err := c.params(&none{}); err != nil {
		return nil, err
	}
	uptime, err := readUptime()
	if err != nil {
		return nil, err
	}
	load, err := readLoad()
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, err
	}
	filesystems := []filesystemStats{}
	for _, path := range c.Machine.Filesystems() {
		var st syscall.Statfs_t
		if err := syscall.Statfs(path, &st); err != nil {
			return nil, fmt.Errorf("stats: %s: %w", path, err)
		}
		filesystems = append(filesystems, filesystemStats{path,
			st.Blocks * uint64(st.Bsize), st.Bavail * uint64(st.Bsize)})
	}
	return map[string]any{"uptime_s": uptime, "load": load,
		"memory": parseMemory(string(text)), "filesystems": filesystems}, nil
}

func readLoad() ([3]float64, error) {
	var load [3]float64
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return load, err
	}
	_, err = fmt.Sscan(string(text), &load[0], &load[1], &load[2])
	return load, err
}

// parseMemory reads /proc/meminfo, whose numbers are KiB whatever they are labelled.
func parseMemory(text string) memoryStats {
	var m memoryStats
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		kib, err := strconv.ParseUint(fields[1], 10, 54)
		if err != nil {
			continue
		}
		switch fields[0] {
		case "MemTotal:":
			m.TotalBytes = kib << 10
		case "MemAvailable:":
			m.AvailableBytes = kib << 10
		}
	}
	return m
}
