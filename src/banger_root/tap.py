"""Tap devices: made persistent here, opened later by the VMM, which runs as the owner.

A tap made here exists until it is deleted over rtnetlink; it does not need this process.
Source: Documentation/networking/tuntap.rst, linux/if_tun.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from banger_root.errors import HelperError

DEVICE = "/dev/net/tun"

_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_TUNSETOWNER = 0x400454CC
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFF_TUN_EXCL = 0x8000
# struct ifreq: 16 bytes of name, a union of 24, of which the flags are the first two.
_IFREQ = struct.Struct("=16sH22x")


def make_tap(name: str, *, owner_uid: int) -> None:
    """Make a persistent tap that `owner_uid` may open, without taking one that exists.

    Raises:
        HelperError: the name is taken, or the host has no usable /dev/net/tun.
    """
    doing = f"making the tap {name}"
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise HelperError(
            "operation_failed", f"{doing}: opening {DEVICE}: {e.strerror}", hint="sudo modprobe tun"
        ) from e
    try:
        # EXCL: without it the ioctl would attach to a tap of that name, whoever made it.
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
        fcntl.ioctl(fd, _TUNSETOWNER, owner_uid)
        # Last: until here the tap goes away with the descriptor, so a crash leaves nothing.
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    except OSError as e:
        if e.errno == errno.EBUSY:
            raise HelperError(
                "already_exists",
                f"{doing}: a link of that name exists",
                hint=f"ip link show {name}",
            ) from e
        raise HelperError("operation_failed", f"{doing}: {e.strerror}") from e
    finally:
        os.close(fd)
