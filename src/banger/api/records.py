"""What banger knows of VMs, images and kernels, as stored and as shown."""

from __future__ import annotations

from typing import Literal

from banger.api.base import Wire
from banger.api.stats import VmStats

VmState = Literal["created", "running", "suspended", "stopped", "error"]
VmmName = Literal["firecracker", "qemu"]


class Workspace(Wire, frozen=True, kw_only=True):
    """A repository that was put into a guest, and what it was then."""

    guest_path: str
    source: str
    base_commit: str | None
    branch: str | None
    mode: str
    source_commit: str | None = None
    """The source's HEAD at that time; `base_commit` is another one with `--from`."""
    tree_id: str | None = None
    readonly: bool = False
    include_untracked: bool = False
    new_branch: str | None = None
    from_ref: str | None = None
    subdirectory: str = ""
    mise: bool = False
    """Whether it holds a file that mise reads."""
    prepared_at: str = ""


class Bootstrap(Wire, frozen=True, kw_only=True):
    """The tooling bootstrap of a workspace: a session of the guest, and how it went."""

    state: Literal["running", "done", "failed"]
    log: str
    session: str
    problem: str | None = None


class OwnerProcess(Wire, frozen=True, kw_only=True):
    """The command that an ephemeral VM belongs to, known by pid and start time (clock ticks)
    of a boot; None in rows of a banger that did not note it."""

    pid: int
    start_time: int
    boot_id: str | None = None


class VmRecord(Wire, frozen=True, kw_only=True):
    """One VM. Sizes in the units of their names; times are RFC 3339 in UTC."""

    id: str
    name: str
    state: VmState
    image_id: str
    image: str
    kernel: str
    vcpu: int
    memory_mib: int
    overlay_bytes: int
    work_disk_bytes: int
    address: str
    mac: str
    network: Literal["bridge", "user"]
    nat: bool = False
    ephemeral: bool = False
    """Deleted when the command that made it ends (`vm run --rm`)."""
    owner: OwnerProcess | None = None
    building: bool = False
    """A throw-away machine that an image is made of: nothing of the owner goes into it, and a
    daemon that finds it removes it."""
    provisional: bool = False
    """Its create has not been answered yet: a daemon that finds it so removes it."""
    vmm: VmmName | None = None
    boot_id: str | None = None
    workspace: Workspace | None = None
    bootstrap: Bootstrap | None = None
    files_synced: bool = False
    """Its first start is over: `[[file_sync]]` entries of `create` have been sent."""
    paused: str | None = None
    """Why a running VM's processors stand still; None: they do not."""
    warning: str | None = None
    """What its owner should know now; told when it is looked at, never stored."""
    stats: VmStats | None = None
    """Its figures when they were last collected; kept when it stops."""
    last_error: str | None = None
    created_at: str = ""
    updated_at: str = ""
    touched_at: str = ""


class ImageConfig(Wire, frozen=True, kw_only=True):
    """The part of an OCI image configuration that a guest honours (OCI image-spec, config.md)."""

    env: tuple[str, ...] = ()
    user: str = ""
    workdir: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()
    digest: str = ""
    """What the reference named when the image was pulled."""
    reference: str = ""


class ImageRecord(Wire, frozen=True, kw_only=True):
    """One image: a read-only root filesystem and the kernel that it boots with."""

    id: str
    name: str
    distro: str
    arch: str
    kernel_ref: str
    rootfs_path: str
    rootfs_sha256: str
    rootfs_bytes: int
    managed: bool
    features: tuple[str, ...] = ()
    recipe: str | None = None
    optional_missing: tuple[str, ...] = ()
    install_sshd: bool = False
    """A VM of it installs openssh-server at its first boot, if it has a way out."""
    description: str = ""
    created_at: str = ""
    oci: ImageConfig | None = None


class KernelRecord(Wire, frozen=True, kw_only=True):
    """One kernel entry: `<state>/kernels/<name>/` with the sha256 of each of its files."""

    name: str
    distro: str
    arch: str
    kernel_version: str
    release: str
    source: str
    agent_version: str
    imported_at: str
    directory: str
    sha256: dict[str, str]

    @property
    def vmlinux(self) -> str:
        return f"{self.directory}/vmlinux"

    @property
    def initrd(self) -> str:
        return f"{self.directory}/initrd.img"

    @property
    def modules(self) -> str:
        return f"{self.directory}/modules.sqfs"
