"""Every path that banger uses on the host. No other module builds one.

`Paths.user_mode()` reads the XDG variables once; `Paths.system_mode()` follows the install record.
The value is passed down from there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from banger.config.system_paths import SYSTEM, SystemPaths


class Paths(msgspec.Struct, frozen=True, kw_only=True):
    """The roots of one installation, and the names below them.

    `config_file` is the owner's; `system` says where what belongs to the whole host lies (user mode
    reads its configuration file only); `owner_state` is the owner's side of system mode.
    """

    state: Path
    cache: Path
    runtime: Path
    config_file: Path
    mode: Literal["user", "system"] = "user"
    system: SystemPaths = SYSTEM
    owner_state: Path | None = None

    @classmethod
    def user_mode(cls, system: SystemPaths = SYSTEM) -> Paths:
        """The roots of a user-mode installation (spec 3.2), from the XDG variables."""

        def xdg(variable: str, default: str) -> Path:
            value = os.environ.get(variable, "")
            return (Path(value) if value.startswith("/") else Path.home() / default) / "banger"

        runtime = os.environ.get("XDG_RUNTIME_DIR", "")
        # Whoever makes it first there: `ensure_private_directory` refuses one that is not ours.
        fallback = Path(f"/tmp/banger-runtime-{os.geteuid()}")  # noqa: S108 - see above
        return cls(
            state=xdg("XDG_STATE_HOME", ".local/state"),
            cache=xdg("XDG_CACHE_HOME", ".cache"),
            runtime=Path(runtime) / "banger" if runtime.startswith("/") else fallback,
            config_file=xdg("XDG_CONFIG_HOME", ".config") / "config.toml",
            system=system,
        )

    @classmethod
    def system_mode(cls, system: SystemPaths, home: Path) -> Paths:
        """The roots of the system installation (spec 3.2); `home` is its owner's.

        The owner's XDG variables do not count: the service does not have them.
        """
        return cls(
            state=system.state,
            cache=system.cache,
            runtime=system.runtime,
            config_file=home / ".config/banger/config.toml",
            mode="system",
            system=system,
            owner_state=home / ".local/state/banger",
        )

    @property
    def config_files(self) -> tuple[Path, Path]:
        """The host's and the owner's configuration file: a later one overrides key by key."""
        return self.system.config_file, self.config_file

    # The daemon
    @property
    def daemon_socket(self) -> Path:
        return self.runtime / "bangerd.sock"

    @property
    def daemon_lock(self) -> Path:
        """Held while a daemon starts, so that two first calls start one daemon."""
        return self.runtime / "start.lock"

    @property
    def operations(self) -> Path:
        """The journal of operations; it outlives the daemon, and not the host."""
        return self.runtime / "operations.jsonl"

    @property
    def clocks(self) -> Path:
        """The host's clocks when guests were last right; it outlives the daemon, as they do."""
        return self.runtime / "clocks.json"

    @property
    def daemon_log(self) -> Path:
        return self.state / "bangerd.log"

    @property
    def helper_log(self) -> Path:
        """What a root helper that is our child appends to; a service has the journal."""
        return self.state / "banger-root.log"

    @property
    def leases(self) -> Path:
        """The root helper's ledger, one file per lease."""
        return self.system.ledger if self.mode == "system" else self.runtime / "leases"

    @property
    def database(self) -> Path:
        return self.state / "banger.db"

    # Stored things
    @property
    def images(self) -> Path:
        return self.state / "images"

    @property
    def kernels(self) -> Path:
        return self.state / "kernels"

    @property
    def index_seen(self) -> Path:
        """The highest version that was seen of each published index."""
        return self.state / "index-seen.json"

    @property
    def templates(self) -> Path:
        """Blank ext4 disks, one per role and size."""
        return self.state / "templates"

    @property
    def bin(self) -> Path:
        """Programs that banger fetched: firecracker, jailer. Installed ones are root's own."""
        # The release's own directory, not the link to it: whoever runs a program as root follows
        # no links.
        installed = self.system.current.resolve() / "libexec"
        if self.mode == "system" and (installed / "firecracker").exists():
            return installed
        return self.state / "bin"

    @property
    def ssh(self) -> Path:
        return self.state / "ssh"

    @property
    def ssh_key(self) -> Path:
        """The owner's key to every guest: always in the owner's own directory."""
        return (self.owner_state or self.state) / "ssh/id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.ssh / "known_hosts"

    @property
    def owner_known_hosts(self) -> Path:
        """The owner's copy of it, kept by the command line; the same file in user mode."""
        return (self.owner_state or self.state) / "ssh/known_hosts"

    @property
    def ssh_config(self) -> Path:
        """The stanza for OpenSSH that `~/.ssh/config` may include."""
        return self.config_file.with_name("ssh_config")

    @property
    def build_cache(self) -> Path:
        """Downloads and built artefacts, each in a directory named after the hash of its inputs."""
        return self.cache / "build"

    @property
    def oci_blobs(self) -> Path:
        """Layers and documents of container images, named by their sha256."""
        return self.cache / "oci" / "blobs" / "sha256"

    # One VM
    def vm(self, vm_id: str) -> VmPaths:
        return VmPaths(
            directory=self.state / "vms" / vm_id, runtime=self.runtime / "vms" / vm_id[:12]
        )

    @property
    def vms(self) -> Path:
        return self.state / "vms"


class VmPaths(msgspec.Struct, frozen=True, kw_only=True):
    """The files of one VM. The runtime directory's name is short: socket paths hold 108 bytes."""

    directory: Path
    runtime: Path

    @property
    def overlay(self) -> Path:
        return self.directory / "overlay.ext4"

    @property
    def work(self) -> Path:
        return self.directory / "work.ext4"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd.img"

    @property
    def handles(self) -> Path:
        return self.directory / "handles.json"

    @property
    def secrets(self) -> Path:
        """Token and host key (0600): made at create, read at each start."""
        return self.directory / "secrets.json"

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    @property
    def api_socket(self) -> Path:
        return self.runtime / "api.sock"

    @property
    def vsock(self) -> Path:
        """Firecracker's vsock device; the guest's connection to port P arrives at `<path>_P`."""
        return self.runtime / "vsock.sock"

    @property
    def announce_socket(self) -> Path:
        """Where a guest on user-mode networking announces itself."""
        return self.runtime / "announce.sock"
