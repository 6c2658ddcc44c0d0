"""banger in a real terminal: a shell, tmux or pexpect around it, the real agent at the other side.

What a person sees and what is left of the terminal afterwards. Programs that are not there skip
the test that needs them.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from fakes.agent import ROOT, WAITING, Agent, running_agent
from patience import PATIENCE_S

PROGRAM = str(ROOT / "tests/fakes/run_command.py")
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8",
    "TERM": "xterm-256color", "PS1": "host> ", "HOME": "/nonexistent",
}  # fmt: skip


@pytest.fixture
def agent() -> Iterator[Agent]:
    with running_agent() as agent:
        yield agent


def words(agent: Agent, *argv: str, tty: bool = True, **options: object) -> list[str]:
    """The command line that runs `argv` as a guest's."""
    env = {"LC_ALL": "C.UTF-8", "TERM": "xterm-256color", "PS1": "guest> "}
    document = {"socket": str(agent.socket), "argv": argv, "tty": tty, "env": env, **options}
    return [sys.executable, PROGRAM, json.dumps(document)]


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"there is no {program}")


# --- a shell around it ----------------------------------------------------------------------------


class Shell:
    """A shell of the host in a terminal, with job control; banger is one of its jobs."""

    def __init__(self) -> None:
        self.child = pexpect.spawn(
            "/bin/bash", ["--norc", "--noediting", "-i"],
            env=ENVIRONMENT, dimensions=(33, 111), timeout=PATIENCE_S, encoding="utf-8",
        )  # fmt: skip
        self.prompt()
        self.before = self.modes()

    def prompt(self) -> str:
        self.child.expect_exact("host> ")
        return str(self.child.before)

    def modes(self) -> str:
        self.child.sendline("stty -g")
        (found,) = re.findall(r"\n([0-9a-f:]{20,})", self.prompt())
        return str(found)

    def start(self, command: list[str]) -> None:
        self.child.sendline(shlex.join(command))
        # The line is echoed; what follows is the program's.
        self.child.expect_exact("\r\n")

    def status(self) -> int:
        """The last job's status, with the terminal as it was before it."""
        self.prompt()
        self.child.sendline("echo status=$?=")
        self.child.expect(r"status=(\d+)=\r")
        status = int(self.child.match.group(1))  # type: ignore[union-attr]  # expect found it
        self.prompt()
        assert self.modes() == self.before
        return status


@pytest.fixture
def shell() -> Iterator[Shell]:
    shell = Shell()
    yield shell
    shell.child.close(force=True)


def test_status_comes_back_and_the_terminal_is_as_it_was(shell: Shell, agent: Agent) -> None:
    shell.start(words(agent, "sh", "-c", "stty -echo raw; printf '\\033[?25l'; exit 42"))
    assert shell.status() == 42


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_terminal_is_as_it_was_after_a_signal_to_the_group(
    shell: Shell, agent: Agent, number: signal.Signals
) -> None:
    shell.start(words(agent, *WAITING))
    shell.child.expect_exact("ready")
    os.killpg(os.tcgetpgrp(shell.child.child_fd), number)
    assert shell.status() == 128 + number


def test_terminal_is_as_it_was_when_the_agent_is_gone(shell: Shell, agent: Agent) -> None:
    shell.start(words(agent, *WAITING))
    shell.child.expect_exact("ready")
    agent.close()
    assert shell.status() == 99


@pytest.mark.parametrize(
    ("argv", "options", "status"),
    [(("/nonexistent",), {}, 127), (("true",), {"user": "nobody-here"}, 99)],
)
def test_terminal_is_as_it_was_when_nothing_could_be_run(
    shell: Shell, agent: Agent, argv: tuple[str, ...], options: dict[str, str], status: int
) -> None:
    shell.start(words(agent, *argv, **options))
    assert shell.status() == status


def test_size_follows_the_terminal_around_it(shell: Shell, agent: Agent) -> None:
    script = "stty size; trap 'stty size' WINCH; echo ready; while :; do sleep 0.01; done"
    shell.start(words(agent, "sh", "-c", script))
    shell.child.expect_exact("33 111\r\nready")
    shell.child.setwinsize(20, 70)
    shell.child.expect_exact("20 70")
    os.killpg(os.tcgetpgrp(shell.child.child_fd), signal.SIGTERM)
    assert shell.status() == 143


