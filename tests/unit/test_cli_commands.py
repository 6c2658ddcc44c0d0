"""Commands against a daemon that says what the test wants: what is asked, printed and returned."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.api import params as p
from banger.api import results as r
from banger.api.records import ImageRecord, VmRecord
from banger.errors import BangerError
from banger.process import read_stat
from banger.rpc.server import Call
from fakes.agent import ROOT, TOKEN, WAITING, Agent, running_agent
from fakes.command_line import CommandLine
from fakes.daemon import FakeDaemon, running_daemon
from patience import PATIENCE_S

VM = VmRecord(
    id="0" * 32,
    name="web",
    state="running",
    image_id="1" * 32,
    image="debian",
    kernel="k",
    vcpu=2,
    memory_mib=512,
    overlay_bytes=8 << 30,
    work_disk_bytes=8 << 30,
    address="172.16.0.2",
    mac="",
    network="bridge",
    created_at="2026-01-02T03:04:05.678Z",
)


IMAGE = ImageRecord(
    id="1" * 32, name="good", distro="debian", arch="amd64", kernel_ref="k",
    rootfs_path="/i/rootfs.sqfs", rootfs_sha256="0" * 64, rootfs_bytes=1, managed=True,
)  # fmt: skip


def named(name: str, **changes: Any) -> VmRecord:
    return msgspec.structs.replace(VM, name=name, **changes)


def access(vm: VmRecord = VM, *, pid: int | None = None) -> r.AgentAccess:
    pid = pid or os.getpid()
    stat = read_stat(pid)
    assert stat is not None
    return r.AgentAccess(
        vm=vm, token=TOKEN, cwd=None, login=False, vmm_pid=pid, vmm_start_time=stat[1]
    )


Serve = Callable[..., FakeDaemon]


@pytest.fixture
def serve(cli: CommandLine) -> Iterator[Serve]:
    """Start a daemon where the command line looks for it."""
    with contextlib.ExitStack() as stack:
        yield lambda **answers: stack.enter_context(
            running_daemon(
                cli.paths.daemon_socket,
                {name.replace("__", "."): answer for name, answer in answers.items()},
                state=cli.paths.state,
            )
        )


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dry_run", "in_use", "line"),
    [
        (True, 0, "would free 1536M in 12 blobs of /c/oci (limit 10G)\n"),
        (False, 2, "freed 1536M in 12 blobs of /c/oci (limit 10G; 2 more, 4M, are in use)\n"),
    ],
)
def test_prune_says_what_goes_what_stays_and_the_limit(
    cli: CommandLine, serve: Serve, dry_run: bool, in_use: int, line: str
) -> None:
    answer = r.PrunedCache(
        blobs=12,
        bytes=3 << 29,
        in_use_blobs=in_use,
        in_use_bytes=4 << 20,
        limit_bytes=10 << 30,
        directory="/c/oci",
        dry_run=dry_run,
    )
    daemon = serve(image__cache__prune=lambda _: answer)
    words = ["image", "cache", "prune", *(["--dry-run"] if dry_run else [])]
    assert cli(*words).out == line
    assert daemon.asked[0][1].dry_run == dry_run
    assert json.loads(cli(*words, "--json").out)["limit_bytes"] == 10 << 30


def test_export_where_no_file_can_be_made_is_told_in_words(cli: CommandLine, serve: Serve) -> None:
    serve(image__export=missing)
    done = cli("image", "export", "web", "--output", "/dev/null")
    assert (done.status, done.err) == (1, "banger: writing to /dev/null: Not a directory\n")


def test_verify_goes_on_behind_a_damaged_image_and_fails(cli: CommandLine, serve: Serve) -> None:
    def verify(params: p.NameRef) -> ImageRecord:
        if params.name == "bad":
            raise BangerError(
                "operation_failed",
                "image bad is not what was stored: rootfs.sqfs: sha256",
                hint="banger image delete bad",
                reason="files_changed",
            )
        return IMAGE

    serve(image__verify=verify)
    done = cli("image", "verify", "bad", "good")
    assert (done.status, done.out) == (1, "good ok\n")
    assert "image bad is not what was stored: rootfs.sqfs: sha256" in done.err
    assert "hint: banger image delete bad" in done.err


# --- looking --------------------------------------------------------------------------------------


def test_list_is_a_table_with_the_facts_of_each_vm(cli: CommandLine, serve: Serve) -> None:
    serve(vm__list=lambda _: [VM, named("db", state="stopped", address="")])
    done = cli("vm", "list")
    head, web, db = done.out.splitlines()
    assert head.split()[:3] == ["NAME", "STATE", "IMAGE"]
    assert web.split() == [
        "web", "running", "debian", "172.16.0.2", "2", "512M", "8G", "-", "2026-01-02", "03:04:05",
    ]  # fmt: skip
    assert db.split()[:4] == ["db", "stopped", "debian", "-"]
    assert done.err == ""


def test_list_says_why_a_vm_stands_still_and_what_the_disk_lacks(
    cli: CommandLine, serve: Serve
) -> None:
    full = "/state has 1.2G free, less than the 2G that are kept in reserve (disk_reserve)"
    vms = [named("db", warning=full), named("web", paused="/state has 100M free", warning=full)]
    serve(vm__list=lambda _: vms)
    done = cli("vm", "list")
    assert [line.split()[1:3] for line in done.out.splitlines()[1:]] == [
        ["running", "debian"], ["running", "(paused)"],
    ]  # fmt: skip
    assert done.err == (
        "banger: warning: VM web is paused: /state has 100M free\n"
        f"banger: warning: {full}\nhint: banger vm prune\n"
    )


def test_ps_is_list(cli: CommandLine, serve: Serve) -> None:
    serve(vm__list=lambda _: [VM])
    assert cli("ps").out == cli("vm", "list").out


def test_list_for_scripts_is_names_or_json(cli: CommandLine, serve: Serve) -> None:
    serve(vm__list=lambda _: [VM, named("db")])
    assert cli("vm", "list", "--names").out == "web\ndb\n"
    assert [vm["name"] for vm in json.loads(cli("vm", "list", "--json").out)] == ["web", "db"]


def test_ports_say_what_only_the_guest_reaches(cli: CommandLine, serve: Serve) -> None:
    row = r.PortRow(
        vm="web", port=80, proto="tcp", process="app", address="0.0.0.0",
        endpoint="web.vm:80", reachable=True, scheme="http", link="http://web.vm/",
    )  # fmt: skip
    inside = msgspec.structs.replace(
        row, port=5432, process="", address="127.0.0.1", endpoint="127.0.0.1:5432",
        reachable=False, fix="listen on 0.0.0.0", scheme=None, link=None,
    )  # fmt: skip
    serve(vm__ports=lambda _: [row, inside])
    lines = cli("vm", "ports", "web").out.splitlines()
    assert [line.split() for line in lines] == [
        ["PORT", "PROTO", "PROCESS", "ENDPOINT", "LINK"],
        ["80", "tcp", "app", "web.vm:80", "http://web.vm/"],
        ["5432", "tcp", "-", "only", "in", "web:", "127.0.0.1:5432", "listen", "on", "0.0.0.0"],
    ]


def test_ports_of_several_vms_are_one_table_in_the_order_given(
    cli: CommandLine, serve: Serve
) -> None:
    def answer(params: p.VmRef) -> list[r.PortRow]:
        if params.vm == "gone":
            raise BangerError("not_running", "VM gone is stopped")
        return [
            r.PortRow(
                vm=params.vm, port=22, proto="tcp", process="sshd", address="::",
                endpoint=f"{params.vm}.vm:22", reachable=True,
            )
        ]  # fmt: skip

    serve(vm__ports=answer)
    done = cli("vm", "ports", "web", "gone", "db", "web")
    assert [line.split()[3] for line in done.out.splitlines()[1:]] == ["web.vm:22", "db.vm:22"]
    assert (done.status, "VM gone is stopped" in done.err) == (1, True)
    assert [x["vm"] for x in json.loads(cli("vm", "ports", "--json", "web", "db").out)] == [
        "web", "db",
    ]  # fmt: skip


def test_logs_are_bytes_as_they_come(serve: Serve) -> None:
    async def logs(call: Call, _: p.VmLogs) -> None:
        await call.data(b"one\n")
        await call.data(b"\xff two\n")

    serve(vm__logs=logs)
    # The whole program, because it writes past Python's text layer.
    done = subprocess.run(
        [sys.executable, "-m", "banger.cli.entry", "vm", "logs", "web"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"one\n\xff two\n", b"")


# --- errors ---------------------------------------------------------------------------------------


def missing(_: Any) -> None:
    raise BangerError("not_found", "there is no VM 'wbe'", hint="banger vm list", reason="gone")


def test_error_of_the_daemon_is_shown_with_its_operation_and_hint(
    cli: CommandLine, serve: Serve
) -> None:
    serve(vm__show=missing)
    done = cli("vm", "show", "wbe")
    assert (done.status, done.out) == (1, "")
    first, hint = done.err.splitlines()
    assert first.startswith("banger: not found: there is no VM 'wbe' (op-")
    assert hint == "hint: banger vm list"


def test_next_command_has_the_name_of_the_vm(cli: CommandLine, serve: Serve) -> None:
    def fail(_: Any) -> None:
        raise BangerError("operation_failed", "no agent", hint="banger vm logs VM; then VMs")

    serve(vm__health=fail, image__show=fail)
    assert cli("vm", "health", "web").err.endswith("\nhint: banger vm logs web; then VMs\n")
    assert cli("image", "show", "web").err.endswith("\nhint: banger vm logs VM; then VMs\n")


def test_error_is_json_where_json_was_asked_for(cli: CommandLine, serve: Serve) -> None:
    serve(vm__health=missing)
    done = cli("vm", "health", "wbe", "--json")
    error = json.loads(done.out)["error"]
    assert (done.status, done.err) == (1, "")
    assert (error["code"], error["reason"], error["hint"]) == (
        "not_found",
        "gone",
        "banger vm list",
    )
    assert error["op_id"].startswith("op-")


def test_json_of_the_guest_command_is_not_ours(cli: CommandLine, serve: Serve) -> None:
    serve(vm__connect=missing)
    done = cli("vm", "exec", "wbe", "--", "tool", "--json")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("banger: not found")


def test_daemon_that_dies_while_it_answers_is_told_from_a_failure(
    cli: CommandLine, serve: Serve
) -> None:
    def die(call: Call, _: Any) -> Any:
        call.channel.close()
        raise BangerError("operation_failed", "nobody hears this")

    serve(vm__stop=die)
    done = cli("vm", "stop", "web")
    assert done.status == 1
    assert "may or may not have been stopped" in done.err


# --- several at once ------------------------------------------------------------------------------


def test_stop_of_several_goes_on_after_a_failure_in_the_order_given(
    cli: CommandLine, serve: Serve
) -> None:
    def stop(params: p.StopVm) -> r.Outcome:
        if params.vm == "wbe":
            missing(params)
        return r.Outcome(vm=named(params.vm, state="stopped"))

    daemon = serve(vm__stop=stop)
    done = cli("vm", "stop", "--timeout", "5s", "b", "wbe", "a", "b")
    assert (done.status, done.out) == (1, "b stopped\na stopped\n")
    assert done.err.count("there is no VM") == 1
    assert sorted(params.vm for _, params in daemon.asked) == ["a", "b", "wbe"]
    assert {params.timeout_s for _, params in daemon.asked} == {5.0}


@pytest.mark.parametrize(
    ("command", "method"),
    [
        (("vm", "start"), "vm.start"), (("vm", "stop"), "vm.stop"),
        (("vm", "restart"), "vm.restart"), (("vm", "kill"), "vm.kill"),
        (("vm", "delete"), "vm.delete"), (("vm", "set", "--nat"), "vm.set"),
        (("image", "verify"), "image.verify"), (("image", "delete"), "image.delete"),
        (("kernel", "rm"), "kernel.delete"),
    ],
)  # fmt: skip
def test_results_of_several_are_one_list_for_programs(
    cli: CommandLine, serve: Serve, command: tuple[str, ...], method: str
) -> None:
    def answer(params: Any) -> Any:
        if "wbe" in msgspec.structs.astuple(params):
            missing(params)
        return results[method]

    results: dict[str, Any] = {
        "vm.set": r.SetResult(vm=VM),
        "image.verify": IMAGE,
        **dict.fromkeys(("vm.delete", "image.delete", "kernel.delete"), r.Deleted(name="web")),
        **dict.fromkeys(("vm.start", "vm.stop", "vm.restart", "vm.kill"), r.Outcome(vm=VM)),
    }
    serve(**{method.replace(".", "__"): answer})
    done = cli(*command, "wbe", "web", "--json")
    failed, fine = json.loads(done.out)
    assert (done.status, failed["error"]["code"]) == (1, "not_found")
    assert fine == json.loads(msgspec.json.encode(results[method]))
    assert "there is no VM" not in done.err


@pytest.mark.parametrize("command", [("vm", "show"), ("image", "show"), ("kernel", "show")])
def test_json_may_be_asked_for_where_there_is_nothing_else(
    cli: CommandLine, serve: Serve, command: tuple[str, str]
) -> None:
    serve(**{"__".join(command): missing})
    assert json.loads(cli(*command, "wbe", "--json").out)["error"]["code"] == "not_found"


def interrupted(*words: str, begun: threading.Barrier, told: str = "") -> str:
    """What a command says on Ctrl-C, which it gets when all its calls have begun and it has `told`
    a line: then it has heard of its call's beginning, too."""
    with subprocess.Popen(
        [sys.executable, "-m", "banger.cli.entry", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        begun.wait(15)
        if told:
            assert process.stderr is not None and process.stderr.readline() == told
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=15)[1]
    assert process.returncode == 130
    return err.lstrip()


@pytest.mark.parametrize("names", [("web",), ("web", "db")])
def test_interrupt_of_a_start_does_not_wait_for_its_end(
    serve: Serve, names: tuple[str, ...]
) -> None:
    begun, given_back = threading.Barrier(len(names) + 1), threading.Semaphore(0)

    async def start(call: Call, params: p.StartVm) -> None:
        try:
            await asyncio.to_thread(begun.wait, 15)
            await asyncio.Event().wait()
        finally:
            given_back.release()

    serve(vm__start=start)
    err = interrupted("vm", "start", *names, begun=begun)
    assert err.splitlines()[0] == "banger: interrupted"
    assert all(given_back.acquire(timeout=15) for _ in names)


def test_interrupt_says_what_was_not_given_back(serve: Serve) -> None:
    begun = threading.Barrier(2)

    async def restart(call: Call, params: p.StartVm) -> None:
        try:
            call.stage("restart", "restarting")
            await asyncio.to_thread(begun.wait, 15)
            await asyncio.Event().wait()
        except asyncio.CancelledError as e:
            raise BangerError(
                "operation_failed", "VM web was \x1b[1mstopped", hint="banger vm start web",
                outcome="unknown",
            ) from e  # fmt: skip

    serve(vm__restart=restart)
    told = "restart: restarting\n"
    assert interrupted("vm", "restart", "web", begun=begun, told=told).splitlines() == [
        "banger: interrupted",
        "VM web was ?[1mstopped",
        "hint: banger vm start web",
    ]


def test_note_of_a_stop_goes_to_stderr(cli: CommandLine, serve: Serve) -> None:
    serve(vm__stop=lambda _: r.Outcome(vm=VM, note="VM web was not running"))
    done = cli("vm", "stop", "web")
    assert (done.status, done.out) == (0, "web stopped\n")
    assert done.err == "banger: VM web was not running\n"


def test_start_shows_stages_for_one_vm(cli: CommandLine, serve: Serve) -> None:
    async def start(call: Call, params: p.StartVm) -> r.Outcome:
        call.stage("plan", "planning")
        call.stage("ready", "waiting for the guest")
        return r.Outcome(vm=VM)

    serve(vm__start=start)
    done = cli("vm", "start", "web")
    assert done.err == "plan: planning\nready: waiting for the guest\n"
    assert cli("vm", "start", "-q", "web").err == ""


def test_prune_asks_before_it_deletes(
    cli: CommandLine, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    idle = named("old", state="stopped")
    daemon = serve(vm__list=lambda _: [VM, idle], vm__delete=lambda _: r.Deleted(name="old"))
    done = cli("vm", "prune")
    assert done.status == 130  # nobody answered the question
    assert [name for name, _ in daemon.asked] == ["vm.list"]
    done = cli("vm", "prune", "-f")
    assert (done.status, done.out) == (0, "old deleted\n")
    assert daemon.asked[-1][1].vm == idle.id


# --- creating -------------------------------------------------------------------------------------


def test_create_prints_the_name_alone_and_asks_for_what_its_line_says(
    cli: CommandLine, serve: Serve
) -> None:
    daemon = serve(vm__create=lambda params: named(params.name))
    done = cli("vm", "create", "--name", "db", "--vcpu", "3", "--memory", "1G", "--no-start",
               "--image", "debian", "--disk-size", "4G", "--system-overlay-size", "2G")  # fmt: skip
    assert (done.status, done.out) == (0, "db\n")
    assert done.err == "spec: 3 vCPU | 1024 MiB | disk 4G | image debian | nat off\n"
    assert daemon.asked == [
        ("vm.create", p.CreateVm(
            image="debian", vcpu=3, memory_mib=1024, disk_bytes=4 << 30, overlay_bytes=2 << 30,
            name="db", start=False,
        )),
    ]  # fmt: skip


def test_create_for_scripts_is_quiet_or_json(cli: CommandLine, serve: Serve) -> None:
    serve(vm__create=lambda params: VM)
    assert cli("vm", "create", "-q").err == ""
    assert json.loads(cli("vm", "create", "-q", "--json").out)["name"] == "web"


def test_dry_run_prints_the_files_and_makes_nothing(
    cli: CommandLine, serve: Serve, tmp_path: Path
) -> None:
    async def files(call: Call, _: p.ShipWorkspace) -> r.FileList:
        await call.data(b"Makefile\nsrc/a.c\n")
        return r.FileList(names=())

    daemon = serve(vm__workspace__files=files)
    done = cli("vm", "run", str(tmp_path), "--dry-run", "--include-untracked")
    assert (done.status, done.out, done.err) == (0, "Makefile\nsrc/a.c\n", "")
    ((_, params),) = daemon.asked
    assert params == p.ShipWorkspace(path=str(tmp_path), include_untracked=True)


def test_detached_run_says_what_to_type_next(cli: CommandLine, serve: Serve) -> None:
    async def run(call: Call, _: p.RunVm) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await call.finish(r.RunResult(vm=VM, access=access()), fds=(theirs.fileno(),))

    serve(vm__run=run)
    done = cli("vm", "run", "-d", "-q")
    assert done.status == 0
    assert done.out.splitlines()[0] == "web"
    assert "  banger vm ssh web" in done.out.splitlines()


# --- running a command in a guest -----------------------------------------------------------------


@pytest.fixture
def agent() -> Iterator[Agent]:
    with running_agent() as agent:
        yield agent


class Banger:
    """The program itself, beside a daemon that leads to a real agent."""

    def __init__(self, daemon: FakeDaemon, machine: subprocess.Popen[bytes]) -> None:
        self.daemon = daemon
        self.machine = machine

    def popen(self, *words: str, shell: str = "", **options: Any) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "banger.cli.entry", *words]
        if shell:
            argv = ["sh", "-c", f'exec "$@" {shell}', "sh", *argv]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": -1, "stderr": -1, **options}
        # As users have it: an unbuffered stdout fails elsewhere, and keeps nothing for the exit.
        env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
        return subprocess.Popen(argv, env={**env, "PYTHONPATH": str(ROOT / "src")}, **pipes)

    def run(self, *words: str, stdin: bytes | None = None, **options: Any) -> tuple[int, str, str]:
        if stdin is not None:
            options["stdin"] = -1
        process = self.popen(*words, **options)
        out, err = process.communicate(stdin, timeout=PATIENCE_S)
        return process.returncode, out.decode(), err.decode()

    def asked(self) -> list[str]:
        return [name for name, _ in self.daemon.asked]


@pytest.fixture
def banger(serve: Serve, agent: Agent) -> Iterator[Banger]:
    machine = subprocess.Popen(["sleep", "600"])

    async def give(call: Call, answer: Any) -> None:
        with agent.connect() as sock:
            await call.finish(answer, fds=(sock.fileno(),))

    async def connect(call: Call, params: p.VmRef) -> None:
        await give(call, access(pid=machine.pid))

    async def run(call: Call, params: p.RunVm) -> None:
        call.stage("plan", "planning")
        await give(call, r.RunResult(vm=VM, access=access(pid=machine.pid)))

    daemon = serve(
        vm__connect=connect,
        vm__run=run,
        vm__delete=lambda _: r.Deleted(name="web"),
        vm__list=lambda _: [VM],
        vm__show=missing,
        vm__health=missing,
    )
    yield Banger(daemon, machine)
    machine.kill()
    machine.wait()


def test_exec_passes_status_streams_and_words_through(banger: Banger) -> None:
    script = 'cat; echo "$1" >&2; exit 7'
    status, out, err = banger.run("vm", "exec", "web", "--", "sh", "-c", script, "sh", "a b",
                                  stdin=b"input")  # fmt: skip
    assert (status, out, err) == (7, "input", "a b\n")


def test_exec_names_the_vm_in_the_environment(banger: Banger) -> None:
    out = banger.run("vm", "exec", "web", "--env", "A=1 2", "--", "sh", "-c", "echo $BANGER_VM $A")[
        1
    ]
    assert out == "web 1 2\n"


def test_exec_with_a_closed_stdin_gives_the_command_an_empty_one(banger: Banger) -> None:
    assert banger.run("vm", "exec", "web", "--", "cat", shell="<&-") == (0, "", "")


def test_exec_with_a_closed_stdout_does_not_write_into_a_connection(banger: Banger) -> None:
    status, out, _ = banger.run("vm", "exec", "web", "--", "sh", "-c", "echo lost", shell=">&-")
    assert (status, out) == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        ("vm", "list"),
        ("vm", "list", "--json"),
        ("vm", "health", "wbe", "--json"),
        ("vm", "--help"),
        ("--version",),
        ("vm", "exec", "web", "--", "echo", "lost"),
    ],
    ids=" ".join,
)
def test_output_that_cannot_be_written_is_told_in_one_line(
    banger: Banger, words: tuple[str, ...]
) -> None:
    """The disk of the host is not full because our stdout is, and Python has nothing to add."""
    status, _, err = banger.run(*words, shell=">/dev/full")
    assert status == 1
    assert err.startswith("banger: writing the output")
    assert err.endswith(": No space left on device\n")
    assert len(err.splitlines()) == 1


