"""Completion: scripts that shells accept, names from a daemon that answers, and patience's end."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from banger.cli import complete
from banger.cli.complete import VM
from fakes.command_line import CommandLine
from fakes.daemon import running_daemon
from patience import PATIENCE_S

SHELLS = {"bash": "bash", "zsh": "zsh", "fish": "fish", "powershell": "pwsh"}


@pytest.mark.parametrize("shell", SHELLS)
def test_script_is_printed_without_a_daemon(cli: CommandLine, shell: str) -> None:
    done = cli("completion", shell)
    assert (done.status, done.err, cli.starts) == (0, "", 0)
    assert "_BANGER_COMPLETE" in done.out
    assert "%(" not in done.out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_is_accepted_by_its_shell(cli: CommandLine, tmp_path: Path, shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed here")
    script = tmp_path / "script"
    script.write_text(cli("completion", shell).out)
    done = subprocess.run([program, "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def complete_line(
    tmp_path: Path, line: str, shell: str = "bash"
) -> subprocess.CompletedProcess[str]:
    """What the shell gets for a line whose last word is being typed."""
    words = line.split(" ")
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
        "HOME": str(tmp_path),
        "XDG_RUNTIME_DIR": str(tmp_path / "run"),
        "BANGER_MODE": "user",
        "_BANGER_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": line,
    }
    env |= (
        {"COMP_CWORD": str(len(words) - 1)} if shell == "bash" else {"COMP_INCOMPLETE": words[-1]}
    )
    return subprocess.run(
        [sys.executable, "-m", "banger.cli.entry"], env=env, capture_output=True, text=True,
        timeout=PATIENCE_S,
    )  # fmt: skip


def test_words_of_a_group_are_completed_without_a_daemon(tmp_path: Path) -> None:
    done = complete_line(tmp_path, "banger vm st")
    assert done.stdout.split() == ["plain,start", "plain,stop", "plain,stats"]
    assert done.stderr == ""
    assert not (tmp_path / "run").exists()


def test_options_are_completed(tmp_path: Path) -> None:
    done = complete_line(tmp_path, "banger vm run --inc")
    assert done.stdout.split() == ["plain,--include-untracked"]


def test_hidden_commands_are_not_offered(tmp_path: Path) -> None:
    assert complete_line(tmp_path, "banger in").stdout.strip() == ""


def test_powershell_speaks_the_protocol_of_its_script(tmp_path: Path) -> None:
    done = complete_line(tmp_path, "banger vm lo", shell="powershell")
    assert done.stdout.split() == ["logs"]


def test_name_without_a_daemon_completes_to_nothing_and_starts_none(tmp_path: Path) -> None:
    done = complete_line(tmp_path, "banger vm show w")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
    assert not (tmp_path / "run").exists()


def test_names_come_from_a_running_daemon(tmp_path: Path) -> None:
    runtime = tmp_path / "run" / "banger"
    runtime.mkdir(parents=True)
    rows = [{"name": name} for name in ("web", "work", "db")]
    with running_daemon(runtime / "bangerd.sock", {"vm.list": lambda _: rows}):
        done = complete_line(tmp_path, "banger vm show w")
    assert done.stdout.split() == ["plain,web", "plain,work"]


def test_daemon_of_another_version_is_neither_asked_nor_replaced(tmp_path: Path) -> None:
    runtime = tmp_path / "run" / "banger"
    runtime.mkdir(parents=True)
    rows = [{"name": "web"}]
    with running_daemon(
        runtime / "bangerd.sock", {"vm.list": lambda _: rows}, version="0.0.0-old"
    ) as daemon:
        done = complete_line(tmp_path, "banger vm show w")
    assert (done.stdout.strip(), done.stderr, daemon.asked) == ("", "", [])


def test_daemon_that_hangs_costs_a_fifth_of_a_second(cli: CommandLine) -> None:
    """It accepts, as the kernel does for it, and never answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as hanging:
        directory = os.open(cli.paths.runtime, os.O_PATH)
        hanging.bind(f"/proc/self/fd/{directory}/{cli.paths.daemon_socket.name}")
        os.close(directory)
        hanging.listen(1)
        began = time.monotonic()
        assert VM.shell_complete(None, None, "w") == []  # type: ignore[arg-type]  # neither is used
        assert time.monotonic() - began >= complete._PATIENCE_S
    # That it came back at all says that it waits for no answer; how late is this machine's affair.
    assert complete._PATIENCE_S <= 0.2
