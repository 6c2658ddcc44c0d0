package account

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func guest(t *testing.T, passwd, group string) string {
	t.Helper()
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"passwd": passwd, "group": group} {
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

const passwd = `root:x:0:0:root:/root:/bin/bash
# a comment
broken line
:x:5:5::/:/bin/sh
dev:x:1000:1000:Dev,,,:/home/dev:/bin/zsh
1000:x:77:77::/odd:/bin/sh
huge:x:4294967295:1::/:/bin/sh
norel:x:12:12::relative:/bin/sh
`

const groups = `root:x:0:
dev:x:1000:
docker:x:999:dev,other
wheel:x:10:root,dev
bad:x:notanumber:dev
`

func TestUsersAreFoundByNameAndNumber(t *testing.T) {
	root := guest(t, passwd, groups)
	for _, c := range []struct {
		spec     string
		uid, gid uint32
		groups   []uint32
		home     string
	}{
		{"", 0, 0, []uint32{10}, "/root"},
		{"root", 0, 0, []uint32{10}, "/root"},
		{"dev", 1000, 1000, []uint32{999, 10}, "/home/dev"},
		{"1000", 77, 77, nil, "/odd"}, // a name of digits is a name first
		{"dev:docker", 1000, 999, nil, "/home/dev"},
		{"dev:5", 1000, 5, nil, "/home/dev"},
		{"dev:", 1000, 1000, []uint32{999, 10}, "/home/dev"},
		{"4242", 4242, 0, nil, "/"},
		{"4242:7", 4242, 7, nil, "/"},
		{"norel", 12, 12, nil, "/"},
	} {
		u, err := Lookup(root, c.spec)
		if err != nil || u.UID != c.uid || u.GID != c.gid || u.Home != c.home ||
			!slices.Equal(u.Groups, c.groups) {
			t.Errorf("%q: %+v, %v", c.spec, u, err)
		}
	}
}

func TestUnknownUsersAndGroupsAreErrorsThatNameThem(t *testing.T) {
	root := guest(t, passwd, groups)
	for spec, named := range map[string]string{"nobody-here": "nobody-here", "huge": "huge",
		"4294967295": "4294967295", "-1": "-1", "dev:nogroup": "nogroup", ":5": `user ""`} {
		_, err := Lookup(root, spec)
		if err == nil || !strings.Contains(err.Error(), named) {
			t.Errorf("%q: %v", spec, err)
		}
	}
}

func TestAnImageWithoutPasswdHasRoot(t *testing.T) {
	for _, spec := range []string{"", "root", "0"} {
		u, err := Lookup(t.TempDir(), spec)
		if err != nil || u.UID != 0 || u.Home != "/root" || u.Name != "root" {
			t.Errorf("%q: %+v, %v", spec, u, err)
		}
	}
}
