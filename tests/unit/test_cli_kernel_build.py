"""`banger kernel build`: what it asks the daemon for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from banger.api.catalog import BuildKernel
from banger.api.records import KernelRecord
from banger.cli import kernel_build
from fakes.command_line import CommandLine

RECORD = KernelRecord(
    name="mine", distro="debian", arch="amd64", kernel_version="6.12.9-1", release="6.12.9-banger",
    source="build:linux-source-6.12=6.12.9-1", agent_version="0" * 64, imported_at="",
    directory="/k", sha256={"vmlinux": "1" * 64},
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[BuildKernel]:
    """The parameters that reached the daemon; it answers with `RECORD`."""
    asked: list[BuildKernel] = []

    class Answer:
        def result(self, kind: type[Any]) -> Any:
            assert kind is KernelRecord
            return RECORD

    class FakeServer:
        @contextlib.contextmanager
        def stream(self, method: str, params: BuildKernel, painter: Any) -> Iterator[Answer]:
            assert method == "kernel.build"
            asked.append(params)
            yield Answer()

    monkeypatch.setattr(kernel_build, "Server", FakeServer)
    return asked


def test_a_build_needs_only_a_name(cli: CommandLine, asked: list[BuildKernel]) -> None:
    done = cli("kernel", "build", "generic-6.12")
    assert (done.status, done.out) == (0, "mine 6.12.9-1\n")
    assert asked == [BuildKernel(recipe="generic-6.12")]


def test_files_travel_as_text_and_archives_as_paths(
    cli: CommandLine, asked: list[BuildKernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("more.config", "linux-6.12.9.tar.xz", "linux.sign", "key.asc"):
        Path(name).write_text(f"the text of {name}")
    done = cli(
        "kernel", "build", "generic-6.12", "--name", "mine", "--config-fragment", "more.config",
        "--jobs", "3", "--force", "--source", "linux-6.12.9.tar.xz", "--signature", "linux.sign",
        "--signing-key", "key.asc", "--json",
    )  # fmt: skip
    assert done.status == 0
    assert '"kernel_version": "6.12.9-1"' in done.out
    assert asked == [
        BuildKernel(
            recipe="generic-6.12",
            name="mine",
            fragment="the text of more.config",
            jobs=3,
            force=True,
            source=str(tmp_path / "linux-6.12.9.tar.xz"),
            signature=str(tmp_path / "linux.sign"),
            signing_key="the text of key.asc",
        )
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\xff\xfe", "it is no text"), (b"#" * ((1 << 20) + 1), "it is larger than 1 MiB")],
)
def test_a_fragment_that_is_none_is_refused_here(
    cli: CommandLine, asked: list[BuildKernel], tmp_path: Path, content: bytes, words: str
) -> None:
    file = tmp_path / "more.config"
    file.write_bytes(content)
    done = cli("kernel", "build", "generic-6.12", "--config-fragment", str(file))
    assert done.status == 1
    assert f"reading {file}: {words}" in done.err
    assert "banger kernel build --help" in done.err
    assert asked == []
