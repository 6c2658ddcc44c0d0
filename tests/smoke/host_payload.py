"""The payload disk: what one smoke run brings into the nested host, as one read-only squashfs.

The project's wheel with the locked dependencies beside it, firecracker, the kernel and the image
that this machine already has, and the scenarios. Nothing is downloaded inside. The disk belongs to
the run; only the wheels of the dependencies are kept, in the build cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from tools.setup import FIRECRACKER_SHA256, KERNEL, MINIMAL_IMAGE, PYTHON
from tools.steps import ROOT, StepFailed, cache_dir, hash_files, run, state_dir

HERE = Path(__file__).resolve().parent
LOCK = ROOT / "requirements.lock"
# The Python of the nested host and the C libraries whose wheels it takes (Debian 12: glibc 2.36).
_HOST_PYTHON = "3.11"
_PLATFORMS = ("manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux_2_17_x86_64",
              "manylinux2014_x86_64")  # fmt: skip
_CONFIG = f"""\
default_image_name = "{MINIMAL_IMAGE}"
ready_timeout = "240s"
stop_timeout = "60s"

[vm_defaults]
vcpu = 1
memory_mib = 384
disk_size = "2G"
system_overlay_size = "2G"
"""


def build_payload(directory: Path) -> Path:
    """Make the payload disk in `directory`, which must be empty, and return it.

    Raises:
        StepFailed: a part is missing or cannot be built; the text names it.
    """
    tree = directory / "payload"
    tree.mkdir(parents=True)
    _pack_state(tree / "state.tar")
    shutil.copytree(_ensure_wheelhouse(), tree / "wheels")
    run(
        [PYTHON, "-m", "hatchling", "build", "-t", "wheel", "-d", tree / "wheels"],
        log="smoke-wheel",
    )
    # Of the host's Python version and compiled: its own pip is an archive, compiled at every call.
    pip = subprocess.check_output([PYTHON, "-c", "import pip; print(*pip.__path__)"], text=True)
    shutil.copytree(pip.strip(), tree / "pip" / "pip")
    (tree / "config.toml").write_text(_CONFIG)
    shutil.copy(HERE / "inside.sh", tree / "inside.sh")
    inside = tree / "tests" / "smoke"
    (inside / "scenarios").mkdir(parents=True)
    for path in HERE.glob("*.py"):
        shutil.copy(path, inside / path.name)
    for path in (HERE / "scenarios").glob("*.py"):
        shutil.copy(path, inside / "scenarios" / path.name)
    (tree / "tests" / "bench").mkdir()
    for name in ("__init__", "dns", "measure"):
        shutil.copy(HERE.parent / "bench" / f"{name}.py", tree / "tests" / "bench" / f"{name}.py")
    disk = directory / "payload.sqfs"
    # Not compressed: everything big in it already is, and the emulated processor would unpack it.
    run(
        ["mksquashfs", tree, disk, "-quiet", "-no-progress", "-all-root",
         "-noI", "-noD", "-noF", "-noX"],
        log="smoke-payload",
    )  # fmt: skip
    shutil.rmtree(tree)
    return disk


def _pack_state(target: Path) -> None:
    """The parts of this user's state that the nested host starts with.

    As pax, which keeps nanoseconds: a kernel or image whose file times differ from its manifest is
    hashed again at each start, and the emulated processor takes long over that.
    """
    parts = [
        *(f"bin/{name}" for name in FIRECRACKER_SHA256),
        f"kernels/{KERNEL}",
        f"images/{_find_image(MINIMAL_IMAGE)}",
    ]
    for part in parts:
        if not (state_dir() / part).exists():
            raise StepFailed(f"{state_dir() / part} is missing: python3 -m tools.setup smoke")
    run(
        ["tar", "--format=posix", "--owner=0", "--group=0", "-cf", target, "-C", state_dir(),
         *parts],
        log="smoke-payload",
    )  # fmt: skip


def _find_image(name: str) -> str:
    for manifest in sorted((state_dir() / "images").glob("*/manifest.json")):
        if json.loads(manifest.read_bytes()).get("name") == name:
            return manifest.parent.name
    raise StepFailed(f"there is no image {name}: banger image build --name {name} --recipe {name}")


def _ensure_wheelhouse() -> Path:
    """The locked dependencies as wheels for the nested host's Python, in the build cache."""
    key = hash_files([LOCK], _HOST_PYTHON, *_PLATFORMS)[:16]
    target = cache_dir() / "build" / f"wheelhouse-{key}"
    if target.is_dir():
        return target
    staging = target.with_name(f"{target.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    run(
        [PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input", "download",
         "--require-hashes", "--only-binary", ":all:", "--python-version", _HOST_PYTHON,
         *platforms, "--dest", staging, "-r", LOCK],
        log="smoke-wheelhouse",
    )  # fmt: skip
    for old in target.parent.glob("wheelhouse-*"):
        if old != staging:
            shutil.rmtree(old)
    staging.rename(target)
    return target


def make_scratch(path: Path) -> None:
    """A sparse ext4 disk for everything that the nested host writes in one run."""
    with path.open("wb") as f:
        f.truncate(16 << 30)
    # With a journal, as on any host: a scenario cuts the power.
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(path)],
        env={**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"},
        check=True,
    )
