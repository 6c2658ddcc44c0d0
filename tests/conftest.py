"""Settings of every test. A slow machine is no failure: examples have no deadline of their own, and
pytest's timeout ends only what hangs.

Examples are the same in every run, so that what passes here passes there. With BANGER_SOAK set they
are new ones each time, and more of them where a test says so.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

from sample import EVERYTHING, SEED, SEED_OF_THE_DAY

settings.register_profile(
    "banger",
    deadline=None,
    derandomize=not EVERYTHING,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("banger")
if not EVERYTHING:
    # Hypothesis mixes in constants of the modules that happen to be imported, so that the examples
    # would depend on which tests have run in this process before, and which are run with them.
    _none = providers.Constants()
    providers._get_local_constants = lambda: _none

# What was inherited for these would be inherited by every program that a test starts and sends them
# to: a shell ignores SIGINT in what it puts into the background, nohup ignores SIGHUP.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(
            _number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL
        )
signal.pthread_sigmask(signal.SIG_SETMASK, ())
# Modes of files are looked at.
os.umask(0o022)


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
