"""What the host needs to build a kernel, asked for before anything is fetched.

A user need not have them until then: doctor only says which are missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from banger.errors import BangerError
from banger.process import find_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class BuildTool(msgspec.Struct, frozen=True, kw_only=True):
    """A program, or with a slash a file (a header), and its package by package manager."""

    name: str
    apt: str
    dnf: str
    pacman: str


BUILD_TOOLS = (
    BuildTool(name="gcc", apt="gcc", dnf="gcc", pacman="gcc"),
    BuildTool(name="/usr/include/stdlib.h", apt="libc6-dev", dnf="glibc-devel", pacman="glibc"),
    BuildTool(name="ld", apt="binutils", dnf="binutils", pacman="binutils"),
    BuildTool(name="make", apt="make", dnf="make", pacman="make"),
    BuildTool(name="flex", apt="flex", dnf="flex", pacman="flex"),
    BuildTool(name="bison", apt="bison", dnf="bison", pacman="bison"),
    BuildTool(name="bc", apt="bc", dnf="bc", pacman="bc"),
    BuildTool(name="perl", apt="perl", dnf="perl", pacman="perl"),
    # For objtool, a program of the kernel's own that looks at every object.
    BuildTool(
        name="/usr/include/libelf.h", apt="libelf-dev", dnf="elfutils-libelf-devel",
        pacman="libelf",
    ),
    BuildTool(name="tar", apt="tar", dnf="tar", pacman="tar"),
    BuildTool(name="depmod", apt="kmod", dnf="kmod", pacman="kmod"),
    BuildTool(
        name="sqfstar", apt="squashfs-tools", dnf="squashfs-tools", pacman="squashfs-tools"
    ),
)  # fmt: skip
SIGNATURE_TOOLS = (
    BuildTool(name="gpg", apt="gpg", dnf="gnupg2", pacman="gnupg"),
    BuildTool(name="gpgv", apt="gpgv", dnf="gnupg2", pacman="gnupg"),
)


def find_missing_tools(
    tools: Iterable[BuildTool],
    *,
    is_there: Callable[[str], bool] = lambda path: Path(path).is_file(),
    find: Callable[[str], str | None] = find_program,
) -> tuple[BuildTool, ...]:
    """Those of `tools` that this host does not have."""
    return tuple(
        tool for tool in tools if not (is_there(tool.name) if "/" in tool.name else find(tool.name))
    )


def require_build_tools(name: str, *, signature: bool) -> None:
    """Refuse a build for which something is missing.

    Raises:
        BangerError: not_found, naming all that is missing, with the command that installs it.
    """
    missing = find_missing_tools((*BUILD_TOOLS, *(SIGNATURE_TOOLS if signature else ())))
    if missing:
        packages = " ".join(dict.fromkeys(tool.apt for tool in missing))
        raise BangerError(
            "not_found",
            f"building the kernel {name} needs what this host does not have: "
            f"{', '.join(tool.name for tool in missing)}",
            hint=f"sudo apt-get install {packages}",
        )
