"""One stage of the image pipeline: from the tar of a fresh root to the tar that becomes the image.

Works on streams and holds no file's content beyond one buffer; one that is left out waits in a file
of the caller's, since it may have another name further on. What differs from machine to machine
or belongs to one VM only is left out; what the recipe adds is put in; times are made equal.
"""

from __future__ import annotations

import copy
import io
import re
import shutil
import tarfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from banger.disk.squashfs import DEFAULT_EPOCH, open_tar_writer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Left out, together with what lies below a directory that is emptied.
_DROPPED = re.compile(
    r"etc/(hostname|hosts|resolv\.conf|\.pwd\.lock|passwd-|group-|shadow-|gshadow-)"
    r"|etc/ssh/ssh_host_.*"
    r"|etc/apt/apt\.conf\.d/99mmdebstrap|etc/dpkg/dpkg\.cfg\.d/99mmdebstrap"
    r"|var/cache/apt/[^/]*\.bin|var/cache/debconf/.*-old|var/cache/ldconfig/aux-cache"
    r"|var/lib/dbus/machine-id|var/lib/dpkg/[^/]*-old|var/lib/dpkg/lock.*"
    r"|var/lib/systemd/random-seed|root/\.(bash_history|wget-hsts)"
)
_EMPTIED = (
    "dev", "proc", "sys", "run", "tmp", "boot", "var/tmp", "var/cache/apt/archives",
    "var/lib/apt/lists",
)  # fmt: skip
_LOG = "var/log/"
_XATTRS = tuple(f"SCHILY.xattr.{space}." for space in ("user", "trusted", "security"))
# Present and empty: systemd then makes an id at first boot, and does not ask any questions.
_MADE_EMPTY = "etc/machine-id"


class Addition(msgspec.Struct, frozen=True, kw_only=True):
    """A file that the recipe puts into the image, owned by root; a `Path` is a file of the host's.

    `mode` are permission bits.
    """

    mode: int
    content: bytes | Path


class RootStats(msgspec.Struct, kw_only=True):
    """What went through, for progress and for the message at the end."""

    members: int = 0
    content_bytes: int = 0


def filter_root(
    source: IO[bytes],
    target: IO[bytes],
    additions: Mapping[str, Addition],
    *,
    stats: RootStats,
    check: Callable[[], None],
    aside: IO[bytes],
    built_after: int,
    epoch: int = DEFAULT_EPOCH,
) -> None:
    """Copy a root filesystem's tar stream, filtered; `additions` are by path without leading `/`.

    An addition replaces what was at its path. A file that is left out and has another name that is
    not is the file of that name; `aside` is empty, and holds what is left out until the end.
    `check` is called per member and may raise to stop. Times from `built_after` on (both in
    seconds) become `epoch`: those files were made by this build. Files out of packages keep theirs,
    which compiled Python files refer to.

    Raises:
        ValueError: the stream holds a name twice, or a hard link to what was not there before it.
        tarfile.TarError: the stream is cut off or is no tar.
    """
    kinds: dict[str, bytes] = {}
    others = _OtherNames(aside)
    with (
        tarfile.open(fileobj=source, mode="r|", bufsize=1 << 18) as reader,
        open_tar_writer(target) as writer,
    ):
        for info in reader:
            check()
            # Streams do not go back, and a root has tens of thousands of headers.
            reader.members = []  # type: ignore[attr-defined]
            name = _plain_name(info.name)
            if name is None:
                continue
            if name in additions or is_left_out(name):
                if info.isreg():
                    others.keep(name, info, reader.extractfile(info))
                elif info.islnk():
                    others.link(name, _plain_name(info.linkname))
                continue
            if name in kinds:
                raise ValueError(f"the root filesystem has {name} twice")
            member = _normalised(info, name, built_after, epoch)
            content = reader.extractfile(info) if member.isreg() else None
            if member.islnk() and (found := others.find(member.linkname)) is not None:
                first, original, content = found
                if first is None:
                    member = _normalised(original, name, built_after, epoch)
                    others.name(_plain_name(info.linkname), name)
                else:
                    member.linkname = first
            if member.islnk() and kinds.get(member.linkname) != tarfile.REGTYPE:
                raise ValueError(f"{name} is a hard link to {member.linkname}, which is not there")
            kinds[name] = member.type
            if name == _MADE_EMPTY:
                member.size = 0
            writer.addfile(member, content if member.isreg() else None)
            writer.members = []  # type: ignore[attr-defined]
            stats.members += 1
            stats.content_bytes += member.size
        if not stats.members:
            raise ValueError("the root filesystem is empty")
        if _MADE_EMPTY not in kinds and _MADE_EMPTY not in additions:
            additions = {**additions, _MADE_EMPTY: Addition(mode=0o444, content=b"")}
        for name in sorted(additions):
            _add(writer, name, additions[name], kinds, epoch)


