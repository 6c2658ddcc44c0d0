"""Live completion of names: asks a running daemon, gives up after 200 ms, never starts one."""

from __future__ import annotations

from typing import Any

import click

_PATIENCE_S = 0.2


def _names(method: str, incomplete: str, field: str) -> list[str]:
    from banger.api.params import Empty
    from banger.cli.server import Server

    rows = Server().find(method, Empty(), list[dict[str, Any]], timeout_s=_PATIENCE_S) or []
    return sorted(row[field] for row in rows if row[field].startswith(incomplete))


class _LiveName(click.ParamType[str]):
    """A name that a running daemon can complete; `method` lists the candidates."""

    def __init__(self, name: str, method: str, field: str = "name") -> None:
        self.name = name
        self._method = method
        self._field = field

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in _names(self._method, incomplete, self._field)]


class _SessionName(click.ParamType[str]):
    """The name of a session of the VM that was named before it."""

    name = "NAME"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[Any]:
        from click.shell_completion import CompletionItem

        from banger.api.params import VmRef
        from banger.cli.server import Server

        rows = Server().find(
            "vm.session.list",
            VmRef(vm=ctx.params.get("vm") or ""),
            list[dict[str, Any]],
            timeout_s=_PATIENCE_S,
        )
        names = sorted(row["name"] for row in rows or [])
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class _ShippedName(click.ParamType[str]):
    """The name of a file that ships with banger, or whatever else the command takes."""

    def __init__(self, name: str, directory: str) -> None:
        self.name = name
        self._directory = directory

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[Any]:
        from click.shell_completion import CompletionItem

        from banger.config.resources import recipes_directory

        names = sorted(p.stem for p in (recipes_directory() / self._directory).glob("*.toml"))
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


RECIPE = _ShippedName("RECIPE", ".")
FEATURE = _ShippedName("FEATURE", "features")
SESSION = _SessionName()
VM = _LiveName("VM", "vm.list")
IMAGE = _LiveName("IMAGE", "image.list")
KERNEL = _LiveName("KERNEL", "kernel.list")
OPERATION = _LiveName("OPERATION", "daemon.operations.list", "id")
