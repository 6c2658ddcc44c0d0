"""ENTRYPOINT and CMD on the command line, and the names of images in files."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from banger.api.records import ImageConfig
from banger.cli.image_command import absolute_image, check_options, compose
from banger.errors import BangerError

BOTH = ImageConfig(entrypoint=("run", "-v"), cmd=("serve", "80"))
NONE = ImageConfig()


@pytest.mark.parametrize(
    ("config", "argv", "entrypoint", "default", "expected"),
    [
        (BOTH, ("x",), None, False, ("run", "-v", "x")),
        (BOTH, ("x",), "sh", False, ("sh", "x")),
        (BOTH, ("x",), "", False, ("x",)),
        (BOTH, None, None, False, ()),
        (BOTH, None, "sh", False, ("sh",)),
        (BOTH, None, "", False, ()),
        (BOTH, None, None, True, ("run", "-v", "serve", "80")),
        (BOTH, None, "sh", True, ("sh", "serve", "80")),
        (BOTH, None, "", True, ("serve", "80")),
        (NONE, ("x", "y"), None, False, ("x", "y")),
        (None, ("x",), None, False, ("x",)),
        (None, ("x",), "sh", False, ("sh", "x")),
    ],
)
def test_what_runs_is_what_container_users_expect(
    config: ImageConfig | None,
    argv: tuple[str, ...] | None,
    entrypoint: str | None,
    default: bool,
    expected: tuple[str, ...],
) -> None:
    assert compose(config, argv, entrypoint=entrypoint, default_command=default) == expected


@pytest.mark.parametrize("config", [NONE, None])
def test_an_image_without_a_command_of_its_own_says_so(config: ImageConfig | None) -> None:
    with pytest.raises(BangerError, match="neither ENTRYPOINT nor CMD"):
        compose(config, None, entrypoint=None, default_command=True)


def test_the_default_command_takes_no_other() -> None:
    with pytest.raises(click.UsageError):
        check_options(("x",), default_command=True, detach=False)
    with pytest.raises(click.UsageError):
        check_options(None, default_command=True, detach=True)
    check_options(None, default_command=True, detach=False)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("oci-archive:a.tar", "oci-archive:{here}/a.tar"),
        ("docker-archive:b/a.tar:tag", "docker-archive:{here}/b/a.tar:tag"),
        ("oci:./dir", "oci:{here}/dir"),
        ("oci-archive:/abs.tar", "oci-archive:/abs.tar"),
        ("oci:v1", "oci:v1"),
        ("alpine:3.20", "alpine:3.20"),
        ("name", "name"),
    ],
)
def test_paths_of_archives_are_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_image(image) == expected.format(here=tmp_path)
