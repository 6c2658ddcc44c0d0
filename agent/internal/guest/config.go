// Package guest holds what the host told this guest about itself, and the files that the agent
// writes from it at each boot.
//
// Paths are below a root directory. In a guest the agent has changed its root into the image
// before it writes anything, so that no symbolic link of the image can lead elsewhere; tests use
// a temporary directory.
package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
)

// MaxConfig is the largest configuration document, in bytes.
const MaxConfig = 1 << 20

// Config is /banger/config.json. Unknown fields are ignored: the host may be newer.
type Config struct {
	Schema         int          `json:"schema"`
	VMID           string       `json:"vm_id"`
	Name           string       `json:"name"`
	Hostname       string       `json:"hostname"`
	Network        *Network     `json:"network"`
	Transport      Transport    `json:"transport"`
	TimeUnixNs     int64        `json:"time_unix_ns"`
	Token          string       `json:"token"`
	AuthorizedKeys []string     `json:"authorized_keys"`
	HostKey        string       `json:"host_key"`
	HostKeyPub     string       `json:"host_key_pub"`
	Mounts         Mounts       `json:"mounts"`
	DockerDirs     bool         `json:"docker_dirs"`
	InstallSSHD    bool         `json:"install_sshd"`
	Image          *ImageConfig `json:"image_config"`
	GitIdentity    *GitIdentity `json:"git_identity"`
}

// Network is the one link that the agent configures, found by its MAC address.
type Network struct {
	MAC     string   `json:"mac"`
	Address string   `json:"address"`
	Prefix  int      `json:"prefix"`
	Gateway string   `json:"gateway"`
	MTU     int      `json:"mtu"`
	DNS     []string `json:"dns"`
}

// Transport says how host and agent reach each other.
type Transport struct {
	Kind         string `json:"kind"` // vsock or tcp
	ListenPort   uint32 `json:"listen_port"`
	AnnouncePort uint32 `json:"announce_port"` // vsock
	Announce     string `json:"announce"`      // tcp, address:port
	Peer         string `json:"peer"`          // tcp, the only address that may connect
}

// Mounts names the block devices; an empty string is a disk that this VM does not have.
type Mounts struct {
	Image   string `json:"image"`
	Overlay string `json:"overlay"`
	Work    string `json:"work"`
	Modules string `json:"modules"`
}

// ImageConfig is the part of an OCI image's configuration that commands are started with.
type ImageConfig struct {
	Env        []string `json:"env"`
	User       string   `json:"user"`
	Workdir    string   `json:"workdir"`
	Entrypoint []string `json:"entrypoint"`
	Cmd        []string `json:"cmd"`
	StopSignal string   `json:"stop_signal"`
	Volumes    []string `json:"volumes"`
}

// GitIdentity is the host user's global git identity.
type GitIdentity struct {
	Name  string `json:"name"`
	Email string `json:"email"`
}

var (
	vmIDForm     = regexp.MustCompile(`^[0-9a-f]{32}$`)
	hostnameForm = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?$`)
)

// ParseConfig decodes and checks a configuration document.
//
// Errors name the field and the rule it breaks.
func ParseConfig(text []byte) (*Config, error) {
	if len(text) > MaxConfig {
		return nil, fmt.Errorf("the configuration document has %d bytes, the limit is %d",
			len(text), MaxConfig)
	}
	c := &Config{}
	if err := json.Unmarshal(text, c); err != nil {
		return nil, fmt.Errorf("the configuration document: %w", err)
	}
	if c.Schema != 1 {
		return nil, fmt.Errorf("the configuration document: schema is %d, this agent knows 1",
			c.Schema)
	}
	if !vmIDForm.MatchString(c.VMID) {
		return nil, errors.New("the configuration document: vm_id is not 32 hex digits")
	}
	if err := CheckHostname(c.Hostname); err != nil {
		return nil, fmt.Errorf("the configuration document: %w", err)
	}
	if c.Network != nil {
		if err := c.Network.check(); err != nil {
			return nil, fmt.Errorf("the configuration document: network.%w", err)
		}
		if err := CheckDNS(c.Network.DNS); err != nil {
			return nil, fmt.Errorf("the configuration document: network.%w", err)
		}
	}
	if err := CheckKeys(c.AuthorizedKeys); err != nil {
		return nil, fmt.Errorf("the configuration document: %w", err)
	}
	return c, nil
}

func (n *Network) check() error {
	if _, err := netip.ParseAddr(n.Address); err != nil {
		return fmt.Errorf("address: %w", err)
	}
	if n.Gateway != "" {
		if _, err := netip.ParseAddr(n.Gateway); err != nil {
			return fmt.Errorf("gateway: %w", err)
		}
	}
	if n.Prefix < 1 || n.Prefix > 32 {
		return fmt.Errorf("prefix: %d is not between 1 and 32", n.Prefix)
	}
	if n.MTU != 0 && (n.MTU < 576 || n.MTU > 65535) {
		return fmt.Errorf("mtu: %d is not between 576 and 65535", n.MTU)
	}
	return nil
}

// CheckTransport checks what a guest needs to be reached. On a host, in tests, the addresses come
// from the command line instead.
func (c *Config) CheckTransport() error {
	t := c.Transport
	switch t.Kind {
	case "vsock":
		return nil
	case "tcp":
		if c.Token == "" {
			return errors.New("token: empty, which the tcp transport does not allow")
		}
		if _, err := netip.ParseAddr(t.Peer); err != nil {
			return fmt.Errorf("transport.peer: %w", err)
		}
		if t.Announce == "" {
			return errors.New("transport.announce: empty")
		}
		return nil
	default:
		return fmt.Errorf("transport.kind: %q is neither vsock nor tcp", t.Kind)
	}
}

// CheckHostname accepts a host name of at most 63 characters, the longest the agent sets.
func CheckHostname(name string) error {
	if !hostnameForm.MatchString(name) {
		return fmt.Errorf("hostname: %q is not 1 to 63 letters, digits, dots and hyphens", name)
	}
	return nil
}

// CheckDNS accepts a list of addresses.
func CheckDNS(servers []string) error {
	for i, s := range servers {
		if _, err := netip.ParseAddr(s); err != nil {
			return fmt.Errorf("dns[%d]: %w", i, err)
		}
	}
	return nil
}

// CheckKeys accepts public keys, one a string. A newline would smuggle in a second line.
func CheckKeys(keys []string) error {
	for i, k := range keys {
		if k == "" || strings.ContainsAny(k, "\n\r\x00") {
			return fmt.Errorf("authorized_keys[%d]: empty, or more than one line", i)
		}
	}
	return nil
}
