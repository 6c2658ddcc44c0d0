package boot

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/agent/internal/disk"
	"banger/agent/internal/guest"
)

func TestModuleListKeepsItsOrder(t *testing.T) {
	got, err := parseModules("/lib/b.ko\n\n# comment\n /lib/a.ko \r\n")
	if err != nil || !slices.Equal(got, []string{"/lib/b.ko", "/lib/a.ko"}) {
		t.Fatalf("%q, %v", got, err)
	}
	for _, bad := range []string{"relative.ko", "/lib/../a.ko", strings.Repeat("/a\n", maxModules+1)} {
		if _, err := parseModules(bad); err == nil {
			t.Errorf("accepted %.20q", bad)
		}
	}
}

func TestModuleParametersComeFromTheCommandLine(t *testing.T) {
	cmdline := `console=ttyS0 virtio_mmio.device=512@0xfeb00e00:12 virtio-mmio.device=4K@0x1:5 ` +
		`foo.name="a b" quiet -- virtio_mmio.device=no` + "\n"
	for module, want := range map[string]string{
		"virtio_mmio": "device=512@0xfeb00e00:12 device=4K@0x1:5",
		"foo":         `name="a b"`,
		"quiet":       "",
	} {
		if got := moduleParams(cmdline, module); got != want {
			t.Errorf("%s: %q", module, got)
		}
	}
}

func TestMountPlanOfARoot(t *testing.T) {
	if m := planImage("/dev/vda", disk.Ext4); m.data != "noload" || m.flags&syscall.MS_RDONLY == 0 {
		t.Errorf("an ext4 image: %+v", m)
	}
	if m := planImage("/dev/vda", disk.Squashfs); m.data != "" || m.fstype != "squashfs" || m.flags&syscall.MS_RDONLY == 0 {
		t.Errorf("a squashfs image: %+v", m)
	}
	if m := planRoot(); !strings.HasPrefix(m.data, "lowerdir="+lowerDir+",upperdir="+overDir+"/upper,workdir="+overDir+"/work") {
		t.Errorf("the overlay: %+v", m)
	}
	if got := disks(guest.Mounts{Image: "/dev/vda", Overlay: "/dev/vdb", Modules: "/dev/vdd"}); !slices.Equal(
		got, []string{"/dev/vda", "/dev/vdb", "/dev/vdd"}) {
		t.Error(got)
	}
	var targets []string
	for _, m := range planKernelMounts() {
		targets = append(targets, m.target)
	}
	if slices.Index(targets, "/dev") > slices.Index(targets, "/dev/pts") {
		t.Error("/dev would hide /dev/pts")
	}
}

func TestModulesGoWhereTheImageLooksForThem(t *testing.T) {
	merged, split := t.TempDir(), t.TempDir()
	if err := os.Symlink("usr/lib", merged+"/lib"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(split+"/lib", 0o755); err != nil {
		t.Fatal(err)
	}
	for root, want := range map[string]string{merged: "/usr/lib/modules/6.12", split: "/lib/modules/6.12",
		t.TempDir(): "/usr/lib/modules/6.12"} {
		if got := modulesTarget(root, "6.12"); got != want {
			t.Errorf("%s", got)
		}
	}
}

func TestWaitingForADeviceEndsAtTheDeadlineAndNamesIt(t *testing.T) {
	u, err := openUevents()
	if err != nil {
		t.Skipf("needs NETLINK_KOBJECT_UEVENT: %v", err)
	}
	defer u.close()
	begin := time.Now()
	err = u.waitFor(func() error {
		_, err := os.Stat("/dev/no-such-disk")
		return err
	}, os.ErrNotExist, begin.Add(100*time.Millisecond))
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "/dev/no-such-disk") || time.Since(begin) > 2*time.Minute {
		t.Fatalf("%v after %v", err, time.Since(begin))
	}
	broken := errors.New("broken")
	if err := u.waitFor(func() error { return broken }, os.ErrNotExist, begin.Add(time.Hour)); err != broken {
		t.Fatal(err)
	}
}

func TestADeviceThatAppearsEndsTheWait(t *testing.T) {
	ip, err := exec.LookPath("ip")
	if err != nil || os.Geteuid() != 0 {
		t.Skip("needs CAP_NET_ADMIN and ip")
	}
	u, err := openUevents()
	if err != nil {
		t.Skipf("needs NETLINK_KOBJECT_UEVENT: %v", err)
	}
	defer u.close()
	name := fmt.Sprintf("bngr%d", os.Getpid()) // others may test on this host
	done := make(chan error, 1)
	go func() {
		time.Sleep(50 * time.Millisecond)
		out, err := exec.Command(ip, "link", "add", name, "type", "veth", "peer", "name", name+"p").CombinedOutput()
		if err != nil {
			err = errors.New(string(out))
		}
		done <- err
	}()
	defer exec.Command(ip, "link", "del", name).Run()
	err = u.waitFor(func() error {
		_, err := os.Stat("/sys/class/net/" + name)
		return err
	}, os.ErrNotExist, time.Now().Add(2*time.Minute))
	if added := <-done; added != nil {
		t.Skipf("needs veth links: %v", added)
	}
	if err != nil {
		t.Fatal(err)
	}
}
