"""Kernel pulls from an apt that is the test's, with a package whose content is."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from banger.api.records import KernelRecord
from banger.config.paths import Paths
from banger.disk.background import Job
from banger.kernel import apt, pull, pull_kernel
from banger.kernel.base_initrd import build_module_members, write_members
from banger.progress import Silent

NAME = "debian-6.12-cloud"


class KernelWorld:
    """An agent, and packages that a fake apt hands out. Counts the downloads."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths = Paths(
            state=tmp_path / "state",
            cache=tmp_path / "cache",
            runtime=tmp_path / "run",
            config_file=tmp_path / "config.toml",
        )
        self.agent = tmp_path / "agent"
        self.agent.write_bytes(b"agent 1")
        self.version = "6.12.1-1"
        self.downloads = 0
        self.hold = threading.Event()
        self.hold.set()
        self.arrived = threading.Event()
        self.fail: Exception | None = None
        monkeypatch.setattr(pull, "agent_binary", lambda arch: self.agent)
        monkeypatch.setattr(apt, "find_newest", self._find)
        monkeypatch.setattr(apt, "download", self._download)
        monkeypatch.setattr(pull, "build_entry_files", self._build)

    def _find(self, *args: object, **options: object) -> apt.KernelPackage:
        return apt.KernelPackage(name="linux", version=self.version, sha256="aa", size_bytes=1)

    def _download(self, package: apt.KernelPackage, directory: Path, *, job: Job) -> Path:
        self.downloads += 1
        self.arrived.set()
        while not self.hold.wait(0.01):
            job.check()
        return directory / "linux.deb"

    def _build(self, package: Path, target: Path, *, job: Job) -> None:
        (target / "vmlinux").write_text(f"kernel {self.version}")
        if self.fail:
            raise self.fail
        (target / "modules.sqfs").write_text("modules")
        (target / "release").write_text("6.12.1-cloud")
        write_members(target / "boot-modules.cpio", build_module_members({"a.ko": b"A"}))

    async def pull(self, *, force: bool = False, reserve_bytes: int = 0) -> KernelRecord:
        return await pull_kernel(
            self.paths, NAME, reporter=Silent(), force=force, reserve_bytes=reserve_bytes
        )

    def left_behind(self) -> list[str]:
        return [
            str(path)
            for root in (self.paths.kernels, self.paths.build_cache / "kernels" / NAME)
            if root.exists()
            for path in root.iterdir()
            if not path.name.endswith("lock")
        ]
