"""KVM tried with a real vCPU, in a child process with a deadline; the result in words and hints.

A broken KVM may hang or kill whoever uses it, so `vcpu.py` runs as a program of its own, and what
it printed before it was lost still says how far it came.
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args

import msgspec

from banger.errors import BangerError
from banger.process import popen, run
from banger.vmm import tsc, vcpu

KvmKind = Literal[
    "usable", "absent", "denied", "busy", "no_long_mode", "dies", "wrong", "hangs", "crashed"
]
DEADLINE_S = 20.0
_REAP_S = 2.0
_TSC_DEADLINE_S = 10.0


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Something that keeps a driver from being used, and the command that mends it."""

    about: Literal["kvm", "firecracker", "qemu"]
    message: str
    hint: str | None = None


class KvmResult(msgspec.Struct, frozen=True, kw_only=True):
    """How the vCPU's run ended, and the steps that it reported, in order."""

    kind: KvmKind
    detail: str
    steps: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        return self.kind == "usable"


def probe_kvm(
    device: Path = Path("/dev/kvm"),
    *,
    deadline_s: float = DEADLINE_S,
    program: Path = Path(vcpu.__file__),
) -> KvmResult:
    """Run a vCPU through `device` to its known exit, or say how far it came.

    Returns within `deadline_s` and a little, even when the child cannot be killed (a process that
    hangs inside the kernel); such a child is left behind. Blocks: call it in a thread.
    """
    try:
        child = popen(
            [sys.executable, "-I", str(program), str(device)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except BangerError as e:
        return KvmResult(kind="crashed", detail=e.message)
    hung = False
    try:
        out, err = child.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired as late:
        hung, err = True, b""
        out = late.output or b""
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            # Gives everything that the child wrote, not only what was missing.
            out, _ = child.communicate(timeout=_REAP_S)
    steps, ended = _parse_lines(out)
    if ended is not None:
        return KvmResult(kind=ended[0], detail=ended[1], steps=steps)
    where = f"after {len(steps)} of {len(vcpu.STEPS)} steps"
    if hung:
        return KvmResult(
            kind="hangs", detail=f"no exit within {deadline_s:g} s {where}", steps=steps
        )
    status = child.returncode
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    words = err.decode(errors="replace").strip().rpartition("\n")[2]
    detail = f"the probe's process ended with {how} {where}" + (f": {words}" if words else "")
    return KvmResult(kind="crashed", detail=detail, steps=steps)


def _parse_lines(out: bytes) -> tuple[tuple[str, ...], tuple[KvmKind, str] | None]:
    steps: list[str] = []
    for line in out.splitlines():
        try:
            said = json.loads(line)
        except ValueError:  # cut off in the middle
            break
        if not isinstance(said, dict):
            break
        if "step" in said:
            steps.append(str(said["step"]))
        elif said.get("outcome") in get_args(KvmKind):
            return tuple(steps), (said["outcome"], str(said["detail"]))
    return tuple(steps), None


def describe_kvm(result: KvmResult, device: Path = Path("/dev/kvm")) -> tuple[str, ...]:
    """The evidence, one sentence each: the steps that passed, then how it ended."""
    if result.kind in ("absent", "denied"):
        return (result.detail,)
    passed = tuple(f"vCPU passed: {step}" for step in result.steps)
    return (f"{device} can be opened", *passed, result.detail)


def explain_kvm(result: KvmResult, device: Path = Path("/dev/kvm")) -> Problem | None:
    """What keeps KVM from being used and what to type; None when it is usable."""
    if result.usable:
        return None
    message, hint = {
        "absent": (
            "this host offers no KVM: no virtualisation, not enabled in its firmware, or in a VM "
            "without nested virtualisation",
            "sudo modprobe -a kvm_intel kvm_amd",
        ),
        "denied": (f"{device} may not be opened by uid {os.geteuid()}", _access_hint(device)),
        "busy": (
            "another hypervisor on this host holds the processor's virtualisation",
            "lsmod | grep -E 'vbox|vmmon'",
        ),
        "no_long_mode": ("KVM on this host runs no 64-bit guests", None),
        "dies": (f"{device} is there, but a guest dies on it: software-nested KVM", None),
        "wrong": (f"{device} is there, but computes wrong results", None),
        "hangs": (f"{device} is there, but a vCPU does not come back", None),
        "crashed": (f"{device} is there, but the probe was lost", None),
    }[result.kind]
    return Problem(about="kvm", message=f"{message} ({result.detail})", hint=hint)


def _access_hint(device: Path) -> str:
    """The command that lets this user in: the device's group where it has access, else an ACL."""
    try:
        st = device.stat()
        group = grp.getgrgid(st.st_gid).gr_name
    except (OSError, KeyError):
        return f"ls -l {device}"
    user = os.environ.get("USER") or str(os.geteuid())
    access = stat.S_IRGRP | stat.S_IWGRP
    if st.st_mode & access == access and st.st_gid != 0:
        return f"sudo usermod -aG {group} {user}   (then log in again)"
    return f"sudo setfacl -m u:{user}:rw {device}"


def measure_tsc() -> int | None:
    """The frequency of this host's time stamp counter in kHz; None where it cannot be told."""
    try:
        done = run([sys.executable, "-I", tsc.__file__], timeout_s=_TSC_DEADLINE_S, check=False)
    except BangerError:
        return None
    text = done.stdout.strip()
    return int(text) if done.returncode == 0 and text.isdigit() else None
