"""How the root helper can be run here: as ourselves, through sudo, or not at all."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Literal

import msgspec

from banger import process
from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError

# Not the interpreter of our virtual environment: that one the owner can write.
_PYTHON = "/usr/bin/python3"


class Privilege(msgspec.Struct, frozen=True, kw_only=True):
    """`kind` "none" means user-mode networking; then `missing` says in a sentence why.

    "service": the helper is installed and runs by itself.
    """

    kind: Literal["root", "sudo", "service", "none"]
    missing: str = ""
    hint: str | None = None


class _Probe(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    problems: tuple[str, ...]


def find_helper() -> Path:
    """The directory or zip of the root helper that belongs to this banger.

    Raises:
        BangerError: not_found: the installation is incomplete.
    """
    # Found, not imported: the helper's code runs in its own process only.
    spec = importlib.util.find_spec("banger_root")
    if spec is None or not spec.submodule_search_locations:
        raise BangerError(
            "not_found",
            "banger's root helper is not installed",
            hint="pip install --force banger-vm",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def build_helper_argv(
    helper: Path, arguments: tuple[str, ...], *, kind: Literal["root", "sudo"]
) -> list[str]:
    """The command line of the helper: isolated, without site packages or compiled files."""
    argv = [_PYTHON, "-I", "-S", "-B", str(helper), *arguments]
    return argv if kind == "root" else ["sudo", "-n", "--", *argv]


async def find_privilege(helper: Path | None = None) -> Privilege:
    """Run the helper once to see whether it could make a lease here."""
    kind: Literal["root", "sudo"] = "root" if os.geteuid() == 0 else "sudo"
    if not os.access(_PYTHON, os.X_OK):
        return Privilege(
            kind="none",
            missing=f"the root helper needs {_PYTHON}, which this host does not have",
            hint="sudo apt-get install python3",
        )
    if kind == "sudo" and process.find_program("sudo") is None:
        return Privilege(
            kind="none",
            missing="banger runs as an ordinary user and sudo is not installed, so it can make no "
            "bridge and no tap",
            hint="su -c 'apt-get install sudo'",
        )
    argv = build_helper_argv(helper or find_helper(), ("--probe",), kind=kind)
    done = await process.run_async(argv, check=False)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        doing = "running the root helper through sudo" if kind == "sudo" else "running the helper"
        return Privilege(
            kind="none",
            missing=f"{doing} failed: {said[-1] if said else f'status {done.returncode}'}",
            hint="sudo -v" if kind == "sudo" else None,
        )
    try:
        probe = decode_json(done.stdout, type=_Probe)
    except MALFORMED as e:
        return Privilege(kind="none", missing=f"the root helper's answer is unreadable: {e}")
    if probe.problems:
        return Privilege(kind="none", missing="; ".join(probe.problems))
    return Privilege(kind=kind)
