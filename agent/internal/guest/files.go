package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// WriteFiles writes every file of the configuration below root. It tries all of them and joins the
// errors: a full disk must not keep the agent from starting. linkName is the configured interface,
// "" when there is none.
func WriteFiles(root string, c *Config, linkName string) error {
	errs := []error{
		makeDirs(root),
		WriteHostname(root, c.Hostname),
		WriteHosts(root, c),
		emptyFstab(root),
		WriteSSHD(root, c),
		WriteAuthorizedKeys(root, c.AuthorizedKeys),
		writeGitIdentity(root, c.GitIdentity),
		writeMachineID(root, c.VMID),
		makeVolumes(root, c.Image),
	}
	if c.Network != nil {
		errs = append(errs,
			WriteResolvConf(root, c.Network.DNS),
			releaseLink(root, c.Network.MAC, linkName))
	}
	return errors.Join(errs...)
}

func makeDirs(root string) error {
	var errs []error
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{{"root", 0o755}, {"run/banger", 0o700}, {"var/lib/banger", 0o700}} {
		full := filepath.Join(root, d.path)
		if err := os.MkdirAll(full, d.mode); err != nil {
			errs = append(errs, fmt.Errorf("making /%s: %w", d.path, err))
			continue
		}
		errs = append(errs, own(full, d.mode))
	}
	return errors.Join(errs...)
}

// own gives path to root with the given mode. Without privilege, in tests, only the mode is set.
func own(path string, mode os.FileMode) error {
	if os.Geteuid() == 0 {
		if err := os.Lchown(path, 0, 0); err != nil {
			return err
		}
	}
	return os.Chmod(path, mode)
}

// WriteHostname writes /etc/hostname.
func WriteHostname(root, name string) error {
	return writeFile(root, "etc/hostname", []byte(name+"\n"), 0o644)
}

// WriteHosts writes /etc/hosts: localhost, and the guest's own name at its address.
func WriteHosts(root string, c *Config) error {
	address := "127.0.1.1"
	if c.Network != nil {
		address = c.Network.Address
	}
	text := "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n" +
		address + " " + c.Hostname + "\n"
	return writeFile(root, "etc/hosts", []byte(text), 0o644)
}

// WriteResolvConf writes /etc/resolv.conf in place of whatever manages it in the image, which is
// mostly a link to a file of a service that knows nothing of this network.
func WriteResolvConf(root string, servers []string) error {
	var b strings.Builder
	for _, s := range servers {
		b.WriteString("nameserver " + s + "\n")
	}
	return writeFile(root, "etc/resolv.conf", []byte(b.String()), 0o644)
}

// emptyFstab: lines that name devices which this machine lacks would delay the boot by minutes.
func emptyFstab(root string) error {
	text := "# Emptied by banger: its agent mounts everything before the init starts.\n"
	return writeFile(root, "etc/fstab", []byte(text), 0o644)
}

// WriteAuthorizedKeys puts the keys into banger's block of root's authorized_keys and sets the
// modes that sshd's StrictModes asks for. Other lines are kept.
func WriteAuthorizedKeys(root string, keys []string) error {
	const path = "root/.ssh/authorized_keys"
	if _, err := os.Lstat(filepath.Join(root, path)); len(keys) == 0 && errors.Is(err, os.ErrNotExist) {
		return nil // nothing to say, and nothing to take back
	}
	dir := filepath.Join(root, "root/.ssh")
	// A link to a directory is how some users keep their dotfiles, and it stays.
	if info, err := os.Stat(dir); err == nil && !info.IsDir() {
		if err := os.Remove(dir); err != nil {
			return fmt.Errorf("making /root/.ssh: %w", err)
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("making /root/.ssh: %w", err)
	}
	if err := own(dir, 0o700); err != nil {
		return fmt.Errorf("making /root/.ssh: %w", err)
	}
	old, err := readFile(root, path)
	if err != nil {
		return err
	}
	if err := writeFile(root, path, []byte(fence(string(old), keys)), 0o600); err != nil {
		return err
	}
	return own(filepath.Join(root, path), 0o600)
}

// writeGitIdentity writes root's .gitconfig when there is none.
func writeGitIdentity(root string, id *GitIdentity) error {
	const path = "root/.gitconfig"
	if id == nil || id.Name == "" && id.Email == "" {
		return nil
	}
	if _, err := os.Lstat(filepath.Join(root, path)); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	text := "[user]\n"
	if id.Name != "" {
		text += "\tname = " + quoteGit(id.Name) + "\n"
	}
	if id.Email != "" {
		text += "\temail = " + quoteGit(id.Email) + "\n"
	}
	return writeFile(root, path, []byte(text), 0o644)
}

// quoteGit quotes a value as git-config(1) describes. Git knows no escape for other control
// characters, and they mean nothing in a name.
func quoteGit(value string) string {
	value = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, value)
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(value) + `"`
}

// writeMachineID gives the machine an id of its own, once in its life: the image's id is the same
// for every VM made from it.
func writeMachineID(root, vmID string) error {
	const marker = "var/lib/banger/vm-id"
	seen, err := readFile(root, marker)
	if err != nil {
		return err
	}
	if strings.TrimSpace(string(seen)) == vmID {
		return nil
	}
	if err := writeFile(root, "etc/machine-id", []byte(vmID+"\n"), 0o444); err != nil {
		return err
	}
	// dbus reads a copy of its own where it is no link to the other.
	const dbus = "var/lib/dbus/machine-id"
	if info, err := os.Lstat(filepath.Join(root, dbus)); err == nil && info.Mode().IsRegular() {
		if err := writeFile(root, dbus, []byte(vmID+"\n"), 0o444); err != nil {
			return err
		}
	}
	return writeFile(root, marker, []byte(vmID+"\n"), 0o600)
}

// EnsureDir makes root/path a directory when nothing is there, or something that is not even a
// link to a directory inside root. It is for mount points that images may lack.
func EnsureDir(root, path string, mode os.FileMode) error {
	full := filepath.Join(root, path)
	info, err := os.Lstat(full)
	if err == nil && !info.IsDir() {
		err = os.Remove(full)
		if err == nil {
			err = os.ErrNotExist
		}
	}
	if errors.Is(err, os.ErrNotExist) {
		if err = os.MkdirAll(full, mode); err == nil {
			err = os.Chmod(full, mode) // whatever the umask
		}
	}
	if err != nil && !errors.Is(err, syscall.EROFS) {
		return fmt.Errorf("making /%s: %w", path, err)
	}
	return err
}
