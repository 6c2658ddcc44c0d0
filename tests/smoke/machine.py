"""One emulated host of a run: QEMU, its two serial ports, and the work that it is handed.

The first port is the kernel's console; on the second the host tells what happens, asks for work
with an event and gets a line with the names of the next scenarios, or `end` when there is no more;
empty lines in between keep it awake. A scenario may ask for the host's power to be cut: QEMU is
killed and started anew on the same disk, and the host goes on with that scenario. A machine belongs
to the run: it ends with its thread, at the limit at the latest.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tests.smoke.report import HostLog

if TYPE_CHECKING:
    from tests.smoke.nested_host import HostImage
    from tests.smoke.registry import Deal
    from tests.smoke.report import Report

# QEMU's emulation of nested virtualisation loses a timer interrupt now and then; an idle host then
# sleeps until another interrupt comes. This one does, whatever happens.
_PULSE_S = 1.0
# Now and then it loses all of them, and the processor stands still for ever. A host that lives uses
# more than this, in clock ticks, for the pulses of that time alone.
_PATIENCE_S = 90.0
_ALIVE_TICKS = 3
# What one host may take of the machine's memory; QEMU takes it only as far as the host uses it.
MEMORY_MIB = 4096


def qemu_command(image: HostImage, payload: Path, scratch: Path, console: Path) -> list[str]:
    """The emulated host: one processor, because a second one was seen to hang."""
    return [
        "qemu-system-x86_64",
        *("-accel", "tcg"),
        # Without the fast string operations: emulated, they move single bytes, and where code once
        # ran each of them is looked up. Clearing a guest's memory could take minutes.
        *("-cpu", "max,-erms,-fsrm"),
        *("-smp", "1"),
        *("-m", str(MEMORY_MIB)),
        *("-display", "none"),
        *("-monitor", "none"),
        *("-nic", "none"),
        "-no-reboot",
        *("-kernel", str(image.kernel)),
        *("-initrd", str(image.initrd)),
        "-append",
        "root=/dev/vda rootfstype=squashfs ro console=ttyS0 loglevel=5 systemd.show_status=0 "
        "mitigations=off panic=1",
        *("-drive", f"file={image.root},format=raw,if=virtio,readonly=on"),
        # Unsafe when this machine loses its power, which is not what is tried. When QEMU is killed,
        # what it had written is in our page cache, and what the host had not flushed is lost.
        *("-drive", f"file={scratch},format=raw,if=virtio,cache=unsafe,discard=unmap"),
        *("-drive", f"file={payload},format=raw,if=virtio,readonly=on"),
        *("-serial", f"file:{console}"),
        *("-serial", "stdio"),
    ]


class Machine(threading.Thread):
    """Boots one host, hands it work until there is none, and sees it end."""

    def __init__(
        self,
        number: int,
        command: list[str],
        deal: Deal,
        report: Report,
        output: Path,
        limit_s: float,
        *,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        super().__init__(name=f"host {number}", daemon=True)
        self._told = HostLog(report, number)
        self._deal = deal
        self._report = report
        self._log = output / f"host-{number}.log"
        self._limit_s = limit_s
        self._patience_s = patience_s
        self.frozen = False
        """Its processor stood still, or a guest's: what it has not finished says nothing of what
        is tested."""
        self._ended = threading.Event()
        self._stopped = False
        self._command = command
        self._process = self._boot()

    def _boot(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def stop(self) -> None:
        """End the host at once; its thread ends soon after."""
        self._stopped = True
        self._process.kill()

    def _listen(self, log: TextIO, given: list[str], *, again: str | None) -> bool | None:
        """Hear a host out and hand it work; None when it wants its power cut, else whether it was
        told that there is no more. `again`: what it is given first."""
        released = cut = False
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                log.write(line)
                log.flush()
                wish = self._told.feed(line.rstrip("\r\n"))
                if wish == "cut":
                    cut = True
                    self._process.kill()
                elif wish == "want" and again is not None:
                    self._write(again)
                    again = None
                elif wish == "want":
                    unit = [each.name for each in self._deal.take()]
                    given += unit
                    released = not unit
                    self._write(" ".join(unit) or "end")
        return None if cut and not self._stopped else released

    def run(self) -> None:
        given: list[str] = []
        released: bool | None = False
        deadline = threading.Timer(self._limit_s, self.stop)
        deadline.start()
        pulse = threading.Thread(target=self._keep_awake, daemon=True)
        pulse.start()
        try:
            with self._log.open("w") as log:
                released = self._listen(log, given, again=None)
                while released is None:
                    self._give_up()
                    self._process = self._boot()
                    again = f"again {self._told.told} {self._told.running}"
                    released = self._listen(log, given, again=again)
        finally:
            deadline.cancel()
            self._ended.set()
            pulse.join()
            self.stop()
            self._give_up()
            unfinished = [name for name in given if name not in self._report.results]
            self.frozen |= self._told.stood_still
            if self.frozen:
                self._told.freeze(unfinished)
            else:
                self._told.close(unfinished, released=bool(released))

    def _give_up(self) -> None:
        """QEMU has been killed: nothing of it stays."""
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _keep_awake(self) -> None:
        used, since = self._processor_ticks(), time.monotonic()
        while not self._ended.wait(min(_PULSE_S, self._patience_s / 4)):
            self._write("")
            now = self._processor_ticks()
            if now - used >= _ALIVE_TICKS or now < used:  # a host that was booted anew counts anew
                used, since = now, time.monotonic()
            elif time.monotonic() - since > self._patience_s:
                self.frozen = True
                self.stop()
                return

    def _processor_ticks(self) -> int:
        """What QEMU has used of a processor; proc(5), utime and stime."""
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        except OSError:
            return 0
        fields = stat.rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        # Shorter than what a pipe takes at once, so lines of two threads do not mix. A host that
        # has ended meanwhile is told by the end of its output.
        with contextlib.suppress(BrokenPipeError, ValueError):
            os.write(self._process.stdin.fileno(), f"{line}\n".encode())