def test_errors_that_cannot_be_written_leave_the_status(banger: Banger) -> None:
    assert banger.run("vm", "nope", shell="2>/dev/full")[0] in (1, 2)
    assert banger.run("vm", "show", "wbe", shell="2>/dev/full")[0] == 1


def test_help_is_there_also_when_the_configuration_cannot_be_read(cli: CommandLine) -> None:
    config = cli.paths.config_files[-1]
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("memory = [")
    done = cli("vm", "run", "--help")
    assert (done.status, done.err) == (0, "")
    assert "--memory" in done.out
    done = cli("vm", "run", "--", "true")
    assert done.status == 1 and str(config) in done.err


@pytest.mark.parametrize(
    "words",
    [
        ("vm", "show", b"h\xff"),
        ("vm", "exec", "web", "--", "echo", b"h\xff"),
        ("vm", "run", "--", "echo", b"h\xff"),
    ],
)
def test_words_that_are_no_text_are_refused_in_words(
    banger: Banger, words: tuple[str | bytes, ...]
) -> None:
    status, _, err = banger.run(*map(os.fsdecode, words))
    assert (status, err) == (2, "banger: bad request: b'h\\xff' is not UTF-8\n")
    assert "vm.run" not in banger.asked()


def test_run_runs_the_command_and_says_that_the_vm_still_runs(banger: Banger) -> None:
    status, out, err = banger.run("vm", "run", "--", "sh", "-c", "echo hello; exit 3")
    assert (status, out) == (3, "hello\n")
    assert err.splitlines()[1:] == [
        "plan: planning",
        "banger: VM web still runs; stop it with: banger vm stop web",
    ]
    assert banger.asked() == ["vm.run"]


