"""The base initrd of a kernel entry: the guest agent as `/init`, and the modules for mounting root.

Uncompressed, since the VMM copies it into the guest's memory as it is and unpacking costs boot
time. Each VM gets a copy with its own configuration appended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from banger.disk.cpio import (
    Member,
    Writer,
    character_device,
    directory,
    read_members,
    regular_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

_LIST = "banger/modules"
_MODULES = "banger/ko"


def build_module_members(modules: Mapping[str, bytes]) -> tuple[Member, ...]:
    """The members for modules given as path → content in load order; the list names them so.

    Raises:
        ValueError: two modules have one file name.
    """
    names = [f"{_MODULES}/{path.rsplit('/', 1)[-1]}" for path in modules]
    if len(set(names)) != len(names):
        raise ValueError("two modules have the same file name")
    listing = "".join(f"/{name}\n" for name in names)
    return (
        regular_file(_LIST, listing.encode()),
        *(regular_file(n, c) for n, c in zip(names, modules.values(), strict=True)),
    )


def write_members(target: Path, members: Iterable[Member]) -> None:
    """Write the new archive `target`."""
    with target.open("xb") as f:
        writer = Writer(f)
        for member in members:
            writer.add(member)
        writer.finish()


def write_base_initrd(target: Path, *, agent: Path, modules: Iterable[Member]) -> None:
    """Write the new file `target`: agent, empty mount points, and `modules` as built above.

    `/dev/console` is a record in the archive: without it the kernel starts `/init` with no stdio.
    """
    write_members(
        target,
        (
            *(directory(name) for name in ("banger", _MODULES, "dev", "proc", "sys", "run")),
            character_device("dev/console", 5, 1),
            regular_file("init", agent.read_bytes(), mode=0o755),
            *modules,
        ),
    )


def read_module_members(initrd: Path) -> Iterator[Member]:
    """The module members of a base initrd, for writing it anew with another agent.

    Raises:
        ValueError: it is no base initrd that banger made.
    """
    found = False
    with initrd.open("rb") as f:
        for member in read_members(f):
            if member.name == _LIST or member.name.startswith(f"{_MODULES}/"):
                found = found or member.name == _LIST
                yield member
    if not found:
        raise ValueError(f"{initrd} is no base initrd made by banger: it lists no modules")
