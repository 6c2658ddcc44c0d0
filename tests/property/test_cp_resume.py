"""Copies whose connection is cut at any byte, and asked for again until they are whole.

A file never has its name before it is whole; what has come is not sent again; nothing is left in
the end. The guest is this host behind the real agent. `BANGER_SOAK=N` runs N times the examples.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from banger.cli import cp_in, cp_out
from banger.cli.copying import Copying
from banger.cli.server import Server
from banger.errors import BangerError
from fakes.agent import running_agent
from fakes.copies import Wire, describe
from workspace_steps import SOAK

_EXAMPLES = settings(
    max_examples=25 * SOAK, deadline=None, suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)  # fmt: skip
_LARGE = 64 << 10
_CHATTER = 256 << 10  # what one attempt says without a byte of content, and what is on its way
pytestmark = pytest.mark.timeout(600 * SOAK)


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with running_agent() as agent, pytest.MonkeyPatch.context() as patch:
        wire = Wire(agent)
        patch.setattr(Server, "call_with_fd", lambda _, *words: wire.call_with_fd(*words))
        # The machine of these tests never ends: nobody need wait for that.
        patch.setattr("banger.cli.guest_run._EXIT_FOLLOWS_S", 0)
        for module in (cp_in, cp_out):
            patch.setattr(module, "LARGE_BYTES", _LARGE)
        yield wire


def _attempt(wire: Wire, way: str, source: str, target: Path, most: int) -> bool:
    """One command, cut after `most` bytes. True: it has come to its end."""
    wire.left = most
    copying = Copying("web", lambda _: None)
    try:
        if way == "in":
            cp_in.upload(copying, source, str(target))
        else:
            cp_out.download(copying, source, str(target))
    except BangerError as e:
        assert e.reason == "connection_lost", e
        return False
    return True


def _check_names(source: Path, target: Path, old: bytes | None) -> None:
    """What has its name is whole: the new one, or the one that was there before."""
    if source.is_file():
        assert not target.exists() or target.read_bytes() in (source.read_bytes(), old)
        return
    for path in target.rglob("*") if target.exists() else ():
        if path.is_file() and not path.name.startswith(".banger"):
            assert path.read_bytes() in ((source / path.relative_to(target)).read_bytes(), old)


def _content(number: random.Random, size: int) -> bytes:
    return b"".join(
        bytes(4096) if number.random() < 0.2 else number.randbytes(4096)
        for _ in range(size // 4096)
    ) + number.randbytes(size % 4096)


@_EXAMPLES
@example(way="in", size=1_500_000, cuts=[90], old=None, seed=1, changed=True)
@example(way="out", size=1_500_000, cuts=[90], old=None, seed=1, changed=True)
@given(
    way=st.sampled_from(["in", "out"]),
    size=st.sampled_from([0, 1, 70_000, 400_001, 1_500_000]),
    cuts=st.lists(st.integers(1, 100), min_size=1, max_size=6),
    old=st.sampled_from([None, b"", b"old"]),
    seed=st.integers(0, 2**32),
    changed=st.booleans(),
)
def test_file_goes_on_where_it_stopped(
    wire: Wire, way: str, size: int, cuts: list[int], old: bytes | None, seed: int, changed: bool
) -> None:
    number = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "source"), Path(directory, "copy/target")
        target.parent.mkdir()
        source.write_bytes(_content(number, size))
        source.chmod(0o640)
        if old is not None:
            target.write_bytes(old)
        before = wire.carried
        done = False
        for at, cut in enumerate(cuts):
            # What is said before the first byte of content is less than 2000 bytes.
            done = _attempt(wire, way, str(source), target, 2000 + cut * size // 150)
            _check_names(source, target, old)
            if done:
                break
            if changed and at == 0:
                source.write_bytes(_content(number, size))
        if not done:
            assert _attempt(wire, way, str(source), target, 1 << 40)
        assert target.read_bytes() == source.read_bytes()
        assert target.stat().st_mode == source.stat().st_mode
        assert [p.name for p in target.parent.iterdir()] == ["target"]
        if not changed:
            assert wire.carried - before <= size + (len(cuts) + 1) * _CHATTER


@_EXAMPLES
@given(
    way=st.sampled_from(["in", "out"]),
    sizes=st.lists(st.sampled_from([0, 1, 5000, 60_000, 64 << 10, 300_000]), max_size=12),
    cuts=st.lists(st.integers(1, 700_000), max_size=8),
    fresh=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_directory_goes_on_with_what_is_missing(
    wire: Wire, way: str, sizes: list[int], cuts: list[int], fresh: bool, seed: int
) -> None:
    number = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "source"), Path(directory, "copy/target")
        target.parent.mkdir()
        _plant(source, number, sizes)
        if not fresh:
            # It is taken for the directory to copy into: the content goes there.
            shutil.copytree(source, target, symlinks=True)
            for path in sorted(target.rglob("*.f"))[::2]:
                path.write_bytes(b"old")
        said = str(source) if fresh else f"{source}/."
        for cut in cuts:
            done = _attempt(wire, way, said, target, cut)
            if fresh:
                assert target.exists() is done
            _check_names(source, target, b"old")
            if done:
                break
        # Once it is there, it would be the directory to copy into.
        said = f"{source}/." if target.exists() else said
        assert _attempt(wire, way, said, target, 1 << 40)
        assert describe(target) == describe(source)
        assert [p.name for p in target.parent.iterdir()] == ["target"]


def _plant(root: Path, number: random.Random, sizes: list[int]) -> None:
    root.mkdir()
    (root / "link").symlink_to("nowhere")
    (root / "empty").mkdir()
    for at, size in enumerate(sizes):
        place = root / number.choice(["", "sub", "sub/deep", ".git"])
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"{at}\udcff.f"
        path.write_bytes(_content(number, size))
        path.chmod(number.choice([0o600, 0o644, 0o755]))
        if number.random() < 0.3:
            os.link(path, place / f"{at}-again.f")


def test_large_file_comes_through_any_number_of_cuts(
    wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, number = 64 << 20, random.Random(1)
    source = tmp_path / "source"
    source.write_bytes(_content(number, size))
    for way in ("in", "out"):
        before, attempts = wire.carried, 1
        target = tmp_path / way
        while not _attempt(wire, way, str(source), target, number.randrange(2 << 20, 24 << 20)):
            assert not target.exists()
            attempts += 1
        assert 3 <= attempts <= 33
        assert wire.carried - before <= size + attempts * (1 << 20)
        assert target.read_bytes() == source.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "source"]
