"""The lowest rung of the ladder: a world of fakes, empty before a test and empty after it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from fakes.command_line import CommandLine
from fakes.world import World, temporary_templates


@pytest.fixture(scope="session")
def templates() -> Iterator[Path]:
    """Blank disks for every world of this process."""
    yield from temporary_templates()


@pytest_asyncio.fixture
async def world(templates: Path) -> AsyncIterator[World]:
    """An installation with one image and no VM."""
    world = World(templates=templates)
    yield world
    await world.close()


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    """`banger` with directories of its own and no daemon."""
    return CommandLine(tmp_path, monkeypatch, capsys)
