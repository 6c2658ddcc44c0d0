"""What a guest was told is on disk is there afterwards, and disks grow when they are full."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot.installation import PATIENCE_S, SMALL, Installation

pytestmark = pytest.mark.usefixtures("nothing_left")

# On both disks; sync(1) with a file's name is fsync(2). A number is told when it is on disk.
WRITER = """
    i=0
    while :; do
        i=$((i+1))
        echo $i >> /root/records; echo $i >> /var/lib/records
        sync /root/records /var/lib/records
        echo $i
    done
"""


@pytest.fixture
def vm(banger: Installation) -> Iterator[str]:
    banger.ok("vm", "create", "--name", "box", *SMALL)
    yield "box"
    banger("vm", "delete", "box")


def check_disks(banger: Installation, vm: str, copies: Path, *, replay: bool) -> None:
    """e2fsck on copies, as our own start does nothing of the kind; `replay`: the journal first."""
    directory = banger.state / "vms" / banger.show(vm)["id"]
    for disk in ("work.ext4", "overlay.ext4"):
        copy = copies / disk
        subprocess.run(["cp", "--sparse=always", directory / disk, copy], check=True)
        if replay:
            # 1: the journal was replayed; -p alone mends nothing that is really wrong.
            replayed = subprocess.run(["/sbin/e2fsck", "-p", copy], capture_output=True, text=True)
            assert replayed.returncode in (0, 1), replayed.stdout
        checked = subprocess.run(["/sbin/e2fsck", "-fn", copy], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
        copy.unlink()


def test_what_was_synced_before_the_vmm_was_killed_is_there_after_start(
    banger: Installation, vm: str, tmp_path: Path
) -> None:
    p = banger.popen("vm", "exec", vm, "--", "sh", "-c", WRITER)
    assert p.stdout
    told = [int(p.stdout.readline()) for _ in range(20)]
    os.kill(banger.handles(vm)["process"]["pid"], signal.SIGKILL)
    out, _ = p.communicate(timeout=PATIENCE_S)
    told += [int(line) for line in out.split(b"\n")[:-1]]
    assert banger.show(vm)["state"] == "stopped"
    check_disks(banger, vm, tmp_path, replay=True)
    banger.ok("vm", "start", vm)
    for path in ("/root/records", "/var/lib/records"):
        kept = banger.ok("vm", "exec", vm, "--", "cat", path).text.split("\n")
        assert kept[: len(told)] == [str(number) for number in told], path


def test_disks_that_are_full_to_the_last_block_grow_and_keep_their_data(
    banger: Installation, vm: str, tmp_path: Path
) -> None:
    fill = """
        for d in /root /var/lib; do
            head -c 3000000 /dev/urandom > $d/data
            sha256sum $d/data
            # The bulk without writing it, and the rest block by block.
            fallocate -l $(df --output=avail -B1 $d | tail -n 1) $d/filler 2> /dev/null
            dd if=/dev/zero of=$d/rest bs=4096 2> /dev/null
            test $(df --output=avail -B1 $d | tail -n 1) = 0 || echo $d is not full
        done
        sync
    """
    sums = banger.ok("vm", "exec", vm, "--", "sh", "-c", fill).text
    assert "not full" not in sums
    banger.ok("vm", "set", vm, "--disk-size", "1G", "--system-overlay-size", "1G")
    banger.ok("vm", "restart", vm)
    look = """
        sha256sum /root/data /var/lib/data
        for d in /root /var/lib; do
            df --output=size,avail -B1M $d | tail -n 1
            echo more > $d/more && cat $d/more
        done
    """
    got = banger.ok("vm", "exec", vm, "--", "sh", "-c", look).text.splitlines()
    assert got[:2] == sums.splitlines()
    for sizes in (got[2], got[4]):
        size, available = map(int, sizes.split())
        assert size > 900, sizes
        assert available > 400, sizes
    assert (got[3], got[5]) == ("more", "more")
    banger.ok("vm", "stop", vm)
    check_disks(banger, vm, tmp_path, replay=False)
