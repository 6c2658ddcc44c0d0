"""What root opens and runs for somebody else: files only as the owner, programs only if trusted."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools import setup

from banger_root import paths, trust
from banger_root.errors import HelperError
from host.served import OWNER

pytestmark = pytest.mark.host


@pytest.fixture
def top(obstacle: str | None) -> Iterator[Path]:
    """A directory of root's with one of the owner's in it, both without a link on the way."""
    if obstacle:
        pytest.skip(obstacle)
    top = Path("/var/lib") / f"banger-test-{secrets.token_hex(4)}"
    (top / "own/vm").mkdir(parents=True)
    top.chmod(0o755)
    for directory in ("own", "own/vm"):
        os.chown(top / directory, OWNER, OWNER)
    yield top
    shutil.rmtree(top)


def own(path: Path, content: bytes = b"content") -> Path:
    path.write_bytes(content)
    os.chown(path, OWNER, OWNER)
    return path


def open_writable(top: Path, path: Path) -> int:
    return paths.open_writable(str(path), roots=(str(top / "own"),), owner_uid=OWNER)


def open_log(top: Path, path: Path) -> int:
    return paths.open_log(str(path), roots=(str(top / "own"),), owner_uid=OWNER)


def test_pins_are_those_that_are_fetched() -> None:
    assert trust.PINS == setup.FIRECRACKER_SHA256


def test_owners_rights_are_taken_and_given_back(top: Path) -> None:
    before = (os.getresuid(), os.getresgid(), os.getgroups())
    with paths.as_owner(OWNER):
        assert (os.geteuid(), os.getegid(), os.getgroups()) == (OWNER, OWNER, [OWNER])
    assert (os.getresuid(), os.getresgid(), os.getgroups()) == before


def test_file_of_the_owner_is_opened_for_both_ways(top: Path) -> None:
    fd = open_writable(top, own(top / "own/vm/disk"))
    assert os.pread(fd, 100, 0) == b"content"
    os.close(fd)


@pytest.mark.parametrize("component", ["own", "own/vm", "own/vm/disk"])
@pytest.mark.parametrize("opened", ["writable", "readable", "log"])
def test_link_at_any_place_of_a_path_is_refused(top: Path, component: str, opened: str) -> None:
    own(top / "own/vm/disk")
    real = top / "real"
    (top / component).rename(real)
    (top / component).symlink_to(real)
    path = top / "own/vm/disk"
    with pytest.raises(HelperError, match="symbolic link"):
        if opened == "readable":
            paths.open_readable(str(path), owner_uid=OWNER)
        elif opened == "writable":
            open_writable(top, path)
        else:
            open_log(top, path)


@pytest.mark.parametrize("opened", [open_writable, open_log])
def test_path_that_only_looks_as_if_it_lay_beneath_a_root_is_refused(
    top: Path, opened: object
) -> None:
    (top / "own-not").mkdir()
    os.chown(top / "own-not", OWNER, OWNER)
    assert callable(opened)
    for path in (own(top / "own-not/disk"), top / "own", Path("/etc/passwd")):
        with pytest.raises(HelperError, match="does not lie beneath"):
            opened(top, path)


@pytest.mark.parametrize("opened", [open_writable, open_log])
def test_file_of_somebody_else_or_with_a_second_name_is_refused(top: Path, opened: object) -> None:
    assert callable(opened)
    secret = top / "secret"
    secret.write_text("root's")
    os.link(secret, top / "own/vm/linked")
    with pytest.raises(HelperError, match="belongs to uid 0"):
        opened(top, top / "own/vm/linked")
    own(top / "own/vm/disk")
    os.link(top / "own/vm/disk", top / "own/vm/again")
    with pytest.raises(HelperError, match=r"2 names \(hard links\)"):
        opened(top, top / "own/vm/disk")


@pytest.mark.parametrize("kind", ["FIFO", "socket", "directory", "character device"])
@pytest.mark.parametrize("opened", ["writable", "readable", "log"])
def test_what_is_no_file_is_refused_without_being_opened(top: Path, kind: str, opened: str) -> None:
    path = top / "own/vm/thing"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(path))
    elif kind == "directory":
        path.mkdir()
    else:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    os.chown(path, OWNER, OWNER)
    with pytest.raises(HelperError, match=f"is a {kind}, no file"):
        if opened == "readable":
            paths.open_readable(str(path), owner_uid=OWNER)
        elif opened == "writable":
            open_writable(top, path)
        else:
            open_log(top, path)


def test_file_that_the_owner_cannot_read_is_not_read_for_it(top: Path) -> None:
    secret = top / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)
    with pytest.raises(HelperError, match=f"uid {OWNER} may not read"):
        paths.open_readable(str(secret), owner_uid=OWNER)
    secret.chmod(0o644)
    os.close(paths.open_readable(str(secret), owner_uid=OWNER))


def test_file_behind_a_directory_that_the_owner_cannot_pass_is_not_found_for_it(top: Path) -> None:
    closed = top / "closed"
    closed.mkdir(mode=0o700)
    (closed / "file").write_text("open to all")
    with pytest.raises(HelperError, match="Permission denied"):
        paths.open_readable(str(closed / "file"), owner_uid=OWNER)


def test_hard_linked_file_may_be_read(top: Path) -> None:
    os.link(own(top / "own/image"), top / "own/again")
    os.close(paths.open_readable(str(top / "own/image"), owner_uid=OWNER))


def test_missing_log_is_made_as_the_owners_alone(top: Path) -> None:
    fd = open_log(top, top / "own/vm/console.log")
    os.write(fd, b"line\n")
    os.close(fd)
    found = (top / "own/vm/console.log").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (OWNER, OWNER, 0o600)


def test_log_is_not_made_where_the_owner_may_not_make_it(top: Path) -> None:
    os.chown(top / "own/vm", 0, 0)
    with pytest.raises(HelperError, match="Permission denied"):
        open_log(top, top / "own/vm/console.log")
    assert os.listdir(top / "own/vm") == []


def program(path: Path, content: bytes = b"\x7fELF a jailer") -> Path:
    path.write_bytes(content)
    path.chmod(0o755)
    return path


def trusted(top: Path, path: Path) -> str:
    return trust.trust_program("jailer", str(path), bin_dir=str(top / "bin"), owner_uid=OWNER)


def test_program_in_a_place_of_roots_runs_from_there(top: Path) -> None:
    path = program(top / "jailer")
    assert trusted(top, path) == str(path)


def test_program_of_a_release_runs_as_a_copy_with_the_plain_name(top: Path) -> None:
    copy = Path(trusted(top, program(top / "jailer-v1.12.1-x86_64")))
    assert copy.name == "jailer"
    assert copy.is_relative_to(top / "bin")
    assert copy.read_bytes() == b"\x7fELF a jailer"


def test_link_in_a_place_of_roots_is_followed_to_another_such_place(top: Path) -> None:
    program(top / "jailer")
    (top / "current").symlink_to(top)
    assert trusted(top, top / "current/jailer") == str(top / "jailer")


@pytest.mark.parametrize("kind", ["file", "directory", "link to own", "group"])
def test_program_that_somebody_else_could_replace_is_refused(top: Path, kind: str) -> None:
    path = top / "jailer"
    if kind == "link to own":
        own(top / "own/jailer").chmod(0o755)
        path.symlink_to(top / "own/jailer")
    elif kind == "directory":
        path = own(top / "own/jailer")
    else:
        program(path)
        if kind == "file":
            os.chown(path, OWNER, 0)
        else:
            path.chmod(0o775)
    with pytest.raises(HelperError) as caught:
        trusted(top, path)
    assert caught.value.code in ("unauthorized", "bad_request")
    assert not (top / "bin").exists()


def test_program_of_roots_by_another_name_is_refused(top: Path) -> None:
    for path in (Path("/bin/sh"), program(top / "jailer.sh"), program(top / "myjailer")):
        with pytest.raises(HelperError, match="its file is called"):
            trusted(top, path)


def test_pinned_content_of_the_owners_runs_as_a_copy(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own(top / "own/jailer", b"the pinned one")
    monkeypatch.setitem(trust.PINS, "jailer", hashlib.sha256(b"the pinned one").hexdigest())
    copy = Path(trusted(top, path))
    path.write_bytes(b"another one")
    assert copy.read_bytes() == b"the pinned one"
    assert (copy.stat().st_uid, copy.stat().st_mode & 0o7777) == (0, 0o755)
    with pytest.raises(HelperError, match="is not the pinned one"):
        trusted(top, path)


def test_helper_in_a_place_that_others_could_change_does_not_serve(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = top / "banger_root"
    package.mkdir()
    for name in ("trust.py", "server.py"):
        program(package / name)
    monkeypatch.setattr(trust, "__file__", str(package / "trust.py"))
    trust.check_helper()
    (package / "server.py").chmod(0o666)
    with pytest.raises(HelperError, match=r"server\.py"):
        trust.check_helper()
    (package / "server.py").chmod(0o644)
    package.chmod(0o777)
    with pytest.raises(HelperError, match="is not root's alone"):
        trust.check_helper()


def test_helper_in_a_zip_is_judged_by_the_zip(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = program(top / "banger-root.pyz")
    monkeypatch.setattr(trust, "__file__", f"{archive}/banger_root/trust.py")
    trust.check_helper()
    os.chown(archive, OWNER, OWNER)
    with pytest.raises(HelperError, match=r"banger-root\.pyz"):
        trust.check_helper()
