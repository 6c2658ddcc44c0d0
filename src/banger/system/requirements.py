"""What of third parties banger needs to run, found in the environment that it runs in.

No package tool and no network: whatever these very files came from, they work together here.
"""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

from banger.errors import BangerError

PROJECT = "banger-vm"
_CHECKOUT = Path(__file__).resolve().parents[3]


def own_requirements() -> tuple[str, ...]:
    """banger's own requirement lines: from its metadata, or from the checkout that it runs in.

    Raises:
        BangerError: not_found: there is neither.
    """
    try:
        return tuple(metadata.distribution(PROJECT).requires or ())
    except metadata.PackageNotFoundError:
        pass
    try:
        project = tomllib.loads((_CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
        return tuple(project["project"]["dependencies"])
    except (OSError, KeyError, tomllib.TOMLDecodeError) as e:
        raise BangerError(
            "not_found",
            f"installing: this banger has no metadata that says what it needs ({e})",
            hint="pip install --force-reinstall banger-vm",
        ) from e


def find_distributions(requirements: tuple[str, ...]) -> tuple[metadata.Distribution, ...]:
    """The installed distributions that these requirements need, and those that they need, by name.

    A requirement with a condition that is not installed is one that does not apply here; one that
    is installed although it does not apply does no harm.

    Raises:
        BangerError: not_found: a requirement without condition is not installed.
    """
    found: dict[str, metadata.Distribution] = {}
    pending = list(requirements)
    while pending:
        requirement, _, condition = pending.pop().partition(";")
        if "extra" in condition:
            continue
        m = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
        if m is None:
            continue
        # PEP 503: names that differ in case and separators only are one.
        name = re.sub(r"[-_.]+", "-", m[0]).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(m[0])
        except metadata.PackageNotFoundError as e:
            if condition:
                continue
            raise BangerError(
                "not_found",
                f"installing: banger needs the Python package {m[0]}, which is not installed",
                hint=f"pip install {m[0]}",
            ) from e
        pending += found[name].requires or ()
    return tuple(found[name] for name in sorted(found))


def list_files(distribution: metadata.Distribution) -> dict[str, Path]:
    """The files of a distribution, by their place in site-packages; its scripts are left out.

    Raises:
        BangerError: it has no list of its files (a distribution's own package, or a link to
            sources elsewhere).
    """
    name = distribution.metadata["Name"]
    files = {}
    for file in distribution.files or ():
        if ".." in file.parts or file.is_absolute() or "__pycache__" in file.parts:
            continue
        files[file.as_posix()] = Path(str(distribution.locate_file(file)))
    if not any(place.endswith((".py", ".so")) for place in files):
        raise BangerError(
            "operation_failed",
            f"installing: the Python package {name} cannot be copied: it has no list of its own "
            "files; install banger into a virtual environment of its own",
            hint="python3 -m venv ~/.local/lib/banger",
        )
    return files
