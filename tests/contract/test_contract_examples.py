"""The promise of tests/conftest.py: property tests see the same examples in every run, whatever was
imported before them, and whatever they inherit from the shell that starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_SHOW = """
import conftest, sys
if sys.argv[1:]:
    import local_words
from hypothesis import given, strategies as st

@given(st.lists(st.one_of(st.integers(), st.text(), st.binary(), st.floats()), min_size=5))
def show(values):
    print(ascii(values))

show()
"""
_LOCAL = "\n".join(f"a{n} = {n * 7919 + 1}\nb{n} = 'word-{n}'" for n in range(300))


@pytest.mark.skipif("BANGER_SOAK" in os.environ, reason="BANGER_SOAK asks for new examples")
def test_examples_do_not_depend_on_what_else_is_imported(tmp_path: Path) -> None:
    (tmp_path / "local_words.py").write_text(_LOCAL)
    (tmp_path / "show.py").write_text(_SHOW)
    path = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "src", tmp_path)))
    seen = [
        subprocess.run(
            [sys.executable, "show.py", *more], cwd=tmp_path, check=True, capture_output=True,
            env={**os.environ, "PYTHONPATH": path},
        ).stdout
        for more in ([], ["more"])
    ]  # fmt: skip
    assert seen[0].count(b"\n") >= 100
    assert seen[0] == seen[1]


def test_ignored_signals_are_not_handed_on_to_programs_that_tests_start() -> None:
    """As under nohup, or in the background of a script."""
    code = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); import conftest; "
        "os.execvp('sh', ['sh', '-c', 'grep SigIgn /proc/self/status'])"
    )
    path = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "src")))
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert int(done.stdout.split()[1], 16) & 0b11 == 0
