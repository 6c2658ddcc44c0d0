"""Commands in guests: streams, status, signals, terminals, two at once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import select
import signal
import struct
import subprocess
import termios

from tests.smoke import guests
from tests.smoke.calls import CALL_S, banger, expect
from tests.smoke.registry import scenario

# Under emulation; on real hardware this would be 200 MB.
_BULK_BYTES = 16 << 20


@scenario("pure", "`vm run --rm -- echo` prints on stdout, status 0, the VM is gone")
def bare_run() -> None:
    before = banger.vm_names()
    done = banger.done("vm", "run", "--rm", "--", "echo", "two  words")
    expect(done.status == 0, f"status {done.status}")
    expect(done.out == "two  words\n", f"stdout is {done.out!r}")
    expect("spec: " in done.err, "the spec line is not on stderr")
    expect(banger.vm_names() == before, "a VM is left")


@scenario("pure", "exit 42 gives 42, also from `vm run`; killed by TERM gives 143", shared_vm=True)
def exit_code() -> None:
    vm = guests.shared()
    banger("vm", "run", "--rm", "--", "sh", "-c", "exit 42", status=42)
    banger("vm", "exec", vm, "--", "sh", "-c", "exit 42", status=42)
    banger("vm", "exec", vm, "--", "sh", "-c", "kill -TERM $$", status=143)


@scenario(
    "pure", "stdout and stderr apart; 16 MiB each way, equal by hash; stdin to the end",
    shared_vm=True,
)  # fmt: skip
def streams() -> None:
    vm = guests.shared()
    done = banger.done("vm", "exec", vm, "--", "sh", "-c", "echo out; echo err >&2")
    expect((done.out, done.err) == ("out\n", "err\n"), f"streams: {done}")
    data = os.urandom(_BULK_BYTES)
    process = banger.banger_started(
        "vm", "exec", vm, "--", "tee", "/root/bulk", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    out, _ = process.communicate(data, timeout=CALL_S)
    expect(process.returncode == 0, f"status {process.returncode}")
    expect(out == data, f"{len(out)} bytes came back and are not the {len(data)} that went")
    there = banger("vm", "exec", vm, "--", "sha256sum", "/root/bulk").split()[0]
    expect(there == hashlib.sha256(data).hexdigest(), "the guest has other bytes")
    banger("vm", "exec", vm, "--", "rm", "/root/bulk")


@scenario(
    "pure", "Ctrl-C reaches the process while stdin is blocked; status 130", shared_vm=True
)  # fmt: skip
def interrupt() -> None:
    vm = guests.shared()
    script = "trap 'echo interrupted; exit 130' INT; echo up; read -r line; echo not reached"
    process = banger.banger_started(
        "vm", "exec", vm, "--", "sh", "-c", script,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    expect(process.stdout.readline() == "up\n", "the command did not start")
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    status = process.wait(CALL_S)
    process.stdin.close()  # type: ignore[union-attr]
    process.stdout.close()
    expect(rest == "interrupted\n", f"stdout went on with {rest!r}")
    expect(status == 130, f"status {status}")


@scenario(
    "pure", "a login shell on a terminal: size, resize, status, terminal restored", shared_vm=True
)
def shell_pty() -> None:
    vm = guests.shared()
    ours, theirs = pty.openpty()
    try:
        _resize(ours, 33, 111)
        before = termios.tcgetattr(theirs)
        process = banger.banger_started(
            "vm", "exec", "-t", vm, "--", "bash", "-l",
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip
        # Whatever is typed before the shell is there belongs to nobody.
        _read_to(ours, b"# ")
        # `stty` speaks for the guest's terminal; the odd quotes tell the output from the echo.
        _type(ours, b"stty size; echo re''ady\n")
        expect(b"33 111" in _read_to(ours, b"ready"), "the size did not arrive")
        _resize(ours, 44, 122)
        process.send_signal(signal.SIGWINCH)
        _type(ours, b"until [ \"$(stty size)\" = '44 122' ]; do :; done; echo re''sized\n")
        _read_to(ours, b"resized")
        _type(ours, b"exit 7\n")
        status = process.wait(CALL_S)
        expect(status == 7, f"status {status}")
        expect(termios.tcgetattr(theirs) == before, "the terminal is not as it was before")
    finally:
        os.close(ours)
        os.close(theirs)


def _resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _type(terminal: int, text: bytes) -> None:
    os.write(terminal, text)


def _read_to(terminal: int, word: bytes) -> bytes:
    """What the terminal shows until the word is there."""
    seen = b""
    while word not in seen:
        readable, _, _ = select.select([terminal], [], [], CALL_S)
        expect(bool(readable), f"the terminal shows {seen!r} and no {word!r}")
        seen += os.read(terminal, 4096)
    print(seen.decode(errors="replace"), flush=True)
    return seen


@scenario("pure", "two `vm run --rm` at once both succeed")
def concurrent_runs() -> None:
    started = [
        banger.banger_started(
            "vm", "run", "--rm", "-q", "--", "sh", "-c", f"hostname; exit {status}",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        )
        for status in (3, 4)
    ]  # fmt: skip
    outs = [process.communicate(timeout=CALL_S)[0] for process in started]
    print(f"host names: {outs}")
    expect([process.returncode for process in started] == [3, 4], "a run failed")
    expect(len(set(outs)) == 2 and "" not in outs, "they were not two VMs")
