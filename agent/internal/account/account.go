// Package account reads the guest's own /etc/passwd and /etc/group.
//
// Nothing is cached: a user made a moment ago counts. The files belong to the guest, so they are
// read up to a limit and malformed lines are skipped, as the C library does.
package account

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// maxFile bounds what is read of each file, in bytes.
const maxFile = 16 << 20

// User is an account as commands need it.
type User struct {
	Name   string
	UID    uint32
	GID    uint32
	Groups []uint32 // supplementary, without GID
	Home   string
	Shell  string // empty when the account names none
}

type passwdEntry struct {
	name, home, shell string
	uid, gid          uint32
}

type groupEntry struct {
	name    string
	gid     uint32
	members []string
}

// Lookup finds a user given as "name", "number", "name:group" or "number:group".
//
// A number needs no entry in passwd: it then has no name, the group 0 and the home "/", as
// container users know it. root needs none either. An empty spec is root.
//
// Errors: the name, or the name of the group, does not exist.
func Lookup(root, spec string) (User, error) {
	if spec == "" {
		spec = "0"
	}
	who, group, hasGroup := strings.Cut(spec, ":")
	entries, err := readPasswd(filepath.Join(root, "etc/passwd"))
	if err != nil {
		return User{}, err
	}
	groups, err := readGroup(filepath.Join(root, "etc/group"))
	if err != nil {
		return User{}, err
	}
	user, err := findUser(entries, who)
	if err != nil {
		return User{}, err
	}
	if hasGroup && group != "" {
		// A named group replaces the account's own groups: that is what naming one is for.
		if user.GID, err = findGroup(groups, group); err != nil {
			return User{}, err
		}
		return user, nil
	}
	for _, g := range groups {
		for _, member := range g.members {
			if member == user.Name && user.Name != "" && g.gid != user.GID {
				user.Groups = append(user.Groups, g.gid)
			}
		}
	}
	return user, nil
}

func findUser(entries []passwdEntry, who string) (User, error) {
	for _, e := range entries {
		if e.name == who {
			return User{Name: e.name, UID: e.uid, GID: e.gid, Home: e.home, Shell: e.shell}, nil
		}
	}
	uid, err := parseID(who)
	if err != nil {
		if who == "root" {
			return User{Name: "root", Home: "/root"}, nil
		}
		return User{}, fmt.Errorf("no user %q in the guest's /etc/passwd", who)
	}
	for _, e := range entries {
		if e.uid == uid {
			return User{Name: e.name, UID: e.uid, GID: e.gid, Home: e.home, Shell: e.shell}, nil
		}
	}
	if uid == 0 {
		return User{Name: "root", Home: "/root"}, nil
	}
	return User{UID: uid, Home: "/"}, nil
}

func findGroup(groups []groupEntry, name string) (uint32, error) {
	for _, g := range groups {
		if g.name == name {
			return g.gid, nil
		}
	}
	gid, err := parseID(name)
	if err != nil {
		return 0, fmt.Errorf("no group %q in the guest's /etc/group", name)
	}
	return gid, nil
}

// parseID accepts 0 to 2^32-2; the kernel keeps the last number as "no change".
func parseID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err == nil && n == 1<<32-1 {
		err = strconv.ErrRange
	}
	return uint32(n), err
}

func readPasswd(path string) ([]passwdEntry, error) {
	var entries []passwdEntry
	err := eachLine(path, func(field []string) {
		if len(field) < 7 {
			return
		}
		uid, err1 := parseID(field[2])
		gid, err2 := parseID(field[3])
		if field[0] == "" || err1 != nil || err2 != nil {
			return
		}
		home := field[5]
		if !strings.HasPrefix(home, "/") {
			home = "/"
		}
		entries = append(entries, passwdEntry{field[0], home, field[6], uid, gid})
	})
	return entries, err
}

func readGroup(path string) ([]groupEntry, error) {
	var entries []groupEntry
	err := eachLine(path, func(field []string) {
		if len(field) < 4 {
			return
		}
		gid, err := parseID(field[2])
		if field[0] == "" || err != nil {
			return
		}
		entries = append(entries, groupEntry{field[0], gid, strings.Split(field[3], ",")})
	})
	return entries, err
}

// eachLine calls f with the colon-separated fields of every line. A missing file has no lines:
// images without passwd exist.
func eachLine(path string, f func([]string)) error {
	file, err := os.Open(path)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	s := bufio.NewScanner(io.LimitReader(file, maxFile))
	s.Buffer(nil, 1<<20) // a group may have very many members
	for s.Scan() {
		if line := strings.TrimSpace(s.Text()); line != "" && line[0] != '#' {
			f(strings.Split(line, ":"))
		}
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	return nil
}
