"""What a VM uses: read from made-up kernel files, and from this very process as the kernel says."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from banger.host.usage import Usage, read_usage

VM_ID = "0123456789abcdef" * 2
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


class Kernel:
    """Files as a kernel shows them, for process 42."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        # The name of a program may look like fields.
        numbers = ["S", *"1 42 42 0 -1 0 0 0 0 0".split(), "150", "50", *"0 0 20 0".split()]
        stat = f"42 (a) S (b) {' '.join([*numbers, '7', '0', '99', '123456', '1000'])}\n"
        self.write("proc/42/stat", stat)
        self.root = root

    def write(self, name: str, text: str) -> None:
        path = self.proc.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def group(self, name: str, **files: str) -> None:
        """A cgroup of its own for the process, below a mount that shows a part of the hierarchy."""
        self.write("proc/42/cgroup", f"3:memory:/x\n0::/part/banger/{name}\n")
        mount = self.root / "cgroup"
        self.write(
            "proc/self/mountinfo",
            "22 1 0:5 / /proc rw - proc proc rw\n"
            f"30 22 0:26 /part {mount} rw,nosuid shared:4 - cgroup2 cgroup rw\n",
        )
        for file, text in files.items():
            self.write(f"cgroup/banger/{name}/{file.replace('_', '.')}", text)

    def read(self, tap: str | None = None) -> Usage:
        return read_usage(42, VM_ID, tap, proc=self.proc)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_process_alone_tells_processor_memory_and_threads(kernel: Kernel) -> None:
    usage = kernel.read()
    assert (usage.rss_bytes, usage.cpu_s, usage.tasks) == (1000 * _PAGE, 200 / _TICKS, 7)
    assert usage.memory_bytes is usage.read_bytes is usage.sent_bytes is None


def test_cgroup_of_the_vm_tells_more(kernel: Kernel) -> None:
    kernel.group(
        f"banger-vm-{VM_ID}.scope",
        cpu_stat="usage_usec 3500000\nuser_usec 1\n",
        memory_current="5000\n",
        memory_max="max\n",
        io_stat="8:0 rbytes=100 wbytes=20 rios=1\n8:16 rbytes=1 wbytes=2\n",
    )
    usage = kernel.read()
    assert (usage.cpu_s, usage.memory_bytes, usage.memory_limit_bytes) == (3.5, 5000, None)
    assert (usage.read_bytes, usage.written_bytes) == (101, 22)


def test_cgroup_that_others_share_is_not_the_vms(kernel: Kernel) -> None:
    kernel.group("user.slice", memory_current="5000\n", cpu_stat="usage_usec 9000000\n")
    usage = kernel.read()
    assert (usage.memory_bytes, usage.cpu_s) == (None, 200 / _TICKS)


def test_cgroup_without_controllers_leaves_the_process_to_tell(kernel: Kernel) -> None:
    """As on hosts whose controllers belong to the first version."""
    kernel.group(VM_ID)
    kernel.write("proc/42/io", "rchar: 1\nread_bytes: 4096\nwrite_bytes: 8192\n")
    usage = kernel.read()
    assert (usage.cpu_s, usage.read_bytes, usage.written_bytes) == (200 / _TICKS, 4096, 8192)


def test_tap_counts_from_the_hosts_side(kernel: Kernel) -> None:
    table = "Inter-|   Receive\n face |bytes    packets\n"
    for name, sent, received in (("tap-fc-11", 33, 44), ("tap-fc-1", 11, 22)):
        table += f"{name:>6}: {sent:7} 1 0 0 0 0 0 0 {received:8} 2 0 0 0 0 0 0\n"
    kernel.write("proc/self/net/dev", table)
    usage = kernel.read("tap-fc-1")
    assert (usage.sent_bytes, usage.received_bytes) == (11, 22)


def test_process_that_has_ended_uses_nothing(tmp_path: Path) -> None:
    usage = read_usage(42, VM_ID, "gone", proc=tmp_path)
    assert (usage.rss_bytes, usage.cpu_s, usage.sent_bytes) == (0, 0.0, None)


def test_own_process_is_read_as_the_kernel_accounts_it() -> None:
    ours = resource.getrusage(resource.RUSAGE_SELF)
    usage = read_usage(os.getpid(), VM_ID, "lo")
    assert usage.cpu_s == pytest.approx(ours.ru_utime + ours.ru_stime, abs=0.5)
    assert 0 < usage.rss_bytes <= ours.ru_maxrss * 1024
    assert usage.tasks is not None and usage.tasks >= 1
