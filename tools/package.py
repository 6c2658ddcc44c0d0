"""`python -m tools.package`: the wheel in `dist/` and the programs in `build/bin/`.

Runs in the virtual environment, for hatchling. The root helper becomes one zip archive for
`/usr/bin/python3 -I -S`; fixed times and a sorted list make two builds equal.
"""

from __future__ import annotations

import io
import shutil
import sys
import zipfile
from typing import TYPE_CHECKING

from tools.setup import AGENT_BINARIES, PYTHON, SCRIPTS, VENV
from tools.steps import BUILD, ROOT, StepFailed, run, say

if TYPE_CHECKING:
    from pathlib import Path

# The oldest time that a zip archive can name.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def helper_archive(package: Path) -> bytes:
    """The root helper as a zipapp; equal sources give equal bytes."""
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


def build_wheel() -> Path:
    """Build the wheel, which carries both agent binaries, and return it."""
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    run([PYTHON, "-m", "hatchling", "build", "-t", "wheel", "-d", dist], log="wheel")
    (wheel,) = dist.glob("*.whl")
    return wheel


def build_programs() -> Path:
    """Put the four programs into `build/bin` and return it."""
    target = BUILD / "bin"
    staging = BUILD / ".bin.staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name in SCRIPTS:
        shutil.copy2(VENV / "bin" / name, staging / name)
    helper = staging / "banger-root"
    helper.write_bytes(helper_archive(ROOT / "src" / "banger_root"))
    helper.chmod(0o755)
    shutil.copy2(AGENT_BINARIES / "banger-vsock-agent-amd64", staging / "banger-vsock-agent")
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    return target


if __name__ == "__main__":
    try:
        say(f"build: {build_wheel()}")
        say(f"build: {build_programs()}")
    except StepFailed as e:
        sys.exit(f"build: failed: {e}")
