"""From a Debian kernel package to the files of an entry: vmlinux, modules.sqfs, the boot modules.

Works in a staging directory of the caller's; the package is unpacked without being installed.
"""

from __future__ import annotations

import lzma
import re
import tarfile
from typing import TYPE_CHECKING

import msgspec

from banger import files
from banger.errors import BangerError
from banger.kernel.base_initrd import build_module_members, write_members
from banger.kernel.built import BOOT_ARCHIVE, RELEASE
from banger.kernel.compression import decompress, find_compression
from banger.kernel.deb import open_package_data
from banger.kernel.entries import MODULES, VMLINUX
from banger.kernel.modules import read_load_order, write_module_indexes, write_modules_squashfs
from banger.kernel.requirements import BOOT_MODULES, find_missing_options
from banger.kernel.vmlinux import extract_vmlinux

if TYPE_CHECKING:
    from pathlib import Path

    from banger.disk.background import Job

# Part of the cache key: to be raised when the same package would give other files.
BUILDER_VERSION = "1"

_MODULE_LIMIT_BYTES = 256 << 20
_TREE_LIMIT_BYTES = 4 << 30
_BOOT_FILE = re.compile(r"boot/(vmlinuz|config)-(.+)")
_MODULE_FILE = re.compile(r"(?:usr/)?lib/modules/([^/]+)/((?:[^/]+/)*[^/]+)")


class _Unpacked(msgspec.Struct, kw_only=True):
    release: str = ""
    image: bytes = b""
    config: str = ""


def build_entry_files(package: Path, target: Path, *, job: Job) -> None:
    """Write vmlinux, modules.sqfs, boot-modules.cpio and release for a kernel package.

    Raises:
        BangerError: operation_failed: the package is damaged, or its kernel lacks what a guest
            needs; not_found: a host program is missing.
    """
    with files.staging_directory(target, "tree") as tree:
        try:
            unpacked = _unpack(package, tree, job)
            vmlinux = extract_vmlinux(unpacked.image)
        except (ValueError, OSError, tarfile.TarError, lzma.LZMAError) as e:
            raise BangerError("operation_failed", f"unpacking {package.name}: {e}") from e
        if missing := find_missing_options(unpacked.config):
            raise BangerError(
                "operation_failed",
                f"the kernel of {package.name} cannot boot a guest: it lacks {', '.join(missing)}",
                hint="banger kernel list --available",
            )
        job.advance(2, 4, "indexing modules")
        write_module_indexes(tree, unpacked.release, job=job)
        modules = tree / "lib/modules" / unpacked.release
        order = read_load_order(modules, BOOT_MODULES)
        job.advance(3, 4, "writing modules.sqfs")
        write_modules_squashfs(modules, target / MODULES, job=job)
        members = build_module_members({path: (modules / path).read_bytes() for path in order})
        write_members(target / BOOT_ARCHIVE, members)
    (target / VMLINUX).write_bytes(vmlinux)
    (target / RELEASE).write_text(unpacked.release)
    job.advance(4, 4, unpacked.release)


def _unpack(package: Path, tree: Path, job: Job) -> _Unpacked:
    """Put the modules, uncompressed, below `tree/lib/modules`; return kernel image and config."""
    found = _Unpacked()
    total = 0
    with open_package_data(package) as tar:
        for info in tar:
            job.check()
            name = info.name.removeprefix("./")
            if not info.isreg() or ".." in name.split("/"):
                continue  # links named build and source lead to packages that are not here
            boot, module = _BOOT_FILE.fullmatch(name), _MODULE_FILE.fullmatch(name)
            if not boot and not module:
                continue
            total += info.size
            if info.size > _MODULE_LIMIT_BYTES or total > _TREE_LIMIT_BYTES:
                raise ValueError(f"{name} is larger than any kernel has it")
            source = tar.extractfile(info)
            assert source
            content = source.read()
            if boot and boot[1] == "vmlinuz":
                found.image, found.release = content, boot[2]
            elif boot:
                found.config = content.decode()
            elif module:
                _write_module(tree / "lib/modules" / module[1] / module[2], content)
    if not found.image or not (tree / "lib/modules" / found.release).is_dir():
        raise ValueError("it holds no kernel with modules")
    return found


def _write_module(path: Path, content: bytes) -> None:
    if path.suffix in (".xz", ".zst", ".gz") and find_compression(content):
        # The agent loads plain modules before there is a modprobe.
        path, content = path.with_suffix(""), decompress(content, limit_bytes=_MODULE_LIMIT_BYTES)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