def test_jobs_of_the_guests_shell_stop_go_on_and_are_interrupted(
    shell: Shell, agent: Agent
) -> None:
    shell.start(words(agent, "bash", "--norc", "--noediting", "-i"))
    child = shell.child
    child.expect_exact("guest> ")
    child.sendline("cat")
    child.sendline("one")
    child.expect("one\r\none\r\n")
    child.send("\x1a")  # Ctrl-Z: the guest's job stops, not banger
    child.expect_exact("Stopped")
    child.expect_exact("guest> ")
    child.sendline("fg")
    child.sendline("two")
    # Twice, the echo and cat's own: only now the job has the terminal again.
    child.expect("two\r\n(cat\r\n)?two\r\n")
    child.send("\x03")  # Ctrl-C
    child.expect_exact("guest> ")
    child.sendline("cat")
    child.sendline("over")
    child.expect("over\r\nover\r\n")
    child.send("\x04")  # Ctrl-D: the end of cat's input
    child.expect_exact("guest> ")
    child.sendline("(exit 9)")
    child.expect_exact("guest> ")
    child.send("\x04")  # and of the shell's
    assert shell.status() == 9


def test_banger_itself_can_be_stopped_and_continued(shell: Shell, agent: Agent) -> None:
    """A signal from outside, as Ctrl-Z belongs to the guest."""
    shell.start(words(agent, "sh", "-c", "echo ready; read x; stty size; echo got $x; exit 3"))
    shell.child.expect_exact("ready")
    os.killpg(os.tcgetpgrp(shell.child.child_fd), signal.SIGTSTP)
    shell.child.expect_exact("Stopped")
    shell.prompt()
    assert shell.modes() == shell.before
    shell.child.setwinsize(21, 81)
    shell.child.sendline("fg")
    shell.child.expect_exact("run_command.py")
    shell.child.send("typed\r")
    shell.child.expect_exact("21 81")
    shell.child.expect_exact("got typed")
    assert shell.status() == 3


def test_ctrl_z_without_a_terminal_in_the_guest_stops_banger_and_loses_nothing(
    shell: Shell, agent: Agent
) -> None:
    script = "echo ready; read x; seq 1 20000; echo got $x; exit 4"
    shell.start(words(agent, "sh", "-c", script, tty=False))
    shell.child.expect_exact("ready")
    shell.child.send("\x1a")
    shell.child.expect_exact("Stopped")
    shell.prompt()
    shell.child.sendline("fg")
    shell.child.expect_exact("run_command.py")
    shell.child.sendline("line")
    shell.child.expect_exact("\r\n19999\r\n20000\r\ngot line")
    assert shell.status() == 4


def test_ctrl_c_gets_through_a_flood_of_output(shell: Shell, agent: Agent) -> None:
    shell.start(words(agent, "sh", "-c", "trap 'exit 6' INT; while :; do seq 1 2000; done"))
    shell.child.expect_exact("\r\n1999\r\n")
    shell.child.send("\x03")
    assert shell.status() == 6


def test_interrupt_arrives_though_the_command_ignores_its_stdin(agent: Agent) -> None:
    script = "trap 'exit 7' INT; echo ready; while :; do sleep 0.01; done"
    p = agent.run("sh", "-c", script, stdin=subprocess.PIPE)
    assert p.stdin is not None and p.stdout is not None
    assert p.stdout.readline() == b"ready\n"
    os.set_blocking(p.stdin.fileno(), False)
    deadline = time.monotonic() + PATIENCE_S
    # Full: the credit is used up, and nobody takes any more.
    idle = 0
    while idle < 5:
        assert time.monotonic() < deadline
        try:
            os.write(p.stdin.fileno(), b"x" * 65536)
            idle = 0
        except BlockingIOError:
            idle += 1
            select.select([], [], [], 0.02)
    p.send_signal(signal.SIGINT)
    assert p.wait(timeout=PATIENCE_S) == 7
    for pipe in (p.stdin, p.stdout, p.stderr):
        assert pipe is not None
        pipe.close()