def test_run_with_rm_deletes_the_vm_whatever_the_command_says(banger: Banger) -> None:
    status, _, err = banger.run("vm", "run", "-q", "--rm", "--", "false")
    assert (status, err) == (1, "")
    assert banger.asked() == ["vm.run", "vm.delete"]
    assert banger.daemon.asked[0][1].rm


def test_run_with_rm_deletes_the_vm_after_an_interrupt(banger: Banger) -> None:
    process = banger.popen("vm", "run", "-q", "--rm", "--", *WAITING)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert banger.asked() == ["vm.run", "vm.delete"]


def test_machine_that_ends_under_its_command_is_named(banger: Banger) -> None:
    process = banger.popen("vm", "exec", "web", "--", *WAITING)
    assert process.stdout is not None
    process.stdout.readline()
    banger.machine.kill()
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "the machine ended while the command ran" in err.decode()
    assert "hint: banger vm logs web" in err.decode()


def test_agent_that_ends_alone_leaves_the_command_unknown(banger: Banger, agent: Agent) -> None:
    process = banger.popen("vm", "exec", "web", "--", *WAITING)
    assert process.stdout is not None
    process.stdout.readline()
    agent.close()
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "what became of the command is unknown" in err.decode()


def test_ssh_without_an_sshd_goes_through_the_agent(serve: Serve, agent: Agent) -> None:
    async def connect(call: Call, _: p.VmRef) -> None:
        with agent.connect() as sock:
            await call.finish(access(), fds=(sock.fileno(),))

    serve(
        vm__connect=connect,
        vm__ssh=lambda _: r.SshAccess(
            vm=VM, sshd=False, address="", port=22, key="", known_hosts=""
        ),
    )
    done = subprocess.run(
        [sys.executable, "-m", "banger.cli.entry", "vm", "ssh", "web", "--", "echo a  b | tr a c"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, stdin=subprocess.DEVNULL,
        capture_output=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"c b\n")
