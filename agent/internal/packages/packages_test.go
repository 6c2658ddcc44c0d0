package packages

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestManagerIsFoundByIDThenByLike(t *testing.T) {
	for text, want := range map[string]Manager{
		"ID=debian\n": Apt,
		"NAME=\"Ubuntu\"\nID=ubuntu\nID_LIKE=debian\n":     Apt,
		"ID=alpine\nVERSION_ID=3.20.1\n":                   Apk,
		"ID=fedora\n":                                      Dnf,
		"ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n":   Dnf,
		"ID=ol\nID_LIKE=\"fedora\"\n":                      Dnf,
		"ID=manjaro\nID_LIKE=arch\n":                       Pacman,
		"ID=\"opensuse-tumbleweed\"\nID_LIKE=\"opensuse\"": Zypper,
		"ID=\"void\"\n":                                    Xbps,
		"ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n":        Apt,
		"ID=unheard-of\nID_LIKE='nobody arch debian'\n":    Pacman,
		"ID=unheard-of\n":                                  "",
		"nonsense\n#ID=debian\nID_LIKE=\n":                 "",
		"":                                                 "",
	} {
		if got := ParseRelease(text).Find(); got != want {
			t.Errorf("%q: found %q, want %q", text, got, want)
		}
	}
}

func TestReleaseIsReadWhereEtcHasNone(t *testing.T) {
	root := t.TempDir()
	if got := ReadRelease(root).Find(); got != "" {
		t.Errorf("an empty root has the manager %q", got)
	}
	if err := os.MkdirAll(filepath.Join(root, "usr/lib"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "usr/lib/os-release"), []byte("ID=arch\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := ReadRelease(root).Find(); got != Pacman {
		t.Errorf("found %q", got)
	}
}

func TestNamesThatCouldBeOptionsAreRefused(t *testing.T) {
	for _, name := range []string{"-y", "--allow-untrusted", "", "a b", "a;b", "$(x)", "a\nb", "../x"} {
		if _, _, err := Apt.Install([]string{"good", name}); err == nil {
			t.Errorf("%q is taken for a package", name)
		}
	}
	if _, _, err := Apt.Install(nil); err == nil {
		t.Error("nothing is installed")
	}
	if _, _, err := Dnf.Install([]string{"gcc-c++", "@development-tools", "python3=3.11.2-1+b1"}); err != nil {
		t.Error(err)
	}
}

// The scripts run with programs of the test in place of the managers: what they are asked is what
// counts, and that a failure of the first step is one of the whole.
func TestEveryManagerIsAskedForThePackages(t *testing.T) {
	for manager, script := range scripts {
		dir := t.TempDir()
		fake := "#!/bin/sh\necho \"$0 $*\" >> \"$LOG\"\n"
		if err := os.WriteFile(filepath.Join(dir, string(manager)), []byte(fake), 0o755); err != nil {
			t.Fatal(err)
		}
		argv, env, err := manager.Install([]string{"one", "two"})
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("/bin/sh", argv[1:]...)
		cmd.Env = []string{"PATH=" + dir, "LOG=" + filepath.Join(dir, "log")}
		for key, value := range env {
			cmd.Env = append(cmd.Env, key+"="+value)
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
		text, _ := os.ReadFile(filepath.Join(dir, "log"))
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		if last := lines[len(lines)-1]; !strings.HasSuffix(last, "-- one two") {
			t.Errorf("%s was asked %q last", manager, last)
		}
		broken := "#!/bin/sh\nexit 3\n"
		if err := os.WriteFile(filepath.Join(dir, string(manager)), []byte(broken), 0o755); err != nil {
			t.Fatal(err)
		}
		cmd = exec.Command("/bin/sh", argv[1:]...)
		cmd.Env = []string{"PATH=" + dir}
		if cmd.Run() == nil {
			t.Errorf("%s: a failure is a success", manager)
		}
	}
	if !slices.Equal(keys(scripts), keys(sshServers)) {
		t.Error("a manager has no script, or no package with sshd")
	}
}

func keys[V any](m map[Manager]V) []Manager {
	var all []Manager
	for k := range m {
		all = append(all, k)
	}
	slices.Sort(all)
	return all
}