@pytest.mark.parametrize("typed", [b"ahead\n", b"no end of line"])
def test_what_is_typed_before_the_command_runs_reaches_it(tmp_path: Path, typed: bytes) -> None:
    """The agent takes its time to answer; the terminal is not raw until then."""
    path = tmp_path / "agent"
    master, slave = pty.openpty()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)
        document = {"socket": str(path), "argv": ["cat"], "tty": True}
        p = subprocess.Popen(
            [sys.executable, PROGRAM, json.dumps(document)],
            env=ENVIRONMENT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        )  # fmt: skip
        try:
            listening.settimeout(PATIENCE_S)
            connection, _ = listening.accept()
            with connection, connection.makefile("rb") as said:
                connection.settimeout(PATIENCE_S)
                assert json.loads(said.readline())["method"] == "exec"
                os.write(master, typed)
                echo = b""
                while typed.strip() not in echo:  # the echo says that the terminal has it
                    assert select.select([master], [], [], PATIENCE_S)[0]
                    echo += os.read(master, 100)
                connection.sendall(b'{"stream":true}\n')
                received = b""
                while received != typed:
                    kind, length = struct.unpack(">BI", said.read(5))
                    payload = said.read(length)
                    if kind == 0x04:  # stdin
                        received += payload
                        assert typed.startswith(received)
                connection.sendall(struct.pack(">BI", 0x0E, 10) + b'{"code":5}')
                assert p.wait(timeout=PATIENCE_S) == 5
        finally:
            if p.poll() is None:
                p.kill()
                p.wait()
            os.close(master)
            os.close(slave)


def test_end_of_the_terminal_ends_the_command(agent: Agent, tmp_path: Path) -> None:
    """The window is closed."""
    ended = tmp_path / "ended"
    script = f"trap 'echo hup > {ended}; exit' HUP; echo ready; while :; do sleep 0.01; done"
    child = pexpect.spawn(
        sys.executable, words(agent, "sh", "-c", script)[1:], env=ENVIRONMENT,
        timeout=PATIENCE_S, encoding="utf-8",
    )  # fmt: skip
    child.expect_exact("ready")
    os.close(child.child_fd)
    deadline = time.monotonic() + PATIENCE_S
    while not ended.exists() or ended.read_text() != "hup\n":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.waitpid(child.pid, 0)
    child.closed, child.terminated = True, True  # type: ignore[attr-defined]  # it is done by hand


# --- a screen around it ---------------------------------------------------------------------------


