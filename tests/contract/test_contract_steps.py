"""The steps in the code are those of `banger.faults.STEPS`, each once in one place."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from banger.faults import STEPS

SOURCES = Path(__file__).parents[2] / "src" / "banger"
# The functions that are given the name of a step, as the modules call them.
_TAKERS = ("step", "attempt")


def steps_in_code() -> Counter[str]:
    found: Counter[str] = Counter()
    for path in SOURCES.rglob("*.py"):
        if path.name == "faults.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id not in _TAKERS or not node.args:
                continue
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                found[first.value] += 1
    return found


def test_every_step_of_the_code_is_listed_and_every_listed_one_is_there() -> None:
    listed = Counter(name for names in STEPS.values() for name in names)
    assert steps_in_code() == listed


def test_steps_are_named_for_their_path() -> None:
    assert [n for path, names in STEPS.items() for n in names if n.split(".")[0] != path] == []
