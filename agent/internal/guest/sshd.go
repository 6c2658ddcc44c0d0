package guest

import (
	"errors"
	"strings"
)

// dropIn is read before the image's own settings: sshd keeps the first value it meets.
const dropIn = `# Written by banger at each boot.
PermitRootLogin prohibit-password
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
AuthorizedKeysFile /root/.ssh/authorized_keys
HostKey /etc/ssh/ssh_host_ed25519_key
`

const includeLine = "Include /etc/ssh/sshd_config.d/*.conf"

// WriteSSHD writes drop-in and host key also where no sshd is installed yet.
func WriteSSHD(root string, c *Config) error {
	errs := []error{writeFile(root, "etc/ssh/sshd_config.d/00-banger.conf", []byte(dropIn), 0o644)}
	if c.HostKey != "" {
		key := strings.TrimRight(c.HostKey, "\n") + "\n"
		errs = append(errs,
			writeFile(root, "etc/ssh/ssh_host_ed25519_key", []byte(key), 0o600))
	}
	if c.HostKeyPub != "" {
		pub := strings.TrimRight(c.HostKeyPub, "\n") + "\n"
		errs = append(errs,
			writeFile(root, "etc/ssh/ssh_host_ed25519_key.pub", []byte(pub), 0o644))
	}
	text, err := readFile(root, "etc/ssh/sshd_config")
	if err != nil {
		errs = append(errs, err)
	} else if text != nil && !includesDropIns(string(text)) {
		errs = append(errs, writeFile(root, "etc/ssh/sshd_config",
			[]byte(includeLine+"\n"+string(text)), 0o644))
	}
	return errors.Join(errs...)
}

// includesDropIns tells whether sshd_config reads sshd_config.d for every connection, that is,
// before the first Match block.
func includesDropIns(text string) bool {
	for line := range strings.Lines(text) {
		// sshd_config(5): keywords are case-insensitive, "=" may stand between keyword and value.
		fields := strings.FieldsFunc(line, func(r rune) bool {
			return r == ' ' || r == '\t' || r == '=' || r == '\n' || r == '\r' || r == '"'
		})
		if len(fields) == 0 {
			continue
		}
		switch strings.ToLower(fields[0]) {
		case "match":
			return false
		case "include":
			for _, pattern := range fields[1:] {
				if strings.HasPrefix(strings.TrimPrefix(pattern, "/etc/ssh/"), "sshd_config.d/") {
					return true
				}
			}
		}
	}
	return false
}
