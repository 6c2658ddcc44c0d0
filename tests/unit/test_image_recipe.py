"""Recipes: strict, and every shipped one loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.image.recipe import list_recipes, load_recipe

GOOD = """
name = "x"
distro = "debian"
suite = "bookworm"
arch = ["amd64"]
from = "debootstrap"
kernel_ref = "k"
packages = ["make"]
"""


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "x.toml").write_text(text)
    return str(tmp_path / "x.toml")


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_loads_under_its_own_name(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.recipe.name == name
    assert loaded.recipe.kernel_ref == "debian-6.12-cloud"


def test_the_default_image_has_what_the_specification_lists() -> None:
    recipe = load_recipe("debian-bookworm").recipe
    assert {
        "systemd", "systemd-sysv", "dbus", "openssh-server", "docker.io", "git", "make", "jq",
        "tmux", "curl", "ca-certificates", "sudo", "build-essential", "python3", "vim", "less",
        "iproute2", "procps", "rsync", "zstd", "unzip", "kmod",
    } <= set(recipe.packages)  # fmt: skip
    assert [(d.name, d.optional) for d in recipe.downloads] == [("mise", True)]
    assert recipe.features == ("docker",)


def test_the_minimal_image_has_no_init_system() -> None:
    assert not any(
        p.startswith("systemd") for p in load_recipe("debian-bookworm-minimal").recipe.packages
    )


def test_scripts_and_files_come_along_with_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "setup.sh").write_text("true")
    text = GOOD + 'scripts = ["setup.sh"]\n[[files]]\npath = "/etc/motd"\nsource = "setup.sh"\n'
    assert load_recipe(write(tmp_path, text)).sources == {"setup.sh": b"true"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ('packges = ["make"]\n', "packges"),
        ('[[files]]\npath = "/a"\ncontent = ""\nowner = "x"\n', "owner"),
        ('[[files]]\npath = "/a"\n', "source and content"),
        ('[[files]]\npath = "etc/a"\ncontent = ""\n', "absolute"),
        ('[[files]]\npath = "/etc/../a"\ncontent = ""\n', "plain"),
        ('[[files]]\npath = "/a"\ncontent = ""\nmode = "rwx"\n', "mode"),
        ('[[files]]\npath = "/a"\ncontent = ""\n' * 2, "same path"),
        ('scripts = ["/etc/passwd"]\n', "outside"),
        ('scripts = ["../x"]\n', "outside"),
        ('scripts = ["none.sh"]\n', "none.sh"),
        ('exclude_paths = ["usr/share/doc"]\n', "absolute"),
        ("name = 3\n", "name"),
    ],
)
def test_a_mistake_is_refused_with_file_and_place(tmp_path: Path, change: str, named: str) -> None:
    key = change.partition(" ")[0]
    base = "".join(f"{line}\n" for line in GOOD.splitlines() if not line.startswith(f"{key} "))
    with pytest.raises(BangerError) as caught:
        load_recipe(write(tmp_path, base + change))
    assert caught.value.code == "bad_request"
    assert named in caught.value.message
    assert "x.toml" in caught.value.message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"amd64"', '"riscv64"'),
        ('"debootstrap"', '"oci:alpine"'),
        ('"make"', '"--hook"'),
        ('"bookworm"', '"-o x"'),
    ],
)
def test_a_value_that_could_be_an_option_or_is_not_built_here_is_refused(
    tmp_path: Path, old: str, new: str
) -> None:
    with pytest.raises(BangerError) as caught:
        load_recipe(write(tmp_path, GOOD.replace(old, new)))
    assert caught.value.code == "bad_request"


def test_a_link_out_of_the_recipes_directory_is_not_followed(tmp_path: Path) -> None:
    place = tmp_path / "recipes"
    place.mkdir()
    (tmp_path / "secret").touch()
    (place / "s.sh").symlink_to(tmp_path / "secret")
    with pytest.raises(BangerError, match="outside"):
        load_recipe(write(place, GOOD + 'scripts = ["s.sh"]\n'))


def test_an_unknown_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(BangerError) as caught:
        load_recipe("no-such")
    assert caught.value.code == "not_found"
    assert "debian-bookworm-minimal" in caught.value.message
