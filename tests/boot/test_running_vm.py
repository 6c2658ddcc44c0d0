"""One VM that runs: commands, streams, terminals, figures, and a daemon that dies beside it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pexpect
import pytest

from boot.installation import PATIENCE_S, Installation


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (("true",), 0),
        (("false",), 1),
        (("sh", "-c", "exit 42"), 42),
        (("sh", "-c", "kill -KILL $$"), 137),
        (("no-such-program",), 127),
        (("/etc/passwd",), 126),
    ],
)
def test_the_exit_status_is_the_commands(
    banger: Installation, web: str, argv: tuple[str, ...], status: int
) -> None:
    assert banger("vm", "exec", web, "--", *argv).status == status


def test_streams_are_separate_and_complete(banger: Installation, web: str) -> None:
    done = banger("vm", "exec", web, "--", "sh", "-c", "echo out; echo err >&2")
    assert (done.out, done.err) == (b"out\n", "err\n")


def test_stdin_passes_through_whole_and_its_end_is_told(banger: Installation, web: str) -> None:
    data = os.urandom(5_000_000)
    done = banger("vm", "exec", web, "--", "sha256sum", stdin=data)
    assert done.text.split()[0] == hashlib.sha256(data).hexdigest()


def test_much_output_to_a_slow_reader_arrives_whole(banger: Installation, web: str) -> None:
    size = 30_000_000
    argv = ("vm", "exec", web, "--", "head", "-c", str(size), "/dev/zero")
    total = 0
    with banger.popen(*argv, stderr=None) as p:
        assert p.stdout
        while chunk := p.stdout.read(1 << 20):
            total += len(chunk)
    assert (p.returncode, total) == (0, size)


def test_arguments_travel_as_they_are(banger: Installation, web: str) -> None:
    words = ["a b", "", "$HOME", "'", '"', "\\", "--rm", "-c", "é", "*", "new\nline"]
    done = banger("vm", "exec", web, "--", "printf", "%s\\0", *words)
    assert done.out.decode().split("\0")[:-1] == words


def test_environment_directory_and_user_are_honoured(banger: Installation, web: str) -> None:
    done = banger(
        "vm", "exec", "--env", "A=1 2", "--env", "B=", "--user", "nobody",
        "--guest-path", "/tmp", web,
        "--", "sh", "-c", "echo $A,$B,$(id -un),$PWD,$BANGER_VM",
    )  # fmt: skip
    assert done.text == f"1 2,,nobody,/tmp,{web}\n", done.err


def test_many_commands_at_once_keep_their_own_streams(banger: Installation, web: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        done = list(
            pool.map(
                lambda i: banger("vm", "exec", web, "--", "sh", "-c", f"echo {i}; exit {i}"),
                range(8),
            )
        )
    assert [(d.text, d.status) for d in done] == [(f"{i}\n", i) for i in range(8)]


def test_a_terminal_has_its_size_and_follows_a_resize(banger: Installation, web: str) -> None:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "banger.cli.entry", "vm", "exec", "-t", web, "--", "sh"],
        env=banger.env,
        dimensions=(31, 97),
        timeout=PATIENCE_S,
        encoding="utf-8",
    )
    child.expect(r"[#$] ")
    child.sendline("stty size")
    child.expect("31 97")
    child.setwinsize(40, 120)
    child.sendline("stty size")
    child.expect("40 120")
    child.sendline("tty; exit 9")
    child.expect("/dev/pts/")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 9


def test_ctrl_c_in_a_terminal_hits_the_guest_command_only(banger: Installation, web: str) -> None:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "banger.cli.entry", "vm", "exec", "-t", web, "--", "sh"],
        env=banger.env,
        timeout=PATIENCE_S,
        encoding="utf-8",
    )
    child.expect(r"[#$] ")
    # A shell that is not interactive dies of the signal, wherever it is; its echo is not its input.
    child.sendline("sh -c 'echo g''o; exec sleep 1000'")
    child.expect("go\r\n")
    child.sendintr()
    child.expect(r"[#$] ")
    child.sendline("echo alive$((1+1)); exit")
    child.expect("alive2")
    child.expect(pexpect.EOF)
    child.close()


def test_a_command_survives_the_daemons_death_and_the_next_daemon_finds_the_vm(
    banger: Installation, web: str
) -> None:
    boot_id = banger.show(web)["boot_id"]
    p = banger.popen(
        "vm", "exec", web, "--", "sh", "-c", "echo up; read x; echo $x", stdin=subprocess.PIPE
    )
    assert p.stdout
    assert p.stdout.readline() == b"up\n"
    banger.kill_daemon()
    out, _ = p.communicate(b"still\n", timeout=PATIENCE_S)
    assert (p.returncode, out) == (0, b"still\n")
    assert (
        banger.ok("vm", "exec", web, "--", "cat", "/proc/sys/kernel/random/boot_id").text.strip()
        == boot_id
    )
    assert banger.show(web)["boot_id"] == boot_id


def test_a_vm_shows_its_ports_figures_and_health(banger: Installation, web: str) -> None:
    ports = banger.json("vm", "ports", "--json", web)
    assert any(p["port"] == 22 and p["reachable"] for p in ports), ports
    (stats,) = banger.json("vm", "stats", web)
    assert stats["vmm_rss_bytes"] > 0
    assert stats["guest"]["memory"]["total_bytes"] > 300 << 20
    health = banger.json("vm", "health", "--json", web)
    assert health["hostname"] == web
    assert banger.json("vm", "ping", "--json", web)["round_trip_ms"] > 0
    assert "banger" in banger.ok("vm", "logs", web).text


def test_ssh_trusts_the_guest_at_first_contact_and_passes_the_status(
    banger: Installation, web: str
) -> None:
    done = banger("vm", "ssh", web, "--", "echo $HOSTNAME; exit 42")
    assert (done.status, done.text) == (42, f"{web}\n"), done.err
    assert banger("vm", "ssh", web, "--", "sh", "-c", "exit 42").status == 42
    assert banger.ok("vm", "ssh", web, "--", "printf", "%s|", "a b", "c").text == "a b|c|"


def test_what_is_wrong_in_a_guest_command_is_said_and_changes_nothing(
    banger: Installation, web: str
) -> None:
    done = banger("vm", "exec", "nobody-here", "--", "true")
    assert (done.status, "there is no VM 'nobody-here'" in done.err) == (1, True)
    assert banger("vm", "exec", web).status == 2
    done = banger("vm", "exec", "--user", "no-such-user", web, "--", "true")
    assert done.status == 1
    assert "no-such-user" in done.err


def test_a_fast_ending_command_loses_no_output(banger: Installation, web: str) -> None:
    for _ in range(5):
        done = banger("vm", "exec", web, "--", "sh", "-c", "seq 1 20000; exit 3")
        assert (done.status, len(done.out.splitlines())) == (3, 20000)


def test_show_and_list_agree(banger: Installation, web: str) -> None:
    (row,) = [vm for vm in banger.json("vm", "list", "--json") if vm["name"] == web]
    assert row == banger.show(web) == banger.show(row["id"][:8])
    assert json.dumps(row).find("token") < 0


def test_three_interrupts_give_up_on_a_deaf_command(banger: Installation, web: str) -> None:
    p = banger.popen("vm", "exec", web, "--", "sh", "-c", "trap '' INT; echo up; sleep 1000")
    assert p.stdout
    assert p.stdout.readline() == b"up\n"
    # Two that come before it has had its turn are one to it, as they are to every program.
    sent = 0
    while p.returncode is None:
        p.send_signal(signal.SIGINT)
        sent += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            p.wait(0.1)
    p.communicate()
    assert (p.returncode, sent >= 3) == (130, True)


def test_a_terminal_outlives_the_daemon_and_is_given_back_as_it_was(
    banger: Installation, web: str
) -> None:
    """A shell of the host around it, as a person has; a pager of the guest fills its screen."""
    host = pexpect.spawn(
        "/bin/bash", ["--norc", "--noediting", "-i"],
        env={**banger.env, "PS1": "host> ", "TERM": "xterm"},
        dimensions=(24, 80), timeout=PATIENCE_S, encoding="utf-8",
    )  # fmt: skip

    def modes() -> str:
        host.sendline("stty -g")
        host.expect(r"\n([0-9a-f:]{20,})\r\n")
        found = str(host.match.group(1))
        host.expect_exact("host> ")
        return found

    host.expect_exact("host> ")
    before = modes()
    host.sendline(f"{sys.executable} -m banger.cli.entry vm exec -t {web} -- sh")
    host.expect(r"\n[^\n]*# $")
    banger.kill_daemon()
    host.sendline("seq 1 100 | less")
    host.expect_exact("\r\n23\r\n")
    host.setwinsize(40, 80)
    host.send("G")
    host.expect_exact("\r\n100")
    host.send("q")
    host.expect("# $")
    host.sendline("stty size; printf '\\303\\251%s\\n' $((40+2)); exit 9")
    host.expect_exact("40 80\r\né42\r\n")
    host.expect_exact("host> ")
    host.sendline("echo status=$?=")
    host.expect_exact("status=9=\r\n")
    host.expect_exact("host> ")
    assert modes() == before
    host.close(force=True)
