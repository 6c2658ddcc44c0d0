"""The switch of the fault tests does exactly what an order says, once, and otherwise nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import faults
from banger.errors import BangerError
from banger.faults import Order, arm, disarm, parse_order, step
from banger.process import read_stat
from patience import PATIENCE_S

LEASE = "start.lease"


@pytest.fixture(autouse=True)
def _disarmed_after() -> Iterator[None]:
    yield
    disarm()


def test_unarmed_every_step_is_one_object_that_does_nothing() -> None:
    assert step(LEASE) is step("start.launch")
    with step(LEASE):
        pass


@pytest.mark.parametrize(
    "text",
    ["start.lease:before:fail", "start.lease:during+3:kill", "start.lease:after:hang:0.5"],
)
def test_order_survives_its_text(text: str) -> None:
    assert str(parse_order(text)) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("start.lease", "is not STEP"),
        ("start.nonsense:before:fail", "no step 'start.nonsense'"),
        ("start.lease:meanwhile:fail", "no moment"),
        ("start.lease:before:explode", "no action"),
    ],
)
def test_order_that_cannot_be_meant_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        arm([text])


@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.parametrize(("action", "error"), [("fail", BangerError), ("enospc", OSError)])
def test_thread_step_fails_at_its_moment_and_then_no_more(
    tmp_path: Path, moment: str, action: str, error: type[Exception]
) -> None:
    arm([f"{LEASE}:{moment}:{action}"])
    did = []

    def work() -> None:
        with step(LEASE):
            did.append("begun")
            (tmp_path / "a").read_text() if (tmp_path / "a").exists() else None
            (tmp_path / "a").write_text("")
            did.append("written")

    with pytest.raises(error):
        work()
    assert did == {"before": [], "during": ["begun"], "after": ["begun", "written"]}[moment]
    work()
    with step("start.launch"):
        (tmp_path / "b").write_text("")


def test_middle_of_a_thread_step_may_be_any_of_its_changes(tmp_path: Path) -> None:
    arm([f"{LEASE}:during+2:fail"])
    with pytest.raises(BangerError), step(LEASE):
        (tmp_path / "a").mkdir()
        (tmp_path / "b").write_text("")
        (tmp_path / "a").rename(tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    # So many changes are not made here: nothing happens.
    arm([f"{LEASE}:during+9:fail"])
    with step(LEASE):
        (tmp_path / "d").mkdir()


def test_step_without_a_middle_counts_at_its_end() -> None:
    arm([f"{LEASE}:during:fail"])
    did = []
    with pytest.raises(BangerError), step(LEASE):
        did.append("everything")
    assert did == ["everything"]


def test_error_of_the_body_is_not_replaced() -> None:
    arm([f"{LEASE}:during:fail", f"{LEASE}:after:fail"])
    with pytest.raises(KeyError), step(LEASE):
        raise KeyError


@pytest.mark.asyncio
@pytest.mark.parametrize("moment", ["before", "during", "after"])
async def test_coroutine_step_fails_at_its_moment(moment: str) -> None:
    arm([f"{LEASE}:{moment}:fail"])
    did = []
    with pytest.raises(BangerError) as caught:
        async with step(LEASE):
            did.append("begun")
            await asyncio.sleep(0)
            did.append("ended")
    assert caught.value.reason == "injected"
    assert did == {"before": [], "during": ["begun"], "after": ["begun", "ended"]}[moment]
    # Whoever was interrupted is not taken for cancelled afterwards.
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0
    await asyncio.sleep(0)


@pytest.mark.asyncio
@pytest.mark.parametrize("moment", ["before", "during", "after"])
async def test_coroutine_step_hangs_until_it_is_cancelled(moment: str) -> None:
    arm([f"{LEASE}:{moment}:hang"])
    did = []

    async def work() -> None:
        async with step(LEASE):
            did.append("begun")
            await asyncio.sleep(0)
            did.append("ended")
        did.append("gone on")

    task = asyncio.create_task(work())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()
    assert did == ([] if moment == "before" else ["begun", "ended"])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.asyncio
async def test_hanging_may_be_bounded() -> None:
    arm([f"{LEASE}:before:hang:0.01"])
    async with asyncio.timeout(PATIENCE_S):
        async with step(LEASE):
            pass


@pytest.mark.asyncio
async def test_test_may_bring_actions_of_its_own() -> None:
    met: list[Order] = []
    arm([f"{LEASE}:during:bite"], actions={"bite": met.append})
    async with step(LEASE):
        assert not met
        await asyncio.sleep(0)
        assert [str(order) for order in met] == [f"{LEASE}:during:bite"]


PROGRAM = f"""
from banger import faults
faults.arm_from_environment()
with faults.step({LEASE!r}):
    print("begun", flush=True)
    open("made", "w").close()
    print("ended", flush=True)
"""


def start_program(directory: Path, orders: str) -> subprocess.Popen[bytes]:
    source = str(Path(faults.__file__).parents[1])
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": source, "BANGER_FAULTS": orders}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=directory, env=env, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def test_program_kills_itself_once(tmp_path: Path) -> None:
    orders = f"{tmp_path}:{LEASE}:during:kill"
    first = start_program(tmp_path, orders)
    assert first.communicate(timeout=PATIENCE_S)[0] == b"begun\n"
    assert first.returncode == -signal.SIGKILL
    assert not (tmp_path / "made").exists()
    # The next one finds the mark.
    second = start_program(tmp_path, orders)
    assert second.communicate(timeout=PATIENCE_S)[0] == b"begun\nended\n"
    assert second.returncode == 0


def test_program_stands_still_until_it_is_let_go(tmp_path: Path) -> None:
    program = start_program(tmp_path, f"{tmp_path}:{LEASE}:during:stop")
    deadline = time.monotonic() + PATIENCE_S
    while (stat := read_stat(program.pid)) is not None and stat[0] != "T":
        assert time.monotonic() < deadline
        os.sched_yield()
    assert (tmp_path / f"{LEASE}:during:stop").exists()
    assert not (tmp_path / "made").exists()
    program.send_signal(signal.SIGCONT)
    assert program.communicate(timeout=PATIENCE_S)[0] == b"begun\nended\n"


def test_orders_that_cannot_be_meant_end_the_program_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BANGER_FAULTS", "/tmp:start.lease:never:fail")
    with pytest.raises(BangerError, match="BANGER_FAULTS: 'never' is no moment") as caught:
        faults.arm_from_environment()
    assert caught.value.hint == "unset BANGER_FAULTS; it is for tests"


def test_nothing_is_armed_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BANGER_FAULTS", raising=False)
    faults.arm_from_environment()
    assert step(LEASE) is step("start.launch")
