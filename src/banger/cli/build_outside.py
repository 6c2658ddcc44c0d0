"""An image built by the command itself, where the daemon's service may not.

The build runs in a process of its own, so that a signal or a crash of the command leaves nothing.
What it made lies in the daemon's cache; the daemon publishes it when it is asked again.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

from banger.api import params as p
from banger.api.envelope import WireError
from banger.config.program import module_command
from banger.config.target import choose_paths
from banger.decoding import convert, decode_json
from banger.errors import BangerError

if TYPE_CHECKING:
    from banger.rpc.client import OnEvent


def build_outside(refusal: BangerError, params: Any, on_event: OnEvent) -> None:
    """Build what `params` need into the cache of the system installation.

    Raises:
        BangerError: the build failed; or nothing in `params` says what to build: the refusal.
    """
    recipe = _find_recipe(params)
    if recipe is None:
        raise refusal
    from banger.process import popen

    paths = choose_paths()
    argv = [
        *module_command("banger.daemon.builder"),
        "--state", str(paths.state), "--cache", str(paths.cache),
        "image", recipe,
    ]  # fmt: skip
    if isinstance(params, p.BuildImage):
        argv += [f"--package={name}" for name in params.packages]
        argv += [f"--feature={name}" for name in params.features]
        argv += [f"--script={path}" for path in params.scripts]
    builder = popen(argv, stdout=subprocess.PIPE)
    assert builder.stdout is not None
    error: BangerError | None = None
    ended = False
    try:
        for line in builder.stdout:
            event = decode_json(line, dict[str, Any])
            if "error" in event:
                error = convert(event["error"], type=WireError).exception()
            elif "result" in event:
                ended = True
            else:
                on_event(event)
    finally:
        # An interrupt from the terminal reaches the builder too, and it takes back what it began.
        builder.stdout.close()
        builder.wait()
    if error is not None:
        raise error
    if not ended:
        raise BangerError(
            "operation_failed",
            f"building the image of {recipe}: the builder ended with status {builder.returncode}",
        )


def _find_recipe(params: Any) -> str | None:
    if isinstance(params, p.BuildImage):
        return params.recipe
    if isinstance(params, p.PullImage):
        return params.reference
    if isinstance(params, p.RunVm):
        params = params.create
    image = getattr(params, "image", None)
    return image if isinstance(image, str) else None
