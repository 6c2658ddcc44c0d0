"""The ELF inside a bzImage, for each compression; and Debian packages built by dpkg-deb."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from banger import zstd
from banger.kernel.deb import open_package_data
from banger.kernel.vmlinux import extract_vmlinux

ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, 62) + b"kernel" * 1000
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "zstd": lambda data: zstd.compress(data) + struct.pack("<I", len(data)),
    "xz": lambda data: lzma.compress(data) + struct.pack("<I", len(data)),
    "gzip": gzip.compress,
}


def build_bzimage(payload: bytes, *, version: int = 0x20F, sectors: int = 3) -> bytes:
    """A setup header as the boot protocol has it, some code, then the payload."""
    image = bytearray((sectors + 1) * 512)
    image[0x1F1] = sectors
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, version)
    stub = b"decompressor, with a magic of its own: \x28\xb5\x2f\xfd \x1f\x8b" * 7
    struct.pack_into("<II", image, 0x248, len(stub), len(payload))
    return bytes(image) + stub + payload + b"signature block"


@pytest.mark.parametrize("packer", PACKERS)
def test_the_payload_comes_out_whatever_its_compression(packer: str) -> None:
    assert extract_vmlinux(build_bzimage(PACKERS[packer](ELF))) == ELF


def test_an_elf_is_taken_as_it_is() -> None:
    assert extract_vmlinux(ELF) == ELF


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (b"", "neither"),
        (b"MZ" + bytes(4096), "neither"),
        (build_bzimage(zstd.compress(ELF), version=0x200), "older than 2.08"),
        (build_bzimage(zstd.compress(ELF))[:2400], "ends within"),
        (build_bzimage(zstd.compress(ELF)[:-9]), "cut off|damaged"),
        (build_bzimage(b"lzo?" * 10), "not xz, zstd or gzip"),
        (build_bzimage(zstd.compress(b"#!/bin/sh\n")), "no 64-bit ELF"),
        (build_bzimage(zstd.compress(ELF[:18] + b"\xb7\x00" + ELF[20:])), "another processor"),
    ],
)
def test_anything_else_is_refused_with_a_reason(image: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        extract_vmlinux(image)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
@pytest.mark.parametrize("compression", ["xz", "zstd", "gzip", "none"])
def test_a_package_of_dpkgs_is_read(tmp_path: Path, compression: str) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: x\nVersion: 1\nArchitecture: amd64\nMaintainer: a <a@b>\nDescription: x\n"
    )
    (tree / "boot").mkdir()
    (tree / "boot/vmlinuz-1").write_bytes(ELF)
    package = tmp_path / "x.deb"
    done = subprocess.run(
        ["dpkg-deb", f"-Z{compression}", "--root-owner-group", "-b", tree, package],
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"this dpkg-deb does not write {compression}")
    with open_package_data(package) as tar:
        found = {
            info.name: source.read()
            for info in tar
            if (source := tar.extractfile(info)) is not None
        }
    assert found == {"./boot/vmlinuz-1": ELF}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"!<arch>\n", b"!<arch>\n" + b"x" * 60])
def test_what_is_no_package_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.deb").write_bytes(content)
    with pytest.raises(ValueError, match="package|archive"), open_package_data(tmp_path / "x.deb"):
        pass
