"""`banger vm cp` against the real agent on this host: where things go, what they are there."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from banger.api import results as r
from banger.api.records import VmRecord
from banger.cli.server import Server
from banger.process import read_stat
from fakes.agent import TOKEN, Agent, running_agent
from fakes.command_line import CommandLine


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with running_agent() as agent:
        yield agent


@pytest.fixture
def banger(
    agent: Agent,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> CommandLine:
    """A command line whose VM `web` is this host."""
    stat = read_stat(agent.process.pid)
    assert stat is not None

    def connect(self: Server, method: str, params: Any, result: Any) -> tuple[Any, socket.socket]:
        assert (method, params.vm) == ("vm.connect", "web")
        vm = VmRecord(
            id="1" * 32, name="web", state="running", image_id="", image="", kernel="", vcpu=1,
            memory_mib=1, overlay_bytes=1, work_disk_bytes=1, address="", mac="", network="user",
        )  # fmt: skip
        access = r.AgentAccess(
            vm=vm, token=TOKEN, cwd=None, login=False, vmm_pid=agent.process.pid,
            vmm_start_time=stat[1],
        )  # fmt: skip
        return access, agent.connect()

    (tmp_path / "cli").mkdir()
    line = CommandLine(tmp_path / "cli", monkeypatch, capsys)
    monkeypatch.setattr(Server, "call_with_fd", connect)
    return line


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A tree with what trees have."""
    root = tmp_path / "here"
    (root / "sub/empty").mkdir(parents=True)
    (root / "tool").write_text("#!/bin/sh\n")
    (root / "tool").chmod(0o755)
    (root / "sub/secret").write_bytes(os.urandom(3_000_000))
    (root / "sub/secret").chmod(0o600)
    (root / "sub").chmod(0o750)
    (root / "link").symlink_to("/etc/passwd")
    os.link(root / "tool", root / "sub/same")
    os.mkfifo(root / "pipe")
    with open(os.fsencode(root) + b"/odd \n\xff", "wb") as f:
        f.write(b"odd")
    return root


def _describe(root: Path) -> dict[bytes, object]:
    found: dict[bytes, object] = {}
    top = os.fsencode(root)
    for directory, names, files in os.walk(top):
        for base in (*names, *files):
            path = os.path.join(directory, base)
            st = os.lstat(path)
            name = os.path.relpath(path, top)
            if os.path.islink(path):
                found[name] = os.readlink(path)
            elif os.path.isdir(path):
                found[name] = st.st_mode
            elif os.path.isfile(path):
                with open(path, "rb") as f:
                    found[name] = (st.st_mode, st.st_nlink, f.read())
    return found


def test_directory_goes_in_and_comes_out_the_same(
    banger: CommandLine, here: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    done = banger("vm", "cp", "-q", str(here), f"web:{there}")
    assert (done.status, done.out) == (0, ""), done.err
    assert "pipe" in done.err
    expected = _describe(here)
    assert _describe(there) == expected
    assert banger("vm", "cp", f"web:{there}", str(tmp_path / "back")).status == 0
    assert _describe(tmp_path / "back") == expected
    assert there.stat().st_mode == here.stat().st_mode


def test_existing_directory_takes_the_thing_itself(
    banger: CommandLine, here: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    assert banger("vm", "cp", str(here), f"web:{there}").status == 0
    assert banger("vm", "cp", str(here / "tool"), f"web:{there}").status == 0
    assert banger("vm", "cp", f"{here}/sub/.", f"web:{there}").status == 0
    assert sorted(p.name for p in there.iterdir()) == ["empty", "here", "same", "secret", "tool"]
    back = tmp_path / "back"
    back.mkdir()
    for path in (there / "here", there / "tool", f"{there}/here/sub/."):
        assert banger("vm", "cp", f"web:{path}", str(back)).status == 0
    assert sorted(p.name for p in back.iterdir()) == ["empty", "here", "same", "secret", "tool"]


def test_file_gets_the_name_that_was_given_also_through_links_of_the_guest(
    banger: CommandLine, here: Path, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to("real")
    assert banger("vm", "cp", str(here / "tool"), f"web:{tmp_path}/alias/new/name").status == 0
    copy = tmp_path / "real/new/name"
    assert (copy.read_text(), copy.stat().st_mode & 0o777) == ("#!/bin/sh\n", 0o755)
    assert banger("vm", "cp", f"web:{copy}", str(tmp_path / "local")).status == 0
    assert (tmp_path / "local").stat().st_mode & 0o777 == 0o755


def test_standard_streams_are_files_too(
    banger: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"from a pipe\n")))
    assert banger("vm", "cp", "-", f"web:{tmp_path}/file").status == 0
    done = banger("vm", "cp", "-q", f"web:{tmp_path}/file", "-")
    assert (done.status, done.out) == (0, "from a pipe\n")
    assert banger("vm", "cp", f"web:{tmp_path}", "-").status == 1


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (("a", "b"), 2, "one of SRC and DST"),
        (("web:a", "web:b"), 2, "one of SRC and DST"),
        (("./a:b", "c"), 2, "one of SRC and DST"),
        (("/no/such/file", "web:/tmp/x"), 1, "/no/such/file"),
        (("web:/no/such/file", "."), 1, "no /no/such/file"),
        (("web:/dev/null", "."), 1, "no file or directory"),
        (("/etc/passwd", "web:/no/such/directory/"), 1, "no directory"),
    ],
)
def test_what_cannot_be_copied_is_said(
    banger: CommandLine, words: tuple[str, str], status: int, text: str
) -> None:
    done = banger("vm", "cp", *words)
    assert done.status == status and text in done.err, done.err


def test_failed_download_leaves_no_part_of_a_file(
    banger: CommandLine, tmp_path: Path, here: Path
) -> None:
    target = tmp_path / "back"
    target.mkdir()
    (target / "sub").symlink_to(tmp_path)
    done = banger("vm", "cp", f"web:{here}/.", str(target))
    assert done.status == 1 and "in the way" in done.err
    assert not (tmp_path / "secret").exists()
    assert not [p for p in target.iterdir() if p.name.startswith(".banger")]
