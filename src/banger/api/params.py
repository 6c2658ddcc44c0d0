"""Parameters of the daemon's methods. Optional sizes are None, so that "omitted" is not 0."""

from __future__ import annotations

from typing import Literal

from banger.api.base import Params

WorkspaceMode = Literal["shallow_overlay", "metadata_only", "full_copy"]


class Empty(Params, frozen=True, kw_only=True):
    """Nothing to say."""


class VmRef(Params, frozen=True, kw_only=True):
    """A VM's name, id, or unique id prefix of at least 4 characters."""

    vm: str


class ConnectVm(Params, frozen=True, kw_only=True):
    """`check_workspace`: also tell whether the recorded workspace is behind its source."""

    vm: str
    check_workspace: bool = False


class ShipWorkspace(Params, frozen=True, kw_only=True):
    """What of a host repository goes into a guest (spec 8)."""

    path: str
    mode: WorkspaceMode = "shallow_overlay"
    branch: str | None = None
    from_ref: str | None = None
    include_untracked: bool = False
    guest_path: str | None = None


class CreateVm(Params, frozen=True, kw_only=True):
    """`vm.create` and, with `workspace` and `rm`, `vm.run`. Sizes are explicit: the CLI resolves
    the defaults, so that the line it prints equals what is created."""

    image: str
    vcpu: int
    memory_mib: int
    disk_bytes: int
    overlay_bytes: int
    name: str | None = None
    nat: bool = False
    start: bool = True
    allow_overcommit: bool = False
    detach: bool = False
    """Answer at once with the id of the operation; only of `vm.create`."""


class RunVm(Params, frozen=True, kw_only=True):
    create: CreateVm
    workspace: ShipWorkspace | None = None
    rm: bool = False
    bootstrap: bool = False
    """Begin to install the tools that the workspace pins."""


class StartVm(Params, frozen=True, kw_only=True):
    vm: str
    allow_overcommit: bool = False


class StopVm(Params, frozen=True, kw_only=True):
    vm: str
    timeout_s: float | None = None


class KillVm(Params, frozen=True, kw_only=True):
    vm: str
    signal: str = "KILL"


class SetVm(Params, frozen=True, kw_only=True):
    vm: str
    vcpu: int | None = None
    memory_mib: int | None = None
    disk_bytes: int | None = None
    overlay_bytes: int | None = None
    nat: bool | None = None


class FindCommands(Params, frozen=True, kw_only=True):
    """`vm.acp.prepare`: programs that a guest must have, and where they will run."""

    vm: str
    names: tuple[str, ...]
    cwd: str | None = None
    user: str | None = None


class VmLogs(Params, frozen=True, kw_only=True):
    vm: str
    follow: bool = False
    tail: int | None = None


class NameRef(Params, frozen=True, kw_only=True):
    """An image or kernel by name."""

    name: str


class BuildImage(Params, frozen=True, kw_only=True):
    """`image.build`: from a `recipe` (a name, or the absolute path of a file), or from the image
    `from_image`, with what is added to either. Paths are absolute.

    `archive` is the root of a recipe that takes one. Sizes are those of the machine, if there is
    one; None is the default of new VMs.
    """

    name: str
    recipe: str | None = None
    from_image: str | None = None
    archive: str | None = None
    packages: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    scripts: tuple[str, ...] = ()
    kernel_ref: str | None = None
    nat: bool = False
    """A way out also where no packages are installed."""
    vcpu: int | None = None
    memory_mib: int | None = None
    disk_bytes: int | None = None
    overlay_bytes: int | None = None
    force: bool = False


class PullImage(Params, frozen=True, kw_only=True):
    """An image of a registry or an archive; paths in `reference` are absolute."""

    reference: str
    name: str | None = None
    kernel_ref: str | None = None
    platform: str = "linux/amd64"
    install_sshd: bool = False
    force: bool = False


class PruneCache(Params, frozen=True, kw_only=True):
    dry_run: bool = False


class PullKernel(Params, frozen=True, kw_only=True):
    name: str
    force: bool = False


class Doctor(Params, frozen=True, kw_only=True):
    """What `daemon.doctor` does beside looking: give back what no VM uses, try a lease."""

    sweep: bool = False
    try_lease: bool = False