class _OtherNames:
    """Files that were left out, for a link to one of them that is not."""

    def __init__(self, aside: IO[bytes]) -> None:
        self._aside = aside
        self._files: dict[str, tuple[tarfile.TarInfo, int]] = {}
        self._links: dict[str, str] = {}  # a name that is left out → the file's first
        self._named: dict[str, str] = {}  # the file's first → its name in the image

    def keep(self, name: str, info: tarfile.TarInfo, content: IO[bytes] | None) -> None:
        at = self._aside.seek(0, io.SEEK_END)
        if content is not None:
            shutil.copyfileobj(content, self._aside, 1 << 18)
        self._files[name] = (info, at)

    def link(self, name: str, target: str | None) -> None:
        """A further name that is left out as well."""
        if target is not None:
            self._links[name] = self._links.get(target, target)

    def find(self, target: str) -> tuple[str | None, tarfile.TarInfo, IO[bytes]] | None:
        """Where a link leads: the name that the file has by now, else its member and content; None
        where nothing of that name was left out."""
        target = self._links.get(target, target)
        if target not in self._files:
            return None
        info, at = self._files[target]
        self._aside.seek(at)
        return self._named.get(target), info, self._aside

    def name(self, target: str | None, name: str) -> None:
        """The file that was left out as `target` is in the image as `name`."""
        assert target is not None
        self._named[self._links.get(target, target)] = name


def is_left_out(name: str) -> bool:
    """Whether a path of the fresh root (no leading `/`) does not belong into an image."""
    if _DROPPED.fullmatch(name):
        return True
    return any(name.startswith(f"{directory}/") for directory in _EMPTIED)


def _plain_name(name: str) -> str | None:
    """`./usr/bin` → `usr/bin`; None for the root itself.

    Raises:
        ValueError: the name climbs. sqfstar would strip that and go on.
    """
    plain = name.removeprefix("./").rstrip("/")
    if plain in ("", "."):
        return None
    if plain.startswith("/") or ".." in plain.split("/"):
        raise ValueError(f"the root filesystem holds the name {name!r}")
    return plain


def _normalised(info: tarfile.TarInfo, name: str, built_after: int, epoch: int) -> tarfile.TarInfo:
    member = copy.copy(info)
    member.name = name
    if member.islnk():
        member.linkname = _plain_name(member.linkname) or ""
    member.mtime = int(info.mtime) if info.mtime < built_after else epoch
    # Ids are what counts in a guest; names would be looked up in the wrong passwd.
    member.uname = member.gname = ""
    # The attributes that squashfs can hold, which excludes ACLs (Debian has one, on the journal's
    # directory, where systemd-tmpfiles sets it at each boot). Other headers are written anew.
    member.pax_headers = {
        key: value for key, value in info.pax_headers.items() if key.startswith(_XATTRS)
    }
    if name.startswith(_LOG) and member.isreg():
        member.size = 0  # an empty log keeps its owner and mode
    return member


def _add(
    writer: tarfile.TarFile, name: str, addition: Addition, kinds: dict[str, bytes], epoch: int
) -> None:
    parts = name.split("/")
    for depth in range(1, len(parts)):
        parent = "/".join(parts[:depth])
        kind = kinds.get(parent)
        if kind is None:
            info = tarfile.TarInfo(parent)
            info.type, info.mode, info.mtime = tarfile.DIRTYPE, 0o755, epoch
            writer.addfile(info)
            kinds[parent] = tarfile.DIRTYPE
        elif kind != tarfile.DIRTYPE:
            raise ValueError(f"/{name} cannot be added: /{parent} is no directory in the image")
    if kinds.get(name) is not None:
        raise ValueError(f"/{name} cannot be added: it is there already")
    info = tarfile.TarInfo(name)
    info.mode, info.mtime = addition.mode, epoch
    if isinstance(addition.content, bytes):
        info.size = len(addition.content)
        writer.addfile(info, io.BytesIO(addition.content))
    else:
        info.size = addition.content.stat().st_size
        with addition.content.open("rb") as f:
            writer.addfile(info, f)
    kinds[name] = tarfile.REGTYPE
