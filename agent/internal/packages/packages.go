// Package packages knows the package managers of distributions: which one a guest has, by its
// os-release, and the command that installs with it.
//
// It decides only; whoever asks runs the command.
package packages

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Manager is a package manager by the name of its program.
type Manager string

// The managers that banger can drive.
const (
	Apt    Manager = "apt-get"
	Apk    Manager = "apk"
	Dnf    Manager = "dnf"
	Pacman Manager = "pacman"
	Zypper Manager = "zypper"
	Xbps   Manager = "xbps-install"
)

// Release is what matters of an os-release file.
//
// Source: os-release(5).
type Release struct {
	ID   string
	Like []string
}

// byID: distributions by their ID; those that are derived from one of them say so in ID_LIKE.
var byID = map[string]Manager{
	"debian": Apt, "ubuntu": Apt, "alpine": Apk, "fedora": Dnf, "rhel": Dnf, "centos": Dnf,
	"rocky": Dnf, "almalinux": Dnf, "amzn": Dnf, "arch": Pacman, "opensuse": Zypper,
	"opensuse-leap": Zypper, "opensuse-tumbleweed": Zypper, "suse": Zypper, "sles": Zypper,
	"void": Xbps,
}

// scripts are run by sh -c with the packages as arguments. "--" keeps a name from being an option.
var scripts = map[Manager]string{
	Apt: `apt-get -q update && exec apt-get -q -y --no-install-recommends ` +
		`-o Dpkg::Options::=--force-confold install -- "$@"`,
	Apk:    `exec apk add --no-progress --update-cache -- "$@"`,
	Dnf:    `exec dnf -q -y --setopt=install_weak_deps=False install -- "$@"`,
	Pacman: `exec pacman -Sy --noconfirm --needed --noprogressbar -- "$@"`,
	Zypper: `zypper -n -q refresh && exec zypper -n -q install --no-recommends -- "$@"`,
	// Its own new version first: an old one refuses to install anything else.
	Xbps: `xbps-install -Syu xbps && exec xbps-install -y -- "$@"`,
}

// sshServers names the package with sshd.
var sshServers = map[Manager]string{
	Apt: "openssh-server", Apk: "openssh-server", Dnf: "openssh-server", Pacman: "openssh",
	Zypper: "openssh-server", Xbps: "openssh",
}

var nameForm = regexp.MustCompile(`^[A-Za-z0-9@][A-Za-z0-9@._+:/=~<>-]{0,199}$`)

// ParseRelease reads an os-release text; lines that are none are passed over.
func ParseRelease(text string) Release {
	var r Release
	for line := range strings.Lines(text) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok {
			continue
		}
		value = strings.Trim(value, `"'`)
		switch key {
		case "ID":
			r.ID = value
		case "ID_LIKE":
			r.Like = strings.Fields(value)
		}
	}
	return r
}

// ReadRelease reads the os-release of the system below root; an empty one when there is none.
func ReadRelease(root string) Release {
	for _, path := range []string{"etc/os-release", "usr/lib/os-release"} {
		if text, err := os.ReadFile(filepath.Join(root, path)); err == nil && len(text) < 1<<20 {
			return ParseRelease(string(text))
		}
	}
	return Release{}
}

// Find returns the manager of a distribution, by ID, then by ID_LIKE in its order; "" when none is
// known.
func (r Release) Find() Manager {
	for _, id := range append([]string{r.ID}, r.Like...) {
		if m, ok := byID[id]; ok {
			return m
		}
	}
	return ""
}

// Install returns the command that installs packages, and what its environment needs.
//
// Errors: nothing to install, or a name that is no package's.
func (m Manager) Install(names []string) (argv []string, env map[string]string, err error) {
	if len(names) == 0 {
		return nil, nil, fmt.Errorf("no packages are named")
	}
	if i := slices.IndexFunc(names, func(n string) bool { return !nameForm.MatchString(n) }); i >= 0 {
		return nil, nil, fmt.Errorf("%q is no package name", names[i])
	}
	argv = append([]string{"sh", "-c", scripts[m], "sh"}, names...)
	if m == Apt {
		env = map[string]string{"DEBIAN_FRONTEND": "noninteractive"}
	}
	return argv, env, nil
}

// SSHServer is the package that brings sshd.
func (m Manager) SSHServer() string { return sshServers[m] }
