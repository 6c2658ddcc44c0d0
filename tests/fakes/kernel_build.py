"""A place to build kernels in: an installation, and an apt that hands out small sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from banger.api.records import KernelRecord
from banger.config.paths import Paths
from banger.disk.background import Job
from banger.kernel import apt
from banger.kernel import build as kernel_build
from banger.kernel.build import build_kernel, plan_build
from banger.kernel.build_recipe import get_build_recipe, read_options
from banger.kernel.fragment import parse_fragment
from banger.progress import Silent
from fakes.kernel_source import FakeSource

NAME = "generic-6.12"
RECIPE = get_build_recipe(NAME)
OPTIONS = read_options(RECIPE)


class Report(Silent):
    """What a user would read."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, stage: str, label: str, detail: str = "") -> None:
        self.lines.append(f"{label} ({detail})" if detail else label)


class Place:
    """An installation with an agent, and an apt that hands out a small source package."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths = Paths(
            state=root / "state", cache=root / "cache", runtime=root / "run",
            config_file=root / "config.toml",
        )  # fmt: skip
        self.agent = root / "agent"
        self.agent.write_bytes(b"agent")
        self.source = FakeSource(root, (n for n, value in OPTIONS.items() if value is not None))
        self.version = "6.12.9-1"
        self.report = Report()
        monkeypatch.setattr(kernel_build, "agent_binary", lambda arch: self.agent)
        monkeypatch.setattr(apt, "find_newest", self._find)
        monkeypatch.setattr(apt, "download", self._download)

    def _find(self, pattern: str, **_: object) -> apt.KernelPackage:
        assert pattern == r"linux\-source\-6\.12"
        return apt.KernelPackage(
            name="linux-source-6.12", version=self.version, sha256="aa", size_bytes=150_000_000
        )

    def _download(self, package: apt.KernelPackage, directory: Path, *, job: Job) -> Path:
        return self.source.write_package(directory / "linux-source.deb")

    async def build(self, fragment: str = "", **changes: Any) -> KernelRecord:
        options = {k: changes.pop(k) for k in ("force", "reserve_bytes") if k in changes}
        name = changes.pop("name", NAME)
        plan = plan_build(name, RECIPE, added=parse_fragment(fragment, what="mine"), **changes)
        return await build_kernel(
            self.paths, plan, reporter=self.report, **{"reserve_bytes": 0, **options}
        )

    def left_behind(self, name: str = NAME) -> list[str]:
        """What is there beside locks: an entry, cached artefacts, staging, a log."""
        cache = self.paths.build_cache / "kernels"
        return [
            str(path.relative_to(self.paths.state.parent))
            for root in (self.paths.kernels, cache, cache / name)
            if root.exists()
            for path in root.iterdir()
            if not path.name.endswith("lock") and path != cache / name
        ]
