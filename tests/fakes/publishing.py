"""Two installations and a web server between them: one publishes bundles, one pulls."""

from __future__ import annotations

import io
import lzma
import shutil
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from banger.api import catalog as c
from banger.api.records import ImageRecord, KernelRecord
from banger.catalog.index import IndexEntry, bundle_name, publish_index, with_entry
from banger.config.paths import Paths
from banger.config.settings import Settings
from banger.daemon import given
from banger.files import sha256_file
from banger.image.published import export_image
from banger.kernel.requirements import BOOT_MODULES
from banger.progress import Silent
from fakes.signing import make_key
from fakes.web import Web

KEY = make_key(bytes(range(32)))
ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, 62) + bytes(64)
VMLINUX = ELF + b"Linux version 6.12.9-test (somebody) #1\n\0"
SQUASHFS = b"hsqs" + b"a root filesystem" * 5000
EXT4 = bytes(1024 + 0x38) + b"\x53\xef" + b"\1" * 4000
CATALOG_KERNEL = "debian-6.12-cloud"
CATALOG_IMAGE = "debian-bookworm-minimal"

needs_tools = pytest.mark.skipif(
    any(
        shutil.which(t, path="/usr/sbin:/sbin:/usr/bin:/bin") is None
        for t in ("sqfstar", "unsquashfs", "depmod")
    ),
    reason="squashfs-tools or kmod is not installed",
)


class Report(Silent):
    """What a user would read."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def stage(self, stage: str, label: str, detail: str = "") -> None:
        self.lines.append(label)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


class Place:
    """Two installations and a web server between them: one publishes, one pulls."""

    def __init__(self, root: Path, web: Web) -> None:
        self.root, self.web = root, web
        self.report = Report()
        self.publisher = self.paths("publisher")
        self.vms: list[Any] = []
        self.daemon = self.client()

    def paths(self, name: str) -> Paths:
        return Paths(
            state=self.root / name / "state", cache=self.root / name / "cache",
            runtime=self.root / name / "run", config_file=self.root / name / "config.toml",
        )  # fmt: skip

    def client(self, *, index: bool = True) -> Any:
        configured: dict[str, Any] = {}
        if index:
            configured = {
                "index_url": f"{self.web.url}/index.json",
                "index_keys": (str(KEY.public),),
            }
        return SimpleNamespace(
            paths=self.paths("client"),
            settings=Settings(disk_reserve="1M", **configured),
            store=SimpleNamespace(list=lambda: self.vms),
        )

    def file(self, name: str, content: bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    async def register(self, daemon: Any = None, **changes: Any) -> ImageRecord:
        fields: dict[str, Any] = {
            "name": "mine", "rootfs": str(self.file("root.sqfs", SQUASHFS)),
            "kernel_ref": CATALOG_KERNEL,
        }  # fmt: skip
        params = c.RegisterImage(**{**fields, **changes})
        return await given.image_register(daemon or self.daemon, self.report, params)  # type: ignore[arg-type]

    async def publish(self, *entries: IndexEntry) -> None:
        index = None
        for entry in entries:
            index = with_entry(index, entry)
        assert index is not None
        publish_index(self.web.root / "index.json", index, KEY)

    def bundle(self, content: bytes, done: c.Exported) -> IndexEntry:
        new = self.file("www/new", content)
        sha256 = sha256_file(new)
        file = bundle_name(done.name, done.arch, sha256)
        new.rename(new.with_name(file))
        return IndexEntry(
            **msgspec.structs.asdict(done), file=file, sha256=sha256, size_bytes=len(content)
        )

    async def publish_image(self, name: str = "mine", content: bytes = SQUASHFS) -> IndexEntry:
        publisher = SimpleNamespace(**{**vars(self.daemon), "paths": self.publisher})
        root = self.file(f"published/{name}", content)
        await self.register(publisher, name=name, rootfs=str(root))
        out = io.BytesIO()
        done = await export_image(self.publisher, name, write=out.write, reporter=Silent())
        entry = self.bundle(out.getvalue(), done)
        await self.publish(entry)
        return entry

    def left_behind(self) -> list[str]:
        return [
            path.name
            for directory in (self.daemon.paths.images, self.daemon.paths.kernels)
            if directory.exists()
            for path in directory.iterdir()
            if path.name.startswith(".") and not path.name.endswith(".lock")
        ]


def kernel_directory(root: Path, *, modules: bool = True) -> Path:
    """What a user might have: a compressed module, and links to the sources."""
    directory = root / "given"
    (directory / "modules" / "kernel" / "fs").mkdir(parents=True)
    (directory / "vmlinux").write_bytes(VMLINUX)
    source = root / "empty.c"
    source.write_text('__attribute__((section(".modinfo"))) char v[] = "license=GPL";\n')
    subprocess.run(["gcc", "-c", str(source), "-o", str(root / "empty.o")], check=True)
    module = (root / "empty.o").read_bytes()
    (directory / "modules/kernel/fs/overlay.ko.xz").write_bytes(lzma.compress(module))
    built_in = [f"kernel/x/{name}.ko\n" for name in BOOT_MODULES if name != "overlay"]
    (directory / "modules/modules.builtin").write_text("".join(built_in))
    (directory / "modules/build").symlink_to("/usr/src/somewhere")
    if not modules:
        shutil.rmtree(directory / "modules")
    return directory


async def import_kernel(place: Place, directory: Path, **changes: Any) -> KernelRecord:
    params = c.ImportKernel(name="own", directory=str(directory), distro="debian")
    params = msgspec.structs.replace(params, **changes)
    return await given.kernel_import(place.daemon, place.report, params)  # type: ignore[arg-type]
