"""Kernel sources: Debian's source package through apt, or a signed tarball of the user's.

Both become a directory of the caller's. apt checks the package; a tarball is unpacked only when its
detached signature, which covers the uncompressed archive, is valid.
"""

from __future__ import annotations

import lzma
import os
import re
import subprocess
import tarfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from banger.errors import BangerError
from banger.kernel import apt
from banger.kernel.compression import open_decompressed
from banger.kernel.deb import open_package_data
from banger.process import ProcessFailed, get_program
from banger.units import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from banger.disk.background import Job
    from banger.kernel.build_recipe import KernelRecipe

_TAR_LIMIT_BYTES = 4 * GIB
_COPY_BYTES = 1 << 20
_REPORT_EVERY_BYTES = 64 * MIB
_SIGNATURE_LIMIT_BYTES = 64 << 10
_HINT = "banger kernel build --help"
_TROUBLE = (ValueError, OSError, EOFError, tarfile.TarError, lzma.LZMAError)


class Tarball(msgspec.Struct, frozen=True, kw_only=True):
    """An archive of the kernel project's and the signature beside it, both the user's files."""

    archive: Path
    signature: Path


def plan_tarball(archive: Path, signature: Path | None) -> Tarball:
    """The archive with its signature: `linux-6.12.1.tar.xz` and `linux-6.12.1.tar.sign`.

    Raises:
        BangerError: bad_request: it is no .tar.xz, or a file is missing.
    """
    name = archive.name
    if not archive.is_absolute() or not name.endswith(".tar.xz"):
        raise BangerError(
            "bad_request", f"{archive} is no .tar.xz of the kernel's sources", hint=_HINT
        )
    beside = signature or archive.with_name(f"{name.removesuffix('.tar.xz')}.tar.sign")
    for path in (archive, beside):
        if not path.is_file():
            raise BangerError(
                "bad_request",
                f"there is no file {path}: sources come with their detached signature",
                hint=_HINT,
            )
    return Tarball(archive=archive, signature=beside)


def find_source_package(recipe: KernelRecipe, *, entry: str, job: Job) -> apt.KernelPackage:
    """The newest package of the recipe's sources that this host's apt sees.

    Raises:
        BangerError: as `apt.find_newest`.
    """
    return apt.find_newest(
        re.escape(recipe.package),
        prefix=recipe.package,
        suite=recipe.suite,
        entry=entry,
        job=job,
    )


def unpack_source_package(package: Path, tree: Path, *, job: Job) -> None:
    """Unpack the tarball inside a Debian source package such as linux-source-6.12 into `tree`.

    Raises:
        BangerError: operation_failed: the package is damaged or holds no sources.
    """
    try:
        with open_package_data(package) as tar:
            for info in tar:
                job.check()
                if info.isreg() and re.fullmatch(
                    r"(\./)?usr/src/linux-source-.*\.tar\.xz", info.name
                ):
                    inner = tar.extractfile(info)
                    assert inner
                    with lzma.LZMAFile(inner) as stream:
                        _unpack(stream, tree, package.name, job)
                    return
        raise ValueError("it holds no sources")
    except _TROUBLE as e:
        raise _damaged(package.name, e) from e


def decompress_tarball(tarball: Tarball, target: Path, *, job: Job) -> None:
    """Write the uncompressed archive, which is what its signature covers, as the file `target`.

    Raises:
        BangerError: operation_failed: damaged, or larger than any kernel's sources.
    """
    name = tarball.archive.name
    try:
        # Without waiting for a writer, should it be a pipe.
        fd = os.open(tarball.archive, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as f, open_decompressed(f, name) as stream, target.open("xb") as t:
            for chunk in _pieces(stream, job, "unpacking"):
                t.write(chunk)
    except _TROUBLE as e:
        raise _damaged(name, e) from e


def read_signature(tarball: Tarball, target: Path) -> None:
    """Copy the signature, so that what is checked cannot change under the check."""
    try:
        with tarball.signature.open("rb") as f:
            content = f.read(_SIGNATURE_LIMIT_BYTES + 1)
        if len(content) > _SIGNATURE_LIMIT_BYTES:
            raise ValueError("it is too large for a signature")
        target.write_bytes(content)
    except _TROUBLE as e:
        raise _damaged(tarball.signature.name, e) from e


def unpack_tarball(archive: Path, tree: Path, *, what: str, job: Job) -> None:
    """Unpack a verified, uncompressed archive into `tree`.

    Raises:
        BangerError: operation_failed.
    """
    try:
        with archive.open("rb") as f:
            _unpack(f, tree, what, job)
    except _TROUBLE as e:
        raise _damaged(what, e) from e


def read_version(tree: Path, *, what: str) -> str:
    """`6.12.117`, from the sources' own Makefile.

    Raises:
        BangerError: operation_failed: these are no kernel sources.
    """
    try:
        with (tree / "Makefile").open(encoding="utf-8", errors="replace") as f:
            head = f.read(4096)
    except OSError as e:
        raise _damaged(what, e) from e
    parts = dict(re.findall(r"^(VERSION|PATCHLEVEL|SUBLEVEL) = ([0-9]+)$", head, re.MULTILINE))
    if len(parts) != 3:
        raise _damaged(what, ValueError("its Makefile names no version of Linux"))
    return f"{parts['VERSION']}.{parts['PATCHLEVEL']}.{parts['SUBLEVEL']}"


def _unpack(stream: IO[bytes], tree: Path, name: str, job: Job) -> None:
    """Feed a tar stream to tar(1), which is several times as quick as tarfile."""
    tree.mkdir(exist_ok=True)
    argv = [
        get_program("tar", package="tar"),
        "--extract", "--file", "-",
        "--directory", str(tree),
        "--strip-components", "1",
        "--no-same-owner", "--no-same-permissions",
    ]  # fmt: skip
    try:
        with job.program(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as p:
            assert p.stdin
            try:
                for chunk in _pieces(stream, job, "unpacking the sources"):
                    p.stdin.write(chunk)
                p.stdin.close()
            except BrokenPipeError:
                # It ended first: leaving the block reports its status and last words.
                if p.wait() == 0:
                    raise
    except ProcessFailed as e:
        raise BangerError("operation_failed", f"unpacking {name}: {e}") from e


def _pieces(stream: IO[bytes], job: Job, doing: str) -> Iterator[bytes]:
    done = told = 0
    while chunk := stream.read(_COPY_BYTES):
        job.check()
        done += len(chunk)
        if done > _TAR_LIMIT_BYTES:
            raise ValueError("it unpacks to more than any kernel's sources")
        if done - told >= _REPORT_EVERY_BYTES:
            told = done
            job.advance(done, None, doing)
        yield chunk


def _damaged(name: str, e: Exception) -> BangerError:
    return BangerError("operation_failed", f"unpacking {name}: {e}", hint=_HINT)
