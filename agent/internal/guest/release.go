package guest

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
)

// releaseLink tells the network managers that an image may have to leave the link alone. What can
// be said below /run is: it is gone at the next boot, when the MAC may be another.
func releaseLink(root, mac, linkName string) error {
	errs := []error{
		writeFile(root, "run/systemd/network/00-banger.network", []byte(
			"[Match]\nMACAddress="+mac+"\n\n[Link]\nUnmanaged=yes\n"), 0o644),
		// Without this udev may rename the link while commands already use its name.
		writeFile(root, "run/systemd/network/00-banger.link", []byte(
			"[Match]\nMACAddress="+mac+"\n\n[Link]\nNamePolicy=keep kernel\nMACAddressPolicy=none\n"),
			0o644),
		// It would wait two minutes for a managed link, and there is none.
		writeFile(root, "run/systemd/system/systemd-networkd-wait-online.service.d/00-banger.conf",
			[]byte("[Service]\nExecStart=\nExecStart=/bin/true\n"), 0o644),
		writeFile(root, "run/NetworkManager/conf.d/00-banger.conf", []byte(
			"[keyfile]\nunmanaged-devices=mac:"+mac+"\n\n"+
				"[device-banger]\nmatch-device=mac:"+mac+"\nmanaged=0\n"), 0o644),
	}
	if linkName == "" {
		return errors.Join(errs...)
	}
	paths := []string{"etc/network/interfaces"}
	entries, err := os.ReadDir(filepath.Join(root, "etc/network/interfaces.d"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, e := range entries {
		paths = append(paths, filepath.Join("etc/network/interfaces.d", e.Name()))
	}
	for _, path := range paths {
		errs = append(errs, edit(root, path, func(text string) string {
			return dropStanzas(text, linkName)
		}))
	}
	errs = append(errs, edit(root, "etc/dhcpcd.conf", func(text string) string {
		return fence(text, []string{"denyinterfaces " + linkName})
	}))
	return errors.Join(errs...)
}

// edit rewrites an existing file when change changes it.
func edit(root, path string, change func(string) string) error {
	text, err := readFile(root, path)
	if err != nil || text == nil {
		return err
	}
	changed := change(string(text))
	if changed == string(text) {
		return nil
	}
	return writeFile(root, path, []byte(changed), 0o644)
}

// dropStanzas removes what an interfaces(5) file says about one interface. Other interfaces keep
// their stanzas, also on an "auto" line that names several.
func dropStanzas(text, name string) string {
	var b strings.Builder
	dropping := false
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			b.WriteString(line)
			continue
		}
		keyword := fields[0]
		switch {
		case keyword == "auto" || strings.HasPrefix(keyword, "allow-"):
			dropping = false
			var others []string
			for _, f := range fields[1:] {
				if f != name {
					others = append(others, f)
				}
			}
			if len(others) == len(fields)-1 {
				b.WriteString(line)
			} else if len(others) > 0 {
				b.WriteString(keyword + " " + strings.Join(others, " ") + "\n")
			}
			continue
		case keyword == "iface":
			dropping = len(fields) > 1 && fields[1] == name
		case keyword == "mapping", strings.HasPrefix(keyword, "source"), keyword == "no-auto-down",
			keyword == "no-scripts", keyword == "rename", keyword == "template":
			dropping = false
		}
		if !dropping {
			b.WriteString(line)
		}
	}
	return b.String()
}
