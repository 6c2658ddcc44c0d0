"""Which filesystem a root is, told by its magic number and never looked at further.

Source: Linux, fs/squashfs/squashfs_fs.h (SQUASHFS_MAGIC at 0), include/uapi/linux/magic.h
(EXT4_SUPER_MAGIC, at 0x38 in the superblock, which begins at 1024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_SQUASHFS = b"hsqs"
_EXT4 = b"\x53\xef"
_EXT4_AT = 1024 + 0x38

ROOTFS_FILES = ("rootfs.sqfs", "rootfs.ext4")
"""The names that a managed root filesystem can have."""


def rootfs_name(path: Path) -> str:
    """The name that this filesystem has in a managed image.

    Raises:
        ValueError: it is neither squashfs nor ext4. OSError: it cannot be read.
    """
    with path.open("rb") as f:
        head = f.read(_EXT4_AT + len(_EXT4))
    if head.startswith(_SQUASHFS):
        return "rootfs.sqfs"
    if head[_EXT4_AT:] == _EXT4:
        return "rootfs.ext4"
    raise ValueError("it is neither squashfs nor ext4")
