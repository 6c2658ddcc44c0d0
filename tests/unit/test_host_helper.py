"""The line to the installed root helper, which here is a socket that answers as a test says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from banger.host.helper import HelperService
from patience import PATIENCE_S

pytestmark = pytest.mark.asyncio

VM, OTHER = "a" * 32, "b" * 32


async def test_calls_about_one_lease_are_made_in_their_order_also_after_a_cancellation(
    tmp_path: Path,
) -> None:
    """The helper answers side by side: a release that overtook the prepare whose caller has gone
    would find no lease, and leave one."""
    asked: list[tuple[str, str]] = []
    answering = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = json.loads(await reader.readline())
        params: dict[str, Any] = request["params"]
        asked.append((request["method"], params.get("vm_id") or params["id"]))
        if request["method"] == "prepare":
            await answering.wait()
        writer.write(b'{"result":{}}\n')
        await writer.drain()
        writer.close()

    path = tmp_path / "s"
    server = await asyncio.start_unix_server(answer, path)
    async with server, asyncio.timeout(PATIENCE_S):
        service = HelperService(path)
        preparing = asyncio.create_task(service.call("prepare", {"vm_id": VM}))
        while not service._calls:
            await asyncio.sleep(0)
        preparing.cancel()
        releasing = asyncio.create_task(service.call("release", {"id": VM}))
        await service.call("release", {"id": OTHER})  # waits for nobody
        assert ("release", VM) not in asked
        answering.set()
        await releasing
        assert [method for method, lease in asked if lease == VM] == ["prepare", "release"]
        await service.aclose()
