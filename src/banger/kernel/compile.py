"""Configuring and compiling a source tree, so that the same input gives the same bytes.

Nothing of the host, the user, the directory or the day gets into the kernel: name and time are
fixed, the tree's own paths are relative, and there is no debug information. What make says goes
into a log, which the caller keeps when it fails.
"""

from __future__ import annotations

import collections
import re
import subprocess
import time
from typing import TYPE_CHECKING

from banger.errors import BangerError
from banger.kernel.fragment import explain_lost, find_defined, find_lost, format_options
from banger.kernel.requirements import (
    find_missing_boot_options,
    find_missing_container_options,
    find_missing_options,
)
from banger.process import ProcessFailed, get_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from banger.disk.background import Job

_HINT = "banger kernel build --help"
# `  CC      kernel/fork.o`: make's short line for a step; these are the ones that take time.
_STEP = re.compile(r"  (CC|AS|HOSTCC) +(\S+)")
_MISTAKE = re.compile(
    r"\berror:|\*\*\*|undefined reference|No such file|No space left|Disk quota", re.IGNORECASE
)
_REPORT_EVERY_S = 1.0
_STAGE_EVERY_STEPS = 400
_KEPT_LINES = 400
_SHOWN_LINES = 4


def configure(
    tree: Path, options: Mapping[str, str | None], *, name: str, log: Path, job: Job
) -> str:
    """Make `.config` of these options alone, all others off; return its text.

    Raises:
        BangerError: bad_request, naming each option that the sources do not have or that did not
            survive; operation_failed: make failed, or the kernel would not do for guests.
    """
    seed = tree / ".banger.config"
    seed.write_text(format_options(options))
    _make(tree, ["allnoconfig"], name=name, log=log, job=job, env={"KCONFIG_ALLCONFIG": str(seed)})
    config = (tree / ".config").read_text(encoding="utf-8", errors="replace")
    if lost := find_lost(options, config):
        why = explain_lost(lost, options, find_defined(tree, lost))
        raise BangerError("bad_request", f"configuring the kernel {name}: {why}", hint=_HINT)
    missing = (
        *find_missing_options(config),
        *find_missing_boot_options(config),
        *find_missing_container_options(config),
    )
    if missing:
        raise BangerError(
            "operation_failed",
            f"configuring the kernel {name}: it would lack {', '.join(missing)}, which guests need",
            hint=_HINT,
        )
    return config


def compile_kernel(tree: Path, target: Path, *, name: str, jobs: int, log: Path, job: Job) -> None:
    """Build `vmlinux` and write it, without symbols, as the file `target`.

    Raises:
        BangerError: operation_failed, with make's last words and where the log is.
    """
    steps = _Steps(name, job)
    _make(tree, [f"-j{jobs}", "vmlinux"], name=name, log=log, job=job, on_line=steps.hear)
    job.stage("kernel", f"linking {name}", f"{steps.count} files compiled")
    # As the kernel's own makefiles do for a bzImage's payload: what is loaded, nothing else.
    objcopy = get_program("objcopy", package="binutils")
    job.run([objcopy, "-S", "-R", ".comment", str(tree / "vmlinux"), str(target)])


def read_built_in_indexes(tree: Path) -> dict[str, bytes]:
    """`modules.builtin*`: with these a guest's modprobe knows what need not be loaded."""
    names = ("modules.builtin", "modules.builtin.modinfo", "modules.order")
    return {n: (tree / n).read_bytes() if (tree / n).is_file() else b"" for n in names}


def read_release(tree: Path) -> str:
    """The release that the kernel calls itself by (uname -r)."""
    return (tree / "include/config/kernel.release").read_text(encoding="ascii").strip()


class _Steps:
    """Counts what make reports and tells the job, at most once a second."""

    def __init__(self, name: str, job: Job) -> None:
        self.count = 0
        self._name, self._job = name, job
        self._began = self._told = time.monotonic()

    def hear(self, line: str) -> None:
        if (found := _STEP.match(line)) is None:
            return
        self.count += 1
        now = time.monotonic()
        rate = self.count / max(now - self._began, 0.001)
        said = f"{self.count} files, {rate:.1f} a second"
        if self.count % _STAGE_EVERY_STEPS == 0:
            # Where nothing is drawn live, stages are all that is seen.
            self._job.stage("kernel", f"compiling {self._name}", said)
        if now - self._told >= _REPORT_EVERY_S:
            self._told = now
            self._job.advance(0, None, f"{said}: {found[2]}")


def build_environment(tree: Path) -> dict[str, str]:
    """What makes a build depend on its sources only. The time is that of the sources' Makefile."""
    epoch = int((tree / "Makefile").stat().st_mtime)
    return {
        "SOURCE_DATE_EPOCH": str(epoch),
        "KBUILD_BUILD_TIMESTAMP": time.strftime("%a %b %e %H:%M:%S UTC %Y", time.gmtime(epoch)),
        "KBUILD_BUILD_USER": "banger",
        "KBUILD_BUILD_HOST": "banger",
        "KBUILD_BUILD_VERSION": "1",
        # Set and empty: no "+" for a directory that happens to lie in somebody's repository.
        "LOCALVERSION": "",
        "TZ": "UTC",
    }


def _make(
    tree: Path,
    words: list[str],
    *,
    name: str,
    log: Path,
    job: Job,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Run make in the tree, niced: VMs and their users come first."""
    said: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
    nice, make = get_program("nice", package="coreutils"), get_program("make", package="make")
    argv = [nice, "-n", "10", make, "--directory", str(tree), *words]
    try:
        # Unbuffered and in whole lines: both streams of make write into it.
        with log.open("ab", buffering=0) as f:

            def hear_mistakes(line: str) -> None:
                said.append(line)
                f.write(line.encode() + b"\n")

            with job.program(
                argv,
                stdout=subprocess.PIPE,
                env={**build_environment(tree), **(env or {})},
                on_line=hear_mistakes,
            ) as p:
                assert p.stdout
                for raw in p.stdout:
                    f.write(raw)
                    if on_line:
                        on_line(raw.decode(errors="replace").rstrip())
    except ProcessFailed as e:
        raise BangerError(
            "operation_failed",
            f"building the kernel {name}: {_explain(words, e.how, said, log)}",
            hint=e.hint or f"less {log}",
            reason=e.reason,
        ) from e


def _explain(words: list[str], how: str, said: Iterable[str], log: Path) -> str:
    lines = list(said)
    mistakes = [line for line in lines if _MISTAKE.search(line)] or lines[-_SHOWN_LINES:]
    shown = "; ".join(line.strip()[:200] for line in mistakes[:_SHOWN_LINES])
    return f"make {words[-1]} {how}: {shown or 'no word of why'} (all of it: {log})"
