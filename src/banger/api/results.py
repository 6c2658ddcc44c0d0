"""Results of the daemon's methods. Fields are added, never renamed, within a major version."""

from __future__ import annotations

from banger.api.base import Wire
from banger.api.records import ImageConfig, VmRecord, Workspace
from banger.api.stats import VmStats as VmStats


class Pong(Wire, frozen=True, kw_only=True):
    version: str
    pid: int


class VmmVerdict(Wire, frozen=True, kw_only=True):
    driver: str | None
    accel: str | None
    kvm_usable: bool
    evidence: tuple[str, ...] = ()
    problem: str | None = None
    hint: str | None = None


class DaemonStatus(Wire, frozen=True, kw_only=True):
    version: str
    pid: int
    mode: str
    socket: str
    log: str
    uptime_s: float
    rss_bytes: int
    threads: int = 0
    tasks: int = 0
    """Coroutines under way in it."""
    vms_running: int
    network: str
    network_note: str | None
    dns: str | None
    """Where `.vm` names are answered; None while they are not."""
    dns_note: str | None
    vmm: VmmVerdict


class AgentPlace(Wire, frozen=True, kw_only=True):
    """Where a coding agent runs in a guest. `has_shell`: the guest has one."""

    cwd: str
    has_shell: bool


class AgentAccess(Wire, frozen=True, kw_only=True):
    """How to use the connected descriptor that comes with this."""

    vm: VmRecord
    token: str
    cwd: str | None
    login: bool
    vmm_pid: int
    vmm_start_time: int
    """The VMM's process: its end is the machine's, which a TCP connection would never tell."""
    stale: str | None = None
    """How the workspace is behind its source, where that was asked."""


class RunResult(Wire, frozen=True, kw_only=True):
    vm: VmRecord
    access: AgentAccess
    workspace: Workspace | None = None
    files: int = 0
    bytes: int = 0
    image_config: ImageConfig | None = None
    """How the image itself says that it is run; None: it says nothing."""


class Outcome(Wire, frozen=True, kw_only=True):
    """A VM after a command, and one sentence when something is worth saying."""

    vm: VmRecord
    note: str | None = None


class Deleted(Wire, frozen=True, kw_only=True):
    name: str
    note: str | None = None


class SetResult(Wire, frozen=True, kw_only=True):
    vm: VmRecord
    at_next_start: tuple[str, ...] = ()


class Ping(Wire, frozen=True, kw_only=True):
    vm: str
    round_trip_ms: float


class SshAccess(Wire, frozen=True, kw_only=True):
    """What the OpenSSH client needs; `sshd` is False when nothing listens on port 22.

    `address` is empty where only the agent leads to it.
    """

    vm: VmRecord
    sshd: bool
    address: str
    port: int
    key: str
    known_hosts: str


class PortRow(Wire, frozen=True, kw_only=True):
    """A listening socket of a guest. `address` is what it is bound to in the guest.

    `endpoint` is where this host reaches it, or, when it is not `reachable`, where the guest does;
    then `fix` says what helps. `scheme` is what it answered to, `link` what a browser opens.
    """

    vm: str
    port: int
    proto: str
    process: str
    address: str
    endpoint: str
    reachable: bool
    fix: str | None = None
    scheme: str | None = None
    link: str | None = None


class PrunedCache(Wire, frozen=True, kw_only=True):
    """What `image cache prune` freed, or would free; what pulls use now stays."""

    blobs: int
    bytes: int
    in_use_blobs: int
    in_use_bytes: int
    limit_bytes: int
    """`oci_cache_limit`, which each pull keeps."""
    directory: str
    dry_run: bool


class FileList(Wire, frozen=True, kw_only=True):
    """Names as they are printed, one a line (odd bytes quoted as git does)."""

    names: tuple[str, ...]
    note: str | None = None
