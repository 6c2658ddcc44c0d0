"""The nested smoke host: a Debian with systemd in which KVM works although this machine has none.

QEMU's software emulation of an AMD processor has SVM, so a real Firecracker runs inside. The root
is a squashfs made by mmdebstrap and sqfstar without root where user namespaces allow it; what the
host writes goes to a scratch disk of its own. The image lives in the build cache, in a directory
named after the hash of everything that it is made from; an interrupted build leaves only a staging
directory, which the next build removes.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from tools.steps import cache_dir, hash_files

FILES = Path(__file__).resolve().parent / "host"
SUITE = "bookworm"
# Raised when this file changes how the image is put together.
_RECIPE = "2"


@dataclass(frozen=True, kw_only=True)
class HostImage:
    """Kernel, initramfs and root of the nested host, all read-only."""

    kernel: Path
    initrd: Path
    root: Path


def packages() -> tuple[str, ...]:
    """The Debian packages of the host image."""
    lines = (FILES / "packages").read_text().splitlines()
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def image_directory() -> Path:
    """Where the image is or will be: the name says what it is made from."""
    key = hash_files(FILES.iterdir(), _RECIPE, SUITE)
    return cache_dir() / "build" / f"nested-host-{key[:16]}"


def find_image() -> HostImage | None:
    """The image, when it was built before."""
    directory = image_directory()
    image = HostImage(
        kernel=directory / "vmlinuz", initrd=directory / "initrd.img", root=directory / "root.sqfs"
    )
    return image if image.root.is_file() else None


def ensure_image(log: Path) -> HostImage:
    """Build the image unless it is there; mmdebstrap's output goes to `log`.

    Raises:
        subprocess.CalledProcessError: mmdebstrap or sqfstar failed.
        BangerError: apt cannot tell its sources.
    """
    # Not at the top: the list of scenarios is printed by a bare Python too.
    from banger.disk.background import Job
    from banger.image.debian import read_apt_sources

    if found := find_image():
        return found
    target = image_directory()
    staging = target.with_name(f"{target.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    tar = staging / "root.tar"
    with log.open("wb") as out:
        subprocess.run(
            [
                "mmdebstrap",
                "--variant=apt",
                f"--include={','.join(packages())}",
                "--aptopt=Apt::Install-Recommends false",
                *_apt_options(),
                # Copied in by the part of mmdebstrap that may read our files: in a user namespace
                # the hooks themselves cannot enter a private directory.
                f"--customize-hook=copy-in {shlex.quote(str(FILES))} /",
                f'--customize-hook=chroot "$1" /bin/sh /{FILES.name}/customize.sh',
                SUITE,
                str(tar),
                *read_apt_sources(SUITE, Job()),
            ],
            stdout=out,
            stderr=subprocess.STDOUT,
            check=True,
        )
        _extract_boot(tar, staging)
        with tar.open("rb") as source:
            subprocess.run(
                # Barely compressed: the emulated processor would pay for every block it reads.
                ["sqfstar", "-quiet", "-no-progress", "-comp", "lz4", "-root-mode", "0755",
                 str(staging / "root.sqfs")],
                stdin=source,
                stdout=out,
                stderr=subprocess.STDOUT,
                check=True,
            )  # fmt: skip
    tar.unlink()
    for old in target.parent.glob("nested-host-*"):
        if old != staging:
            shutil.rmtree(old)
    staging.rename(target)
    found = find_image()
    assert found is not None
    return found


def _extract_boot(tar: Path, directory: Path) -> None:
    names = {"vmlinuz-": "vmlinuz", "initrd.img-": "initrd.img"}
    with tarfile.open(tar) as archive:
        for member in archive:
            name = Path(member.name).name
            for prefix, wanted in names.items():
                if member.name.startswith(f"./boot/{prefix}") and member.isfile():
                    source = archive.extractfile(member)
                    assert source is not None, name
                    with (directory / wanted).open("wb") as out:
                        shutil.copyfileobj(source, out)


def _apt_options() -> list[str]:
    """Proxy and certificate settings of this machine's apt, for the apt that mmdebstrap runs."""
    if shutil.which("apt-config") is None:
        return []
    dump = subprocess.run(
        ["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True
    ).stdout
    wanted = ("Acquire::http", "Acquire::https", "Acquire::Retries")
    return [
        f"--aptopt={line.rstrip(';')}"
        for line in dump.splitlines()
        if line.startswith(wanted) and not line.endswith(' "";')
    ]
