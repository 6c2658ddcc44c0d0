"""`vm run` on real VMs: one command, its streams, its exit status, and nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from boot.installation import PATIENCE_S, SMALL, Installation

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_a_command_gives_back_its_exit_status_and_leaves_nothing(banger: Installation) -> None:
    done = banger("vm", "run", "--rm", *SMALL, "--", "sh", "-c", "echo out; echo err >&2; exit 42")
    assert (done.status, done.out) == (42, b"out\n"), done.err
    assert "err\n" in done.err
    assert done.err.startswith("spec: 1 vCPU | 512 MiB | disk 512M | image debian-bookworm-minimal")


def test_a_repository_arrives_as_it_is_on_disk(banger: Installation, repository: Path) -> None:
    script = (
        "set -e; cat message; ls -A; stat -c '%a %u:%g' run.sh; readlink link; "
        'test -e "a name with\nnewline"; pwd; make -s test'
    )
    done = banger("vm", "run", "--rm", *SMALL, str(repository), "--", "sh", "-c", script)
    assert done.status == 0, done.err + banger.evidence()
    lines = done.text.splitlines()
    assert lines[0] == "edited"
    assert "755 0:0" in lines
    assert "message" in lines
    assert "/root/repo" in lines
    assert "ran in /root/repo" in lines
    assert "untracked" not in lines
    assert "ignored" not in lines


def test_a_command_runs_in_the_directory_that_was_named(
    banger: Installation, repository: Path
) -> None:
    done = banger(
        "vm", "run", "--rm", "--include-untracked", *SMALL, str(repository / "sub"), "--",
        "sh", "-c", "pwd; ls ..",
    )  # fmt: skip
    lines = done.text.splitlines()
    assert lines[0] == "/root/repo/sub", done.err
    assert "untracked" in lines
    assert "ignored" not in lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_vm_of_a_command_line_that_was_killed_is_deleted(
    banger: Installation, number: signal.Signals
) -> None:
    words = ("vm", "run", "--rm", "--name", "killed", *SMALL)
    p = banger.popen(*words, "--", "sh", "-c", "echo up; sleep 1000")
    assert p.stdout
    assert p.stdout.readline() == b"up\n"
    p.send_signal(number)
    p.communicate(timeout=PATIENCE_S)
    # The daemon deletes it; asking for that too waits for it, because the delete holds its lock.
    banger("vm", "delete", "killed")


def test_ctrl_c_reaches_the_guest_command(banger: Installation) -> None:
    p = banger.popen(
        "vm", "run", "--rm", *SMALL, "--",
        "sh", "-c", "trap 'echo caught; exit 7' INT; echo up; while :; do sleep 0.1; done",
    )  # fmt: skip
    assert p.stdout
    assert p.stdout.readline() == b"up\n"
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=PATIENCE_S)
    assert (p.returncode, out) == (7, b"caught\n"), err


def test_ctrl_c_while_the_vm_starts_leaves_nothing(banger: Installation) -> None:
    p = banger.popen("vm", "run", "--rm", *SMALL, "--", "true")
    assert p.stderr
    for line in p.stderr:
        if line.startswith(b"ready:"):
            break
    p.send_signal(signal.SIGINT)
    p.communicate(timeout=PATIENCE_S)
    assert p.returncode == 130


def test_a_command_killed_by_a_signal_is_128_and_its_number(banger: Installation) -> None:
    done = banger("vm", "run", "--rm", *SMALL, "--", "sh", "-c", "kill -TERM $$")
    assert done.status == 143, done.err


def test_two_runs_at_once_do_not_disturb_each_other(banger: Installation) -> None:
    both = [
        banger.popen("vm", "run", "--rm", *SMALL, "--", "sh", "-c", f"echo {i}; exit {i}")
        for i in (3, 4)
    ]
    results = [(p.communicate(timeout=PATIENCE_S)[0], p.returncode) for p in both]
    assert results == [(b"3\n", 3), (b"4\n", 4)]


def test_a_guest_that_reboots_in_mid_command_is_reported_as_the_machines_end(
    banger: Installation,
) -> None:
    done = banger(
        "vm", "run", "--rm", *SMALL, "--", "sh", "-c", "echo b > /proc/sysrq-trigger; sleep 100"
    )
    assert done.status == 1
    assert "the machine ended while the command ran" in done.err


def test_a_guest_kernel_that_panics_is_an_error_with_its_words(banger: Installation) -> None:
    done = banger(
        "vm",
        "run",
        "--name",
        "panics",
        *SMALL,
        "--",
        "sh",
        "-c",
        "echo c > /proc/sysrq-trigger; sleep 100",
    )
    assert done.status == 1
    assert "the machine ended" in done.err
    logs = banger("vm", "logs", "panics")
    assert "Kernel panic" in logs.text
    assert banger.show("panics")["state"] == "stopped"
    banger.ok("vm", "delete", "panics")


def test_the_daemons_death_does_not_end_a_command(banger: Installation) -> None:
    p = banger.popen(
        "vm", "run", "--rm", *SMALL, "--", "sh", "-c", "echo up; read line; echo got $line; exit 5",
        stdin=subprocess.PIPE,
    )  # fmt: skip
    assert p.stdout and p.stdin
    assert p.stdout.readline() == b"up\n"
    banger.kill_daemon()
    out, err = p.communicate(b"word\n", timeout=PATIENCE_S)
    assert (p.returncode, out) == (5, b"got word\n"), err


def test_without_rm_the_vm_stays_and_a_reminder_says_so(banger: Installation) -> None:
    done = banger("vm", "run", "--name", "stays", *SMALL, "--", "true")
    assert done.status == 0
    assert "VM stays still runs" in done.err
    assert banger.show("stays")["state"] == "running"
    banger.ok("vm", "delete", "stays")


def test_the_terminal_closing_ends_the_command(banger: Installation) -> None:
    primary, secondary = os.openpty()
    p = banger.popen(
        "vm", "run", "--rm", *SMALL, "--", "sh", "-c", "echo up; sleep 1000",
        stdin=secondary, start_new_session=True,
    )  # fmt: skip
    os.close(secondary)
    assert p.stdout
    assert p.stdout.readline() == b"up\n"
    p.send_signal(signal.SIGHUP)
    p.communicate(timeout=PATIENCE_S)
    os.close(primary)
    assert p.returncode != 0
