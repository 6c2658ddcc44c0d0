"""An image whose replacement was cut between the new one's name and the old one's end."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.config.paths import Paths
from banger.daemon.leftovers import remove_shadowed
from banger.image.entries import ImageManifest, delete_image, list_images, write_manifest


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(
        state=tmp_path / "state",
        cache=tmp_path / "cache",
        runtime=tmp_path / "run",
        config_file=tmp_path / "config.toml",
    )


def store(paths: Paths, number: int, name: str = "app") -> str:
    directory = paths.images / f"{number:032x}"
    directory.mkdir(parents=True)
    write_manifest(
        directory,
        ImageManifest(
            name=name, distro="", arch="amd64", kernel_ref="k", rootfs_file="rootfs.sqfs",
            rootfs_sha256="", rootfs_bytes=0, rootfs_mtime_ns=0,
        ),
    )  # fmt: skip
    return directory.name


def ids(paths: Paths) -> set[str]:
    return {image.id for image in list_images(paths)}


def test_the_older_of_two_images_of_a_name_goes(paths: Paths) -> None:
    # Not by their ids, which are made by chance.
    old, other, new = store(paths, 9), store(paths, 5, "other"), store(paths, 1)
    remove_shadowed(paths, set())
    assert ids(paths) == {new, other}
    assert old not in ids(paths)


def test_an_image_that_a_vm_has_stays(paths: Paths) -> None:
    old, new = store(paths, 9), store(paths, 1)
    remove_shadowed(paths, {old})
    assert ids(paths) == {old, new}


@pytest.mark.parametrize("number", [9, 1])
def test_the_image_that_is_named_by_its_id_is_deleted(paths: Paths, number: int) -> None:
    both = {store(paths, 9), store(paths, 1)}
    delete_image(paths, f"{number:032x}")
    assert ids(paths) == both - {f"{number:032x}"}
