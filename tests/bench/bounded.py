"""Figures of memory: what command line, daemon and agent grow to while much goes through.

Session output of 100 MB for a reader that stops reading, and a repository with a file of 2 GB on
its way in and out. Peaks are the kernel's own (VmHWM, reset before; ru_maxrss of a command line).
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

from tests.bench.ground import Ground
from tests.bench.measure import Figure, load

_MB = 1_000_000
_OUTPUT_BYTES = 100_000_000
_LARGE_BYTES = int(os.environ.get("BENCH_LARGE_BYTES", 2 << 30))
_VM = "bounded"


def bounded_memory(ground: Ground, runs: int) -> list[Figure]:
    """Each once: peaks hardly move."""
    ground.create(_VM, "--disk-size", "12G")
    try:
        return [*_slow_reader(ground), *_large_file(ground)]
    finally:
        ground.ok("vm", "delete", _VM)


class _Peaks:
    """The most memory of daemon, agent and command lines since it was made, MB."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self.daemon_pid = ground.daemon_pid()
        Path(f"/proc/{self.daemon_pid}/clear_refs").write_text("5")
        self._in_guest("for p in /proc/[0-9]*; do echo 5 > $p/clear_refs; done 2>/dev/null; true")
        self.cli = 0.0

    def _in_guest(self, script: str) -> str:
        return self._ground.ok(
            "vm", "exec", "--guest-path", "/", _VM, "--", "sh", "-c", script
        ).text

    def run(self, *words: str) -> float:
        """A command line to its end; its seconds."""
        began = time.perf_counter()
        child = subprocess.Popen(
            self._ground.argv(*words), env=self._ground.env, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.ended(child)
        return time.perf_counter() - began

    def ended(self, child: subprocess.Popen[bytes]) -> None:
        """Wait for a command line and take its peak."""
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RuntimeError(f"{child.args!r}: status {child.returncode}")
        self.cli = max(self.cli, used.ru_maxrss * 1024 / _MB)

    def daemon(self) -> float:
        status = Path(f"/proc/{self.daemon_pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / _MB

    def agent(self) -> float:
        """The largest of the agent's processes: itself, and the supervisors of sessions."""
        script = "grep -H -e VmHWM /proc/[0-9]*/status; cd /proc; for p in [0-9]*; do"
        script += " echo $p $(readlink $p/exe); done"
        peaks: dict[str, int] = {}
        found = 0
        for line in self._in_guest(script).splitlines():
            words = line.split()
            if line.startswith("/proc/"):
                peaks[line.split("/")[2]] = int(words[1])
            elif len(words) == 2 and ("banger" in words[1] or words[1] == "/init"):
                found = max(found, peaks.get(words[0], 0))
        return found * 1024 / _MB


def _slow_reader(ground: Ground) -> list[Figure]:
    before = load()
    peaks = _Peaks(ground)
    script = f"sleep 1; head -c {_OUTPUT_BYTES} /dev/zero"
    ground.ok("vm", "session", "start", _VM, "--name", "much", "--", "sh", "-c", script)
    follow = subprocess.Popen(
        ground.argv("vm", "session", "logs", _VM, "much", "-f"), env=ground.env,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert follow.stdout is not None
    follow.stdout.read(1)
    deadline = time.monotonic() + 300
    while ground.json("vm", "session", "show", _VM, "much")["state"] == "running":
        if time.monotonic() > deadline:
            raise RuntimeError("the session does not end")
    while follow.stdout.read(1 << 20):
        pass
    follow.stdout.close()
    peaks.ended(follow)
    ground.ok("vm", "session", "remove", _VM, "much")
    return _figures("slow_reader", "100 MB of session output, reader stops", peaks, before)


def _large_file(ground: Ground) -> list[Figure]:
    figures = []
    root = ground.root / "with-large"
    root.mkdir()
    number = random.Random(1)
    with (root / "large").open("wb") as f:
        for _ in range(_LARGE_BYTES >> 20):
            f.write(number.randbytes(1 << 20))
    identity = ("-c", "user.name=B", "-c", "user.email=b@example.invalid")
    for words in (("init", "-q"), ("add", "large"), (*identity, "commit", "-qm", "large")):
        subprocess.run(["git", "-c", "core.compression=0", *words], cwd=root, check=True)
    for mode in ("shallow_overlay", "full_copy"):
        before = load()
        peaks = _Peaks(ground)
        place = ("--guest-path", f"/root/{mode}")
        seconds = {
            "prepare_s": peaks.run(
                "vm", "workspace", "prepare", "-q", _VM, str(root), *place, "--mode", mode
            )
        }
        change = "printf changed | dd of=large bs=1 seek=1000000 conv=notrunc status=none"
        ground.ok("vm", "exec", *place, _VM, "--", "sh", "-c", change)
        patch = ground.root / "large.patch"
        seconds["export_s"] = peaks.run(
            "vm", "workspace", "export", "-q", _VM, *place, "-o", str(patch)
        )
        if patch.stat().st_size > _MB:
            raise RuntimeError("the patch of seven bytes is large")
        seconds["apply_s"] = peaks.run("vm", "workspace", "apply", _VM, *place)
        with (root / "large").open("rb") as f:
            f.seek(1_000_000)
            if f.read(7) != b"changed":
                raise RuntimeError("the change did not come back")
        figures += _figures(f"large_{mode}", f"a file of 2 GB, {mode}, in and out", peaks, before,
                            seconds)  # fmt: skip
        ground.ok("vm", "exec", "--guest-path", "/", _VM, "--", "rm", "-rf", place[1])
        subprocess.run(["git", "checkout", "-q", "."], cwd=root, check=True)
    return figures


def _figures(
    key: str, title: str, peaks: _Peaks, before: tuple[float, ...],
    parts: dict[str, float] | None = None,
) -> list[Figure]:  # fmt: skip
    return [
        Figure(key=f"{key}_{who}", title=f"{title}: {who}", unit="MB", aim=aim, ours=[value],
               load=before, parts=parts or {})
        for who, value, aim in (
            ("command line", peaks.cli, 80), ("daemon", peaks.daemon(), 120),
            ("agent", peaks.agent(), 60),
        )
    ]  # fmt: skip
