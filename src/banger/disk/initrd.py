"""The initrd of one VM: the kernel entry's base initrd, plus the documents of this start.

The file lies in the VM's directory, is readable by the owner alone because it holds the VM's token
and host key, and is written anew at each start. A VMM that copies it leaves it empty afterwards.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import TYPE_CHECKING

from banger import files
from banger.disk.cpio import append_member

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def write_vm_initrd(base: Path, target: Path, members: Mapping[str, bytes]) -> None:
    """Replace `target` (0600) by a copy of `base` with one more archive per member.

    Raises:
        ValueError: a member's name is absolute or climbs. OSError: `base` is missing, disk full;
            an older `target` is then still whole.
    """
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        files.clone(base, beside, mode=0o600)
        with beside.open("r+b") as f:
            for name, content in members.items():
                append_member(f, name, content, mode=0o600)
        os.replace(beside, target)  # noqa: PTH105 - one rename, as in files.py
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
        raise
