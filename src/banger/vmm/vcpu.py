"""One vCPU, run through /dev/kvm from 32-bit protected mode to a known exit in 64-bit mode.

Run as a program (`python -I vcpu.py [DEVICE]`) by `probe.py`, in a process of its own, because a
broken KVM may hang or kill its caller. It imports the standard library only, prints one JSON line
for each step that the vCPU reported and one for the outcome, and owns nothing that outlives it.

The guest does what an early kernel does, a step at a time: its own GDT, paging, long mode by its
own wrmsr, TSS and IDT, the GS base, an exception and iretq, a CR3 reload; then two instructions
which every kernel for x86-64 uses and which KVM's instruction emulator does not know (cmpxchg16b
and SSE2 arithmetic). On a KVM that interprets kernel code instead of running it, trivial programs
pass, and kernels die at the first such instruction.

Sources: Linux, Documentation/virt/kvm/api.rst and include/uapi/linux/kvm.h (ioctls, struct
kvm_run, kvm_sregs); Intel SDM volume 3 (descriptors, page tables, control registers).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import struct
import sys
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

_API_VERSION = 12
_MEMORY = 2 << 20
# Where things lie in guest memory. All of it is one identity-mapped page of 2 MiB.
_PML4, _PDPT, _PD, _GDT, _IDT, _TSS, _DATA = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 0x7000
_GDT_POINTER, _IDT_POINTER, _STACK_TOP, _CODE, _CODE64, _HANDLER = (
    0x8000, 0x8010, 0x9000, 0x10000, 0x11000, 0x12000,
)  # fmt: skip
_CODE32_SELECTOR, _DATA_SELECTOR = 0x08, 0x18
_STEP_PORT, _VALUE_PORT = 0x10, 0x14
# Never backed by memory here. Processors without "unrestricted guest" need three pages for a TSS.
_KVM_TSS_ADDRESS = 0x7F000000

_CONSTANT = 0x1122334455667788
_SWAPPED = 0x0123456789ABCDEF
_ADDEND = 0x1111111111111111
_EXPECTED = ((_SWAPPED + _ADDEND) & (1 << 64) - 1) ^ _CONSTANT

# What the vCPU does, as (what the step shows, ((machine code, its source), …)). Each step ends by
# writing its number to _STEP_PORT. Sources are Intel syntax; a test assembles them.
Listing = tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
PROTECTED: Listing = (
    (
        "32-bit protected mode with its own GDT",
        (
            ("0f 01 15 00 80 00 00", "lgdt [0x8000]"),
            ("b8 18 00 00 00", "mov eax, 0x18"),
            ("8e d8", "mov ds, eax"),
            ("8e c0", "mov es, eax"),
            ("8e d0", "mov ss, eax"),
            ("bc 00 90 00 00", "mov esp, 0x9000"),
        ),
    ),
    (
        "paging and EFER.LME switched on",
        (
            ("0f 20 e0", "mov eax, cr4"),
            ("0d 20 06 00 00", "or eax, 0x620"),  # PAE, OSFXSR, OSXMMEXCPT
            ("0f 22 e0", "mov cr4, eax"),
            ("b8 00 10 00 00", "mov eax, 0x1000"),
            ("0f 22 d8", "mov cr3, eax"),
            ("b9 80 00 00 c0", "mov ecx, 0xc0000080"),  # EFER
            ("0f 32", "rdmsr"),
            ("0d 00 01 00 00", "or eax, 0x100"),
            ("0f 30", "wrmsr"),
            ("0f 20 c0", "mov eax, cr0"),
            ("83 e0 fb", "and eax, 0xfffffffb"),  # EM off, or SSE faults
            ("0d 02 00 00 80", "or eax, 0x80000002"),
            ("0f 22 c0", "mov cr0, eax"),
        ),
    ),
)
FAR_RETURN = (
    ("6a 10", "push 0x10"),
    ("68 00 10 01 00", "push 0x11000"),
    ("cb", "retf"),
)
LONG: Listing = (
    (
        "64-bit code segment",
        (("49 b8 88 77 66 55 44 33 22 11", "movabs r8, 0x1122334455667788"),),
    ),
    (
        "task register and IDT",
        (
            ("b8 20 00 00 00", "mov eax, 0x20"),
            ("0f 00 d8", "ltr ax"),
            ("0f 01 1c 25 10 80 00 00", "lidt [0x8010]"),
        ),
    ),
    (
        "GS base by wrmsr",
        (
            ("b9 01 01 00 c0", "mov ecx, 0xc0000101"),
            ("b8 00 70 00 00", "mov eax, 0x7000"),
            ("31 d2", "xor edx, edx"),
            ("0f 30", "wrmsr"),
            ("65 48 8b 1c 25 20 00 00 00", "mov rbx, qword ptr gs:[0x20]"),
        ),
    ),
    ("exception through the IDT and iretq", (("0f 0b", "ud2"),)),
    (
        "CR3 reload",
        (("0f 20 d8", "mov rax, cr3"), ("0f 22 d8", "mov cr3, rax")),
    ),
    (
        "cmpxchg16b in kernel mode",
        (
            ("bf 00 70 00 00", "mov edi, 0x7000"),
            ("48 8b 07", "mov rax, qword ptr [rdi]"),
            ("48 8b 57 08", "mov rdx, qword ptr [rdi+8]"),
            ("31 c9", "xor ecx, ecx"),
            ("f0 48 0f c7 0f", "lock cmpxchg16b xmmword ptr [rdi]"),
        ),
    ),
    (
        "SSE2 arithmetic in kernel mode",
        (
            ("66 0f 6f 07", "movdqa xmm0, xmmword ptr [rdi]"),
            ("66 0f d4 47 10", "paddq xmm0, xmmword ptr [rdi+0x10]"),
            ("66 48 0f 7e c0", "movq rax, xmm0"),
            ("4c 31 c0", "xor rax, r8"),
            ("48 89 c3", "mov rbx, rax"),
        ),
    ),
)
REPORT_VALUE = (
    ("48 89 d8", "mov rax, rbx"),
    ("e7 14", "out 0x14, eax"),
    ("48 c1 e8 20", "shr rax, 32"),
    ("e7 14", "out 0x14, eax"),
    ("f4", "hlt"),
)
SKIP_UD2 = (("48 83 04 24 02", "add qword ptr [rsp], 2"), ("48 cf", "iretq"))

STEPS = tuple(name for name, _ in (*PROTECTED, *LONG))


class Outcome(NamedTuple):
    """How a run ended. `kind` is usable, absent, denied, busy, no_long_mode, dies or wrong."""

    kind: str
    detail: str
    steps: tuple[str, ...] = ()


class KvmCalls(Protocol):
    """The system calls that a run needs; tests answer them without a device."""

    def open(self, path: str) -> int: ...
    def ioctl(self, fd: int, request: int, arg: int | bytearray) -> int: ...
    def map_run(self, fd: int, size: int) -> mmap.mmap | bytearray: ...
    def close(self, fd: int) -> None: ...


class LinuxCalls:
    """The real ones."""

    def open(self, path: str) -> int:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, request: int, arg: int | bytearray) -> int:
        return fcntl.ioctl(fd, request, arg)

    def map_run(self, fd: int, size: int) -> mmap.mmap:
        return mmap.mmap(fd, size)

    def close(self, fd: int) -> None:
        os.close(fd)


# include/uapi/linux/kvm.h, under their kernel names
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_TSS_ADDR = 0xAE47
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_SET_CPUID2 = 0x4008AE90
IOCTL_NAMES = {value: name for name, value in list(globals().items()) if name.startswith("KVM_")}
KVM_EXIT_IO, KVM_EXIT_HLT, KVM_EXIT_SHUTDOWN, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR = (
    2, 5, 8, 9, 17,
)  # fmt: skip
_KVM_EXIT_IO_OUT = 1
_INTERNAL_ERROR_EMULATION = 1


class _Stopped(Exception):
    """The run ended before its known exit."""

    def __init__(self, kind: str, detail: str) -> None:
        self.kind = kind
        self.detail = detail


def run_vcpu(
    calls: KvmCalls, device: str = "/dev/kvm", *, on_step: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Run the program above on a new VM and say how far it came; everything is closed again.

    `on_step` hears of each step as it is reached, so that a run which hangs leaves a trace.
    """
    reached: list[str] = []
    held: list[int] = []

    def reach(step: str) -> None:
        reached.append(step)
        on_step(step)

    try:
        value = _run(calls, device, reached, reach, held)
    except _Stopped as e:
        return Outcome(e.kind, e.detail, tuple(reached))
    finally:
        for fd in reversed(held):
            calls.close(fd)
    if value != _EXPECTED:
        detail = f"the vCPU computed {value:#018x} where {_EXPECTED:#018x} is right"
        return Outcome("wrong", detail, tuple(reached))
    return Outcome("usable", f"the vCPU ran {len(STEPS)} steps and halted", tuple(reached))


