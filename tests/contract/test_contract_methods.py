"""The daemon's methods, pinned: names, streaming and the schema of their parameters.

`methods.json` is what programs outside may rely on. Within a protocol version fields are added,
never renamed or removed.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import banger.api
from banger.api.base import Params
from banger.daemon.handlers import build_methods

GOLDEN = Path(__file__).with_name("methods.json")
_RENEW = (
    "the contract has changed. If that is meant (and only adds, or the protocol version grows), "
    f"write it anew and look at the difference:\n  BANGER_RENEW=1 python -m pytest {__file__}"
)


def describe() -> dict[str, Any]:
    # The handlers are bound to the daemon and not called here.
    methods = build_methods(None)  # type: ignore[arg-type]
    kinds = sorted({m.params for m in methods.values()}, key=lambda kind: kind.__name__)
    _, components = msgspec.json.schema_components(kinds, ref_template="{name}")
    return {
        "methods": {
            name: {"params": m.params.__name__, "streams": m.streams}
            for name, m in sorted(methods.items())
        },
        "params": {name: _without_text(schema) for name, schema in sorted(components.items())},
    }


def _without_text(schema: dict[str, Any]) -> dict[str, Any]:
    """Docstrings may change freely."""
    return {key: value for key, value in schema.items() if key != "description"}


def test_methods_and_their_parameters_are_what_was_agreed() -> None:
    found = json.loads(json.dumps(describe()))
    if os.environ.get("BANGER_RENEW"):
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert found == json.loads(GOLDEN.read_text()), _RENEW


def test_every_parameter_struct_belongs_to_a_method() -> None:
    used = json.loads(GOLDEN.read_text())["params"]
    modules = [
        importlib.import_module(f"banger.api.{m.name}")
        for m in pkgutil.iter_modules(banger.api.__path__)
    ]
    defined = {
        name
        for module in modules
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, Params) and kind is not Params
    }
    assert defined == set(used)


@pytest.mark.parametrize("name", sorted(build_methods(None)))  # type: ignore[arg-type]
def test_unknown_parameters_are_refused(name: str) -> None:
    kind = build_methods(None)[name].params  # type: ignore[arg-type]
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"no_such_field":1}', type=kind)


def test_rpc_schema_command_prints_what_is_pinned() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "banger.cli.entry", "internal", "rpc-schema"],
        capture_output=True, check=True, env={**os.environ, "PYTHONPATH": "src"},
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    printed = json.loads(done.stdout)["components"]
    pinned = json.loads(GOLDEN.read_text())["params"]
    assert {name: sorted(schema["properties"]) for name, schema in printed.items()} == {
        name: sorted(schema["properties"]) for name, schema in pinned.items()
    }
