"""Image builds whose mmdebstrap, apt-get and npm are the test's own programs; sqfstar is real."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from banger.api.records import ImageRecord
from banger.config.paths import Paths
from banger.image import build_image, load_recipe
from banger.progress import Silent

MMDEBSTRAP = """\
import io, os, sys, tarfile, time
place = os.path.dirname(os.path.realpath(__file__))
with open(place + "/calls", "a") as f:
    f.write("call\\n")
print("I: running apt-get update...", file=sys.stderr, flush=True)
while os.path.exists(place + "/hold"):
    time.sleep(0.01)
tar = tarfile.open(fileobj=sys.stdout.buffer, mode="w|")
for name in ("./", "./etc/", "./tmp/"):
    info = tarfile.TarInfo(name); info.type = tarfile.DIRTYPE; info.mode = 0o755
    tar.addfile(info)
for name in ("./etc/issue", "./tmp/left"):
    info = tarfile.TarInfo(name); info.size = 6; info.mtime = 1500000000
    tar.addfile(info, io.BytesIO(b"hello\\n"))
if os.path.exists(place + "/fail"):
    sys.stdout.buffer.flush()
    print("E: Unable to locate package mkae", file=sys.stderr)
    sys.exit(25)
tar.close()
"""
RECIPE = """
name = "small"
distro = "debian"
suite = "bookworm"
arch = ["amd64"]
from = "debootstrap"
kernel_ref = "debian-6.12-cloud"
packages = ["make"]
description = "for a test"

[[files]]
path = "/etc/motd"
content = "welcome"

[[downloads]]
name = "tool"
npm = "@x/tool"
version = "1.0"
sha512 = "{sha512}"
member = "package/tool"
path = "/usr/local/bin/tool"
optional = true
"""


class Listener(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.labels: list[str] = []
        self.began = asyncio.Event()

    def stage(self, stage: str, label: str, detail: str = "") -> None:
        self.labels.append(f"{label}: {detail}")
        if detail == "reading package lists":
            self.began.set()

    def warn(self, message: str) -> None:
        self.warnings.append(message)


class BuildWorld:
    """An installation, a small recipe, and the programs that a build calls."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths = Paths(
            state=tmp_path / "state",
            cache=tmp_path / "cache",
            runtime=tmp_path / "run",
            config_file=tmp_path / "config.toml",
        )
        self.programs = tmp_path / "bin"
        self.programs.mkdir()
        self.write_program("mmdebstrap", f"#!{sys.executable}\n{MMDEBSTRAP}")
        self.write_program("apt-get", "#!/bin/sh\n")
        self.write_program("npm", "#!/bin/sh\necho 'npm error 404' >&2; exit 1\n")
        monkeypatch.setenv("PATH", f"{self.programs}:{os.environ['PATH']}")
        # Another user's build differs in one argument, and needs ids that this host may not have.
        monkeypatch.setattr("banger.image.debian.is_root", lambda: True)
        self.recipe = tmp_path / "small.toml"
        self.recipe.write_text(RECIPE.replace("{sha512}", "0" * 128))
        self.listener = Listener()

    def write_program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def switch(self, name: str, *, on: bool) -> None:
        if on:
            (self.programs / name).touch()
        else:
            (self.programs / name).unlink()

    @property
    def calls(self) -> int:
        log = self.programs / "calls"
        return len(log.read_text().splitlines()) if log.exists() else 0

    async def build(
        self, name: str = "small", *, refresh: bool = False, reserve_bytes: int = 0
    ) -> ImageRecord:
        return await build_image(
            self.paths,
            load_recipe(str(self.recipe)),
            name=name,
            reporter=self.listener,
            refresh=refresh,
            reserve_bytes=reserve_bytes,
        )

    def left_behind(self) -> list[str]:
        return [
            str(path)
            for root in (self.paths.images, self.paths.build_cache / "images" / "small")
            if root.exists()
            for path in root.iterdir()
            if not path.name.endswith("lock")
        ]
