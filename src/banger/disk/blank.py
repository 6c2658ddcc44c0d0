"""Blank ext4 disks: one sparse template per role and size, cloned for each VM.

Templates lie in `<state>/templates`, are made once and never written again. The host touches a
guest's filesystem at no other time: it makes the blank, clones it, and later lengthens the file.
The bytes of a template depend on role and size only.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from typing import TYPE_CHECKING, Literal

from banger import files
from banger.errors import BangerError
from banger.process import get_program, run
from banger.units import GIB, MIB, format_size

if TYPE_CHECKING:
    from pathlib import Path

    from banger.config.paths import Paths

Role = Literal["overlay", "work"]

MIN_BYTES = 64 * MIB
MAX_BYTES = 128 * GIB
_BLOCK = 4096

# A list of our own: the defaults of new e2fsprogs (orphan_file, metadata_csum_seed) keep older
# guest kernels from mounting. resize_inode lets the guest grow the filesystem while mounted.
_MKE2FS_CONF = """\
[defaults]
	base_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr
	default_mntopts = acl,user_xattr
	enable_periodic_fsck = 0
	blocksize = 4096
	inode_size = 256
	inode_ratio = 16384
	reserved_ratio = 0
[fs_types]
	ext4 = {
		features = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize
	}
"""
_EXTENDED = "root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1"
# Any fixed namespace: roles differ in their UUID, since two disks with one UUID in the same guest
# confuse udev, and the same role has the same UUID in every VM.
_NAMESPACE = uuid.UUID("5d7f5a4e-2f0f-4c6e-9a55-0b6f2c1d7e10")


def ensure_template(paths: Paths, role: Role, size_bytes: int) -> Path:
    """The blank disk of this role and size, made now when there is none yet.

    Raises:
        BangerError: bad_request: `size_bytes` is not a multiple of 4096 within 64 MiB to 128 GiB.
            not_found: mke2fs is missing. operation_failed: it failed, or the disk is full.
    """
    if size_bytes % _BLOCK or not MIN_BYTES <= size_bytes <= MAX_BYTES:
        raise BangerError(
            "bad_request",
            f"a {role} disk of {size_bytes} bytes cannot be made: sizes are multiples of 4 KiB "
            f"from {format_size(MIN_BYTES)} to {format_size(MAX_BYTES)}",
            hint="banger vm create --help",
        )
    version = hashlib.sha256(f"{_MKE2FS_CONF}{_EXTENDED}".encode()).hexdigest()[:8]
    template = paths.templates / f"{role}-{size_bytes}-{version}.ext4"
    if not template.is_file():
        files.ensure_private_directory(paths.templates)
        _make(template, role, size_bytes)
    return template


def write_blank_disk(paths: Paths, role: Role, size_bytes: int, target: Path) -> None:
    """Make the new file `target` (0600), a blank disk: a clone of the role's template.

    Raises:
        BangerError: as `ensure_template`, or `target` exists or cannot be written.
    """
    template = ensure_template(paths, role, size_bytes)
    try:
        # Whole or not there: the next start takes a disk that exists for the user's own.
        files.clone_whole(template, target, mode=0o600)
    except OSError as e:
        raise BangerError(
            "operation_failed", f"making the {role} disk {target}: {e.strerror}"
        ) from e


def extend_disk(disk: Path, size_bytes: int) -> None:
    """Lengthen the disk of a stopped VM; the guest grows the filesystem at its next boot.

    Raises:
        BangerError: bad_request: the disk would become smaller, or larger than 128 GiB.
    """
    present = disk.stat().st_size
    if size_bytes < present or size_bytes > MAX_BYTES or size_bytes % _BLOCK:
        raise BangerError(
            "bad_request",
            f"{disk.name} of {format_size(present)} cannot become {format_size(size_bytes)}: "
            f"disks only grow, to {format_size(MAX_BYTES)} at most",
            hint="banger vm set --help",
        )
    os.truncate(disk, size_bytes)
    # Before a guest grows its filesystem into what the host might have forgotten.
    files.sync_file(disk)


def _make(template: Path, role: Role, size_bytes: int) -> None:
    mke2fs = get_program("mke2fs", package="e2fsprogs")
    identity = str(uuid.uuid5(_NAMESPACE, role))
    extended = f"{_EXTENDED},hash_seed={identity}"
    if size_bytes < MAX_BYTES:
        # Room in the tables for as much as a disk may grow. By default it is room for 1000 times
        # the size, which makes 4 MiB that each VM would have its own copy of.
        extended += f",resize={MAX_BYTES // _BLOCK}"
    try:
        # Beside, then renamed: two that make the same template at once write the same bytes.
        with files.staging_directory(template.parent, "template") as staging:
            conf, disk = staging / "mke2fs.conf", staging / "disk.ext4"
            conf.write_text(_MKE2FS_CONF)
            # The size is the file's. A size argument would count units of 1 KiB.
            with disk.open("xb") as f:
                f.truncate(size_bytes)
            argv = [
                mke2fs, "-q", "-F", "-t", "ext4", "-L", f"banger-{role}", "-U", identity,
                "-E", extended,
                str(disk),
            ]  # fmt: skip
            run(
                argv,
                env={"MKE2FS_CONFIG": str(conf), "E2FSPROGS_FAKE_TIME": "1700000000"},
                timeout_s=60,
            )
            disk.chmod(0o444)
            # All VMs to come are copies of it: it gets its name when its content is on disk.
            files.sync_file(disk)
            disk.replace(template)
        files.sync_directory(template.parent)
    except OSError as e:
        raise BangerError(
            "operation_failed", f"making the blank {role} disk {template}: {e.strerror}"
        ) from e