def _run(
    calls: KvmCalls, device: str, reached: list[str], reach: Callable[[str], None], held: list[int]
) -> int:
    try:
        kvm = calls.open(device)
    except OSError as e:
        kind = {
            errno.ENOENT: "absent", errno.ENODEV: "absent", errno.ENXIO: "absent",
            errno.EACCES: "denied", errno.EPERM: "denied", errno.EBUSY: "busy",
        }.get(e.errno or 0, "dies")  # fmt: skip
        raise _Stopped(kind, f"opening {device}: {e.strerror}") from e
    held.append(kvm)
    api = _ioctl(calls, kvm, KVM_GET_API_VERSION, 0)
    if api != _API_VERSION:
        raise _Stopped("wrong", f"{device} speaks KVM API {api}, not {_API_VERSION}")
    cpuid = _supported_cpuid(calls, kvm)
    if not _has_long_mode(cpuid):
        raise _Stopped("no_long_mode", "KVM offers guests no 64-bit mode (CPUID 0x80000001)")
    vm = _ioctl(calls, kvm, KVM_CREATE_VM, 0)
    held.append(vm)
    memory = build_memory()
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    region = bytearray(struct.pack("<IIQQQ", 0, 0, 0, len(memory), address))
    _ioctl(calls, vm, KVM_SET_USER_MEMORY_REGION, region)
    _ioctl(calls, vm, KVM_SET_TSS_ADDR, _KVM_TSS_ADDRESS)
    vcpu = _ioctl(calls, vm, KVM_CREATE_VCPU, 0)
    held.append(vcpu)
    size = _ioctl(calls, kvm, KVM_GET_VCPU_MMAP_SIZE, 0)
    run = calls.map_run(vcpu, size)
    _ioctl(calls, vcpu, KVM_SET_CPUID2, cpuid)
    _ioctl(calls, vcpu, KVM_SET_SREGS, _start_sregs(calls, vcpu))
    # kvm_regs: 16 general registers, rip, rflags (bit 1 is always set).
    _ioctl(calls, vcpu, KVM_SET_REGS, bytearray(struct.pack("<18Q", *[0] * 16, _CODE, 2)))
    return _drive(calls, vcpu, run, reached, reach)


