"""Jobs: threads that can be cancelled, and the programs that end with them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from banger.disk.background import Job, JobCancelled, run_job
from banger.errors import BangerError
from banger.process import ProcessFailed
from banger.progress import Silent
from patience import PATIENCE_S


class Recorder(Silent):
    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []

    def stage(self, stage: str, label: str, detail: str = "") -> None:
        self.heard.append((stage, threading.get_ident()))


def sleeper(ready: Path) -> list[str]:
    """A program that starts another one, says so by a file, and would stay for a minute."""
    code = (
        "import subprocess, sys, pathlib, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"part = pathlib.Path({str(ready)!r} + '.part'); part.write_text(str(p.pid))\n"
        f"part.rename({str(ready)!r})\n"
        "time.sleep(60)\n"
    )
    return [sys.executable, "-c", code]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


async def until(holds: object) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():  # type: ignore[operator] # any callable
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_a_job_returns_its_result_and_reports_on_the_loops_thread() -> None:
    recorder = Recorder()

    def work(job: Job) -> int:
        job.stage("kernel", "working")
        return threading.get_ident()

    worker = await run_job(work, recorder)
    await asyncio.sleep(0)
    assert worker != threading.get_ident()
    assert recorder.heard == [("kernel", threading.get_ident())]


@pytest.mark.asyncio
async def test_a_jobs_error_reaches_the_caller() -> None:
    def work(job: Job) -> None:
        raise BangerError("not_found", "no such thing")

    with pytest.raises(BangerError, match="no such thing"):
        await run_job(work, Silent())


@pytest.mark.asyncio
async def test_cancelling_ends_the_programs_and_all_they_started(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    cleaned = threading.Event()

    def work(job: Job) -> None:
        try:
            job.run(sleeper(ready))
        finally:
            cleaned.set()

    task = asyncio.create_task(run_job(work, Silent()))
    await until(ready.exists)
    child = int(ready.read_text())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned.is_set()
    await until(lambda: not is_running(child))


@pytest.mark.asyncio
async def test_waiting_for_a_lock_can_be_cancelled(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    started = threading.Event()

    def work(job: Job) -> None:
        started.set()
        with job.locked(lock):
            raise AssertionError("the lock is held by another")

    with Job().locked(lock):
        task = asyncio.create_task(run_job(work, Silent()))
        await until(started.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_a_lock_is_free_again_after_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with Job().locked(tmp_path / "lock"):
            pass


def test_a_failed_program_is_reported_with_its_last_words() -> None:
    with pytest.raises(ProcessFailed, match="no such suite") as caught:
        Job().run([sys.executable, "-c", "import sys; sys.exit('no such suite')"])
    assert caught.value.status == 1


def test_leaving_a_program_by_an_error_ends_it(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    job = Job()
    with (
        pytest.raises(ZeroDivisionError),
        job.program(sleeper(ready), stdout=subprocess.DEVNULL) as p,
    ):
        while not ready.exists():
            time.sleep(0.01)
        raise ZeroDivisionError
    assert p.returncode is not None
    assert not is_running(p.pid)


def test_a_cancelled_job_starts_no_program(tmp_path: Path) -> None:
    job = Job()
    job.cancel()
    with pytest.raises(JobCancelled):
        job.run(["touch", str(tmp_path / "made")])
    assert not (tmp_path / "made").exists()
