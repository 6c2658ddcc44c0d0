"""docs/image-catalog.md and docs/kernel-catalog.md: the facts in them are those of the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import msgspec
import pytest

from banger.catalog.index import VALID_DAYS, Index, IndexEntry
from banger.cli.app import app
from banger.config.settings import read_settings
from banger.kernel import build_tools, requirements
from banger.kernel.build_recipe import list_build_recipes
from banger.kernel.pull import CATALOG

DOCS = Path(__file__).parents[2] / "docs"
IMAGES = (DOCS / "image-catalog.md").read_text(encoding="utf-8")
KERNELS = (DOCS / "kernel-catalog.md").read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    lines = re.findall(r"^    banger (.*)$", text, re.MULTILINE)
    # What is said about a command stands behind it, after at least two blanks.
    return [shlex.split(re.split(r" {2,}", line)[0]) for line in lines]


@pytest.mark.parametrize("words", [*commands(IMAGES), *commands(KERNELS)], ids=" ".join)
def test_commands_in_the_documents_exist_with_these_options(words: list[str]) -> None:
    command: click.Command | None = app
    while isinstance(command, click.Group):
        command = command.get_command(click.Context(command), words.pop(0))
    assert command is not None
    options = {o for parameter in command.params for o in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


def test_the_kernel_document_names_every_catalog_kernel_and_what_guests_need() -> None:
    for kernel in (*CATALOG, *list_build_recipes()):
        assert f"`{kernel.name}`" in KERNELS
        assert kernel.suite in KERNELS
    wanted = requirements.find_missing_options("") + requirements.find_missing_boot_options("")
    built_in, other = KERNELS.split("- built in: ")[1].split("- built in or as modules")
    other, containers = other.split("- for containers")
    said = {f"CONFIG_{o}=y" for o in re.findall(r"`([A-Z0-9_]+)`", built_in)}
    said |= {f"CONFIG_{o}=y|m" for o in re.findall(r"`([A-Z0-9_]+)`", other)}
    assert said == set(wanted)
    built_in, other = containers.split("` built in, ")
    said = {f"CONFIG_{o}=y" for o in re.findall(r"`([A-Z0-9_]+)`", f"{built_in}`")}
    said |= {f"CONFIG_{o}=y|m" for o in re.findall(r"`([A-Z0-9_]+)`", other)}
    assert said == set(requirements.find_missing_container_options(""))


def test_the_kernel_document_names_what_a_build_needs_and_who_may_sign() -> None:
    for tool in build_tools.BUILD_TOOLS:
        assert tool.apt in KERNELS
    for tool in build_tools.SIGNATURE_TOOLS:
        assert tool.name in KERNELS
    for recipe in list_build_recipes():
        assert f"`{recipe.package}`" in KERNELS
        assert f"`recipes/kernels/{recipe.fragment}`" in KERNELS
        for signer in recipe.signers:
            assert re.sub(r" \(.*\)", "", signer.name) in " ".join(KERNELS.split())


def test_the_image_document_describes_the_index() -> None:
    described = re.split(r"`index\.json` has ", IMAGES)[1].split("\n\n")[0]
    top, entry = described.split("an entry has")
    fields = {f.encode_name for f in msgspec.structs.fields(Index)}
    assert set(re.findall(r"`(\w+)`", top)) == fields
    fields = {f.encode_name for f in msgspec.structs.fields(IndexEntry)}
    assert set(re.findall(r"`(\w+)`", entry)) - {"image", "kernel"} == fields
    assert f"ends after {VALID_DAYS} days" in IMAGES


def test_the_configuration_in_the_image_document_is_valid(tmp_path: Path) -> None:
    lines = re.findall(r"^    (index_\w+ = .*)$", IMAGES, re.MULTILINE)
    file = tmp_path / "config.toml"
    file.write_text("\n".join(lines))
    settings = read_settings(file)
    assert settings.index_url
    assert len(settings.index_keys) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('index_url = "https://x.example/index.json"', "needs index_keys"),
        ('index_url = "ftp://x.example/i"\nindex_keys = []', "http or https"),
        ('index_keys = ["RWnonsense"]', "index_keys"),
        (f"index_keys = {['RWT4bd8G4796QSDwE0p5J1rXqjaUXqbifPGZcaSr/ZqoY4e2sekQhoYl'] * 3}", "2"),
    ],
)
def test_an_index_that_cannot_be_is_refused_when_it_is_configured(
    tmp_path: Path, text: str, words: str
) -> None:
    from banger.errors import BangerError

    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(BangerError, match=words):
        read_settings(file)
