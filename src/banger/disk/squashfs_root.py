"""The owner of a squashfs's root directory, set in the finished file.

sqfstar gives the root directory to whoever runs it, and ignores -root-uid (4.5.1). In a user
namespace it would believe that it is root, but a confined service, and many hosts, allow none.
Inodes and ids that are stored uncompressed can be changed where they lie.

Source: Linux, fs/squashfs/squashfs_fs.h (super block, inodes, metadata blocks, id table).
"""

from __future__ import annotations

import struct
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

UNCOMPRESSED = ("-noI", "-noId")
"""The options of sqfstar that `own_root_directory` needs."""

_SUPER = struct.Struct("<4s22xH4xQ8xQ8xQ")  # magic, ids, root inode, id table, inode table
_BLOCK = 8192  # SQUASHFS_METADATA_SIZE
_PLAIN = 1 << 15  # SQUASHFS_COMPRESSED_BIT: set when a metadata block is not compressed


class SquashfsChanged(Exception):
    """The file is not what the squashfs tools that we know write."""


def own_root_directory(path: Path) -> None:
    """Give the root directory of a new squashfs to root; where nothing in it is root's, its owner
    has no number to be changed to and stays.

    Raises:
        SquashfsChanged: it is no squashfs with uncompressed inodes and ids. OSError.
    """
    with path.open("r+b") as f:
        magic, ids, root, id_table, inodes = _SUPER.unpack(_at(f, 0, _SUPER.size))
        if magic != b"hsqs":
            raise SquashfsChanged("it is no squashfs")
        index = _find_id(f, id_table, ids, 0)
        if index is None:
            return
        block, offset = inodes + (root >> 16), root & 0xFFFF
        for number, byte in enumerate(struct.pack("<HH", index, index)):
            # squashfs_base_inode: type and mode, two bytes each, then these two. An inode may
            # begin in one block and go on in the next.
            further, at = divmod(offset + 4 + number, _BLOCK)
            start = block + further * (2 + _BLOCK)
            if at >= _plain_length(f, start):
                raise SquashfsChanged("its root inode is not where the super block says")
            f.seek(start + 2 + at)
            f.write(bytes([byte]))


def _find_id(f: IO[bytes], table: int, count: int, wanted: int) -> int | None:
    """The index of an id in the table of all owners and groups."""
    if not count:
        raise SquashfsChanged("it has no ids")
    per_block = _BLOCK // 4
    blocks = -(-count // per_block)
    starts = struct.unpack(f"<{blocks}Q", _at(f, table, 8 * blocks))
    for number, start in enumerate(starts):
        here = min(per_block, count - number * per_block)
        if _plain_length(f, start) < 4 * here:
            raise SquashfsChanged("its table of ids is too short")
        found = struct.unpack(f"<{here}I", _at(f, start + 2, 4 * here))
        if wanted in found:
            return number * per_block + found.index(wanted)
    return None


def _plain_length(f: IO[bytes], start: int) -> int:
    """The bytes in the metadata block at `start`, which has to be uncompressed."""
    (head,) = struct.unpack("<H", _at(f, start, 2))
    if not head & _PLAIN:
        raise SquashfsChanged("its inodes or ids are compressed")
    return int(head & ~_PLAIN) or _PLAIN


def _at(f: IO[bytes], offset: int, count: int) -> bytes:
    f.seek(offset)
    data = f.read(count)
    if len(data) < count:
        raise SquashfsChanged("it is cut off")
    return data
