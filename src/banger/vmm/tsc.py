"""The frequency of this host's time stamp counter, for guests that QEMU emulates.

Run as a program (`python -I tsc.py`) by `probe.py`. It imports the standard library only and prints
the frequency in kHz, or nothing where there is no telling. An emulated guest reads the host's
counter, but has no timer good enough to calibrate it on a busy host.

It is a process of its own because it executes a few bytes of machine code, which a hardened host
may answer with a signal.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
import time

# rdtsc; shl rdx, 32; or rax, rdx; ret
_READ_TSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_INTERVAL_NS = 40_000_000
# Two measurements of a steady counter agree within some parts in a million.
_TOLERANCE = 1e-4


def measure_khz() -> int | None:
    """The counter's frequency in kHz from two intervals of 40 ms; None when they differ."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page[: len(_READ_TSC)] = _READ_TSC
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    read_tsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)

    def sample() -> tuple[int, int]:
        """Time and counter, from the attempt in which the least time passed around the read."""
        best: tuple[int, int, int] | None = None
        for _ in range(20):
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            ticks = int(read_tsc())
            after = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            if best is None or after - before < best[0]:
                best = (after - before, (before + after) // 2, ticks)
        assert best is not None
        return best[1], best[2]

    samples = [sample()]
    for _ in range(2):
        until = samples[-1][0] + _INTERVAL_NS
        while time.clock_gettime_ns(time.CLOCK_MONOTONIC) < until:
            time.sleep(0.005)
        samples.append(sample())
    rates = [(t1 - t0) * 1e6 / (n1 - n0) for (n0, t0), (n1, t1) in itertools.pairwise(samples)]
    if min(rates) < 100_000 or max(rates) / min(rates) - 1 > _TOLERANCE:
        return None
    return round((samples[2][1] - samples[0][1]) * 1e6 / (samples[2][0] - samples[0][0]))


if __name__ == "__main__":
    if (khz := measure_khz()) is not None:
        sys.stdout.write(f"{khz}\n")
