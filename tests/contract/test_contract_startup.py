"""What a command imports before it does anything: the price of every call, and of every tab key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_HEAVY = ("asyncio", "rich", "msgspec", "click", "cryptography", "sqlite3")
_PROGRAM = """
import json, sys
sys.argv = ["banger", *sys.argv[1:]]
from banger.cli.entry import main
try:
    main()
except SystemExit as e:
    status = e.code
sys.stderr.write(json.dumps({"status": status, "modules": sorted(sys.modules)}))
"""


def loaded_by(tmp_path: Path, *words: str, **env: str) -> tuple[str, set[str]]:
    """What one command line prints, and every module that it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *words],
        capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL,
        env={
            "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), "HOME": str(tmp_path),
            "XDG_RUNTIME_DIR": str(tmp_path), "BANGER_MODE": "user", **env,
        },
    )  # fmt: skip
    report = json.loads(done.stderr.splitlines()[-1])
    return done.stdout, set(report["modules"])


def test_version_imports_nothing_that_costs(tmp_path: Path) -> None:
    out, modules = loaded_by(tmp_path, "--version")
    assert out.startswith("banger ")
    assert not modules & set(_HEAVY)


@pytest.mark.parametrize("words", [["--help"], ["vm", "--help"]], ids=" ".join)
def test_help_imports_no_command(tmp_path: Path, words: list[str]) -> None:
    out, modules = loaded_by(tmp_path, *words)
    assert "Usage" in out
    assert not modules & {"asyncio", "rich", "msgspec", "banger.cli.vm_run", "banger.cli.vm_look"}


@pytest.mark.parametrize("line", ["banger vm ", "banger vm show ", "banger image delete "])
def test_completion_imports_no_event_loop_and_draws_nothing(tmp_path: Path, line: str) -> None:
    words = line.split(" ")
    _, modules = loaded_by(
        tmp_path, _BANGER_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1)
    )
    assert not modules & {"asyncio", "rich", "cryptography", "sqlite3"}


@pytest.mark.parametrize(
    "words", [["vm", "list"], ["vm", "run"], ["vm", "exec", "x", "--", "true"]], ids=" ".join
)
def test_commands_need_no_event_loop(tmp_path: Path, words: list[str]) -> None:
    """The daemon cannot start here (its runtime directory is a file), so the command ends early."""
    blocked = tmp_path / "runtime"
    blocked.write_text("no directory")
    _, modules = loaded_by(tmp_path, *words, XDG_RUNTIME_DIR=str(blocked))
    assert not modules & {"asyncio", "rich", "cryptography", "sqlite3"}
