"""Every struct of banger: frozen, keyword-only; requests refuse what they do not know.

msgspec inherits `frozen` and `forbid_unknown_fields`, not `kw_only`, so this looks at each class.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import msgspec
import pytest

import banger
from banger.api.base import Params
from banger.config.settings import Settings, VmDefaults
from banger.image.recipe import Recipe

# Structs that may be changed, or built without names, and why.
_MUTABLE = {
    "banger.image.rootfs.RootStats": "counts while a root filesystem is read",
    "banger.kernel.package._Unpacked": "collects the members of a package as they pass",
    "banger.vmm.firecracker_api._Fault": "decoded from an answer, read at once, never built",
    "banger.vmm.qmp._Error": "decoded from an answer, read at once, never built",
    "banger.vmm.qmp._Message": "decoded from an answer, read at once, never built",
}


def structs() -> Iterator[tuple[str, type[msgspec.Struct]]]:
    for found in pkgutil.walk_packages(banger.__path__, "banger."):
        module = importlib.import_module(found.name)
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, msgspec.Struct) and kind.__module__ == found.name:
                yield f"{found.name}.{name}", kind


STRUCTS = dict(structs())


def keyword_only(kind: type[msgspec.Struct]) -> bool:
    parameters = inspect.signature(kind).parameters.values()
    return all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters)


@pytest.mark.parametrize("name", sorted(STRUCTS))
def test_struct_is_frozen_and_keyword_only(name: str) -> None:
    kind = STRUCTS[name]
    if name in _MUTABLE:
        # The row goes when its reason has gone.
        assert not (kind.__struct_config__.frozen and keyword_only(kind))
        return
    assert kind.__struct_config__.frozen
    assert keyword_only(kind), "repeat kw_only=True: it is not inherited"


@pytest.mark.parametrize("name", sorted(STRUCTS))
def test_frozen_struct_holds_no_list(name: str) -> None:
    kind = STRUCTS[name]
    if name in _MUTABLE:
        return
    lists = [f.name for f in msgspec.structs.fields(kind) if "list[" in str(f.type)]
    assert not lists, f"tuples, not lists: {lists}"


@pytest.mark.parametrize(
    "kind",
    [
        *(k for k in STRUCTS.values() if issubclass(k, Params) and k is not Params),
        Settings,
        VmDefaults,
        Recipe,
    ],
    ids=lambda kind: kind.__name__,
)
def test_whatever_asks_for_something_refuses_unknown_fields(kind: type[msgspec.Struct]) -> None:
    assert kind.__struct_config__.forbid_unknown_fields


def test_exceptions_name_structs_that_exist() -> None:
    assert set(_MUTABLE) <= set(STRUCTS)
