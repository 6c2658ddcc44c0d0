"""The tar of a running system, checked member by member on its way into a squashfs.

It comes from a guest, once, and is read once: nothing is kept but names. What the guest's agent
promises of its order (parents first, a file before the links to it) is checked, not believed, since
sqfstar crashes on one and goes wrong silently on the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Literal, TypeAlias

from banger.oci.errors import BadImage
from banger.oci.merge import keep_xattrs
from banger.oci.tar_read import DIRECTORY, HARD_LINK, KNOWN, REGULAR, Member, TarReader
from banger.oci.tar_write import write_end, write_link, write_member
from banger.oci.tree import split_name
from banger.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from banger.oci.work import Work

_REPORT_EVERY_BYTES = 4 << 20
_MOST_MEMORY = 200 << 20
_MOST_APPARENT = 1 << 40  # bytes, holes counted
_NAME_COST = 140  # bytes of memory, beside the name itself

Fate: TypeAlias = Literal["keep", "empty", "drop"]


@dataclass(kw_only=True)
class Passed:
    """What has gone through."""

    members: int = 0
    content_bytes: int = 0
    apparent_bytes: int = 0


class LiveTar:
    """One system's tar. Ask for `root_mode`, then `copy` once."""

    def __init__(
        self, chunks: Iterator[bytes], *, decide: Callable[[bytes], Fate], most_bytes: int
    ) -> None:
        """`decide` says what becomes of a path; a directory that is dropped takes along what is
        below it. `most_bytes` bounds the contents of all files, holes not counted."""
        self._reader = TarReader(chunks)
        self._decide = decide
        self._most_bytes = most_bytes
        self._kinds: dict[bytes, bytes | None] = {b"": DIRECTORY}  # None: dropped
        self._memory = 0
        self._dropped = 0

    def root_mode(self) -> int:
        """The mode of the root directory, whose member comes first.

        Raises:
            BadImage: it does not, or this is no tar.
        """
        m = self._reader.next()
        if m is None or m.kind != DIRECTORY or split_name(m.name):
            raise BadImage("it does not begin with its root directory")
        return m.mode & 0o7777

    def copy(self, stream: IO[bytes], *, work: Work) -> Passed:
        """Write what is kept to `stream`, as sqfstar needs it.

        Raises:
            BadImage: a name that climbs, is there twice or has no parent; a link to what was not
                there before; more content or more names than are believed; a damaged tar.
        """
        passed = Passed()
        told = 0
        lost: dict[str, int] = {}
        while (m := self._reader.next()) is not None:
            work.check()
            parts = split_name(m.name)
            if not parts:
                raise BadImage("it holds its root directory twice")
            name, parent = b"/".join(parts), b"/".join(parts[:-1])
            fate = self._fate(name, parent)
            if m.kind not in KNOWN:
                lost["sockets and the like"] = lost.get("sockets and the like", 0) + 1
                continue
            self._enter(name, m.kind if fate != "drop" else None)
            if fate == "drop":
                continue
            if m.kind == HARD_LINK:
                self._link(m, name, stream)
            else:
                self._dropped += keep_xattrs(m)
                self._member(m, name, stream, passed, empty=fate == "empty")
            passed.members += 1
            if passed.content_bytes - told >= _REPORT_EVERY_BYTES:
                told = passed.content_bytes
                work.advance(told, None, f"{passed.members} files, {format_size(told)}")
        write_end(stream.write)
        self._reader.drain()
        if self._dropped:
            work.warn(f"{self._dropped} extended attributes (ACLs and labels) are left out")
        for what, count in lost.items():
            work.warn(f"{what} are left out, {count} of them")
        return passed

    def _fate(self, name: bytes, parent: bytes) -> Fate:
        if parent not in self._kinds:
            raise BadImage(f"{name!r} comes before the directory that it is in")
        above = self._kinds[parent]
        if above is None:
            return "drop"
        if above != DIRECTORY:
            raise BadImage(f"{name!r} is in something that is no directory")
        return self._decide(name)

    def _enter(self, name: bytes, kind: bytes | None) -> None:
        if name in self._kinds:
            raise BadImage(f"the name {name!r} is there twice")
        self._memory += _NAME_COST + len(name)
        if self._memory > _MOST_MEMORY:
            raise BadImage(
                f"its names alone would take more than {_MOST_MEMORY >> 20} MiB of memory"
            )
        self._kinds[name] = kind

    def _link(self, m: Member, name: bytes, stream: IO[bytes]) -> None:
        target = b"/".join(split_name(m.link))
        if self._kinds.get(target) in (None, DIRECTORY) or target == name:
            raise BadImage(f"{name!r} is a hard link to {target!r}, which was not there before it")
        # A further name of a link is one of what that leads to.
        write_link(stream.write, m, name, target)

    def _member(
        self, m: Member, name: bytes, stream: IO[bytes], passed: Passed, *, empty: bool
    ) -> None:
        if m.kind == REGULAR and empty:
            m.size = m.stored = 0
            m.sparse = None
        passed.content_bytes += m.stored
        passed.apparent_bytes += m.size
        if passed.content_bytes > self._most_bytes:
            raise BadImage(f"its files hold more than {format_size(self._most_bytes)}")
        if passed.apparent_bytes > _MOST_APPARENT:
            raise BadImage(f"its files have more than {_MOST_APPARENT >> 40} TiB")
        body = write_member(stream.write, m, name)
        if m.kind == REGULAR and not empty:
            self._reader.copy_data(body.write)
            body.end()