def _drive(
    calls: KvmCalls,
    vcpu: int,
    run: mmap.mmap | bytearray,
    reached: list[str],
    reach: Callable[[str], None],
) -> int:
    value: list[int] = []
    # One exit for each step, two for the value, one for hlt; each is checked, so this ends.
    while True:
        _ioctl(calls, vcpu, KVM_RUN, 0, doing=_next_step(reached))
        reason = struct.unpack_from("<I", run, 8)[0]
        if reason == KVM_EXIT_HLT and len(reached) == len(STEPS) and len(value) == 2:
            return value[0] | value[1] << 32
        if reason != KVM_EXIT_IO:
            raise _Stopped("dies", f"{_describe_exit(run, reason)} {_next_step(reached)}")
        direction, size, port, count, offset = struct.unpack_from("<BBHIQ", run, 32)
        if not (direction == _KVM_EXIT_IO_OUT and count == 1 and offset + size <= len(run)):
            raise _Stopped("wrong", f"an I/O exit that nobody asked for {_next_step(reached)}")
        data = int.from_bytes(bytes(run[offset : offset + size]), "little")
        if (port, size, data) == (_STEP_PORT, 1, len(reached) + 1) and len(reached) < len(STEPS):
            reach(STEPS[len(reached)])
        elif (port, size) == (_VALUE_PORT, 4) and len(reached) == len(STEPS) and len(value) < 2:
            value.append(data)
        else:
            raise _Stopped("wrong", f"wrote {data:#x} to port {port:#x} {_next_step(reached)}")


def _next_step(reached: list[str]) -> str:
    if len(reached) == len(STEPS):
        return "after the last step"
    return f"at step {len(reached) + 1} of {len(STEPS)} ({STEPS[len(reached)]})"


def _describe_exit(run: mmap.mmap | bytearray, reason: int) -> str:
    if reason == KVM_EXIT_INTERNAL_ERROR:
        suberror, count, flags = struct.unpack_from("<IIQ", run, 32)
        text = f"KVM_EXIT_INTERNAL_ERROR, suberror {suberror}"
        # struct kvm_run's emulation_failure: bit 0 of flags says that instruction bytes follow.
        if suberror == _INTERNAL_ERROR_EMULATION and count >= 3 and flags & 1:
            size = min(run[48], 15)
            text += f" (KVM cannot emulate {bytes(run[49 : 49 + size]).hex(' ')})"
        return text
    if reason == KVM_EXIT_FAIL_ENTRY:
        return f"KVM_EXIT_FAIL_ENTRY, hardware reason {struct.unpack_from('<Q', run, 32)[0]:#x}"
    known = {KVM_EXIT_HLT: "KVM_EXIT_HLT", KVM_EXIT_SHUTDOWN: "KVM_EXIT_SHUTDOWN (triple fault)"}
    return known.get(reason, f"KVM exit reason {reason}")


