"""`banger internal index-sign` and `index-verify`: for whoever publishes bundles."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import click

from banger import files
from banger.catalog.index import (
    VALID_DAYS,
    expiry_of,
    publish_index,
    read_published,
    with_entry,
)
from banger.cli.bundles import read_secret_key
from banger.cli.errors import warn
from banger.errors import BangerError
from banger.minisign import BadSignature, PublicKey, parse_public_key

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("index", metavar="FILE", type=_FILE)
@click.option("--sign-key", metavar="FILE", type=_FILE, required=True, help="minisign secret key.")
@click.option(
    "--days",
    type=click.IntRange(1, 3650),
    default=VALID_DAYS,
    show_default=True,
    help="How long it is good for.",
)
@click.option(
    "--old-key",
    metavar="KEY|FILE",
    help="Public key that signed it so far, when another one signs from now on.",
)
def index_sign(index: Path, sign_key: Path, days: int, old_key: str | None) -> None:
    """Renew an index: the next version, a new expiry, signed. Makes an empty one when absent."""
    key = read_secret_key(sign_key)
    trusted = read_public_key(old_key) if old_key else key.public
    old = read_published(index, (trusted,)) if index.exists() else None
    new = with_entry(old, None, days=days)
    publish_index(index, new, key)
    sys.stdout.write(f"{index}: version {new.version}, good until {new.expires}\n")


@click.command()
@click.argument("index", metavar="FILE", type=_FILE)
@click.option(
    "--key",
    "keys",
    metavar="KEY|FILE",
    multiple=True,
    required=True,
    help="minisign public key; may be given twice.",
)
def index_verify(index: Path, keys: tuple[str, ...]) -> int:
    """Check an index: signature, expiry, and the bundles beside it."""
    found = read_published(index, [read_public_key(key) for key in keys])
    problems = []
    if expiry_of(found.expires) <= datetime.datetime.now(datetime.UTC):
        problems.append(f"it ended on {found.expires}")
    for entry in found.entries:
        path = index.parent / entry.file
        try:
            if path.stat().st_size != entry.size_bytes:
                problems.append(f"{entry.file} has another size")
            elif files.sha256_file(path) != entry.sha256:
                problems.append(f"{entry.file} has another content")
        except OSError as e:
            problems.append(f"{entry.file}: {e.strerror}")
    for problem in problems:
        warn(f"{index}: {problem}")
    count = len(found.entries)
    sys.stdout.write(
        f"version {found.version}, good until {found.expires}, "
        f"{count} bundle{'' if count == 1 else 's'}, signature ok\n"
    )
    return 1 if problems else 0


def read_public_key(text: str) -> PublicKey:
    """A public key given as itself or as its file. Raises BangerError."""
    try:
        if len(text) == 56 and text.startswith("RW"):
            return parse_public_key(text)
        return parse_public_key(Path(text).read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError, BadSignature) as e:
        words = e.strerror if isinstance(e, OSError) else str(e)
        raise BangerError(
            "bad_request", f"reading the public key {text}: {words}", hint="minisign -G"
        ) from e
