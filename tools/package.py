"""`python -m tools.package`: the wheel in `dist/` and the programs in `build/bin/`.

Runs in the virtual environment, for hatchling and for banger's own packing of the root helper.
"""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

from banger.system.zipapp import helper_archive
from tools.setup import AGENT_BINARIES, PYTHON, SCRIPTS, VENV
from tools.steps import BUILD, ROOT, StepFailed, run, say

if TYPE_CHECKING:
    from pathlib import Path


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