def _ioctl(calls: KvmCalls, fd: int, request: int, arg: int | bytearray, *, doing: str = "") -> int:
    try:
        return calls.ioctl(fd, request, arg)
    except OSError as e:
        name = IOCTL_NAMES[request]
        # Another hypervisor (VirtualBox, VMware) holds the processor's virtualisation.
        kind = "busy" if e.errno == errno.EBUSY and request == KVM_CREATE_VM else "dies"
        raise _Stopped(kind, " ".join(filter(None, [f"{name}: {e.strerror}", doing]))) from e


def _supported_cpuid(calls: KvmCalls, kvm: int) -> bytearray:
    entries = 256
    table = bytearray(8 + 40 * entries)
    struct.pack_into("<I", table, 0, entries)
    _ioctl(calls, kvm, KVM_GET_SUPPORTED_CPUID, table)
    return table


def _has_long_mode(table: bytearray) -> bool:
    count = min(struct.unpack_from("<I", table)[0], (len(table) - 8) // 40)
    for i in range(count):
        function, _, _, _, _, _, edx = struct.unpack_from("<7I", table, 8 + 40 * i)
        if function == 0x80000001:
            return bool(edx >> 29 & 1)
    return False


def _start_sregs(calls: KvmCalls, vcpu: int) -> bytearray:
    """Flat 32-bit protected mode without paging, as a PVH loader enters a kernel."""
    sregs = bytearray(312)
    _ioctl(calls, vcpu, KVM_GET_SREGS, sregs)
    # kvm_segment: base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding
    code = struct.pack("<QIH10B", 0, 0xFFFFFFFF, _CODE32_SELECTOR, 11, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    data = struct.pack("<QIH10B", 0, 0xFFFFFFFF, _DATA_SELECTOR, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    sregs[0:24] = code
    for i in range(1, 6):
        sregs[24 * i : 24 * i + 24] = data
    # After tr, ldt, gdt and idt: cr0 (PE, ET), cr2, cr3, cr4, cr8, efer; the APIC base stays.
    struct.pack_into("<6Q", sregs, 224, 0x11, 0, 0, 0, 0, 0)
    return sregs


def assemble(listing: tuple[tuple[str, str], ...]) -> bytes:
    """The machine code of a listing."""
    return b"".join(bytes.fromhex(code) for code, _ in listing)


def _with_reports(listing: Listing, first: int) -> bytes:
    # mov al, number; out _STEP_PORT, al: the same bytes in both modes.
    return b"".join(
        assemble(code) + bytes([0xB0, number, 0xE6, _STEP_PORT])
        for number, (_, code) in enumerate(listing, first)
    )


def build_memory() -> mmap.mmap:
    """The guest's memory before it starts: page tables, descriptor tables, data and code."""
    memory = mmap.mmap(-1, _MEMORY)

    def put(where: int, what: bytes) -> None:
        memory[where : where + len(what)] = what

    put(_PML4, struct.pack("<Q", _PDPT | 3))
    put(_PDPT, struct.pack("<Q", _PD | 3))
    put(_PD, struct.pack("<Q", 0x83))
    # Null, flat 32-bit code, flat 64-bit code, flat data, and a 64-bit TSS of two entries.
    tss = 0x0000890000000067 | _TSS << 16
    put(_GDT, struct.pack(
        "<6Q", 0, 0x00CF9B000000FFFF, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, tss, 0
    ))  # fmt: skip
    put(_GDT_POINTER, struct.pack("<HQ", 6 * 8 - 1, _GDT))
    # Only #UD (vector 6) has a gate; any other exception ends in a triple fault, which is an exit.
    gate = struct.pack("<HHBBHII", _HANDLER & 0xFFFF, 0x10, 0, 0x8E, _HANDLER >> 16, 0, 0)
    put(_IDT + 6 * 16, gate)
    put(_IDT_POINTER, struct.pack("<HQ", 32 * 16 - 1, _IDT))
    # What cmpxchg16b finds, what paddq adds, and what GS reaches and cmpxchg16b puts in place.
    put(_DATA, struct.pack("<5Q", 1, 2, _ADDEND, 0, _SWAPPED))
    put(_CODE, _with_reports(PROTECTED, 1) + assemble(FAR_RETURN))
    put(_CODE64, _with_reports(LONG, len(PROTECTED) + 1) + assemble(REPORT_VALUE))
    put(_HANDLER, assemble(SKIP_UD2))
    return memory


def main(argv: list[str]) -> int:
    """Print the steps and the outcome as JSON lines; the status is 0 whatever the outcome."""

    def say(line: dict[str, str]) -> None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    device = argv[1] if len(argv) > 1 else "/dev/kvm"
    outcome = run_vcpu(LinuxCalls(), device, on_step=lambda step: say({"step": step}))
    say({"outcome": outcome.kind, "detail": outcome.detail})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
