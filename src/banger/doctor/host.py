"""Checks of the host itself: architecture, control groups, user namespaces, tools, clock."""

from __future__ import annotations

import ctypes
import platform
import pwd
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from banger.doctor.check import Check, Finding, failed, passed, warned
from banger.errors import BangerError
from banger.image.entries import find_image

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from banger.doctor.world import World
    from banger.kernel.build_tools import BuildTool

_SQFSTAR_OLDEST = (4, 5)
_UNIFY = (
    "sudo sed -i 's/^GRUB_CMDLINE_LINUX=\"/&systemd.unified_cgroup_hierarchy=1 /' /etc/default/grub"
    " && sudo update-grub && sudo reboot"
)
_CONTROLLERS = ("cpu", "memory", "pids")
# adjtimex(2): the kernel's clock is not synchronised.
_TIME_ERROR = 5


def _look_architecture(world: World) -> Iterator[Finding]:
    machine = platform.machine()
    if machine == "x86_64":
        yield passed(f"{machine}, Linux {platform.release()}")
    else:
        yield failed(f"this host is {machine}; banger runs VMs on x86_64 only")


def _look_cgroup(world: World) -> Iterator[Finding]:
    mount = _cgroup_mount(world)
    limits = "VMs are ended by it, and have limits of their own"
    if mount is None:
        yield warned(
            "there is no cgroup v2 hierarchy: a VM is known by its process only, without limits",
            command="sudo mount -t cgroup2 none /sys/fs/cgroup",
        )
        return
    present = (world.read(f"{mount}/cgroup.controllers") or "").split()
    missing = [name for name in _CONTROLLERS if name not in present]
    if not missing:
        yield passed(f"cgroup v2 at {mount} with {', '.join(_CONTROLLERS)}: {limits}")
        return
    hybrid = mount != "/sys/fs/cgroup"
    yield warned(
        f"cgroup v2 at {mount} has no {', '.join(missing)} controller: VMs run without such limits",
        "the old hierarchy beside it holds them"
        if hybrid
        else "this host, or what it runs in, does not give them to cgroup v2",
        command=_UNIFY if hybrid else None,
    )


def _cgroup_mount(world: World) -> str | None:
    """Where cgroup v2 is mounted. Source: proc(5), mountinfo."""
    for line in (world.read("/proc/self/mountinfo") or "").splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.startswith("cgroup2 "):
            return fields.split(" ")[4]
    return None


def _look_namespaces(world: World) -> Iterator[Finding]:
    """What mmdebstrap needs to build an image without root (user_namespaces(7), subuid(5))."""
    if world.uid == 0:
        yield passed("root builds images without a user namespace")
        return
    report = failed if _must_build(world) else warned
    if (world.read("/proc/sys/user/max_user_namespaces") or "1").strip() == "0":
        yield report(
            "user namespaces are switched off: no image can be built without root",
            command="sudo sysctl user.max_user_namespaces=10000",
        )
    elif (world.read("/proc/sys/kernel/unprivileged_userns_clone") or "1").strip() == "0":
        yield report(
            "user namespaces are for root only here: no image can be built without root",
            command="sudo sysctl kernel.unprivileged_userns_clone=1",
        )
    elif world.find_program("newuidmap") is None:
        yield report(
            "newuidmap is missing: no image can be built without root",
            command="sudo apt-get install uidmap",
        )
    elif missing := [f for f in ("/etc/subuid", "/etc/subgid") if not _has_range(world, f)]:
        user = _user(world)
        yield report(
            f"{' and '.join(missing)} give {user} no subordinate ids: no image can be built "
            "without root",
            command=f"sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
        )
    elif world.ask("unshare", "--user", "true") is None:
        strict = (
            world.read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") or ""
        ).strip()
        yield warned(
            "a user namespace could not be made: building an image may fail",
            command="sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
            if strict == "1"
            else "unshare --user true",
        )
    else:
        yield passed("user namespaces and subordinate ids are there: images are built without root")


def _user(world: World) -> str:
    try:
        return pwd.getpwuid(world.uid).pw_name
    except KeyError:
        return str(world.uid)


def _has_range(world: World, path: str) -> bool:
    lines = (world.read(path) or "").splitlines()
    return any(line.split(":")[0] in (_user(world), str(world.uid)) for line in lines)


