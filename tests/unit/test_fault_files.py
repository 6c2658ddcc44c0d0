"""Every step of what images, kernels and workspaces do to files, every fault, every moment.

The operation runs in a process of its own, which is really killed: before the step, at each of its
changes of files, after it. Then the next daemon starts. What its user sees is what was there before
or what was asked for, whole; nothing half-made is left; and the same command succeeds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from banger.faults import STEPS
from fakes.agent import running_agent
from fakes.file_work import CASES
from fakes.forks import ORDERED, Forks, forks
from sample import EVERYTHING, pick

FAULTS = ("kill", "fail", "enospc")
PATHS = ("artefact", "pull", "image", "promote", "kernel", "discard", "prepare", "export", "apply")


class Bench:
    """Places to work at, each made once and copied for a cell."""

    def __init__(self, root: Path, children: Forks) -> None:
        self._root = root
        self._children = children
        self._number = 0
        self.known: dict[str, tuple[Any, Any, dict[str, int]]] = {}

    def run(self, function: str, *words: object) -> int:
        return self._children.run(f"fakes.file_work.{function}", *map(str, words))

    def look(self, name: str, place: Path) -> Any:
        answer = self._root / "answer.json"
        assert self.run("look", name, place, answer) == 0, self._children.log.read_text()
        return json.loads(answer.read_text())

    def copy(self, name: str) -> tuple[Path, Path]:
        """A place as it is before, of the same path each time, and a directory for marks."""
        place, marks = self._root / "place", self._root / "marks"
        for path in (place, marks):
            shutil.rmtree(path, ignore_errors=True)
        marks.mkdir()
        shutil.copytree(self._root / name, place, symlinks=True, copy_function=shutil.copy2)
        return place, marks

    def learn(self, name: str) -> tuple[Any, Any, dict[str, int]]:
        """What is seen before and after, and how many changes each step makes."""
        if name not in self.known:
            # Made where it will be used: some things remember their path.
            place = self._root / "place"
            shutil.rmtree(place, ignore_errors=True)
            assert self.run("prepare", name, place) == 0, self._children.log.read_text()
            place.rename(self._root / name)
            place, marks = self.copy(name)
            before = self.look(name, place)
            assert self.run("act", name, place, "", marks) == 0, self._children.log.read_text()
            met = json.loads((marks / "met.json").read_text())
            assert set(met["steps"]) == set(CASES[name].steps)
            self.known[name] = before, self.look(name, place), met["changes"]
        return self.known[name]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    # In memory: what takes the time is fsync.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="bf", dir=memory) as directory,
        running_agent() as agent,
        forks(Path(directory) / "log", "fakes.file_work") as children,
    ):
        root = Path(directory)
        (root / "agent-socket").write_text(str(agent.socket))
        yield Bench(root, children)


def moments(name: str, step: str, changes: int, fault: str) -> list[str]:
    """Of a kill: each change, or the first, the last and one between. Of the others: one moment."""
    middle = [f"during+{n}" if n else "during" for n in range(max(changes, 1))]
    if EVERYTHING:
        return ["before", *middle, "after"]
    if fault != "kill":
        return [pick(["before", *middle, "after"], name, step, fault)]
    some = dict.fromkeys([middle[0], pick(middle, name, step), middle[-1]])
    return ["before", *some, "after"]


def leftovers(place: Path) -> list[str]:
    return [
        str(path.relative_to(place))
        for path in place.rglob(".*-*")
        if not path.name.endswith(".lock") and ".git" not in path.parts
    ]


def check(bench: Bench, name: str, order: str) -> None:
    before, after, _ = bench.learn(name)
    place, marks = bench.copy(name)
    status = bench.run("act", name, place, order, marks)
    assert (marks / order).exists(), "the order was not met"
    if order.endswith("kill"):
        assert status == -signal.SIGKILL
    else:
        # Where a failure is no failure of the operation, it has succeeded.
        assert status in (0, ORDERED), bench._children.log.read_text()
    if name == "apply":
        # Not all at once, but each file is the old or the new one; and nobody but the next `apply`
        # looks for what one that was killed had received.
        seen = {k: v for k, v in bench.look(name, place).items() if ".banger-apply" not in k}
        for file, content in seen.items():
            assert content in (before.get(file), after.get(file)), f"{file} is torn"
        assert seen["mine"] == before["mine"]
    else:
        assert bench.run("recover", place) == 0
        assert bench.look(name, place) in (before, after)
        assert leftovers(place) == []
    assert bench.run("act", name, place, "", marks) == 0, bench._children.log.read_text()
    assert bench.look(name, place) == after
    assert leftovers(place) == []


@pytest.mark.parametrize(
    ("name", "step"), [(name, step) for name, case in CASES.items() for step in case.steps]
)
def test_whatever_is_killed_or_fails_things_are_whole(bench: Bench, name: str, step: str) -> None:
    changes = bench.learn(name)[2].get(step, 0)
    failed = []
    for fault in FAULTS:
        for moment in moments(name, step, changes, fault):
            order = f"{step}:{moment}:{fault}"
            try:
                check(bench, name, order)
            except AssertionError as e:
                failed.append(f"{order}: {e}")
    assert not failed, "\n".join(failed)


def test_matrix_has_every_step_of_these_paths() -> None:
    there = {step for case in CASES.values() for step in case.steps}
    assert there == {step for path in PATHS for step in STEPS[path]}
