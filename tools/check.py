"""`python3 -m tools.check GROUP…`: lint, types, import rules and tests, one stage after the other.

Every stage has its heading and its time. A failing stage does not stop the others: one run shows
everything that is wrong, and the summary at the end says which stages failed; the exit status is 1
when any did. Groups: `lint`, `unit`, `all`; or single stages by name.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.setup import PYTHON, VENV, go_environment
from tools.steps import ROOT

if TYPE_CHECKING:
    from pathlib import Path

AGENT = ROOT / "agent"
_WIDTH = 78
# gofmt names the files that it would change and ends with status 0.
_GOFMT = 'out=$(gofmt -l .) && { test -z "$out" || { echo "$out"; false; }; }'
_SHELL_IN = (".ci", "tools", "tests", "recipes", "examples", "src")


@dataclass(frozen=True)
class Stage:
    """One check: a program with its arguments, and where and how it runs."""

    name: str
    argv: tuple[str, ...]
    cwd: Path = ROOT
    go: bool = False


def _python(name: str, *arguments: str) -> Stage:
    return Stage(name, (str(PYTHON), "-m", *arguments))


def stages() -> list[Stage]:
    """Every stage in the order of `make test`: the quick ones first."""
    return [
        _python("ruff", "ruff", "check", "."),
        _python("format", "ruff", "format", "--check", "."),
        _python("types", "mypy"),
        _python(
            "types-tools",
            "mypy",
            "--strict",
            "-p",
            "tools",
            "-p",
            "tests.smoke",
            "-p",
            "tests.bench",
            "-p",
            "tests.soak",
        ),
        Stage("imports", (str(VENV / "bin" / "lint-imports"),)),
        Stage("shellcheck", ("shellcheck", "-S", "error", *shell_files())),
        Stage("gofmt", ("sh", "-c", _GOFMT), AGENT, go=True),
        Stage("go-vet", ("go", "vet", "./..."), AGENT, go=True),
        Stage("go-test", ("go", "test", "-race", "./..."), AGENT, go=True),
        _python("unit", "pytest", "-n", "2", "tests/unit", "tests/property", "tests/contract"),
        _python("host", "pytest", "tests/host"),
        # A VM wants a processor of its own, and a file's tests share what they have built.
        _python("boot", "pytest", "-n", "2", "--dist", "loadfile", "tests/boot", "--durations=5"),
    ]


GROUPS = {
    "lint": ("ruff", "format", "types", "types-tools", "imports", "shellcheck", "gofmt", "go-vet"),
    "unit": ("unit",),
}


def shell_files() -> list[str]:
    """Every shell script of the checkout, by its first line, whatever its name."""
    found = []
    for directory in _SHELL_IN:
        for path in sorted((ROOT / directory).rglob("*")):
            if path.is_file():
                with path.open("rb") as f:
                    first = f.readline(64)
                if first.startswith((b"#!/bin/sh", b"#!/bin/bash", b"#!/usr/bin/env bash")):
                    found.append(str(path.relative_to(ROOT)))
    return found


def run_stage(stage: Stage) -> bool:
    """Run one stage with its output shown; whether it passed."""
    print(f"\n{f' {stage.name} '.center(_WIDTH, '=')}", flush=True)
    env = {**os.environ, **(go_environment() if stage.go else {})}
    try:
        done = subprocess.run(stage.argv, cwd=stage.cwd, env=env, check=False)
    except OSError as e:
        print(f"starting {stage.argv[0]}: {e.strerror}")
        return False
    return done.returncode == 0


def main(names: list[str]) -> int:
    """Run the named stages (all when none is named); 0 when every one passed, 2 for a bad name."""
    known = stages()
    wanted: set[str] = set()
    for name in names or ["all"]:
        wanted |= {s.name for s in known} if name == "all" else set(GROUPS.get(name, (name,)))
    if unknown := wanted - {stage.name for stage in known}:
        print(f"no such stage: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    results: list[tuple[str, bool, float]] = []
    for stage in known:
        if stage.name in wanted:
            started = time.monotonic()
            passed = run_stage(stage)
            results.append((stage.name, passed, time.monotonic() - started))
    print(f"\n{' summary '.center(_WIDTH, '=')}")
    for name, passed, seconds in results:
        print(f"{'PASS' if passed else 'FAIL'}  {name:<14} {seconds:7.1f} s")
    failed = sum(not passed for _, passed, _ in results)
    total = sum(seconds for _, _, seconds in results)
    word = (
        f"{failed} of {len(results)} stages FAILED" if failed else f"{len(results)} stages passed"
    )
    print(f" {word} in {total:.0f} s ".center(_WIDTH, "="), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    # A shell starts what it puts into the background with SIGINT ignored, and so would be the
    # programs to which tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
