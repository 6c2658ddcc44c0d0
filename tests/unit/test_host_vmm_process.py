"""The life of a VMM process: detached, known exactly, reaped once. Any program stands in for it."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from banger.errors import BangerError
from banger.host.vmm_process import (
    ExitStatus,
    ProcessRef,
    find_process,
    is_alive,
    kill_vmm,
    launch_vmm,
    signal_vmm,
    wait_exit,
)

pytestmark = pytest.mark.asyncio

SLEEP = ["/bin/sleep", "600"]


async def launch(tmp_path: Path, *argv: str) -> ProcessRef:
    return await launch_vmm(
        argv or SLEEP, cwd=tmp_path, console=tmp_path / "console.log", cgroup=None
    )


async def test_exit_code_is_reported(tmp_path: Path) -> None:
    ref = await launch(tmp_path, "/bin/sh", "-c", "exit 42")
    assert await wait_exit(ref) == ExitStatus(code=42)


async def test_signal_is_reported(tmp_path: Path) -> None:
    ref = await launch(tmp_path)
    signal_vmm(ref, "SIGTERM")
    assert await wait_exit(ref) == ExitStatus(signal="TERM")


async def test_all_waiters_hear_the_status_and_nothing_is_left_to_reap(tmp_path: Path) -> None:
    ref = await launch(tmp_path)
    waiters = [asyncio.create_task(wait_exit(ref)) for _ in range(3)]
    await asyncio.sleep(0)
    assert await kill_vmm(ref, None) == ExitStatus(signal="KILL")
    assert await asyncio.gather(*waiters) == [ExitStatus(signal="KILL")] * 3
    with pytest.raises(ChildProcessError):
        os.waitpid(ref.pid, os.WNOHANG)


async def test_wait_can_be_cancelled_and_repeated(tmp_path: Path) -> None:
    ref = await launch(tmp_path)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(wait_exit(ref), 0.01)
    assert is_alive(ref)
    await kill_vmm(ref, None)
    assert await wait_exit(ref) is None


async def test_zombie_is_not_alive(tmp_path: Path) -> None:
    ref = await launch(tmp_path, "/bin/true")
    fd = os.pidfd_open(ref.pid)
    os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOWAIT)
    os.close(fd)
    assert not is_alive(ref)
    assert await wait_exit(ref) == ExitStatus(code=0)


async def test_another_start_time_is_another_process(tmp_path: Path) -> None:
    ref = await launch(tmp_path)
    stranger = ProcessRef(pid=ref.pid, start_time=ref.start_time + 1)
    assert not is_alive(stranger)
    assert await wait_exit(stranger) is None
    assert await kill_vmm(stranger, None) is None
    with pytest.raises(BangerError, match="it has ended"):
        signal_vmm(stranger, "TERM")
    assert is_alive(ref)
    await kill_vmm(ref, None)


async def test_process_of_another_boot_is_another_process(tmp_path: Path) -> None:
    """After a reboot a pid comes again, and with bad luck its start time, too."""
    ref = await launch(tmp_path)
    assert ref.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert find_process(ref.pid) == ref
    before = msgspec.structs.replace(ref, boot_id="0b0d3b5e-5d3a-4a5c-8f2e-000000000000")
    assert not is_alive(before)
    assert await wait_exit(before) is None
    assert await kill_vmm(before, None) is None
    with pytest.raises(BangerError, match="it has ended"):
        signal_vmm(before, "TERM")
    assert is_alive(ref)
    await kill_vmm(ref, None)


async def test_process_that_was_noted_without_its_boot_is_judged_by_pid_and_start_time(
    tmp_path: Path,
) -> None:
    ref = await launch(tmp_path)
    old = msgspec.json.decode(
        msgspec.json.encode({"pid": ref.pid, "start_time": ref.start_time}), type=ProcessRef
    )
    assert old.boot_id is None and is_alive(old)
    await kill_vmm(old, None)
    assert not is_alive(ref)


async def test_name_with_spaces_and_parentheses_does_not_confuse_the_start_time(
    tmp_path: Path,
) -> None:
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")
    ref = await launch(tmp_path, str(program), "600")
    assert is_alive(ref)
    signal_vmm(ref, "KILL")
    assert await wait_exit(ref) == ExitStatus(signal="KILL")


async def test_process_has_its_own_session_no_input_no_environment_and_umask_077(
    tmp_path: Path,
) -> None:
    script = (
        "umask; /usr/bin/env -u PWD -u SHLVL -u _; readlink /proc/$$/fd/0; "
        "cut -d' ' -f6 /proc/$$/stat; echo $$"
    )
    ref = await launch(tmp_path, "/bin/sh", "-c", script)
    await wait_exit(ref)
    lines = (tmp_path / "console.log").read_text().splitlines()
    assert lines[:2] == ["0077", "/dev/null"]
    assert lines[2] == lines[3] == str(ref.pid)


async def test_console_is_private_and_appended_to(tmp_path: Path) -> None:
    for word in ("first", "second"):
        await wait_exit(await launch(tmp_path, "/bin/echo", word))
    console = tmp_path / "console.log"
    assert console.read_text() == "first\nsecond\n"
    assert stat.S_IMODE(console.stat().st_mode) == 0o600


async def test_console_that_is_a_symlink_is_refused(tmp_path: Path) -> None:
    (tmp_path / "console.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BangerError, match=r"console\.log"):
        await launch(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


async def test_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(BangerError, match="/nonexistent/firecracker"):
        await launch(tmp_path, "/nonexistent/firecracker")


async def test_process_that_cannot_be_moved_into_its_cgroup_does_not_run(tmp_path: Path) -> None:
    # Earlier tests of this process may have left some.
    before = _children()
    with pytest.raises(BangerError, match="moving it into"):
        await launch_vmm(
            ["/bin/sh", "-c", "echo $$ > pid; exec /bin/sleep 600"],
            cwd=tmp_path, console=tmp_path / "console.log", cgroup=str(tmp_path / "none"),
        )  # fmt: skip
    # It is reaped as well: a zombie of ours would still be listed, without a directory.
    assert _children() <= before


def _children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.parametrize("name", ["STOP", "SIGCONT", "9", "", "SIGSIGTERM", "RTMIN"])
async def test_signal_that_is_not_for_vms_is_refused(tmp_path: Path, name: str) -> None:
    ref = await launch(tmp_path)
    with pytest.raises(BangerError, match="is not for VMs"):
        signal_vmm(ref, name)
    await kill_vmm(ref, None)


async def test_vmm_outlives_a_daemon_that_is_killed(tmp_path: Path) -> None:
    """And it is watched and killed by the next daemon, whose child it is not."""
    daemon = (
        "import asyncio, os, signal, sys\n"
        "from pathlib import Path\n"
        "from banger.host.vmm_process import launch_vmm\n"
        "async def main():\n"
        "    ref = await launch_vmm(['/bin/sleep', '600'], cwd=Path('/'), "
        "console=Path(sys.argv[1]), cgroup=None)\n"
        "    print(ref.pid, ref.start_time, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", daemon, str(tmp_path / "console.log")],
        capture_output=True, text=True, env={"PYTHONPATH": str(source)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, start_time = map(int, done.stdout.split())
    ref = ProcessRef(pid=pid, start_time=start_time)
    assert is_alive(ref)
    waiting = asyncio.create_task(wait_exit(ref))
    assert await kill_vmm(ref, None) is None
    assert await waiting is None
    assert not is_alive(ref)
