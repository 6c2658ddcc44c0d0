"""Recipes: strict, and every shipped one loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.errors import BangerError
from banger.image.features import Extras, assemble, list_features, needs_packages, read_extras
from banger.image.recipe import Manager, list_recipes, load_recipe

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
    # Without one it boots with the kernel of the configuration.
    assert loaded.recipe.kernel_ref in ("debian-6.12-cloud", None)
    manager: Manager = {"alpine": "apk", "void": "xbps-install"}.get(name, "apt-get")  # type: ignore[assignment]
    whole = assemble(loaded, Extras(), manager).recipe
    assert set(loaded.recipe.packages) <= set(whole.packages)


def test_the_default_image_has_what_the_specification_lists() -> None:
    recipe = assemble(load_recipe("debian-bookworm"), Extras(), "apt-get").recipe
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
        ('"debootstrap"', '"image:../x"'),
        ('"debootstrap"', '"file:/x"'),
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


BASED = """
name = "x"
distro = "alpine"
arch = ["amd64"]
from = "oci:alpine:3.20"
"""


def test_a_recipe_may_begin_with_another_image(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, BASED)).recipe
    assert (recipe.source, recipe.bootstrapped, recipe.kernel_ref) == (
        "oci:alpine:3.20", False, None,
    )  # fmt: skip
    for source in ("image:debian-bookworm", "archive", "oci:localhost:5000/a/b@sha256:" + "0" * 64):
        assert load_recipe(write(tmp_path, BASED.replace("oci:alpine:3.20", source)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"oci:alpine:3.20"', '"oci:oci-archive:/x"'),
        ('"oci:alpine:3.20"', '"oci:UPPER"'),
        ('"oci:alpine:3.20"', '"image:a/b"'),
        ('"oci:alpine:3.20"', '"archive:x"'),
        ('"alpine"', '"Alpine\\n"'),
        ('arch = ["amd64"]', 'arch = ["amd64"]\nsuite = "bookworm"'),
        ('arch = ["amd64"]', 'arch = ["amd64"]\nexclude_paths = ["/x"]'),
    ],
)
def test_a_base_that_is_none_is_refused(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(BangerError) as caught:
        load_recipe(write(tmp_path, BASED.replace(old, new, 1)))
    assert caught.value.code == "bad_request"
    assert "x.toml" in caught.value.message


@pytest.mark.parametrize("name", list_features())
def test_every_shipped_feature_can_be_added_where_it_is_known(tmp_path: Path, name: str) -> None:
    loaded = load_recipe(write(tmp_path, BASED))
    extras = read_extras((), (name,), ())
    whole = assemble(loaded, extras, "apk")
    assert whole.recipe.features == (name,)
    assert set(whole.recipe.scripts) <= set(whole.sources)
    assert whole.text != loaded.text


def test_features_come_before_what_was_asked_for_beside_them(tmp_path: Path) -> None:
    script = tmp_path / "my own.sh"
    script.write_text("true")
    loaded = load_recipe(write(tmp_path, GOOD))
    extras = read_extras(("jq", "make"), ("docker",), (script,))
    whole = assemble(loaded, extras, "apt-get").recipe
    assert whole.packages == ("make", "docker.io", "docker-compose", "jq")
    assert whole.scripts == ("features/docker.sh", "0/my own.sh")
    assert needs_packages(loaded, extras)


def test_alpine_gets_only_the_agent_that_runs_there(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, BASED))
    found = {
        manager: [
            d.name for d in assemble(loaded, Extras(features=("agents",)), manager).recipe.downloads
        ]
        for manager in ("apk", "apt-get")
    }
    assert found == {"apk": ["opencode"], "apt-get": ["opencode", "claude", "mise"]}
    assert not needs_packages(loaded, Extras(features=("agents",)))


def test_a_feature_without_packages_for_this_system_is_refused(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, BASED))
    with pytest.raises(BangerError, match="docker knows no packages for this system"):
        assemble(loaded, Extras(features=("docker",)), None)
    with pytest.raises(BangerError, match="there is no feature 'dcoker'"):
        read_extras((), ("dcoker",), ())


@pytest.mark.parametrize("name", ["-y", "--root", "a b", "", "a,b", "../x", "a;b"])
def test_a_package_that_could_be_an_option_is_refused(name: str) -> None:
    with pytest.raises(BangerError, match="no package name"):
        read_extras((name,), (), ())


def test_a_script_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(BangerError, match=r"none\.sh"):
        read_extras((), (), (tmp_path / "none.sh",))
    (tmp_path / "big").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(BangerError, match="1 MiB"):
        read_extras((), (), (tmp_path / "big",))
