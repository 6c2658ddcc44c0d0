"""What this process may not do because of how its service confines it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

from banger.errors import BangerError
from banger.image.build import NO_EXTRAS, is_built

if TYPE_CHECKING:
    from banger.config.paths import Paths
    from banger.image.features import Extras
    from banger.image.recipe import LoadedRecipe

_STATUS = Path("/proc/self/status")


def has_no_new_privileges(status: Path = _STATUS) -> bool:
    """Whether programs that we start gain nothing by set-user-id bits: proc_pid_status(5)."""
    with status.open(encoding="utf-8", errors="replace") as f:
        return any(line.split() == ["NoNewPrivs:", "1"] for line in f)


async def refuse_build(
    paths: Paths, recipe: LoadedRecipe, name: str, extras: Extras = NO_EXTRAS
) -> None:
    """Refuse to build an image where newuidmap cannot work, unless it was built already.

    Raises:
        BangerError: reason build_outside: whoever asks may build it with
            `banger.daemon.builder`, then ask again.
    """
    if os.geteuid() == 0 or not has_no_new_privileges():
        return
    if await asyncio.to_thread(is_built, paths, recipe, extras):
        return
    raise BangerError(
        "operation_failed",
        f"building the image {name}: the service bangerd may not start newuidmap, which gives a "
        "build its user ids; the command builds it itself",
        hint=f"banger image build --name {name} --recipe {recipe.recipe.name}",
        reason="build_outside",
    )