def _must_build(world: World) -> bool:
    """Whether the default image is not here yet."""
    try:
        return find_image(world.paths, world.settings.default_image_name) is None
    except BangerError:
        return False


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A host program, its package by package manager, and what does not work without it."""

    name: str
    apt: str
    dnf: str
    pacman: str
    feature: str
    needed: Literal["always", "bridge", "building", "never"]


TOOLS = (
    Tool(
        name="mke2fs", apt="e2fsprogs", dnf="e2fsprogs", pacman="e2fsprogs",
        feature="disks of VMs", needed="always",
    ),
    Tool(
        name="nft", apt="nftables", dnf="nftables", pacman="nftables",
        feature="the bridge network", needed="bridge",
    ),
    Tool(
        name="mmdebstrap", apt="mmdebstrap", dnf="mmdebstrap", pacman="mmdebstrap",
        feature="building images", needed="building",
    ),
    Tool(
        name="sqfstar", apt="squashfs-tools", dnf="squashfs-tools", pacman="squashfs-tools",
        feature="building images, fetching kernels", needed="building",
    ),
    Tool(
        name="git", apt="git", dnf="git", pacman="git",
        feature="vm run with a repository", needed="never",
    ),
    Tool(
        name="ssh", apt="openssh-client", dnf="openssh-clients", pacman="openssh",
        feature="vm ssh", needed="never",
    ),
)  # fmt: skip


def _look_tools(world: World) -> Iterator[Finding]:
    missing = [tool for tool in TOOLS if world.find_program(tool.name) is None]
    old = _old_sqfstar(world)
    if not missing and old is None:
        yield passed(f"{', '.join(tool.name for tool in TOOLS)} are there", *_for_building(world))
        return
    if old is not None:
        report = failed if _must_build(world) else warned
        yield report(
            f"sqfstar is version {old}; images need 4.5 or newer",
            command=_install(world, [t for t in TOOLS if t.name == "sqfstar"]),
        )
    needed = [tool for tool in missing if _is_needed(world, tool)]
    rest = [tool for tool in missing if tool not in needed]
    for report, tools in ((failed, needed), (warned, rest)):
        if tools:
            yield report(
                f"{', '.join(t.name for t in tools)} {'is' if len(tools) == 1 else 'are'} missing",
                *(f"{t.name}: {t.feature}" for t in tools),
                command=_install(world, tools),
            )


def _for_building(world: World) -> Iterator[str]:
    """What compiling a kernel would need. Most hosts never do, so it is no warning."""
    if missing := world.missing_build_tools():
        names = ", ".join(tool.name for tool in missing)
        yield f"kernel build would need {names}: {_install(world, missing)}"


def _is_needed(world: World, tool: Tool) -> bool:
    if tool.needed == "bridge":
        # Without nft the helper says itself that it cannot work, and the network becomes "user".
        return world.paths.mode == "system" or world.uid == 0
    return tool.needed == "always" or (tool.needed == "building" and _must_build(world))


def _old_sqfstar(world: World) -> str | None:
    said = world.ask("sqfstar", "-version") or ""
    m = re.search(r"version (\d+)\.(\d+)", said)
    old = m is not None and (int(m[1]), int(m[2])) < _SQFSTAR_OLDEST
    return f"{m[1]}.{m[2]}" if m is not None and old else None


def _install(world: World, tools: Sequence[Tool | BuildTool]) -> str:
    for manager, verb in (("apt-get", "install"), ("dnf", "install"), ("pacman", "-S")):
        if world.find_program(manager) is not None:
            column = manager.removesuffix("-get")
            packages = dict.fromkeys(str(getattr(tool, column)) for tool in tools)
            return f"sudo {manager} {verb} {' '.join(packages)}"
    return f"sudo apt-get install {' '.join(dict.fromkeys(tool.apt for tool in tools))}"


def _look_clock(world: World) -> Iterator[Finding]:
    if clock_is_synchronised():
        yield passed("the clock is synchronised")
    else:
        yield warned(
            "nothing keeps this host's clock right: guests take their time from it",
            command="sudo timedatectl set-ntp true",
        )


def clock_is_synchronised() -> bool:
    """Whether the kernel holds the clock for synchronised (adjtimex(2): not TIME_ERROR)."""
    libc = ctypes.CDLL(None, use_errno=True)
    # struct timex is 208 bytes on 64-bit Linux; modes 0 changes nothing.
    answer: int = libc.adjtimex(ctypes.create_string_buffer(256))
    return answer not in (-1, _TIME_ERROR)


CHECKS = (
    Check(
        name="architecture",
        look=_look_architecture,
        meaning="x86_64, the only one that banger runs VMs on",
        mends="another host",
    ),
    Check(
        name="cgroup",
        look=_look_cgroup,
        meaning="cgroup v2 with the cpu, memory and pids controllers, which bound each VM",
        mends="mounting it, or booting without the old hierarchy",
    ),
    Check(
        name="user namespaces",
        look=_look_namespaces,
        meaning="what building an image without root needs: namespaces, `newuidmap`, subordinate "
        "ids; FAIL only while the default image is not built",
        mends="the sysctl, package or `usermod` that the row names",
    ),
    Check(
        name="host tools",
        look=_look_tools,
        meaning="mke2fs, nft, mmdebstrap, sqfstar 4.5 or newer, git, ssh; FAIL for what the "
        "configured features need, else WARN; which compilers `kernel build` would need is only "
        "said",
        mends="the packages that the row names",
    ),
    Check(
        name="clock",
        look=_look_clock,
        meaning="whether something keeps this host's clock right; guests follow it",
        mends="`sudo timedatectl set-ntp true`",
    ),
)
