"""The VMM programs of this host: where they are, their versions, and what they were built with."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import msgspec

from banger.errors import BangerError
from banger.process import find_program, run
from banger.vmm.kvm_probe import Problem
from banger.vmm.qemu import SANDBOX

FIRECRACKER_OLDEST = (1, 10, 0)
# The newest version that the smoke suite has run with.
FIRECRACKER_TESTED = (1, 12, 1)
_DEADLINE_S = 20.0


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """An executable of this host. `sandbox`: QEMU with seccomp filters (Firecracker has them)."""

    path: Path
    version: str
    sandbox: bool = True
    remark: str | None = None


def find_firecracker(setting: str | None, bin_directory: Path) -> Program | Problem:
    """Firecracker as configured, else on PATH, else where banger puts what it fetched."""
    if setting is not None:
        path = Path(setting)
    elif found := find_program("firecracker"):
        path = Path(found)
    else:
        path = bin_directory / "firecracker"
    if not os.access(path, os.X_OK):
        where = (
            f"{path} (firecracker_bin) is no executable file"
            if setting
            else (f"firecracker is neither on PATH nor in {bin_directory}")
        )
        # One that is configured is the user's: it is not replaced.
        hint = "banger doctor" if setting else "banger doctor --fix"
        return Problem(about="firecracker", message=where, hint=hint)
    try:
        first = run([str(path), "--version"], timeout_s=_DEADLINE_S).stdout.decode(errors="replace")
    except BangerError as e:
        return Problem(
            about="firecracker",
            message=f"{path} does not run: {e.message}",
            hint="banger doctor",
        )
    return check_firecracker(path, first)


def check_firecracker(path: Path, output: str) -> Program | Problem:
    """Judge what `firecracker --version` printed."""
    m = re.search(r"Firecracker v(\d+)\.(\d+)\.(\d+)", output)
    if m is None:
        said = output.strip().partition("\n")[0][:80]
        return Problem(about="firecracker", message=f"{path} says {said!r}, which is no version")
    version = (int(m[1]), int(m[2]), int(m[3]))
    text = ".".join(map(str, version))
    if version < FIRECRACKER_OLDEST:
        oldest = ".".join(map(str, FIRECRACKER_OLDEST))
        return Problem(
            about="firecracker",
            message=f"{path} is version {text}; {oldest} is the oldest that works",
            hint="banger doctor",
        )
    tested = ".".join(map(str, FIRECRACKER_TESTED))
    newer = f"newer than {tested}, the newest tested" if version > FIRECRACKER_TESTED else None
    return Program(path=path, version=text, remark=newer)


def find_jailer(setting: str | None, firecracker: Path, bin_directory: Path) -> Path:
    """The jailer as configured, else beside firecracker, on PATH, or where banger puts it.

    Whether root may run it is for the root helper to judge.

    Raises:
        BangerError: unsupported: there is none.
    """
    if setting is not None:
        places = [Path(setting)]
    else:
        found = find_program("jailer")
        places = [firecracker.with_name("jailer"), *([Path(found)] if found else [])]
        places.append(bin_directory / "jailer")
    for path in places:
        if os.access(path, os.X_OK):
            return path
    where = " nor ".join(str(p) for p in places)
    raise BangerError(
        "operation_failed",
        f"VMs are jailed here, and there is no jailer at {where}",
        hint="banger doctor --fix",
        reason="unsupported",
    )


def find_qemu() -> Program | Problem:
    """qemu-system-x86_64 with its microvm machine, asked through its own monitor."""
    found = find_program("qemu-system-x86_64")
    install = "sudo apt-get install --no-install-recommends qemu-system-x86"
    if found is None:
        return Problem(
            about="qemu", message="qemu-system-x86_64 is not installed on this host", hint=install
        )
    # One run answers all, under the very filter that VMs get: a build without it exits at once.
    failure = ""
    for sandbox in (True, False):
        try:
            version, has_microvm = _ask_qemu(found, sandbox=sandbox)
        except BangerError as e:
            failure = e.message
            continue
        if not has_microvm:
            return Problem(about="qemu", message=f"{found} {version} has no microvm machine")
        return Program(path=Path(found), version=version, sandbox=sandbox)
    return Problem(about="qemu", message=f"{found} does not run: {failure}", hint=install)


def _ask_qemu(program: str, *, sandbox: bool) -> tuple[str, bool]:
    commands = ("qmp_capabilities", "query-version", "query-machines", "quit")
    done = run(
        [
            program, "-M", "none", "-no-user-config", "-nodefaults", "-display", "none",
            *(("-sandbox", SANDBOX) if sandbox else ()),
            "-qmp", "stdio",
        ],
        stdin="".join(json.dumps({"execute": c}) + "\n" for c in commands).encode(),
        timeout_s=_DEADLINE_S,
    )  # fmt: skip
    version, machines = "", set[str]()
    for line in done.stdout.splitlines():
        try:
            answer = json.loads(line).get("return")
        except (ValueError, AttributeError) as e:
            raise BangerError("operation_failed", f"{program} answered {line[:80]!r}") from e
        if isinstance(answer, dict) and "qemu" in answer:
            v = answer["qemu"]
            version = f"{v['major']}.{v['minor']}.{v['micro']}"
        elif isinstance(answer, list):
            machines = {m["name"] for m in answer}
    if not version or not machines:
        raise BangerError("operation_failed", f"{program} gave no version over its monitor")
    return version, "microvm" in machines
