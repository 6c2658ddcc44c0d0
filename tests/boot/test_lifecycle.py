"""Stop, start, kill, delete, set, and what the disks keep."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from boot.installation import PATIENCE_S, SMALL, Installation

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def vm(banger: Installation) -> Iterator[str]:
    banger.ok("vm", "create", "--name", "box", *SMALL)
    yield "box"
    banger("vm", "delete", "box")


def test_data_written_just_before_stop_is_there_after_start(banger: Installation, vm: str) -> None:
    banger.ok(
        "vm", "exec", vm, "--", "sh", "-c", "echo work > /root/marker; echo system > /etc/marker"
    )
    first = banger.show(vm)["boot_id"]
    banger.ok("vm", "stop", vm)
    record = banger.show(vm)
    assert record["state"] == "stopped"
    directory = banger.state / "vms" / record["id"]
    for disk in ("work.ext4", "overlay.ext4"):
        checked = subprocess.run(
            ["/sbin/e2fsck", "-fn", directory / disk], capture_output=True, text=True
        )
        assert checked.returncode == 0, checked.stdout
    banger.ok("vm", "start", vm)
    assert (
        banger.ok("vm", "exec", vm, "--", "cat", "/root/marker", "/etc/marker").text
        == "work\nsystem\n"
    )
    assert banger.show(vm)["boot_id"] != first


def test_starting_twice_and_stopping_twice_succeed_and_say_so(
    banger: Installation, vm: str
) -> None:
    again = banger.ok("vm", "start", vm)
    assert "is running already" in again.err
    banger.ok("vm", "stop", vm)
    assert "was not running" in banger.ok("vm", "stop", vm).err


def test_a_killed_vm_is_stopped_and_refuses_commands(banger: Installation, vm: str) -> None:
    banger.ok("vm", "kill", vm)
    assert banger.show(vm)["state"] == "stopped"
    done = banger("vm", "exec", vm, "--", "true")
    assert done.status == 1
    assert "VM box is stopped" in done.err
    assert f"hint: banger vm start {vm}" in done.err


def test_a_vmm_killed_under_a_command_is_told_and_its_data_kept(
    banger: Installation, vm: str
) -> None:
    banger.ok("vm", "exec", vm, "--", "sh", "-c", "echo kept > /root/kept; sync")
    p = banger.popen("vm", "exec", vm, "--", "sh", "-c", "echo up; sleep 1000")
    assert p.stdout
    assert p.stdout.readline() == b"up\n"
    os.kill(banger.handles(vm)["process"]["pid"], signal.SIGKILL)
    _, err = p.communicate(timeout=PATIENCE_S)
    assert p.returncode == 1
    assert b"the machine ended while the command ran" in err
    record = banger.show(vm)
    assert record["state"] == "stopped"
    assert "the machine ended by itself" in record["last_error"]
    banger.ok("vm", "start", vm)
    assert banger.ok("vm", "exec", vm, "--", "cat", "/root/kept").text == "kept\n"


def test_sizes_change_at_the_next_start_and_disks_grow_with_their_filesystem(
    banger: Installation, vm: str
) -> None:
    done = banger.ok("vm", "set", vm, "--vcpu", "2", "--disk-size", "1G")
    assert "at its next start" in done.text
    banger.ok("vm", "restart", vm)
    got = banger.ok(
        "vm", "exec", vm, "--", "sh", "-c", "nproc; df --output=size -B1M /root | tail -1"
    ).text.split()
    assert got[0] == "2"
    assert int(got[1]) > 900
    shrink = banger("vm", "set", vm, "--disk-size", "512M")
    assert shrink.status == 1
    assert "disks only grow" in shrink.err


def test_a_crash_of_the_daemon_during_a_start_leaves_nothing(banger: Installation) -> None:
    daemon = banger.daemon_pid()
    p = banger.popen("vm", "create", "--name", "crash", *SMALL)
    assert p.stderr
    for line in p.stderr:
        if line.startswith(b"ready:"):
            break
    banger.kill_daemon(daemon)
    p.communicate(timeout=PATIENCE_S)
    assert p.returncode == 1
    assert (
        banger.json("vm", "list", "--json") == []
        or "crash" not in banger.ok("vm", "list", "--names").text
    )


def test_a_stopped_vms_start_that_died_with_the_daemon_leaves_it_stopped(
    banger: Installation, vm: str
) -> None:
    banger.ok("vm", "stop", vm)
    daemon = banger.daemon_pid()
    p = banger.popen("vm", "start", vm)
    assert p.stderr
    for line in p.stderr:
        if line.startswith(b"ready:"):
            break
    banger.kill_daemon(daemon)
    p.communicate(timeout=PATIENCE_S)
    assert banger.show(vm)["state"] == "stopped"
    banger.ok("vm", "start", vm)


def test_prune_deletes_what_does_not_run_and_nothing_else(banger: Installation, vm: str) -> None:
    banger.ok("vm", "create", "--name", "idle", "--no-start", *SMALL)
    done = banger.ok("vm", "prune", "-f")
    assert done.text == "idle deleted\n"
    assert vm in banger.ok("vm", "list", "--names").text


def test_a_name_in_use_is_refused_with_the_way_in(banger: Installation, vm: str) -> None:
    done = banger("vm", "create", "--name", vm, *SMALL)
    assert done.status == 1
    assert "hint: banger vm ssh box" in done.err


def test_a_corrupt_image_is_refused_before_anything_starts(
    banger: Installation, tmp_path: Path
) -> None:
    image = banger.json("image", "show", "debian-bookworm-minimal")
    banger.ok("vm", "create", "--name", "held", "--no-start", *SMALL)
    path = Path(image["rootfs_path"])
    whole = path.with_suffix(".whole")
    path.rename(whole)
    try:
        data = bytearray(whole.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        done = banger("vm", "start", "held")
        assert done.status == 1
        assert "debian-bookworm-minimal" in done.err
        assert "hint:" in done.err
    finally:
        path.unlink()
        whole.rename(path)
        banger.ok("vm", "delete", "held")


def test_two_processors_survive_a_kernel_that_patches_itself(
    banger: Installation, nothing_left: None
) -> None:
    """Each write switches a static key: code is patched while the other processor runs it."""
    banger.ok("vm", "create", "--name", "patched", *SMALL, "--vcpu", "2")
    script = """
        while :; do /bin/true; done & a=$!
        while :; do sleep 0.001; done & b=$!
        i=0
        while [ $i -lt 200 ]; do
            echo 1 > /proc/sys/kernel/sched_schedstats
            echo 0 > /proc/sys/kernel/sched_schedstats
            i=$((i + 1))
        done
        kill $a $b
        nproc
    """
    done = banger("vm", "exec", "patched", "--", "sh", "-c", script)
    assert (done.text, done.status) == ("2\n", 0), done.err
    banger.ok("vm", "delete", "patched")
