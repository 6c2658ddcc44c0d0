"""The set-up's step logic: done steps are skipped, changed inputs and interruptions are not."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from tools import steps
from tools.steps import Step, StepFailed, run_steps

from patience import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build directory of the test's own."""
    monkeypatch.setattr(steps, "STAMPS", tmp_path / "setup")
    monkeypatch.setattr(steps, "LOGS", tmp_path / "log")
    return tmp_path


class Work:
    """A step that makes one file and counts how often it was asked to."""

    def __init__(self, result: Path, *, key: str = "one") -> None:
        self.result = result
        self.key = key
        self.calls = 0
        self.before: Callable[[], None] | None = None

    def do(self) -> None:
        self.calls += 1
        if self.before:
            self.before()
        self.result.write_text("made")

    @property
    def step(self) -> Step:
        return Step("work", "some work", lambda: self.key, self.result.is_file, self.do)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path / "result")


def test_a_done_step_is_skipped(work: Work) -> None:
    run_steps([work.step])
    run_steps([work.step])
    assert work.calls == 1


def test_a_skipped_step_says_nothing(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    run_steps([work.step])
    capsys.readouterr()
    run_steps([work.step])
    assert capsys.readouterr() == ("", "")


def test_changed_inputs_run_the_step_again(work: Work) -> None:
    run_steps([work.step])
    work.key = "two"
    run_steps([work.step])
    assert work.calls == 2


def test_a_lost_result_runs_the_step_again(work: Work) -> None:
    run_steps([work.step])
    work.result.unlink()
    run_steps([work.step])
    assert work.calls == 2


def test_an_interrupted_step_runs_again(work: Work) -> None:
    def interrupt() -> None:
        # Half-way: the old result is still there, the inputs have changed.
        raise KeyboardInterrupt

    run_steps([work.step])
    work.key = "two"
    work.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        run_steps([work.step])
    work.before = None
    run_steps([work.step])
    assert work.calls == 3


def test_an_interrupted_step_is_not_done_with_its_old_inputs_either(work: Work) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    run_steps([work.step])
    work.key, work.before = "two", interrupt
    with pytest.raises(KeyboardInterrupt):
        run_steps([work.step])
    work.key = "one"
    assert not work.step.is_current()


def test_a_step_without_its_result_fails_by_name(tmp_path: Path) -> None:
    idle = Step("idle", "idle work", lambda: "key", (tmp_path / "never").is_file, lambda: None)
    with pytest.raises(StepFailed, match=r"idle work: .*result is not there"):
        run_steps([idle])


def test_a_failed_step_stops_the_following_ones(work: Work) -> None:
    def fail() -> None:
        raise StepFailed("no network")

    failing = Step("failing", "failing work", lambda: "key", lambda: False, fail)
    with pytest.raises(StepFailed, match="failing work: no network"):
        run_steps([failing, work.step])
    assert work.calls == 0


def test_a_step_that_proves_itself_needs_no_stamp(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    step = Step("proof", "proof", str, proof.exists, proof.touch)
    run_steps([step])
    assert step.is_current()
    assert not step.stamp.exists()


def test_a_second_set_up_waits_for_the_first(work: Work, tmp_path: Path) -> None:
    steps.STAMPS.mkdir()
    with (steps.STAMPS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=run_steps, args=([work.step],))
        second.start()
        second.join(0.2)
        waiting = second.is_alive() and work.calls == 0
    second.join(PATIENCE_S)
    assert waiting
    assert work.calls == 1


def test_a_failing_program_shows_its_last_words_and_its_log(checkout: Path) -> None:
    with pytest.raises(StepFailed) as failure:
        steps.run(["sh", "-c", "echo out; echo why >&2; exit 3"], log="sh")
    text = str(failure.value)
    assert "status 3" in text
    assert "    why" in text
    assert str(checkout / "log" / "sh.log") in text


def test_a_missing_program_is_named() -> None:
    with pytest.raises(StepFailed, match="starting no-such-program: No such file"):
        steps.run(["no-such-program"], log="none")


def test_ctrl_c_waits_for_a_program_that_ends_by_itself(tmp_path: Path) -> None:
    # As apt does: it ignores SIGINT while it configures packages.
    ended = tmp_path / "ended"
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    script = f"trap '' INT; echo > {ready}; read -r _ < {ready}; touch {ended}"
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(steps.ROOT)!r})\n"
        "from pathlib import Path\n"
        "from tools import steps\n"
        f"steps.LOGS = Path({str(tmp_path)!r})\n"
        f"steps.run(['sh', '-c', {script!r}], log='child')\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL
    )
    ready.read_text()
    os.killpg(parent.pid, signal.SIGINT)
    ready.write_text("go on\n")
    assert parent.wait(PATIENCE_S) != 0
    assert ended.exists()


def test_ctrl_c_in_the_middle_of_a_start_waits_for_the_program_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program runs already, and nobody has noted its number yet."""

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            os.kill(os.getpid(), signal.SIGINT)

    ended = tmp_path / "ended"
    go_on = tmp_path / "go on"
    monkeypatch.setattr(steps, "LOGS", tmp_path)
    monkeypatch.setattr(steps.subprocess, "Popen", Interrupted)
    timer = threading.Timer(0.2, go_on.touch)
    timer.start()
    script = f"until [ -e '{go_on}' ]; do sleep 0.01; done; touch {ended}"
    with pytest.raises(KeyboardInterrupt):
        steps.run(["sh", "-c", script], log="child")
    timer.join()
    assert ended.exists()


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "file"
    steps.write_whole(target, "text", mode=0o755)
    assert target.read_text() == "text"
    assert target.stat().st_mode & 0o777 == 0o755
    assert list(target.parent.iterdir()) == [target]


def test_a_key_depends_on_names_contents_and_words(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("text")
    two.write_text("text")
    keys = {
        steps.hash_files([one]),
        steps.hash_files([two]),
        steps.hash_files([one, two]),
        steps.hash_files([one], "word"),
    }
    one.write_text("other")
    keys.add(steps.hash_files([one]))
    assert len(keys) == 5
