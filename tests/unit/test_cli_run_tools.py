"""`vm run` and the tooling bootstrap: when it is asked for, and what `-d` shows of it."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.api import params as p
from banger.api import results as r
from banger.api.records import Bootstrap, VmRecord, Workspace
from banger.process import read_stat
from banger.rpc.server import Call
from fakes.agent import TOKEN, Agent, running_agent
from fakes.command_line import CommandLine
from fakes.daemon import FakeDaemon, running_daemon

VM = VmRecord(
    id="0" * 32, name="web", state="running", image_id="1" * 32, image="debian", kernel="k",
    vcpu=2, memory_mib=512, overlay_bytes=8 << 30, work_disk_bytes=8 << 30, address="172.16.0.2",
    mac="", network="bridge",
)  # fmt: skip
RUNNING = msgspec.structs.replace(
    VM, bootstrap=Bootstrap(state="running", log="/root/log", session="tooling")
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of these tests never ends: nobody need wait for that."""
    monkeypatch.setattr("banger.cli.guest_run._EXIT_FOLLOWS_S", 0)


def ended(problem: str | None) -> VmRecord:
    state: Any = "failed" if problem else "done"
    return msgspec.structs.replace(
        VM, bootstrap=Bootstrap(state=state, log="/root/log", session="tooling", problem=problem)
    )


def daemon(cli: CommandLine, sock: socket.socket, vm: VmRecord, after: VmRecord = VM) -> Any:
    stat = read_stat(os.getpid())
    assert stat is not None
    access = r.AgentAccess(
        vm=vm, token=TOKEN, cwd=None, login=False, vmm_pid=os.getpid(), vmm_start_time=stat[1]
    )

    async def run(call: Call, _: p.RunVm) -> None:
        await call.finish(r.RunResult(vm=vm, access=access), fds=(sock.fileno(),))

    answers = {"vm.run": run, "vm.show": lambda _: after}
    return running_daemon(cli.paths.daemon_socket, answers, state=cli.paths.state)


def asked(running: FakeDaemon) -> p.RunVm:
    params = running.asked[0][1]
    assert isinstance(params, p.RunVm)
    return params


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("-d", "REPO"), True),
        (("-d", "REPO", "--no-bootstrap"), False),
        (("-d",), False),
        (("REPO", "--", "make"), False),
        (("REPO", "--default-command"), False),
        (("REPO",), True),
    ],
)
def test_tools_are_for_a_shell_or_for_who_comes_later(
    cli: CommandLine, tmp_path: Path, words: tuple[str, ...], expected: bool
) -> None:
    ours, theirs = socket.socketpair()
    with ours, daemon(cli, theirs, VM) as running:
        ours.shutdown(socket.SHUT_RDWR)  # no agent: the command ends at once
        cli("vm", "run", "-q", *(str(tmp_path) if w == "REPO" else w for w in words))
        theirs.close()
    assert asked(running).bootstrap is expected


def session(agent: Agent, *argv: str) -> None:
    params = {"name": "tooling", "argv": argv, "env": {}, "login": False,
              "stdin_mode": "detached", "require": [], "tags": []}  # fmt: skip
    with agent.connect() as sock, sock.makefile("rwb") as stream:
        request = {"version": 1, "method": "session.start", "params": params, "token": TOKEN}
        stream.write(json.dumps(request).encode() + b"\n")
        stream.flush()
        assert "result" in json.loads(stream.readline())


@pytest.mark.parametrize("problem", [None, "status 1"])
def test_detached_run_shows_the_installation_to_its_end_and_then_what_to_type(
    cli: CommandLine, tmp_path: Path, problem: str | None
) -> None:
    with running_agent() as agent:
        session(agent, "sh", "-c", "echo installing; sleep 0.1; echo over; exit 1")
        sock = agent.connect()
        with sock, daemon(cli, sock, RUNNING, ended(problem)):
            done = cli("vm", "run", "-d", "-q", str(tmp_path))
    assert done.status == 0
    assert done.err.startswith("installing\nover\n")
    assert ("not all tools are installed (status 1)" in done.err) is (problem is not None)
    assert done.out.splitlines() == [
        "web", "  banger vm ssh web", "  banger vm exec web -- CMD", "  banger vm acp web",
        "  banger vm stop web",
    ]  # fmt: skip


def test_agent_that_ends_meanwhile_is_a_warning(cli: CommandLine, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, daemon(cli, theirs, RUNNING):
        ours.shutdown(socket.SHUT_RDWR)
        done = cli("vm", "run", "-d", "-q", str(tmp_path))
    assert done.status == 0
    assert "what became of the tools is not known" in done.err
    assert "banger vm session logs web tooling" in done.err


def test_command_of_a_run_goes_through_mise_as_that_of_an_exec_does(
    cli: CommandLine, tmp_path: Path
) -> None:
    place = Workspace(
        guest_path=str(tmp_path), source="/src", base_commit=None, branch=None,
        mode="shallow_overlay", mise=True,
    )  # fmt: skip
    mise, heard = tmp_path / "mise", tmp_path / "heard"
    mise.write_text(f'#!/bin/sh\nprintf "<%s>" "$@" > {heard}\nexit 5\n')
    mise.chmod(0o755)
    with running_agent() as agent:
        sock = agent.connect()
        with sock, daemon(cli, sock, msgspec.structs.replace(VM, workspace=place)):
            path = f"PATH={tmp_path}:/usr/bin:/bin"
            done = cli("vm", "run", "-q", "--env", path, str(tmp_path), "--", "say", "two  words")
    assert (done.status, heard.read_text()) == (5, "<exec><--><say><two  words>")
