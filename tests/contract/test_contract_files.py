"""Documents and data that must agree with the code: configuration reference, recipes, protocol."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from banger.config.resources import recipes_directory
from banger.config.settings import Settings, VmDefaults
from banger.errors import ErrorCode
from banger.image.recipe import list_recipes, load_recipe
from banger.rpc.frames import FrameType

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_NOT_SET = "\N{EN DASH}"


def documented_settings() -> dict[str, Any]:
    """Key → default, from the table of docs/config.md; a dash is "not set"."""
    found: dict[str, Any] = {}
    for line in (DOCS / "config.md").read_text().splitlines():
        if not line.startswith("| `"):
            continue
        keys, defaults, _ = (cell.strip() for cell in line.strip("|").split("|", 2))
        names = re.findall(r"`([^`]+)`", keys)
        values = re.findall(r"`([^`]+)`", defaults) if defaults != _NOT_SET else [None] * len(names)
        for name, value in zip(names, values, strict=True):
            found[name] = None if value is None else tomllib.loads(f"x = {value}")["x"]
    return found


def test_configuration_reference_has_every_key_with_its_default() -> None:
    actual = msgspec.to_builtins(Settings())
    del actual["vm_defaults"]
    assert documented_settings() == json.loads(json.dumps(actual))


def test_configuration_reference_names_the_keys_of_vm_defaults() -> None:
    text = (DOCS / "config.md").read_text()
    (sentence,) = re.findall(r"`\[vm_defaults\]` has (.*?):", text, flags=re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) == set(VmDefaults.__struct_fields__)


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_loads_and_says_what_it_is_for(name: str) -> None:
    assert load_recipe(name).recipe.description


def test_every_recipe_file_is_listed() -> None:
    assert sorted(list_recipes()) == sorted(p.stem for p in recipes_directory().glob("*.toml"))


def test_protocol_lists_the_error_codes() -> None:
    (line,) = re.findall(r"Error codes: `([^`]+)`", (DOCS / "protocol.md").read_text())
    assert set(line.split()) == set(get_args(ErrorCode))


def test_protocol_lists_the_frame_types() -> None:
    numbers: dict[int, str] = {}
    for line in (DOCS / "protocol.md").read_text().splitlines():
        if line.startswith("| 0x"):
            codes, names = (cell.strip() for cell in line.strip("|").split("|")[:2])
            for code, name in zip(codes.split(", "), names.split(", "), strict=True):
                numbers[int(code, 16)] = name.upper()
    assert numbers == {kind.value: kind.name for kind in FrameType}
