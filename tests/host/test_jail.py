"""Jails: made for root alone, removed whatever is in them, and never further than they reach."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger_root import jail, mounts
from banger_root.errors import HelperError
from host.namespace import run
from host.served import OWNER, as_child, spare_id

pytestmark = pytest.mark.host

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def base(obstacle: str | None) -> Iterator[str]:
    """A base that the owner can look through."""
    if obstacle:
        pytest.skip(obstacle)
    top = Path("/var/lib") / f"banger-test-{spare_id()[:8]}"
    top.mkdir()
    top.chmod(0o755)
    yield str(top / "jail")
    shutil.rmtree(top)


@pytest.fixture
def root(base: str) -> Path:
    return Path(jail.make_jail(base, "a" * 32))


def remove(base: str) -> None:
    jail.remove_jail(base, "a" * 32)
    assert os.listdir(f"{base}/firecracker") == []


def test_new_jail_is_roots_and_closed_to_everyone_else(root: Path, base: str) -> None:
    modes = [d.stat().st_mode & 0o7777 for d in (root, root.parent, root.parent.parent, Path(base))]
    assert modes == [0o700, 0o700, 0o711, 0o711]
    assert {d.stat().st_uid for d in (root, root.parent, root.parent.parent)} == {0}
    plant = root / "api.sock"
    assert as_child(OWNER, lambda: plant.symlink_to("/etc/shadow")) == "PermissionError"


def test_jail_that_is_open_to_the_owner_can_be_passed_but_not_listed(base: str, root: Path) -> None:
    os.chown(root, OWNER, OWNER)
    jail.open_to_owner(base, "a" * 32)
    assert as_child(OWNER, lambda: (root / "file").touch()) == "done"
    assert as_child(OWNER, lambda: os.listdir(root.parent)) == "PermissionError"
    assert as_child(OWNER, lambda: (root.parent / "x").touch()) == "PermissionError"


def test_jail_of_an_earlier_life_is_replaced_by_an_empty_one(base: str, root: Path) -> None:
    (root / "firecracker").write_text("old")
    assert jail.make_jail(base, "a" * 32) == str(root)
    assert os.listdir(root) == []


def test_removing_a_jail_twice_or_without_a_base_is_fine(base: str, root: Path) -> None:
    remove(base)
    remove(base)
    jail.remove_jail(f"{base}/elsewhere", "a" * 32)


@pytest.mark.parametrize("kind", ["symlink", "others' directory", "open to others"])
def test_base_that_others_could_change_is_refused(base: str, kind: str) -> None:
    if kind == "symlink":
        Path(f"{base}-real").mkdir()
        Path(base).symlink_to(f"{base}-real")
    else:
        Path(base).mkdir()
        if kind == "open to others":
            Path(base).chmod(0o777)
        else:
            os.chown(base, OWNER, OWNER)
    for call in (jail.make_jail, jail.remove_jail):
        with pytest.raises(HelperError, match="jail"):
            call(base, "a" * 32)


def test_base_on_a_mount_without_devices_or_execution_is_refused(base: str) -> None:
    Path(base).mkdir()
    run(f"mount -t tmpfs -o nodev,noexec,mode=711 tmpfs {base}")
    try:
        with pytest.raises(HelperError, match="nodev and noexec"):
            jail.make_jail(base, "a" * 32)
    finally:
        run(f"umount {base}")


def test_base_that_the_owner_cannot_reach_is_refused_for_it(base: str) -> None:
    Path(base).parent.chmod(0o700)
    jail.check_base(base, owner_uid=0)
    with pytest.raises(HelperError) as caught:
        jail.check_base(base, owner_uid=OWNER)
    assert caught.value.hint == f"sudo chmod o+x {Path(base).parent}"


def test_jail_full_of_traps_is_removed_and_what_they_lead_to_stays(base: str, root: Path) -> None:
    victim = Path(base).parent / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    os.chown(root, OWNER, OWNER)
    jail.open_to_owner(base, "a" * 32)

    def trap() -> None:
        os.chdir(root)
        os.symlink(victim, "link")
        os.symlink("/", "dev")
        os.mkfifo("fifo")
        s = socket.socket(socket.AF_UNIX)
        s.bind("socket")
        for name in ("closed", "sticky", "..."):
            os.mkdir(name)
            os.symlink(victim / "file", f"{name}/file")
        os.chmod("closed", 0)
        os.chmod("sticky", 0o1555)
        os.mkdir(b"\xff\n")

    assert as_child(OWNER, trap) == "done"
    remove(base)
    assert (victim / "file").read_text() == "precious"


def test_jail_deeper_than_any_path_is_removed(base: str, root: Path) -> None:
    fd = os.open(root, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("directory", dir_fd=fd)
        below = os.open("directory", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    remove(base)


def test_mounts_in_a_jail_are_undone_and_nothing_in_them_is_deleted(base: str, root: Path) -> None:
    victim = Path(base).parent / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    (root / "mount").mkdir()
    (root / "name").touch()
    run(f"mount --bind {victim} {root}/mount")
    run(f"mount --bind {victim} {root}/mount")
    run(f"mount --bind {victim}/file {root}/name")
    run(f"mount --bind {victim} {root}")
    remove(base)
    assert str(root) not in Path("/proc/self/mounts").read_text()
    assert (victim / "file").read_text() == "precious"


def test_mount_that_only_another_namespace_has_does_not_stop_the_removal(
    base: str, root: Path
) -> None:
    victim = Path(base).parent / "victim"
    victim.write_text("precious")
    ready, go_on = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            mounts.enter_own_namespace()
            directory = os.open(root, os.O_RDONLY)
            source = os.open(victim, os.O_PATH)
            mounts.bind(source, directory, "image", read_only=True)
            os.write(ready[1], b"r")
            os.read(go_on[0], 1)
        finally:
            os._exit(0)
    assert os.read(ready[0], 1) == b"r"
    remove(base)
    os.write(go_on[1], b"g")
    os.waitpid(pid, 0)
    for fd in (*ready, *go_on):
        os.close(fd)
    assert victim.read_text() == "precious"


def test_link_in_place_of_the_jail_is_not_followed(base: str, root: Path) -> None:
    victim = Path(base).parent / "victim"
    (victim / "root").mkdir(parents=True)
    shutil.rmtree(root.parent)
    root.parent.symlink_to(victim)
    with pytest.raises(HelperError, match="removing the jail"):
        jail.remove_jail(base, "a" * 32)
    assert os.listdir(victim) == ["root"]
