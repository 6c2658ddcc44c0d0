"""Kernel packages as the host's apt sees them: find the newest, download it without installing.

apt checks signature and hash of what it downloads. Works for any user once package lists exist;
only root can refresh the lists. Owns nothing.
"""

from __future__ import annotations

import functools
import os
import re
from typing import TYPE_CHECKING

import msgspec

from banger.errors import BangerError
from banger.process import ProcessFailed, find_program, get_program, run

if TYPE_CHECKING:
    from pathlib import Path

    from banger.disk.background import Job

_REFRESH_HINT = "sudo apt-get update"


class KernelPackage(msgspec.Struct, frozen=True, kw_only=True):
    """One downloadable package. `sha256` is what the signed package list says."""

    name: str
    version: str
    sha256: str
    size_bytes: int


def find_newest(pattern: str, *, prefix: str, suite: str, entry: str, job: Job) -> KernelPackage:
    """The newest available package whose whole name matches `pattern`, in dpkg's version order.

    `prefix` narrows the search. As root the package lists are refreshed once when nothing is found.

    Raises:
        BangerError: not_found: no apt here, or no such package; the message names `suite`, and the
            other ways to the kernel entry `entry`.
    """
    if find_program("apt-cache") is None:
        raise BangerError(
            "not_found",
            f"the kernel {entry} comes from Debian's package {prefix}*, and this host has no apt",
            hint="banger kernel list --available",
        )
    found = _newest(pattern, prefix)
    if found is None and os.geteuid() == 0:
        refresh_lists(job)
        found = _newest(pattern, prefix)
    if found is None:
        raise BangerError(
            "not_found",
            f"no package {prefix}* is visible in this host's apt sources: add the suite {suite}, "
            f"or refresh the package lists; or import a kernel of yours as {entry}",
            hint=_REFRESH_HINT,
        )
    return found


def refresh_lists(job: Job) -> None:
    """`apt-get update`. Needs root.

    Raises:
        BangerError: it failed.
    """
    job.advance(0, None, "refreshing apt's package lists")
    job.run([get_program("apt-get", package="apt"), "-q", "update"])


def download(package: KernelPackage, directory: Path, *, job: Job) -> Path:
    """Download the package into `directory` and return its file.

    Raises:
        BangerError: the download failed; most often the package lists are out of date.
    """
    apt_get = get_program("apt-get", package="apt")
    argv = [apt_get, "-q", "download", f"{package.name}={package.version}"]
    try:
        job.run(argv, cwd=directory)
    except ProcessFailed as e:
        raise BangerError(
            "operation_failed",
            f"downloading {package.name} {package.version}: {e} "
            "(the package lists may be out of date)",
            hint=_REFRESH_HINT,
        ) from e
    debs = list(directory.glob("*.deb"))
    if len(debs) != 1:
        raise BangerError(
            "operation_failed", f"downloading {package.name}: apt-get left {len(debs)} packages"
        )
    return debs[0]


def _newest(pattern: str, prefix: str) -> KernelPackage | None:
    apt_cache = get_program("apt-cache", package="apt")
    listed = run([apt_cache, "pkgnames", prefix]).stdout.decode().split()
    names = sorted(name for name in listed if re.fullmatch(pattern, name))
    if not names:
        return None
    candidates = parse_policy(run([apt_cache, "policy", *names]).stdout.decode())
    if not candidates:
        return None
    # On a tie the unsigned package, whose name sorts last: it needs no signature block skipped.
    name = max(
        candidates,
        key=lambda n: (functools.cmp_to_key(_compare)(candidates[n]), n),
    )
    version = candidates[name]
    fields = parse_stanza(
        run([apt_cache, "show", "--no-all-versions", f"{name}={version}"]).stdout.decode()
    )
    return KernelPackage(
        name=name, version=version, sha256=fields["SHA256"], size_bytes=int(fields["Size"])
    )


def parse_policy(text: str) -> dict[str, str]:
    """Package → candidate version from `apt-cache policy`; packages without one are left out."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            name = line.rstrip(":")
        elif m := re.fullmatch(r"\s+Candidate: (\S+)", line):
            if m[1] != "(none)":
                found[name] = m[1]
    return found


def parse_stanza(text: str) -> dict[str, str]:
    """The one-line fields of the first stanza of a deb822 document."""
    fields: dict[str, str] = {}
    for line in text.strip().split("\n\n")[0].splitlines():
        key, colon, value = line.partition(":")
        if colon and not line[0].isspace():
            fields[key] = value.strip()
    return fields


def _compare(a: str, b: str) -> int:
    """-1, 0 or 1 in the order of Debian versions, which dpkg itself knows best."""
    if a == b:
        return 0
    dpkg = get_program("dpkg", package="dpkg")
    older = run([dpkg, "--compare-versions", a, "lt", b], check=False).returncode == 0
    return -1 if older else 1
