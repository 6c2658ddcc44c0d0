"""Carries frames between a tap of this namespace and `eth0`, a tap that it makes in another one.

Arguments: the tap, and a process in the other namespace. Ends with its stdin.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import sys

_TUNSETIFF = 0x400454CA
_FLAGS = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
_CLONE_NEWNET = 0x40000000


def open_tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _FLAGS))
    return fd


def main() -> None:
    ours = open_tap(sys.argv[1])
    other = os.open(f"/proc/{sys.argv[2]}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    if ctypes.CDLL(None).setns(other, _CLONE_NEWNET) != 0:
        sys.exit("setns failed")
    theirs = open_tap("eth0")
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    to = {ours: theirs, theirs: ours}
    while True:
        ready = select.select([0, ours, theirs], [], [])[0]
        if 0 in ready:
            return
        for fd in ready:
            try:
                while frame := os.read(fd, 1 << 17):
                    os.write(to[fd], frame)
            except BlockingIOError:
                continue
            except OSError as e:
                if e.errno == errno.EBADFD:  # the other namespace has ended
                    return
                # The other side is down, or full: a wire would lose the frame, too.
                if e.errno not in (errno.EIO, errno.ENOBUFS):
                    raise


if __name__ == "__main__":
    main()
