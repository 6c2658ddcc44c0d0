"""Which programs root may run, and whether this one may run as a service.

A program is trusted by its place and name, where nobody but root can change any directory on the
way to it, or by its content: then a copy of our own is run, made from the descriptor that was
hashed. Copies stay in `<bin_dir>/<sha256>/`, one per release of the program.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from typing import TYPE_CHECKING

from banger_root import paths
from banger_root.errors import HelperError

if TYPE_CHECKING:
    from collections.abc import Callable

PINS = {
    "firecracker": "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
    "jailer": "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
}
"""The sha256 of the programs that `make firecracker` fetches."""

_SIZE_LIMIT = 64 << 20
_CHUNK = 1 << 20
_LINKS_LIMIT = 40


def trust_program(name: str, path: str, *, bin_dir: str, owner_uid: int) -> str:
    """The path to run for a program that the owner named: it leads to nothing else later.

    Its last component is `name`, because the jailer names directories after it.

    Raises:
        HelperError: unauthorized: neither its place nor its content is to be trusted.
    """
    doing = f"running {path} as {name}"
    try:
        resolved: str | None = check_root_only(path)
        why = ""
    except HelperError as e:
        resolved, why = None, e.message
    if resolved is not None:
        found = os.stat(resolved, follow_symlinks=False)
        # Root has many programs, and is to run none but these two.
        if not re.fullmatch(rf"{name}(-v?[0-9][A-Za-z0-9._-]*)?", os.path.basename(resolved)):
            raise HelperError(
                "unauthorized", f"{doing}: its file is called {os.path.basename(resolved)[:80]!r}"
            )
        if not stat.S_ISREG(found.st_mode) or not found.st_mode & 0o001:
            raise HelperError(
                "bad_request", f"{doing}: it is no file that everyone may run", hint=f"ls -l {path}"
            )
        if os.path.basename(resolved) == name:
            return resolved
    fd = (
        os.open(resolved, os.O_RDONLY | os.O_CLOEXEC)
        if resolved
        else paths.open_readable(path, owner_uid=owner_uid)
    )
    try:
        digest = _hash(fd, lambda _: None)
        if resolved is None and digest != PINS[name]:
            raise HelperError(
                "unauthorized",
                f"{doing}: {why}; and its content (sha256 {digest}) is not the pinned one",
                hint="banger doctor",
            )
        return _copy(fd, name, digest, bin_dir)
    except OSError as e:
        raise HelperError("operation_failed", f"{doing}: {e.strerror}") from e
    finally:
        os.close(fd)


def check_root_only(path: str) -> str:
    """Follow a path through places that only root can change; return it without links.

    Raises:
        HelperError: unauthorized: somebody else can change what it means; not_found.
    """
    pending = list(reversed(paths.split_path(path)))
    at = "/"
    paths.check_trusted(os.lstat(at), at, path, sticky_ok=False)
    links = 0
    while pending:
        part = pending.pop()
        if part in ("", "."):
            continue
        if part == "..":
            at = os.path.dirname(at)
            continue
        here = os.path.join(at, part)
        try:
            found = os.lstat(here)
        except OSError as e:
            code = "not_found" if isinstance(e, FileNotFoundError) else "operation_failed"
            raise HelperError(code, f"looking at {here}: {e.strerror}") from e
        if stat.S_ISLNK(found.st_mode):
            # The directory that holds it is root's: nobody else chose where it leads.
            links += 1
            if links > _LINKS_LIMIT:
                raise HelperError("bad_request", f"{path} goes through too many links")
            target = os.readlink(here)
            if target.startswith("/"):
                at = "/"
            pending += reversed(target.split("/"))
            continue
        paths.check_trusted(found, here, path, sticky_ok=False)
        at = here
    return at


def check_helper() -> None:
    """Refuse to be a service of code that anyone but root can change.

    Raises:
        HelperError: naming the file or directory.
    """
    place = os.path.abspath(__file__)
    # In a zip the nearest thing that exists is the zip itself.
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    check_root_only(place)
    if place == os.path.abspath(__file__):
        directory = os.path.dirname(place)
        for name in sorted(os.listdir(directory)):
            check_root_only(os.path.join(directory, name))


def _hash(fd: int, also: Callable[[bytes], object]) -> str:
    """The sha256 of a file's content, each piece of which is also handed on."""
    digest = hashlib.sha256()
    position = 0
    while data := os.pread(fd, _CHUNK, position):
        position += len(data)
        if position > _SIZE_LIMIT:
            raise HelperError("bad_request", f"a program is larger than {_SIZE_LIMIT} bytes")
        digest.update(data)
        also(data)
    return digest.hexdigest()


def _copy(fd: int, name: str, digest: str, bin_dir: str) -> str:
    copy = os.path.join(bin_dir, digest, name)
    for directory in (bin_dir, os.path.dirname(copy)):
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
    parent = paths.open_directory(os.path.dirname(copy), trusted=True, sticky_ok=True)
    try:
        if name in os.listdir(parent):
            return copy
        # Of this process alone: two may copy at the same time, and the second rename is harmless.
        beside = f".{name}.{os.getpid()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(beside, flags, 0o600, dir_fd=parent), "wb") as f:
            if _hash(fd, f.write) != digest:
                raise HelperError("unauthorized", f"{name} changed while it was copied")
            f.flush()
            os.fchmod(f.fileno(), 0o755)
            os.fsync(f.fileno())
        os.rename(beside, name, src_dir_fd=parent, dst_dir_fd=parent)
        os.fsync(parent)
        return copy
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f".{name}.{os.getpid()}", dir_fd=parent)
        os.close(parent)
