"""Every path of a system installation (spec 3.2), below one root that is `/` outside of tests."""

from __future__ import annotations

from pathlib import Path

import msgspec

DAEMON_UNIT = "bangerd.service"
HELPER_UNIT = "bangerd-root.service"


class SystemPaths(msgspec.Struct, frozen=True, kw_only=True):
    """Where `banger system install` puts things. A value: whoever needs it gets it passed down."""

    root: Path = Path("/")

    # Configuration and record
    @property
    def etc(self) -> Path:
        return self.root / "etc/banger"

    @property
    def config_file(self) -> Path:
        return self.etc / "config.toml"

    @property
    def record(self) -> Path:
        """Whose installation this is; written by `system install`, world-readable."""
        return self.etc / "install.toml"

    @property
    def environment(self) -> Path:
        """Environment of both services (proxies, certificates); the administrator's."""
        return self.etc / "environment"

    # Programs
    @property
    def programs(self) -> Path:
        return self.root / "usr/local/lib/banger"

    @property
    def versions(self) -> Path:
        return self.programs / "versions"

    @property
    def current(self) -> Path:
        """Link to the release that commands run."""
        return self.programs / "current"

    @property
    def previous(self) -> Path:
        """Link to the release before it."""
        return self.programs / "previous"

    @property
    def bin(self) -> Path:
        return self.root / "usr/local/bin"

    @property
    def units(self) -> Path:
        return self.root / "etc/systemd/system"

    @property
    def systemd(self) -> Path:
        """A directory that is there exactly where systemd runs: sd_booted(3)."""
        return self.root / "run/systemd/system"

    # The owner's
    @property
    def state(self) -> Path:
        return self.root / "var/lib/banger"

    @property
    def cache(self) -> Path:
        return self.root / "var/cache/banger"

    @property
    def runtime(self) -> Path:
        return self.root / "run/banger"

    # Root's
    @property
    def helper_state(self) -> Path:
        return self.root / "var/lib/banger-root"

    @property
    def jails(self) -> Path:
        """One directory per jailed VMM, made and removed by the root helper."""
        return self.helper_state / "jail"

    @property
    def helper_runtime(self) -> Path:
        return self.root / "run/banger-root"

    @property
    def helper_socket(self) -> Path:
        return self.helper_runtime / "bangerd-root.sock"

    @property
    def ledger(self) -> Path:
        return self.helper_runtime / "leases"


SYSTEM = SystemPaths()
"""This host's own."""
