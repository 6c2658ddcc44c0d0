"""The root helper as one archive for `/usr/bin/python3 -I -S`: one file to own, hash and run.

Equal sources give equal bytes: fixed times, a sorted list.
"""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# The oldest time that a zip archive can name.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def helper_archive(package: Path) -> bytes:
    """The package of the root helper as a zipapp (PEP 441)."""
    members = {"__main__.py": (package / "__main__.py").read_bytes()}
    for path in sorted(package.rglob("*.py")):
        members[f"banger_root/{path.relative_to(package)}"] = path.read_bytes()
    buffer = io.BytesIO(b"#!/usr/bin/python3 -IS\n")
    buffer.seek(0, io.SEEK_END)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(members.items()):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.external_attr = 0o644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return buffer.getvalue()
