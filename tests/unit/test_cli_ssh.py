"""`banger vm ssh`: what OpenSSH is told, and what becomes of its own failures."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from banger.api import params as p
from banger.api import results as r
from banger.api.records import VmRecord
from banger.cli.vm_ssh import build_argv, explain
from banger.config.paths import Paths
from banger.config.system_paths import SystemPaths
from banger.ssh.keys import generate_key
from banger.ssh.known_hosts import copy_hosts, replace_host
from fakes.agent import ROOT
from fakes.command_line import CommandLine
from fakes.daemon import running_daemon
from patience import PATIENCE_S

VM = VmRecord(
    id="0" * 32, name="web", state="running", image_id="1" * 32, image="debian", kernel="k",
    vcpu=1, memory_mib=512, overlay_bytes=1, work_disk_bytes=1, address="172.16.0.2", mac="",
    network="bridge",
)  # fmt: skip
ACCESS = r.SshAccess(
    vm=VM, sshd=True, address="172.16.0.2", port=22, key="/k/a b 1%", known_hosts="/d/known_hosts"
)
HOSTS = Path("/o/known hosts")

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


def options(argv: list[str]) -> dict[str, str]:
    given = [argv[i + 1] for i, word in enumerate(argv) if word == "-o"]
    return dict(option.split("=", 1) for option in given)


def test_only_bangers_key_and_hosts_are_used_and_the_host_key_must_be_known() -> None:
    argv = build_argv(ACCESS, HOSTS, (), log="/l", tty=False)
    assert argv[:4] == ["-F", "none", "-E", "/l"]
    assert options(argv) == {
        "HostKeyAlias": "web.vm",
        "UserKnownHostsFile": '"/o/known hosts"',
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "IdentitiesOnly": "yes",
        "PreferredAuthentications": "publickey",
        "IdentityFile": '"/k/a b 1%%"',
    }
    assert argv[-1] == "root@172.16.0.2"


def test_without_an_address_the_agent_leads_to_it() -> None:
    argv = build_argv(msgspec.structs.replace(ACCESS, address=""), HOSTS, (), log="/l", tty=False)
    assert options(argv)["ProxyCommand"].endswith("internal agent-proxy web 22")
    assert argv[-1] == "root@web.vm"


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        (("df -h | tail -1",), "df -h | tail -1"),
        (("sh", "-c", "exit 42"), "sh -c 'exit 42'"),
        (("printf", "%s|", "a b", ""), "printf '%s|' 'a b' ''"),
    ],
)
def test_one_argument_is_a_line_and_several_are_quoted_each(
    words: tuple[str, ...], sent: str
) -> None:
    argv = build_argv(ACCESS, HOSTS, words, log="/l", tty=False)
    assert argv[-2:] == ["--", sent]
    assert "-t" not in argv
    assert "-t" in build_argv(ACCESS, HOSTS, words, log="/l", tty=True)
    assert "-t" not in build_argv(ACCESS, HOSTS, (), log="/l", tty=True)


def test_a_command_that_ends_with_255_is_no_failure_of_ssh() -> None:
    assert explain("web", "") is None
    assert explain("web", "Connection to web.vm closed.\r\n") is None


def test_a_wrong_host_key_is_an_error_of_its_own() -> None:
    for said in (
        "@@@@\r\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\r\n…\r\n"
        "Host key verification failed.\r\n",
        "No ECDSA host key is known for web.vm and you have requested strict checking.\r\n"
        "Host key verification failed.\r\n",
    ):
        error = explain("web", said)
        assert error is not None
        assert error.reason == "host_key_mismatch"
        assert error.hint == "banger vm restart web"


def test_any_other_failure_has_sshs_own_last_words() -> None:
    error = explain("web", "ssh: connect to host 172.16.0.2 port 22: Connection refused\r\n")
    assert error is not None
    assert error.reason is None
    assert "172.16.0.2 port 22: Connection refused" in error.message


# --- the whole program, with a stand-in for ssh ---------------------------------------------------


@pytest.fixture
def run(cli: CommandLine, tmp_path: Path) -> Iterator[Run]:
    """`banger vm ssh web …`, with an ssh that does what the test says; `$log` is its `-E` file."""
    programs = tmp_path / "programs"
    programs.mkdir()

    def vm_ssh(script: str, *words: str) -> subprocess.CompletedProcess[bytes]:
        stand_in = programs / "ssh"
        stand_in.write_text(f"#!/bin/sh\nlog=$4\n{script}\n")
        stand_in.chmod(0o755)
        return subprocess.run(
            [sys.executable, "-m", "banger.cli.entry", "vm", "ssh", "web", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"),
                 "PATH": f"{programs}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip

    def access(_: p.VmRef) -> r.SshAccess:
        return ACCESS

    with running_daemon(cli.paths.daemon_socket, {"vm.ssh": access}, state=cli.paths.state):
        yield vm_ssh


@pytest.mark.parametrize("status", [0, 42, 255])
def test_the_guest_commands_status_and_streams_pass_through(run: Run, status: int) -> None:
    done = run(f"echo out; echo err >&2; exit {status}", "--", "x")
    assert (done.returncode, done.stdout, done.stderr) == (status, b"out\n", b"err\n")


def test_a_failure_of_ssh_is_status_1_and_names_what_it_was(run: Run) -> None:
    done = run('echo "Host key verification failed." >>"$log"; exit 255', "--", "x")
    assert done.returncode == 1
    assert b"its ssh host key is not the one that banger gave it" in done.stderr
    assert b"hint: banger vm restart web" in done.stderr


def test_a_shell_that_ends_is_followed_by_the_reminder(run: Run) -> None:
    done = run('echo "Connection to web.vm closed." >>"$log"; exit 3')
    assert (done.returncode, done.stdout) == (3, b"")
    assert done.stderr == b"banger: VM web still runs; stop it with: banger vm stop web\n"


# --- the owner's copy of the known hosts ----------------------------------------------------------


def test_the_owners_copy_follows_the_daemons_file(tmp_path: Path) -> None:
    paths = Paths.system_mode(SystemPaths(root=tmp_path / "root"), tmp_path / "home")
    source, target = paths.known_hosts, paths.owner_known_hosts
    assert target == tmp_path / "home/.local/state/banger/ssh/known_hosts"
    copy_hosts(source, target)
    assert not target.exists()
    replace_host(source, ["web.vm", "172.16.0.2"], generate_key("a").public)
    copy_hosts(source, target)
    assert target.read_bytes() == source.read_bytes()
    inode = target.stat().st_ino
    copy_hosts(source, target)
    assert target.stat().st_ino == inode
    replace_host(source, ["web.vm", "172.16.0.2"], None)
    copy_hosts(source, target)
    assert target.read_bytes() == b""


def test_in_user_mode_there_is_one_file(cli: CommandLine) -> None:
    assert cli.paths.owner_known_hosts == cli.paths.known_hosts
