"""Settings of every test. A slow machine is no failure: examples have no deadline of their own, and
pytest's timeout ends only what hangs.

Examples are the same in every run, so that what passes here passes there. With BANGER_SOAK set they
are new ones each time, and more of them where a test says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from sample import SEED, SEED_OF_THE_DAY

settings.register_profile(
    "banger", deadline=None, derandomize="BANGER_SOAK" not in os.environ, print_blob=True
)
settings.load_profile("banger")


if TYPE_CHECKING:
    from fakes.agent import Agent
    from fakes.guest_files import GuestHost


@pytest.fixture(scope="module")
def guest_agent() -> Iterator[Agent]:
    """The real agent on this host, one for the tests of a module."""
    from fakes.agent import running_agent  # most tests have no guest

    with running_agent() as agent:
        yield agent


@pytest.fixture
def guests(guest_agent: Agent, tmp_path: Path) -> GuestHost:
    """A guest without a machine; its files are below `tmp_path`."""
    from fakes.guest_files import GuestHost

    (tmp_path / "guest").mkdir()
    return GuestHost(guest_agent, tmp_path)


def pytest_report_header() -> str:
    return f"fault matrices: BANGER_SEED={SEED}, of real VMs BANGER_SEED={SEED_OF_THE_DAY}"
