"""The ELF kernel inside a distribution's `vmlinuz`, the form in which both VMMs load it.

Pure functions over bytes. Source: Linux, Documentation/arch/x86/boot.rst (setup header, protocol
2.08 and later: payload_offset and payload_length).
"""

from __future__ import annotations

import struct

from banger.kernel.compression import decompress

_ELF = b"\x7fELF"
_EM_X86_64 = 62
_LIMIT_BYTES = 512 << 20


def extract_vmlinux(image: bytes) -> bytes:
    """The uncompressed ELF of a bzImage; an ELF is returned as it is.

    Raises:
        ValueError: no x86 kernel image, damaged, or its payload is no x86-64 ELF.
    """
    elf = image if image.startswith(_ELF) else _payload(image)
    # e_ident[EI_CLASS] and e_machine, elf(5).
    if not elf.startswith(_ELF) or elf[4:5] != b"\x02":
        raise ValueError("its payload is no 64-bit ELF file")
    (machine,) = struct.unpack_from("<H", elf, 18)
    if machine != _EM_X86_64:
        raise ValueError(f"its payload is for another processor (ELF machine {machine})")
    return elf


def _payload(image: bytes) -> bytes:
    if len(image) < 0x260 or image[0x202:0x206] != b"HdrS":
        raise ValueError("it is neither an ELF file nor an x86 bzImage")
    (version,) = struct.unpack_from("<H", image, 0x206)
    if version < 0x208:
        raise ValueError(f"its boot protocol {version >> 8}.{version & 255:02} is older than 2.08")
    setup_sectors = image[0x1F1] or 4  # 0 means 4, for the sake of very old loaders
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length]
    if len(payload) != length or not length:
        raise ValueError("it ends within its payload")
    return decompress(payload, limit_bytes=_LIMIT_BYTES)
