"""Programs that the host must have, and the distribution packages that bring them.

Looked up by program, so that any distribution will do on which they are there already; installed
through the distribution's own package manager, as root or through `sudo -n`. Nothing is removed,
upgraded or configured.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools.steps import StepFailed, run, say

if TYPE_CHECKING:
    from collections.abc import Sequence

# Debian keeps mkfs and nft in sbin, which is not on every user's PATH.
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"

# Package manager → field of `Need`.
_COLUMNS = {"apt-get": "apt", "dnf": "dnf", "pacman": "pacman"}


@dataclass(frozen=True)
class Need:
    """A program (or, with a slash, a file; or a Python module as `python:NAME`) and its packages.

    An empty package name: that distribution has no such package, and it is done without.
    """

    what: str
    apt: str
    dnf: str
    pacman: str

    def is_there(self) -> bool:
        if self.what.startswith("python:"):
            importlib.invalidate_caches()  # it may have been installed since the last look
            return importlib.util.find_spec(self.what.removeprefix("python:")) is not None
        if "/" in self.what:
            return Path(self.what).exists()
        return shutil.which(self.what, path=_PATH) is not None

    def package(self, column: str) -> str:
        """The package's name in one distribution family; "" where there is none."""
        return str(getattr(self, column))


RUN = (
    Need("qemu-system-x86_64", "qemu-system-x86", "qemu-system-x86-core", "qemu-system-x86"),
    Need("mmdebstrap", "mmdebstrap", "mmdebstrap", "mmdebstrap"),
    Need("sqfstar", "squashfs-tools", "squashfs-tools", "squashfs-tools"),
    Need("mkfs.ext4", "e2fsprogs", "e2fsprogs", "e2fsprogs"),
    Need("nft", "nftables", "nftables", "nftables"),
    Need("ip", "iproute2", "iproute", "iproute2"),
    Need("ssh", "openssh-client", "openssh-clients", "openssh"),
    Need("ssh-keygen", "openssh-client", "openssh-clients", "openssh"),
    Need("python:ensurepip", "python3-venv", "python3", "python"),
    Need("git", "git", "git", "git"),
    Need("zstd", "zstd", "zstd", "zstd"),
    Need("xz", "xz-utils", "xz", "xz"),
    Need("modprobe", "kmod", "kmod", "kmod"),
    Need("newuidmap", "uidmap", "shadow-utils", "shadow"),
)
TEST = (
    Need("gcc", "gcc", "gcc", "gcc"),
    Need("/usr/include/stdlib.h", "libc6-dev", "glibc-devel", "glibc"),
    Need("make", "make", "make", "make"),
    Need("shellcheck", "shellcheck", "ShellCheck", "shellcheck"),
    Need("tmux", "tmux", "tmux", "tmux"),
    Need("vim", "vim", "vim-enhanced", "vim"),
    Need("less", "less", "less", "less"),
    # What the bench compares the way of repositories with.
    Need("rsync", "rsync", "rsync", "rsync"),
    Need("fakeroot", "fakeroot", "fakeroot", "fakeroot"),
    Need("cpio", "cpio", "cpio", "cpio"),
    Need("dig", "dnsutils", "bind-utils", "bind"),
    Need("dnsmasq", "dnsmasq-base", "dnsmasq", "dnsmasq"),
    Need("ld", "binutils", "binutils", "binutils"),
    # A registry, a maker and a judge of container images; their tests skip where one is missing.
    Need("docker-registry", "docker-registry", "", ""),
    Need("skopeo", "skopeo", "skopeo", "skopeo"),
    Need("umoci", "umoci", "", ""),
    # Small sources are compiled, real ones are configured; tarballs are signed and verified.
    Need("flex", "flex", "flex", "flex"),
    Need("bison", "bison", "bison", "bison"),
    Need("bc", "bc", "bc", "bc"),
    Need("perl", "perl", "perl", "perl"),
    Need("/usr/include/libelf.h", "libelf-dev", "elfutils-libelf-devel", "libelf"),
    Need("gpg", "gpg", "gnupg2", "gnupg"),
    Need("gpg-agent", "gpg-agent", "gnupg2", "gnupg"),
    Need("gpgv", "gpgv", "gnupg2", "gnupg"),
    Need("buildah", "buildah", "buildah", "buildah"),
    # A judge of our signatures.
    Need("minisign", "minisign", "minisign", "minisign"),
    # A judge of our initrds; the tests that ask it skip where the distribution has none.
    Need("unmkinitramfs", "initramfs-tools-core", "", ""),
    # Repositories of all shapes. Only the package's directory is asked for: small images leave out
    # the documentation, where the repositories are, and then their test skips.
    Need("/usr/share/doc/libgit2-fixtures", "libgit2-fixtures", "", ""),
    # A judge of our units; it starts nothing.
    Need("systemd-analyze", "systemd", "systemd", "systemd"),
    # Statically linked: what a small root filesystem of the tests consists of.
    Need("busybox", "busybox-static", "busybox", "busybox"),
)


def missing(needs: Sequence[Need]) -> list[Need]:
    """What is not on this host although this distribution has it."""
    column = _COLUMNS.get(_manager() or "", "")
    return [need for need in needs if not need.is_there() and (not column or need.package(column))]


def _manager() -> str | None:
    return next((name for name in _COLUMNS if shutil.which(name)), None)


def install(needs: Sequence[Need], *, log: str) -> None:
    """Install what is missing.

    Raises:
        StepFailed: no known package manager, no way to become root, or it failed; the text names
            what is missing or the command to run.
    """
    wanted = missing(needs)
    manager = _manager()
    if manager is None:
        names = ", ".join(need.what.removeprefix("python:") for need in wanted)
        raise StepFailed(
            "this distribution's package manager is not one of apt, dnf, pacman.\n"
            f"Install what is missing by hand, then run this again: {names}"
        )
    packages = list(dict.fromkeys(need.package(_COLUMNS[manager]) for need in wanted))
    say(f"setup:   {manager} install {' '.join(packages)}")
    root = _become_root([manager, "install", *packages])
    if manager == "apt-get":
        _apt(root, packages, log)
    elif manager == "dnf":
        run([*root, "dnf", "install", "-y", *packages], log=log)
    else:
        run([*root, "pacman", "-S", "--needed", "--noconfirm", *packages], log=log)
    if left := missing(needs):
        names = ", ".join(need.what for need in left)
        raise StepFailed(f"{manager} installed the packages, but these are still missing: {names}")


def _become_root(command: list[str]) -> list[str]:
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo"):
        asked = subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False)
        if asked.returncode == 0:
            return ["sudo", "-n"]
    raise StepFailed(
        f"needs root, and `sudo -n` does not work here. Run this, then again what you ran:\n"
        f"    sudo {shlex.join(command)}"
    )


def _apt(root: list[str], packages: list[str], log: str) -> None:
    # `env` because sudo drops variables. A lock held by unattended upgrades is waited for.
    apt = [*root, "env", "DEBIAN_FRONTEND=noninteractive"]
    apt += ["apt-get", "-o", "DPkg::Lock::Timeout=300"]
    install = [*apt, "install", "-y", "--no-install-recommends", *packages]
    if any(Path("/var/lib/apt/lists").glob("*_Packages*")):
        try:
            run(install, log=log)
        except StepFailed:
            say("setup:   the package lists are out of date, updating them")
        else:
            return
    run([*apt, "update"], log=log)
    run(install, log=log)
