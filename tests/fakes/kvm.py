"""A KVM device that is played: each KVM_RUN gives the next exit of a script.

It checks what a real one would check (open descriptors, order of the set-up) and counts what is
left open. It runs no instruction: that the program itself is right is for a real vCPU to say.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field

from banger.vmm import vcpu

RUN_SIZE = 0x3000
_DATA_OFFSET = 0x1000


@dataclass(frozen=True)
class Exit:
    """One exit: its reason, and what lies in struct kvm_run from offset 32 on."""

    reason: int
    union: bytes = b""
    data: bytes = b""


def out(port: int, size: int, value: int) -> Exit:
    """The guest wrote `value` to an I/O port."""
    union = struct.pack("<BBHIQ", 1, size, port, 1, _DATA_OFFSET)
    return Exit(vcpu.KVM_EXIT_IO, union, value.to_bytes(size, "little"))


def steps(count: int = len(vcpu.STEPS)) -> list[Exit]:
    """The reports of the first `count` steps."""
    return [out(0x10, 1, number) for number in range(1, count + 1)]


def value(number: int) -> list[Exit]:
    return [out(0x14, 4, number & 0xFFFFFFFF), out(0x14, 4, number >> 32)]


HALT = Exit(vcpu.KVM_EXIT_HLT)
# (0x0123456789abcdef + 0x1111111111111111) xor 0x1122334455667788
RIGHT_VALUE = 0x0316653CCFDAA888


def emulation_failure(instruction: bytes) -> Exit:
    union = struct.pack("<IIQB15s", 1, 3, 1, len(instruction), instruction.ljust(15, b"\0"))
    return Exit(vcpu.KVM_EXIT_INTERNAL_ERROR, union)


def healthy() -> list[Exit]:
    return [*steps(), *value(RIGHT_VALUE), HALT]


@dataclass
class FakeKvm:
    """The system calls of `vcpu.KvmCalls`. `fails` maps an ioctl's number to an errno."""

    script: list[Exit] = field(default_factory=healthy)
    open_errno: int | None = None
    fails: dict[int, int] = field(default_factory=dict)
    api_version: int = 12
    long_mode: bool = True
    open_fds: set[int] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    opened: str | None = None

    def __post_init__(self) -> None:
        self._run = bytearray(RUN_SIZE)
        self._next_fd = 100

    def open(self, path: str) -> int:
        self.opened = path
        if self.open_errno is not None:
            raise OSError(self.open_errno, os.strerror(self.open_errno))
        return self._new_fd()

    def close(self, fd: int) -> None:
        self.open_fds.remove(fd)

    def map_run(self, fd: int, size: int) -> bytearray:
        assert fd in self.open_fds and size == RUN_SIZE
        return self._run

    def ioctl(self, fd: int, request: int, arg: int | bytearray) -> int:
        assert fd in self.open_fds
        self.asked.append(vcpu.IOCTL_NAMES[request])
        if request in self.fails:
            raise OSError(self.fails[request], os.strerror(self.fails[request]))
        match request:
            case vcpu.KVM_GET_API_VERSION:
                return self.api_version
            case vcpu.KVM_GET_VCPU_MMAP_SIZE:
                return RUN_SIZE
            case vcpu.KVM_CREATE_VM | vcpu.KVM_CREATE_VCPU:
                return self._new_fd()
            case vcpu.KVM_GET_SUPPORTED_CPUID:
                assert isinstance(arg, bytearray)
                edx = 1 << 29 if self.long_mode else 0
                struct.pack_into("<I", arg, 0, 2)
                struct.pack_into("<7I", arg, 8, 0, 0, 0, 1, 2, 3, 4)
                struct.pack_into("<7I", arg, 48, 0x80000001, 0, 0, 0, 0, 0, edx)
            case vcpu.KVM_RUN:
                self._play()
        return 0

    def _play(self) -> None:
        self._run[:] = bytes(RUN_SIZE)
        move = self.script.pop(0)
        struct.pack_into("<I", self._run, 8, move.reason)
        self._run[32 : 32 + len(move.union)] = move.union
        self._run[_DATA_OFFSET : _DATA_OFFSET + len(move.data)] = move.data

    def _new_fd(self) -> int:
        self._next_fd += 1
        self.open_fds.add(self._next_fd)
        return self._next_fd
