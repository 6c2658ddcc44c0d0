"""The distribution targets: what they ask banger for, and what they make of a kernel's package."""

from __future__ import annotations

import gzip
import io
import sys
import tarfile
from pathlib import Path

import pytest
from tools import distros
from tools.steps import StepFailed

from banger.image.recipe import load_recipe

BANGER = f"""#!{sys.executable}
import os, pathlib, sys
log = pathlib.Path(__file__).with_name("log")
with log.open("a") as f:
    f.write("\\t".join(sys.argv[1:]) + "\\n")
words = sys.argv[1:]
if words[:2] == ["kernel", "show"]:
    sys.exit(0 if log.with_name("has-kernel").exists() else 1)
if words[:2] == ["vm", "run"]:
    package = log.with_name("package")
    if not package.exists():
        sys.exit("banger: no such registry")
    sys.stdout.buffer.write(package.read_bytes())
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of a banger that only writes down what it is asked."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "banger"
    program.write_text(BANGER)
    program.chmod(0o755)
    monkeypatch.setattr(distros, "VENV", tmp_path)
    monkeypatch.setattr(distros, "MANUAL", tmp_path / "manual")
    monkeypatch.delenv("KERNEL", raising=False)
    monkeypatch.delenv("ALPINE_RELEASE", raising=False)
    return tmp_path / "bin" / "log"


def lines(log: Path) -> list[list[str]]:
    return [line.split("\t") for line in log.read_text().splitlines()]


def segment(entries: dict[str, bytes], *, ends: bool) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.pax_headers = {"APK-TOOLS.checksum.SHA1": "0" * 40}
            tar.addfile(info, io.BytesIO(content))
        whole = tar.offset
    return gzip.compress(out.getvalue() if ends else out.getvalue()[:whole])


def apk() -> bytes:
    """As abuild makes them: signature, control and data, each a gzip stream of its own, of which
    only the last one ends as a tar does."""
    return (
        segment({".SIGN.RSA.x": b"signature"}, ends=False)
        + segment({".PKGINFO": b"pkgname = linux-virt"}, ends=False)
        + segment(
            {
                "boot/vmlinuz-virt": b"kernel",
                "boot/config-6.6-0-virt": b"CONFIG_X=y",
                "lib/modules/6.6-0-virt/kernel/x.ko.gz": b"module",
            },
            ends=True,
        )
    )


def test_a_package_becomes_what_kernel_import_takes(asked: Path, tmp_path: Path) -> None:
    package = tmp_path / "linux-virt.apk"
    package.write_bytes(apk())
    place = distros.import_kernel("alpine", given=package, release=None)
    assert {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()} == {
        "vmlinuz", "config", "modules/6.6-0-virt/kernel/x.ko.gz",
    }  # fmt: skip
    assert lines(asked) == [
        ["kernel", "import", "alpine-virt", "--from", str(place), "--distro", "alpine", "--force"]
    ]


def test_a_directory_serves_as_well(asked: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "usr/lib/modules/6.6_1").mkdir(parents=True)
    (tree / "boot").mkdir()
    (tree / "boot/vmlinuz-6.6_1").write_bytes(b"kernel")
    place = distros.import_kernel("void", given=tree, release=None)
    assert (place / "vmlinuz").read_bytes() == b"kernel"
    assert (place / "modules/6.6_1").is_dir()
    assert not (place / "unpacked").exists()


def test_alpine_s_own_manager_fetches_the_package_where_it_can(asked: Path) -> None:
    asked.with_name("package").write_bytes(apk())
    place = distros.import_kernel("alpine", given=None, release="3.21")
    assert (place / "vmlinuz").read_bytes() == b"kernel"
    assert lines(asked)[0][:6] == ["vm", "run", "--rm", "--nat", "--image", "alpine:3.21"]


@pytest.mark.parametrize("distro", ["alpine", "void"])
def test_a_kernel_that_cannot_be_had_names_the_alternative(asked: Path, distro: str) -> None:
    with pytest.raises(StepFailed) as caught:
        distros.import_kernel(distro, given=None, release=None)
    assert f"make {distro}-kernel KERNEL=FILE" in str(caught.value)
    assert "default_kernel_ref" in str(caught.value)
    assert not (distros.MANUAL / f"{distro}-kernel").exists()
    assert list(distros.MANUAL.iterdir()) == []


def test_what_is_no_package_is_refused(asked: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nonsense")
    with pytest.raises(StepFailed, match="no package"):
        distros.import_kernel("void", given=tmp_path / "x", release=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StepFailed, match="no kernel"):
        distros.import_kernel("void", given=tmp_path / "empty", release=None)


def test_a_root_is_built_into_a_file(asked: Path) -> None:
    assert distros.main(["rootfs", "void", "--archive 'a b.tar.xz'"]) == 0
    target = str(distros.MANUAL / "rootfs-void.sqfs")
    assert lines(asked) == [
        ["image", "build", "--recipe", "void", "--output", target, "--force",
         "--archive", "a b.tar.xz"]
    ]  # fmt: skip


def test_another_release_is_built_from_a_copy_of_the_recipe(
    asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALPINE_RELEASE", "3.21")
    assert distros.main(["rootfs", "alpine", ""]) == 0
    recipe = load_recipe(lines(asked)[0][3]).recipe
    assert (recipe.name, recipe.source) == ("alpine", "oci:alpine:3.21")
    assert distros.alpine_release() == "3.20"


def test_an_image_is_registered_with_the_distribution_s_kernel_if_it_is_here(asked: Path) -> None:
    with pytest.raises(StepFailed, match="make rootfs-alpine"):
        distros.register("alpine")
    distros.MANUAL.mkdir()
    (distros.MANUAL / "rootfs-alpine.sqfs").touch()
    distros.register("alpine")
    asked.with_name("has-kernel").touch()
    distros.register("alpine")
    kernels = [words[7] for words in lines(asked) if words[0] == "image"]
    assert kernels == ["debian-6.12-cloud", "alpine-virt"]
