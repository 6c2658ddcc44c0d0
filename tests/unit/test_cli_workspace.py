"""`vm workspace` and `vm exec --auto-prepare` against a daemon that says what a test wants."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.api import results as r
from banger.api import workspaces as w
from banger.api.records import VmRecord, Workspace
from banger.cli.guest_run import through_mise
from banger.cli.vm_workspace import shown
from banger.errors import BangerError
from banger.rpc.server import Call
from fakes.command_line import CommandLine
from fakes.daemon import FakeDaemon, running_daemon

PLACE = Workspace(
    guest_path="/root/repo", source="/src", base_commit="a" * 40, branch="main",
    mode="shallow_overlay",
)  # fmt: skip
VM = VmRecord(
    id="0" * 32, name="web", state="running", image_id="1" * 32, image="debian", kernel="k", vcpu=2,
    memory_mib=512, overlay_bytes=1, work_disk_bytes=1, address="", mac="", network="bridge",
    workspace=PLACE,
)  # fmt: skip
PATCH = b"diff --git a/f b/f\n--- a/f\n+++ b/f\n@@ -1 +1 @@\n-old\n+\x1b]0;evil\x07new\n"


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.fixture
def serve(cli: CommandLine) -> Iterator[Callable[..., FakeDaemon]]:
    with ExitStack() as stack:

        def start(**answers: Any) -> FakeDaemon:
            table = {name.replace("__", "."): answer for name, answer in answers.items()}
            return stack.enter_context(
                running_daemon(cli.paths.daemon_socket, table, state=cli.paths.state)
            )

        yield start


def _exported(**changes: Any) -> w.ExportedWorkspace:
    result = w.ExportedWorkspace(
        vm="web", guest_path="/root/repo", base_commit="a" * 40, changed=1, names=("M f",), bytes=9
    )
    return msgspec.structs.replace(result, **changes)


async def _export(call: Call, params: w.ExportWorkspace) -> w.ExportedWorkspace:
    for at in range(0, len(PATCH), 10):
        await call.data(PATCH[at : at + 10])
    return _exported()


def test_prepare_asks_for_what_the_words_say(
    cli: CommandLine, serve: Callable[..., FakeDaemon], tmp_path: Path
) -> None:
    daemon = serve(
        vm__workspace__prepare=lambda _: w.PreparedWorkspace(
            vm=VM, workspace=PLACE, name="repo", files=12, bytes=3456, sent=2
        )
    )
    done = cli(
        "vm", "workspace", "prepare", "web", str(tmp_path), "--guest-path", "/root/x",
        "--readonly", "--force", "--branch", "b", "--from", "v1", "-q",
    )  # fmt: skip
    assert (done.status, done.out) == (
        0,
        f"/root/repo: 12 files, 3.4K, 2 sent, at {'a' * 12} (main)\n",
    )
    ((_, params),) = daemon.asked
    assert params == w.PrepareWorkspace(
        vm="web", path=str(tmp_path), guest_path="/root/x", readonly=True, force=True, branch="b",
        from_ref="v1",
    )  # fmt: skip


def test_export_writes_the_patch_and_nothing_else(
    cli: CommandLine, serve: Callable[..., FakeDaemon], tmp_path: Path
) -> None:
    serve(vm__workspace__export=_export)
    done = cli("vm", "workspace", "export", "web", "-q")
    assert (done.status, done.out.encode(), done.err) == (0, PATCH, "")
    target = tmp_path / "p.patch"
    done = cli("vm", "workspace", "export", "web", "-o", str(target))
    assert (done.status, done.out, target.read_bytes()) == (0, "", PATCH)
    assert f"git apply --binary {target}" in done.err


def test_export_goes_through_a_pipe_or_a_link_and_replaces_neither(
    cli: CommandLine, serve: Callable[..., FakeDaemon], tmp_path: Path
) -> None:
    """`-o /dev/null` would else make a file of it, for root."""
    serve(vm__workspace__export=_export)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        cli("vm", "workspace", "export", "web", "-o", str(pipe))
        assert os.read(reader, 1 << 16) == PATCH
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    link = tmp_path / "link"
    link.symlink_to("target")
    cli("vm", "workspace", "export", "web", "-o", str(link))
    assert link.is_symlink()
    assert (tmp_path / "target").read_bytes() == PATCH


def test_export_to_what_the_caller_has_opened_goes_behind_what_is_there(
    cli: CommandLine, serve: Callable[..., FakeDaemon], tmp_path: Path
) -> None:
    """`{ echo head; banger … -o /dev/stdout; } > file` would else lose its head, and what follows
    would go to a file without a name."""
    serve(vm__workspace__export=_export)
    with (tmp_path / "all").open("wb", buffering=0) as f:
        f.write(b"head\n")
        for name in (f"/dev/fd/{f.fileno()}", f"/proc/self/fd/{f.fileno()}"):
            assert cli("vm", "workspace", "export", "web", "-o", name).status == 0
        f.write(b"tail\n")
    assert (tmp_path / "all").read_bytes() == b"head\n" + PATCH + PATCH + b"tail\n"


def test_export_through_links_in_a_ring_is_refused_in_words(
    cli: CommandLine, serve: Callable[..., FakeDaemon], tmp_path: Path
) -> None:
    serve(vm__workspace__export=_export)
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    done = cli("vm", "workspace", "export", "web", "-o", str(tmp_path / "a"))
    assert done.status == 1
    assert done.err == f"banger: writing {tmp_path}/a: Too many levels of symbolic links\n"


def test_export_says_what_a_shell_takes(
    cli: CommandLine, serve: Callable[..., FakeDaemon], tmp_path: Path
) -> None:
    serve(vm__workspace__export=_export)
    done = cli("vm", "workspace", "export", "web", "-o", str(tmp_path / "my work"))
    assert f"git apply --binary '{tmp_path}/my work'\n" in done.err


def test_failed_export_leaves_the_old_file(
    cli: CommandLine, serve: Callable[..., FakeDaemon], tmp_path: Path
) -> None:
    async def export(call: Call, params: w.ExportWorkspace) -> None:
        await call.data(PATCH[:20])
        raise BangerError("operation_failed", "the guest has gone")

    serve(vm__workspace__export=export)
    target = tmp_path / "p.patch"
    target.write_text("old")
    done = cli("vm", "workspace", "export", "web", "-o", str(target))
    assert (done.status, target.read_text()) == (1, "old")
    assert [p.name for p in tmp_path.iterdir() if "p.patch" in p.name] == ["p.patch"]


def test_terminal_gets_colours_and_no_escapes_of_the_guest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with shown(colour=True) as write:
        for at in range(0, len(PATCH), 7):
            write(PATCH[at : at + 7])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "\x1b[1mdiff --git a/f b/f\x1b[m"
    assert lines[3] == "\x1b[36m@@ -1 +1 @@\x1b[m"
    assert lines[4:] == ["\x1b[31m-old\x1b[m", "\x1b[32m+�]0;evil�new\x1b[m"]


def test_auto_prepare_comes_before_the_command_and_says_nothing(
    cli: CommandLine, serve: Callable[..., FakeDaemon]
) -> None:
    daemon = serve(
        vm__workspace__prepare=lambda _: w.PreparedWorkspace(
            vm=VM, workspace=PLACE, name="repo", files=1, bytes=1, sent=1
        ),
        vm__connect=lambda _: r.Pong(version="", pid=1),
    )
    cli("vm", "exec", "--auto-prepare", "web", "--", "true")
    assert [method for method, _ in daemon.asked] == ["vm.workspace.prepare", "vm.connect"]
    assert daemon.asked[0][1] == w.PrepareWorkspace(vm="web")
    cli("vm", "exec", "web", "--", "true")
    assert daemon.asked[2][1].check_workspace


@pytest.mark.parametrize("has_mise", [True, False])
def test_command_goes_through_mise_where_both_sides_have_it(has_mise: bool, tmp_path: Path) -> None:
    import subprocess

    vm = msgspec.structs.replace(VM, workspace=msgspec.structs.replace(PLACE, mise=True))
    access = r.AgentAccess(
        vm=vm, token="", cwd=None, login=True, vmm_pid=1, vmm_start_time=1
    )  # fmt: skip
    words = ("printf", "<%s>", "a b", "", "$HOME", "--")
    argv = through_mise(access, words, None)
    if has_mise:
        mise = tmp_path / "mise"
        mise.write_text('#!/bin/sh\nprintf "mise %s %s:" "$1" "$2"\nshift 2\nexec "$@"\n')
        mise.chmod(0o755)
    done = subprocess.run(
        argv, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, check=True
    )
    prefix = b"mise exec --:" if has_mise else b""
    assert done.stdout == prefix + b"<a b><><$HOME><-->"
    assert through_mise(access, words, "/elsewhere") == words
    plain = msgspec.structs.replace(access, vm=VM)
    assert through_mise(plain, words, None) == words
    assert through_mise(access, (), None) == ()


@pytest.mark.parametrize("nat", [True, False])
def test_tool_that_cannot_be_fetched_is_no_reason_to_ask_for_it(nat: bool, tmp_path: Path) -> None:
    import subprocess

    place = msgspec.structs.replace(PLACE, mise=True)
    vm = msgspec.structs.replace(VM, workspace=place, nat=nat)
    access = r.AgentAccess(vm=vm, token="", cwd=None, login=True, vmm_pid=1, vmm_start_time=1)
    mise = tmp_path / "mise"
    mise.write_text("#!/bin/sh\necho $MISE_OFFLINE $MISE_EXEC_AUTO_INSTALL\n")
    mise.chmod(0o755)
    done = subprocess.run(
        through_mise(access, ("true",)), env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout == (b"\n" if nat else b"1 false\n")


def test_missing_command_keeps_its_status_behind_the_shell() -> None:
    import subprocess

    vm = msgspec.structs.replace(VM, workspace=msgspec.structs.replace(PLACE, mise=True))
    access = r.AgentAccess(vm=vm, token="", cwd=None, login=True, vmm_pid=1, vmm_start_time=1)
    for word, status in (("no-such-program", 127), ("/etc/passwd", 126)):
        done = subprocess.run(through_mise(access, (word,), None), capture_output=True, check=False)
        assert done.returncode == status, sys.platform
