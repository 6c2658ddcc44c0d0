package guest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func put(t *testing.T, root, path, text string, mode os.FileMode) {
	t.Helper()
	full := filepath.Join(root, path)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(full, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

func link(t *testing.T, target, root, path string) {
	t.Helper()
	full := filepath.Join(root, path)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, full); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, root, path string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestAnInitCountsOnlyWithItsParts(t *testing.T) {
	for name, c := range map[string]struct {
		programs []string
		links    map[string]string
		want     Init
	}{
		"nothing":            {nil, nil, Init{"agent", ""}},
		"busybox init":       {[]string{"/bin/busybox"}, map[string]string{"/sbin/init": "/bin/busybox"}, Init{"agent", ""}},
		"openrc":             {[]string{"/sbin/init", "/sbin/openrc"}, nil, Init{"openrc", "/sbin/init"}},
		"openrc, no init":    {[]string{"/sbin/openrc"}, nil, Init{"agent", ""}},
		"runit":              {[]string{"/usr/bin/runit-init", "/etc/runit/2"}, map[string]string{"/sbin": "usr/bin", "/usr/bin/init": "runit-init"}, Init{"runit", "/sbin/init"}},
		"systemd":            {[]string{"/usr/lib/systemd/systemd"}, map[string]string{"/sbin/init": "/lib/systemd/systemd"}, Init{"systemd", "/usr/lib/systemd/systemd"}},
		"systemd in /lib":    {[]string{"/lib/systemd/systemd"}, nil, Init{"systemd", "/lib/systemd/systemd"}},
		"absolute link":      {[]string{"/opt/systemd"}, map[string]string{"/lib/systemd/systemd": "/opt/systemd"}, Init{"systemd", "/lib/systemd/systemd"}},
		"link to the host's": {nil, map[string]string{"/sbin/init": "/bin/sh", "/sbin/openrc": "/bin/sh"}, Init{"agent", ""}},
	} {
		root := t.TempDir()
		for _, p := range c.programs {
			put(t, root, p, "", 0o755)
		}
		for path, target := range c.links {
			link(t, target, root, path)
		}
		if got := FindInit(root); got != c.want {
			t.Errorf("%s: %+v", name, got)
		}
	}
	root := t.TempDir()
	put(t, root, "/usr/lib/systemd/systemd", "", 0o644)
	if got := FindInit(root); got.Kind != "agent" {
		t.Errorf("a file that cannot run: %+v", got)
	}
}

func config() *Config {
	return &Config{Schema: 1, VMID: strings.Repeat("0123456789abcdef", 2), Name: "web", Hostname: "web",
		Network: &Network{MAC: "06:00:ac:10:00:02", Address: "172.16.0.2", Prefix: 24,
			Gateway: "172.16.0.1", MTU: 1500, DNS: []string{"1.1.1.1", "9.9.9.9"}},
		AuthorizedKeys: []string{"ssh-ed25519 AAAA banger"}, HostKey: "KEY", HostKeyPub: "ssh-ed25519 BBBB web",
		GitIdentity: &GitIdentity{Name: `Q "uo" te`, Email: "a@b.c"}}
}

func TestFilesOfABootAreWritten(t *testing.T) {
	root := t.TempDir()
	link(t, "../run/systemd/resolve/stub-resolv.conf", root, "etc/resolv.conf")
	put(t, root, "etc/fstab", "/dev/sda1 / ext4\n", 0o644)
	put(t, root, "etc/machine-id", "ffffffffffffffffffffffffffffffff\n", 0o444)
	put(t, root, "root/.ssh/authorized_keys", "ssh-rsa mine\n", 0o666)
	put(t, root, "etc/ssh/sshd_config", "PasswordAuthentication yes\n", 0o644)
	for range 2 { // the second boot must find everything right
		if err := WriteFiles(root, config(), "eth0"); err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]string{
		"etc/hostname":                 "web\n",
		"etc/resolv.conf":              "nameserver 1.1.1.1\nnameserver 9.9.9.9\n",
		"etc/machine-id":               config().VMID + "\n",
		"etc/ssh/ssh_host_ed25519_key": "KEY\n",
		"etc/ssh/sshd_config":          includeLine + "\nPasswordAuthentication yes\n",
		"root/.ssh/authorized_keys":    fenceBegin + "\nssh-ed25519 AAAA banger\n" + fenceEnd + "\nssh-rsa mine\n",
	} {
		if got := read(t, root, path); got != want {
			t.Errorf("%s: %q", path, got)
		}
	}
	if strings.Contains(read(t, root, "etc/fstab"), "sda1") ||
		!strings.Contains(read(t, root, "etc/hosts"), "172.16.0.2 web\n") {
		t.Error("fstab or hosts")
	}
	for path, want := range map[string]os.FileMode{"root": 0o755, "root/.ssh": 0o700,
		"root/.ssh/authorized_keys": 0o600, "etc/ssh/ssh_host_ed25519_key": 0o600, "run/banger": 0o700} {
		if info, err := os.Lstat(filepath.Join(root, path)); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	if info, _ := os.Lstat(filepath.Join(root, "etc/resolv.conf")); !info.Mode().IsRegular() {
		t.Error("resolv.conf is still a link")
	}
	left, _ := filepath.Glob(root + "/etc/*.banger-*")
	if len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestGitReadsTheIdentityAndAnExistingFileStays(t *testing.T) {
	git, err := exec.LookPath("git")
	if err != nil {
		t.Skip("needs git")
	}
	root := t.TempDir()
	if err := os.Mkdir(root+"/root", 0o755); err != nil {
		t.Fatal(err)
	}
	id := &GitIdentity{Name: "Q \"uo\" te \\ # ;\n", Email: "a@b.c"}
	if err := writeGitIdentity(root, id); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(git, "config", "-f", root+"/root/.gitconfig", "user.name").Output()
	if err != nil || string(out) != "Q \"uo\" te \\ # ;\n" {
		t.Fatalf("%q, %v", out, err)
	}
	put(t, root, "root/.gitconfig", "mine", 0o644)
	if err := writeGitIdentity(root, id); err != nil || read(t, root, "root/.gitconfig") != "mine" {
		t.Fatal("it was overwritten")
	}
}

func TestMachineIDIsSetOncePerVM(t *testing.T) {
	root := t.TempDir()
	put(t, root, "var/lib/dbus/machine-id", "old\n", 0o444)
	c := config()
	if err := writeMachineID(root, c.VMID); err != nil || read(t, root, "var/lib/dbus/machine-id") != c.VMID+"\n" {
		t.Fatal(err)
	}
	if err := os.Remove(root + "/etc/machine-id"); err != nil {
		t.Fatal(err)
	}
	put(t, root, "etc/machine-id", "changed by the user\n", 0o444)
	if err := writeMachineID(root, c.VMID); err != nil || !strings.HasPrefix(read(t, root, "etc/machine-id"), "changed") {
		t.Fatal("set again")
	}
	other := strings.Repeat("f", 32)
	if err := writeMachineID(root, other); err != nil || read(t, root, "etc/machine-id") != other+"\n" {
		t.Fatal("a copy of the disk in another VM keeps the id")
	}
}

func TestIncludeIsFoundAsSshdReadsIt(t *testing.T) {
	for text, want := range map[string]bool{
		"Include /etc/ssh/sshd_config.d/*.conf\n":             true,
		"  include \"sshd_config.d/*.conf\"\n":                true,
		"Include=/etc/ssh/other.conf sshd_config.d/*.conf\n":  true,
		"#Include /etc/ssh/sshd_config.d/*.conf\n":            false,
		"Include /etc/ssh/other/*.conf\n":                     false,
		"Match User x\nInclude /etc/ssh/sshd_config.d/*.conf": false,
		"": false,
	} {
		if got := includesDropIns(text); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestSshdTakesTheDropInOverLaterSettings(t *testing.T) {
	sshd, err := exec.LookPath("sshd")
	if err != nil {
		t.Skip("needs sshd")
	}
	keygen, err := exec.LookPath("ssh-keygen")
	if err != nil {
		t.Skip("needs ssh-keygen")
	}
	dir := t.TempDir()
	if out, err := exec.Command(keygen, "-q", "-t", "ed25519", "-N", "", "-f", dir+"/key").CombinedOutput(); err != nil {
		t.Fatalf("%s: %v", out, err)
	}
	text := strings.ReplaceAll(dropIn, "/etc/ssh/ssh_host_ed25519_key", dir+"/key") +
		"PasswordAuthentication yes\nPermitRootLogin yes\nKbdInteractiveAuthentication yes\n"
	put(t, dir, "conf", text, 0o600)
	out, err := exec.Command(sshd, "-T", "-f", dir+"/conf").CombinedOutput()
	if err != nil {
		t.Skipf("sshd -T does not run here: %s", out)
	}
	for _, want := range []string{"permitrootlogin without-password", "passwordauthentication no",
		"kbdinteractiveauthentication no", "pubkeyauthentication yes", "strictmodes yes",
		"authorizedkeysfile /root/.ssh/authorized_keys"} {
		if !strings.Contains(string(out), want+"\n") {
			t.Errorf("%s is not in effect", want)
		}
	}
}

func TestFenceReplacesItsBlockAndKeepsEveryOtherByte(t *testing.T) {
	others := "# mine\r\nkey one\n\nlast without newline"
	once := fence(others, []string{"a", "b"})
	if once != fenceBegin+"\na\nb\n"+fenceEnd+"\n"+others {
		t.Fatalf("%q", once)
	}
	if got := fence(once, []string{"c"}); got != fenceBegin+"\nc\n"+fenceEnd+"\n"+others {
		t.Fatalf("%q", got)
	}
	if got := fence(once, nil); got != others {
		t.Fatalf("%q", got)
	}
}

func TestInterfacesForgetOneLinkOnly(t *testing.T) {
	text := `# comment
source /etc/network/interfaces.d/*
auto lo eth0 eth1
iface lo inet loopback
allow-hotplug eth0
iface eth0 inet dhcp
    hostname x
    up true

iface eth0 inet6 auto
iface eth1 inet static
    address 10.0.0.1
`
	want := `# comment
source /etc/network/interfaces.d/*
auto lo eth1
iface lo inet loopback

iface eth1 inet static
    address 10.0.0.1
`
	if got := dropStanzas(text, "eth0"); got != want {
		t.Fatalf("%s", got)
	}
	if got := dropStanzas(want, "eth0"); got != want {
		t.Fatalf("again: %s", got)
	}
}

func TestConfigurationsThatCannotBeAreRefusedByField(t *testing.T) {
	good := `{"schema":1,"vm_id":"` + strings.Repeat("a", 32) + `","hostname":"web","future":1,` +
		`"transport":{"kind":"vsock","listen_port":7000,"announce_port":7001},"image_config":null}`
	c, err := ParseConfig([]byte(good))
	if err != nil || c.CheckTransport() != nil {
		t.Fatal(err, c.CheckTransport())
	}
	for _, change := range [][3]string{
		{`"schema":1`, `"schema":2`, "schema"},
		{strings.Repeat("a", 32), "../../etc", "vm_id"},
		{`"hostname":"web"`, `"hostname":"a\nb"`, "hostname"},
		{`"future":1`, `"authorized_keys":["a\nb"]`, "authorized_keys[0]"},
		{`"future":1`, `"network":{"address":"1.2.3"}`, "network.address"},
		{`"future":1`, `"network":{"address":"1.2.3.4","prefix":24,"dns":["x"]}`, "dns[0]"},
		{`"future":1`, `"network":{"address":"1.2.3.4","prefix":64}`, "prefix"},
		{`"future":1`, `"name":5`, "name"},
	} {
		_, err := ParseConfig([]byte(strings.Replace(good, change[0], change[1], 1)))
		if err == nil || !strings.Contains(err.Error(), change[2]) {
			t.Errorf("%s: %v", change[1], err)
		}
	}
	c.Transport = Transport{Kind: "tcp", Announce: "1.2.3.4:5", Peer: "1.2.3.4"}
	if c.CheckTransport() == nil {
		t.Error("tcp without a token")
	}
}

func TestMountPointsAreMadeInPlaceOfLinks(t *testing.T) {
	root := t.TempDir()
	link(t, "/etc", root, "proc")
	put(t, root, "tmp", "a file", 0o644)
	for path, mode := range map[string]os.FileMode{"proc": 0o755, "tmp": 0o777 | os.ModeSticky, "new/deep": 0o700} {
		if err := EnsureDir(root, path, mode); err != nil {
			t.Fatal(err)
		}
		info, err := os.Lstat(filepath.Join(root, path))
		if err != nil || info.Mode() != os.ModeDir|mode {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
}
