"""Bundles on the command line's side: the file that a stream becomes, and its place in an index.

The key that signs is read here and stays here; the daemon never sees it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from banger import minisign
from banger.api import params as p
from banger.api.catalog import Exported
from banger.catalog.index import (
    IndexEntry,
    bundle_name,
    publish_index,
    read_published,
    with_entry,
)
from banger.cli.draw import print_json, progress
from banger.cli.server import Server
from banger.decoding import decode_json
from banger.errors import BangerError
from banger.files import sync_directory, sync_file
from banger.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator


def export_options(command: Any) -> Any:
    """--output, --index and --sign-key."""
    for option in (
        click.option(
            "--sign-key",
            metavar="FILE",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="minisign secret key for the index.",
        ),
        click.option(
            "--index",
            metavar="FILE",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Also enter it into this signed index, in the same directory; made when absent.",
        ),
        click.option(
            "--output",
            metavar="DIR",
            required=True,
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Where the bundle is written.",
        ),
    ):
        command = option(command)
    return command


def export(
    method: str,
    name: str,
    *,
    output: Path,
    index: Path | None,
    sign_key: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the bundle that `method` streams, and enter it into the index when asked.

    Raises:
        click.UsageError: index and key do not come together, or the index lies elsewhere.
        BangerError: the export failed, nothing is left; or the index is not signed by the key.
    """
    if (index is None) != (sign_key is None):
        raise click.UsageError("--index and --sign-key come together")
    key = old = None
    if index is not None and sign_key is not None:
        if index.absolute().parent.resolve() != output.resolve():
            raise click.UsageError("bundles lie beside their index: --index DIR/index.json")
        # Before the work, so that a wrong password costs none.
        key = read_secret_key(sign_key)
        old = read_published(index, (key.public,)) if index.exists() else None
    with _unnamed(output, name) as temporary:
        digest = hashlib.sha256()
        size = 0
        with (
            temporary.open("xb") as f,
            progress(quiet=quiet) as painter,
            Server().stream(method, p.NameRef(name=name), painter) as call,
        ):
            for chunk in call.frames():
                digest.update(chunk)
                size += len(chunk)
                f.write(chunk)
            done = decode_json(call.result_payload, type=Exported)
        file = output / bundle_name(done.name, done.arch, digest.hexdigest())
        entry = IndexEntry(
            **msgspec.structs.asdict(done),
            file=file.name,
            sha256=digest.hexdigest(),
            size_bytes=size,
        )
        temporary.chmod(0o644)
        sync_file(temporary)
        temporary.replace(file)
        sync_directory(output)
    if index is not None and key is not None:
        new = with_entry(old, entry)
        publish_index(index, new, key)
        if not quiet:
            sys.stderr.write(f"{index}: version {new.version}, good until {new.expires}\n")
    if as_json:
        print_json({"path": str(file), **msgspec.structs.asdict(entry)})
    else:
        sys.stdout.write(f"{file} {format_size(size)} sha256:{entry.sha256}\n")


def read_secret_key(path: Path) -> minisign.SecretKey:
    """A minisign secret key; the password of an encrypted one is asked on the terminal.

    Raises:
        BangerError: it cannot be read, or is none.
    """

    def ask() -> str:
        answer: str = click.prompt(f"Password of {path}", hide_input=True, err=True)
        return answer

    try:
        return minisign.parse_secret_key(path.read_text(encoding="ascii"), ask)
    except (OSError, UnicodeDecodeError, minisign.BadSignature) as e:
        words = e.strerror if isinstance(e, OSError) else str(e)
        raise BangerError(
            "bad_request", f"reading the signing key {path}: {words}", hint="minisign -G -s FILE"
        ) from e


@contextlib.contextmanager
def _unnamed(directory: Path, name: str) -> Iterator[Path]:
    """A name for a file that gets its own when it is whole; a failure leaves nothing."""
    path = directory / f".{name[:100].replace('/', '_')}.{os.urandom(4).hex()}"
    try:
        yield path
    except OSError as e:
        raise BangerError("operation_failed", f"writing to {directory}: {e.strerror or e}") from e
    finally:
        # What keeps us from this has kept us from more before, and that is told.
        with contextlib.suppress(OSError):
            path.unlink()
