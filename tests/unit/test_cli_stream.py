"""A guest command's streams and its end, with the real agent at the other side."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakes.agent import WAITING, Agent, running_agent
from patience import PATIENCE_S

# (status, stdout, stderr)
Run = Callable[..., tuple[int, bytes, bytes]]


@pytest.fixture
def agent() -> Iterator[Agent]:
    with running_agent() as agent:
        yield agent


@pytest.fixture
def run(agent: Agent) -> Run:
    def run(*argv: str, stdin: bytes | None = None, **options: object) -> tuple[int, bytes, bytes]:
        if stdin is not None:
            options["stdin"] = subprocess.PIPE
        p = agent.run(*argv, **options)
        out, err = p.communicate(stdin, timeout=PATIENCE_S)
        return p.returncode, out, err

    return run


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 3", 3), ("exit 255", 255), ("kill -TERM $$", 143), ("kill -9 $$", 137)],
)
def test_exit_status_is_the_commands_own(run: Run, script: str, status: int) -> None:
    assert run("sh", "-c", script)[0] == status


def test_program_that_is_not_there_is_127_as_in_a_shell(run: Run) -> None:
    status, _, err = run("/nonexistent/program")
    assert status == 127
    assert b"/nonexistent/program" in err


def test_program_that_may_not_run_is_126_as_in_a_shell(run: Run) -> None:
    assert run("/etc/passwd")[0] == 126


def test_output_and_errors_stay_apart(run: Run) -> None:
    assert run("sh", "-c", "echo out; echo err >&2") == (0, b"out\n", b"err\n")


def test_words_arrive_as_they_are(run: Run) -> None:
    words = ["a b", "$HOME", "", "'", "--rm", "--", "ü\n", "*"]
    _, out, _ = run("printf", r"%s\0", *words)
    assert out.decode().split("\0")[:-1] == words


def test_environment_and_directory_are_those_asked_for(run: Run, tmp_path: Path) -> None:
    _, out, _ = run("sh", "-c", "echo $X; pwd", env={"X": "1 2"}, cwd=str(tmp_path))
    assert out.decode() == f"1 2\n{tmp_path}\n"


def test_directory_that_is_not_there_is_an_error_before_anything_runs(run: Run) -> None:
    status, out, err = run("echo", "ran", cwd="/nonexistent")
    assert (status, out) == (99, b"")
    assert b"/nonexistent" in err


def test_stdin_reaches_the_command_and_ends(run: Run) -> None:
    data = os.urandom(5 << 20)  # many times the credit of 256 KiB
    status, out, _ = run("cat", stdin=data)
    assert status == 0
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()


def test_stdin_at_its_end_is_told_to_the_command(run: Run) -> None:
    assert run("sh", "-c", "cat; echo end", stdin=b"")[:2] == (0, b"end\n")


def test_stdin_that_the_command_does_not_read_does_not_hold_it_up(run: Run) -> None:
    assert run("true", stdin=b"x" * (1 << 20))[0] == 0


def test_fifty_megabytes_arrive_whole(agent: Agent) -> None:
    size = 50 << 20
    p = agent.run("head", "-c", str(size), "/dev/zero")
    assert p.stdout is not None
    digest, count = hashlib.sha256(), 0
    while chunk := p.stdout.read(1 << 20):
        digest.update(chunk)
        count += len(chunk)
    p.communicate(timeout=PATIENCE_S)
    assert (p.returncode, count) == (0, size)
    assert digest.hexdigest() == hashlib.sha256(bytes(size)).hexdigest()


def test_slow_reader_stops_the_writer_and_loses_nothing(agent: Agent, tmp_path: Path) -> None:
    """The command writes 64 MiB and notes how far it is; nobody reads at first."""
    size, noted = 64 << 20, tmp_path / "written"
    script = f"for i in $(seq 64); do head -c {1 << 20} /dev/zero; echo -n x >> {noted}; done"
    p = agent.run("sh", "-c", script)
    assert p.stdout is not None

    def written() -> int:
        return noted.stat().st_size if noted.exists() else 0

    before, deadline = -1, time.monotonic() + PATIENCE_S
    while written() != before or before <= 0:
        assert time.monotonic() < deadline
        before = written()
        time.sleep(0.2)
    assert before < 16
    received = 0
    while chunk := p.stdout.read(1 << 20):
        received += len(chunk)
    assert received == size
    p.communicate(timeout=PATIENCE_S)
    assert p.returncode == 0


def test_reader_that_has_gone_ends_the_command(agent: Agent, tmp_path: Path) -> None:
    p = agent.run("sh", "-c", f"yes; echo $? > {tmp_path}/after")
    assert p.stdout is not None
    p.stdout.read(1000)
    p.stdout.close()
    p.wait(timeout=PATIENCE_S)
    assert p.returncode == 128 + signal.SIGHUP
    assert p.stderr is not None
    assert p.stderr.read() == b""
    p.stderr.close()


def test_flags_of_a_shared_pipe_stay_as_they_were(agent: Agent) -> None:
    """The pipe's other users (a shell's `{ banger …; other; } | less`) rely on them."""
    read, write = os.pipe()
    flags = fcntl.fcntl(write, fcntl.F_GETFL)
    p = agent.run("sh", "-c", "echo hello; sleep 0.05; echo again", stdout=write)
    p.communicate(timeout=PATIENCE_S)
    assert fcntl.fcntl(write, fcntl.F_GETFL) == flags
    assert os.read(read, 100) == b"hello\nagain\n"
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signal_to_us_is_one_to_the_command(agent: Agent, number: signal.Signals) -> None:
    p = agent.run(*WAITING)
    assert p.stdout is not None
    assert p.stdout.readline() == b"ready\n"
    p.send_signal(number)
    p.communicate(timeout=PATIENCE_S)
    assert p.returncode == 128 + number


def test_command_may_handle_the_signal_itself(agent: Agent) -> None:
    p = agent.run("sh", "-c", "trap 'echo cleaned up; exit 7' TERM; echo ready; read x", stdin=-1)
    assert p.stdout is not None
    assert p.stdout.readline() == b"ready\n"
    p.send_signal(signal.SIGTERM)
    out, _ = p.communicate(timeout=PATIENCE_S)
    assert (p.returncode, out) == (7, b"cleaned up\n")


def test_third_interrupt_gives_up_on_a_command_that_ignores_them(agent: Agent) -> None:
    p = agent.run(
        "sh", "-c", "trap 'echo heard' INT; echo ready; while :; do sleep 0.01; done",
        give_up_within_s=1e6,  # a busy machine takes long from one to the next
    )  # fmt: skip
    assert p.stdout is not None
    for line in (b"ready\n", b"heard\n", b"heard\n"):
        assert p.stdout.readline() == line
        p.send_signal(signal.SIGINT)
    p.communicate(timeout=PATIENCE_S)
    assert p.returncode == 130


def test_agent_that_dies_is_told_from_a_command_that_ends(agent: Agent) -> None:
    p = agent.run(*WAITING)
    assert p.stdout is not None
    p.stdout.readline()
    agent.close()
    _, err = p.communicate(timeout=PATIENCE_S)
    assert p.returncode == 99
    assert err.startswith(b"connection_lost operation_failed: ")


def test_end_of_the_machine_is_noticed_though_the_connection_stays_silent(agent: Agent) -> None:
    machine = subprocess.Popen(["sleep", "60"])
    p = agent.run(*WAITING, machine_pid=machine.pid)
    assert p.stdout is not None
    p.stdout.readline()
    machine.kill()
    machine.wait()
    _, err = p.communicate(timeout=PATIENCE_S)
    assert p.returncode == 99
    assert err.startswith(b"connection_lost")


def test_last_words_before_the_end_of_the_machine_are_kept(agent: Agent) -> None:
    machine = subprocess.Popen(["sleep", "60"])
    p = agent.run("sh", "-c", "echo ready; read x; echo last words; sleep 60", stdin=-1,
                  machine_pid=machine.pid)  # fmt: skip
    assert p.stdout is not None
    assert p.stdin is not None
    p.stdout.readline()
    p.stdin.write(b"go\n")
    p.stdin.flush()
    assert p.stdout.readline() == b"last words\n"
    machine.kill()
    machine.wait()
    assert p.wait(timeout=PATIENCE_S) == 99
    p.communicate()


# --- the terminal ---------------------------------------------------------------------------------


class Terminal:
    """A terminal with banger in it; the test types at its other end."""

    def __init__(self, agent: Agent, *argv: str) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.master, (33, 111))
        self.before = termios.tcgetattr(self.slave)
        self.process = agent.run(
            *argv, tty=True, stdin=self.slave, stdout=self.slave, stderr=self.slave
        )

    def expect(self, word: bytes) -> bytes:
        """Everything up to `word`, which has to come."""
        seen, deadline = b"", time.monotonic() + PATIENCE_S
        while word not in seen:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self.master], [], [], left)[0], seen
            seen += os.read(self.master, 4096)
        return seen

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & termios.ICANON

    def end(self) -> int:
        """Wait for the process; the terminal has to be as it was before."""
        while self.process.poll() is None:
            # What is printed last must be read, or restoring the terminal waits for it.
            if select.select([self.master], [], [], 0.01)[0]:
                os.read(self.master, 4096)
        assert termios.tcgetattr(self.slave) == self.before
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(agent: Agent) -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def make(*argv: str) -> Terminal:
        made.append(Terminal(agent, *argv))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_terminal_has_our_size_and_is_raw_while_the_command_runs(
    terminal: Callable[..., Terminal],
) -> None:
    t = terminal("sh", "-c", "stty size; tty; echo ready; read x; exit 5")
    seen = t.expect(b"ready")
    assert b"33 111" in seen
    assert b"/dev/pts/" in seen
    assert t.is_raw()
    t.type(b"\r")
    assert t.end() == 5


def test_new_size_reaches_the_command(terminal: Callable[..., Terminal]) -> None:
    t = terminal("sh", "-c", "trap 'stty size' WINCH; echo ready; while :; do sleep 0.01; done")
    t.expect(b"ready")
    termios.tcsetwinsize(t.master, (44, 99))
    # It is not the controlling terminal of the process, so the kernel does not tell it.
    t.process.send_signal(signal.SIGWINCH)
    t.expect(b"44 99")
    t.process.send_signal(signal.SIGTERM)
    assert t.end() == 143


def test_ctrl_c_is_the_guests_to_interpret(terminal: Callable[..., Terminal]) -> None:
    t = terminal(
        "sh", "-c", "trap 'echo heard; exit 9' INT; echo ready; while :; do sleep 0.01; done"
    )
    t.expect(b"ready")
    t.type(b"\x03")
    t.expect(b"heard")
    assert t.end() == 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_terminal_is_restored_after_a_signal_to_us(
    terminal: Callable[..., Terminal], number: signal.Signals
) -> None:
    t = terminal(*WAITING)
    t.expect(b"ready")
    t.process.send_signal(number)
    assert t.end() == 128 + number


def test_terminal_is_restored_when_the_agent_is_killed(
    terminal: Callable[..., Terminal], agent: Agent
) -> None:
    t = terminal(*WAITING)
    t.expect(b"ready")
    assert t.is_raw()
    agent.close()
    assert t.end() == 99


def test_terminal_is_restored_when_the_command_is_refused(
    terminal: Callable[..., Terminal],
) -> None:
    t = terminal("/nonexistent/program")
    assert t.end() == 127
