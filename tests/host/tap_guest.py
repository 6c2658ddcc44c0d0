"""A guest made of a file descriptor: it opens its tap as a VMM would and speaks raw Ethernet."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import time
from ipaddress import IPv4Address

from patience import PATIENCE_S

BROADCAST = "ff:ff:ff:ff:ff:ff"
_TUNSETIFF = 0x400454CA
_FLAGS = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
_VNET_HDR = bytes(10)
_AGAIN_S = 0.5


class TapGuest:
    """One guest on its tap; `close` is its power switch."""

    def __init__(self, tap: str, address: str, gateway: str, gateway_mac: str) -> None:
        self.tap = tap
        self.address = address
        self.mac = "06:00:" + IPv4Address(address).packed.hex(":")
        self.gateway = gateway
        self.gateway_mac = gateway_mac
        self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(self._fd, _TUNSETIFF, struct.pack("16sH22x", tap.encode(), _FLAGS))
        self._sequence = 0

    def close(self) -> None:
        os.close(self._fd)

    def send(self, frame: bytes) -> None:
        os.write(self._fd, _VNET_HDR + frame)

    def frames(self) -> list[bytes]:
        """Every frame that has arrived until now."""
        found = []
        while True:
            try:
                found.append(os.read(self._fd, 65536)[len(_VNET_HDR) :])
            except BlockingIOError:
                return found

    def settle(self, *, everything: bool = False) -> list[bytes]:
        """Ping the gateway until it answers; everything that arrived before the answer.

        What was sent before has been through the bridge by then: frames keep their order. Of
        pings' answers only with `everything`.
        """
        self._sequence += 1
        arrived: list[bytes] = []
        deadline = time.monotonic() + PATIENCE_S
        ping = self.echo_request(self.gateway, self.gateway_mac, sequence=self._sequence)
        self.send(ping)
        while True:
            assert time.monotonic() < deadline, f"{self.tap}: the gateway does not answer a ping"
            if not select.select([self._fd], [], [], _AGAIN_S)[0]:
                # The kernel may take a second to let a port forward whose carrier has come up
                # (net/core/link_watch.c); what was sent before is dropped.
                self.send(ping)
            for frame in self.frames():
                if self._asks_for_us(frame):
                    self.send(arp(2, self.mac, self.address, self.gateway_mac, self.gateway))
                elif frame[12:14] == b"\x08\x00" and frame[23] == 1 and frame[34] == 0:
                    if everything:
                        arrived.append(frame)
                    if frame[26:30] != socket.inet_aton(self.gateway):
                        continue
                    if struct.unpack("!H", frame[40:42])[0] == self._sequence:
                        return arrived
                else:
                    arrived.append(frame)

    def echo_request(
        self,
        target: str,
        target_mac: str,
        *,
        sequence: int = 1,
        source: str | None = None,
        source_mac: str | None = None,
    ) -> bytes:
        body = struct.pack("!BBHHH", 8, 0, 0, 7, sequence) + b"banger--"
        body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
        packet = ipv4(1, source or self.address, target, body)
        return ethernet(target_mac, source_mac or self.mac, 0x0800, packet)

    def syn(self, target: str, port: int, *, source_port: int = 40000) -> bytes:
        header = struct.pack("!HHIIBBHHH", source_port, port, 1, 0, 0x50, 0x02, 64240, 0, 0)
        pseudo = (
            socket.inet_aton(self.address)
            + socket.inet_aton(target)
            + struct.pack("!BBH", 0, 6, len(header))
        )
        header = header[:16] + struct.pack("!H", checksum(pseudo + header)) + header[18:]
        packet = ipv4(6, self.address, target, header)
        return ethernet(self.gateway_mac, self.mac, 0x0800, packet)

    def _asks_for_us(self, frame: bytes) -> bool:
        return (
            frame[12:14] == b"\x08\x06"
            and frame[20:22] == b"\x00\x01"
            and frame[38:42] == socket.inet_aton(self.address)
        )


def ethernet(target: str, source: str, kind: int, payload: bytes) -> bytes:
    return _mac(target) + _mac(source) + struct.pack("!H", kind) + payload


def arp(
    operation: int,
    sender_mac: str,
    sender: str,
    target_mac: str,
    target: str,
    *,
    source_mac: str | None = None,
) -> bytes:
    payload = (
        struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
        + _mac(sender_mac)
        + socket.inet_aton(sender)
        + _mac(target_mac if operation == 2 else "00:00:00:00:00:00")
        + socket.inet_aton(target)
    )
    destination = target_mac if operation == 2 else BROADCAST
    return ethernet(destination, source_mac or sender_mac, 0x0806, payload)


def ipv4(protocol: int, source: str, target: str, payload: bytes) -> bytes:
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0,
        socket.inet_aton(source), socket.inet_aton(target),
    )  # fmt: skip
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Listener:
    """An AF_PACKET socket: an outside judge of the frames that reach a link."""

    def __init__(self, link: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
        self._socket.bind((link, 0))
        self._socket.setblocking(False)

    def frames(self) -> list[bytes]:
        found = []
        while True:
            try:
                found.append(self._socket.recv(65536))
            except BlockingIOError:
                return found

    def close(self) -> None:
        self._socket.close()


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))
