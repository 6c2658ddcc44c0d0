"""`banger vm cp` against the real agent on this host: where things go, what they are there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from banger.cli.server import Server
from banger.errors import BangerError
from banger.workspace.partial import Partial, part_name
from fakes.agent import Agent, running_agent
from fakes.command_line import CommandLine
from fakes.copies import Wire, describe


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
    wire = Wire(agent)
    (tmp_path / "cli").mkdir()
    line = CommandLine(tmp_path / "cli", monkeypatch, capsys)
    monkeypatch.setattr(Server, "call_with_fd", wire.call_with_fd)
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


def test_directory_goes_in_and_comes_out_the_same(
    banger: CommandLine, here: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    done = banger("vm", "cp", "-q", str(here), f"web:{there}")
    assert (done.status, done.out) == (0, ""), done.err
    assert "pipe" in done.err
    expected = describe(here)
    assert describe(there) == expected
    assert banger("vm", "cp", f"web:{there}", str(tmp_path / "back")).status == 0
    assert describe(tmp_path / "back") == expected
    assert there.stat().st_mode == here.stat().st_mode


def test_vm_that_is_not_there_is_named_and_not_its_file(
    banger: CommandLine, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BangerError("not_found", "there is no VM 'web'", hint="banger vm list")

    monkeypatch.setattr(Server, "call_with_fd", refuse)
    for words in (("web:/x", str(tmp_path)), ("web:/x", "-"), (str(here), "web:/x")):
        done = banger("vm", "cp", *words)
        assert done.status == 1
        assert "there is no VM 'web'\nhint: banger vm list" in done.err


def test_vm_that_goes_while_files_are_compared_ends_the_copy(
    banger: CommandLine, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest has the directory; before its files are compared the VM is deleted."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there/here").mkdir()
    connect, asked, refused = Server.call_with_fd, 0, 0

    def vanish(self: Server, method: str, params: Any, result: Any) -> Any:
        nonlocal asked, refused
        asked += 1
        if asked <= 2:  # the target, and what has its name inside
            return connect(method, params, result)
        refused += 1
        raise BangerError("not_found", "there is no VM 'web'", hint="banger vm list")

    monkeypatch.setattr(Server, "call_with_fd", vanish)
    done = banger("vm", "cp", str(here), f"web:{tmp_path}/there")
    assert done.status == 1
    assert "there is no VM 'web'\nhint: banger vm list" in done.err
    assert refused == 1


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


def test_what_is_no_file_gets_the_bytes_and_stays_what_it_is(
    banger: CommandLine, tmp_path: Path
) -> None:
    """`vm cp web:/x /dev/null` would else make a file of it, for root."""
    (tmp_path / "file").write_bytes(b"content")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with (tmp_path / "all").open("wb", buffering=0) as f:
        f.write(b"head ")
        for target in (f"{tmp_path}/pipe", f"/dev/fd/{f.fileno()}"):
            done = banger("vm", "cp", f"web:{tmp_path}/file", target)
            assert done.status == 0, done.err
            assert "1 file, 7B" in done.err
    assert banger("vm", "cp", f"web:{tmp_path}", f"{tmp_path}/pipe").status == 1
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "all").read_bytes() == b"head content"


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


def test_copy_that_is_repeated_sends_only_what_differs(
    banger: CommandLine, here: Path, tmp_path: Path
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    there.mkdir()
    for source, target in ((f"{here}/.", f"web:{there}"), (f"web:{there}/.", str(back))):
        assert banger("vm", "cp", source, target).status == 0
        again = banger("vm", "cp", source, target)
        assert again.status == 0
        assert "copied: 0 files, 0B" in again.err and "were there already" in again.err
    (here / "tool").write_text("#!/bin/sh\nexit\n")
    (here / "sub/secret").chmod(0o640)
    assert "copied: 2 files" in banger("vm", "cp", f"{here}/.", f"web:{there}").err
    assert "copied: 2 files" in banger("vm", "cp", f"web:{there}/.", str(back)).err
    assert describe(back) == describe(here)


def test_link_of_this_host_is_not_followed_to_look_what_is_there(
    banger: CommandLine, here: Path, tmp_path: Path
) -> None:
    back, elsewhere = tmp_path / "back", tmp_path / "elsewhere"
    back.mkdir()
    elsewhere.mkdir()
    (elsewhere / "secret").write_bytes((here / "sub/secret").read_bytes())
    (elsewhere / "secret").chmod(0o600)
    (back / "sub").symlink_to(elsewhere)
    done = banger("vm", "cp", f"web:{here}/.", str(back))
    assert done.status == 1 and "in the way" in done.err and "already" not in done.err


@pytest.mark.parametrize("kind", ["link", "name", "directory"])
def test_part_that_is_not_ours_is_never_written_to(
    banger: CommandLine, here: Path, tmp_path: Path, kind: str
) -> None:
    back, outside = tmp_path / "back", tmp_path / "outside"
    back.mkdir()
    outside.write_bytes((here / "sub/secret").read_bytes()[:1000])
    part = back / os.fsdecode(part_name(b"secret"))
    if kind == "link":
        part.symlink_to(outside)
    elif kind == "name":
        part.hardlink_to(outside)
    else:
        part.mkdir()
    done = banger("vm", "cp", f"web:{here}/sub/secret", str(back))
    assert len(outside.read_bytes()) == 1000
    if kind == "name":
        assert done.status == 0
        assert (back / "secret").read_bytes() == (here / "sub/secret").read_bytes()
    else:
        assert done.status == 1 and "writing" in done.err
        assert not (back / "secret").exists()


def test_parts_of_long_ago_are_cleaned_up(banger: CommandLine, here: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    back.mkdir()
    parts = [back / os.fsdecode(part_name(name)) for name in (b"one", b"two", b"three")]
    for part in parts:
        part.write_text("old")
    parts[2].unlink()
    parts[2].mkdir()
    (parts[2] / "in it").write_text("old")
    for part in parts[1:]:
        os.utime(part, (1, 1))
    (back / ".banger-of-mine").write_text("mine")
    os.utime(back / ".banger-of-mine", (1, 1))
    assert banger("vm", "cp", f"web:{here}/tool", str(back)).status == 0
    assert sorted(p.name for p in back.iterdir()) == sorted(
        ["tool", parts[0].name, ".banger-of-mine"]
    )


def test_two_copies_to_one_name_do_not_mix(banger: CommandLine, here: Path, tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    with Partial(directory, b"tool"):
        done = banger("vm", "cp", f"web:{here}/tool", str(tmp_path))
    os.close(directory)
    assert done.status == 1 and "under way" in done.err
    assert banger("vm", "cp", f"web:{here}/tool", str(tmp_path)).status == 0