class Screen:
    """A terminal with a screen, tmux's, with a shell of the host in it."""

    def __init__(self, directory: Path) -> None:
        self._socket = directory / "tmux"
        self.before: list[object] = []

    def open(self) -> None:
        self._tmux(
            "-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24",
            "env PS1='host> ' bash --norc --noediting -i",
        )  # fmt: skip
        self.wait_for("host>")
        self.before = self.modes()

    def modes(self) -> list[object]:
        """Those of the kernel's terminal that the screen is at the other end of."""
        fd = os.open(self.flag("pane_tty"), os.O_RDWR | os.O_NOCTTY)
        try:
            return termios.tcgetattr(fd)
        finally:
            os.close(fd)

    def _tmux(self, *argv: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", self._socket, *argv], env=ENVIRONMENT, check=True,
            capture_output=True, timeout=PATIENCE_S,
        )  # fmt: skip
        return done.stdout.decode()

    def text(self) -> str:
        """What is on the screen, without what is blank at its end."""
        return self._tmux("capture-pane", "-p").rstrip("\n")

    def wait_for(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + PATIENCE_S
        while (found := re.search(pattern, self.text(), re.MULTILINE)) is None:
            assert time.monotonic() < deadline, f"{pattern!r} is not on the screen:\n{self.text()}"
            time.sleep(0.02)
        return found

    def flag(self, name: str) -> str:
        """A mode of the terminal, by tmux's format variable."""
        return self._tmux("display-message", "-p", f"#{{{name}}}").strip()

    def keys(self, *names: str) -> None:
        self._tmux("send-keys", *names)

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-l", text)

    def paste(self, text: str) -> None:
        """As the terminal's own paste does it, in brackets where the program asked for them."""
        self._tmux("set-buffer", text)
        self._tmux("paste-buffer", "-p")

    def resize(self, rows: int, cols: int) -> None:
        self._tmux("resize-window", "-x", str(cols), "-y", str(rows))

    def run(self, line: str) -> None:
        self.type(line)
        self.keys("Enter")

    def start(self, agent: Agent, *argv: str) -> None:
        """A guest command from a script: its command line would fill the screen."""
        script = self._socket.with_name("run")
        script.write_text(f"exec {shlex.join(words(agent, *argv))}\n")
        self.run(f"clear; echo before; sh {script}; echo status=$?=")

    def status(self) -> int:
        """The command's status; the screen and the terminal are what they were before it."""
        found = self.wait_for(r"^status=(\d+)=$")
        assert re.search(r"^before$", self.text(), re.MULTILINE), self.text()
        assert (self.flag("alternate_on"), self.flag("cursor_flag")) == ("0", "1")
        assert self.modes() == self.before
        return int(found.group(1))

    def close(self) -> None:
        self._tmux("kill-server")


@pytest.fixture
def screen(tmp_path_factory: pytest.TempPathFactory, agent: Agent) -> Iterator[Screen]:
    need("tmux")
    screen = Screen(agent.directory)
    try:
        screen.open()
        yield screen
    finally:
        screen.close()


def test_editor_fills_the_screen_follows_its_size_and_gives_it_back(
    screen: Screen, agent: Agent, tmp_path: Path
) -> None:
    need("vim")
    file = tmp_path / "text"
    file.write_text("".join(f"line {i}\n" for i in range(100)))
    screen.start(agent, "vim", "-u", "NONE", "-N", "-n", str(file))
    screen.wait_for(r"^line 22$")
    assert screen.flag("alternate_on") == "1"
    screen.resize(40, 100)
    screen.wait_for(r"^line 38$")
    screen.keys("G")
    screen.wait_for(r"^line 99$")
    screen.keys("o")
    screen.type("漢字 é 🙂 done")
    screen.wait_for("漢字 é 🙂 done")
    screen.keys("Escape")
    screen.run(":wq")
    assert screen.status() == 0
    assert file.read_text().endswith("line 99\n漢字 é 🙂 done\n")


def test_pager_pages_and_gives_the_screen_back(
    screen: Screen, agent: Agent, tmp_path: Path
) -> None:
    need("less")
    file = tmp_path / "text"
    file.write_text("".join(f"line {i}\n" for i in range(100)))
    screen.start(agent, "less", str(file))
    screen.wait_for(r"^line 22$")
    screen.keys("Space")
    screen.wait_for(r"^line 45$")
    screen.type("/line 77")
    screen.keys("Enter")
    screen.wait_for(r"\Aline 77$")
    screen.keys("q")
    assert screen.status() == 0


def test_terminal_multiplexer_in_the_guest_has_its_own_keys(
    screen: Screen, agent: Agent, tmp_path: Path
) -> None:
    socket_path = agent.directory / "inner"
    inner = ["tmux", "-S", str(socket_path), "-f", "/dev/null"]
    try:
        screen.start(agent, *inner, "new-session", "-s", "guest", "sh")
        screen.wait_for(r"\[guest\]")
        screen.run("echo in$((1+1))side")
        screen.wait_for(r"in2side$")
        screen.keys("C-b")
        screen.keys("%")
        screen.wait_for(r"│")
        screen.keys("C-b")
        screen.keys("d")
        assert screen.status() == 0
    finally:
        subprocess.run([*inner, "kill-server"], check=False, capture_output=True)


def test_wide_characters_are_typed_shown_and_erased_whole(screen: Screen, agent: Agent) -> None:
    """By the guest's terminal itself, without an editor of lines."""
    screen.start(agent, "sh", "-c", 'echo ready; read x; echo "got<$x>"; exit 5')
    screen.wait_for(r"^ready$")
    screen.type("é漢")
    screen.wait_for(r"^é漢$")
    screen.keys("BSpace", "BSpace")
    screen.type("字🙂")
    screen.keys("Enter")
    screen.wait_for(r"^got<字🙂>$")
    assert screen.status() == 5


def test_pasted_lines_wait_for_the_key_that_runs_them(screen: Screen, agent: Agent) -> None:
    need("bash")
    screen.start(agent, "bash", "--norc", "-i")
    screen.wait_for(r"^guest>")
    screen.paste("echo one$((1+1))\necho three$((2+2))")
    screen.wait_for(r"^echo three\$\(\(2\+2\)\)$")
    assert "one2" not in screen.text()
    screen.keys("Enter")
    screen.wait_for(r"three4$")
    screen.wait_for(r"one2$")
    screen.run("exit 8")
    assert screen.status() == 8
    # The host's shell did not ask for brackets, and nobody else does any more.
    screen.paste("echo plain$((3+3))\n")
    screen.wait_for(r"plain6$")
