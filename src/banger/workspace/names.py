"""Names in a repository: bytes, checked before they become paths, quoted before they are shown.

An index or a tree object is only bytes on the disk of whoever made the repository: git checks names
when it adds them, not when it reads them back. So every name is checked here before it is used.
"""

from __future__ import annotations

import re

from banger.errors import BangerError

MAX_DEPTH = 256
"""Directories in one name. The walker holds one descriptor for each."""

_UNSAFE = re.compile(rb"(?:\A|/)(?:\.{0,2}|\.git)(?:/|\Z)", re.IGNORECASE)
_ESCAPES = {7: "a", 8: "b", 9: "t", 10: "n", 11: "v", 12: "f", 13: "r", 34: '"', 92: "\\"}


def check_name(name: bytes) -> bytes:
    """The name itself, if it stays inside the work tree and outside of any `.git`.

    Raises:
        BangerError: it has an empty, `.`, `..` or `.git` component, or too many components.
    """
    if _UNSAFE.search(name) or name.count(b"/") >= MAX_DEPTH:
        raise BangerError(
            "bad_request",
            f"the repository names the file {format_name(name)}, which no checkout can hold",
            hint="git fsck",
        )
    return name


def format_name(name: bytes) -> str:
    """One line for a name: as it is when it can be printed, else in git's C quoting.

    Source: git-config(1), core.quotePath. Readable UTF-8 is left alone, as with quotePath=false;
    in a name that has to be quoted for another reason every byte above 0x7f is an octal escape.
    """
    try:
        text = name.decode()
    except UnicodeDecodeError:
        text = ""
    if text and text.isprintable() and '"' not in text and "\\" not in text:
        return text
    return f'"{"".join(map(_escape, name))}"'


def _escape(byte: int) -> str:
    if byte in _ESCAPES:
        return "\\" + _ESCAPES[byte]
    return chr(byte) if 0x20 <= byte < 0x7F else f"\\{byte:03o}"


def format_names(names: list[bytes], *, most: int = 5) -> str:
    """The first few of many names, for an error message."""
    shown = ", ".join(format_name(n) for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def sanitise_name(name: str) -> str:
    """A directory name for the guest: letters, digits, `.`, `_`, `-`; at most 64; never hidden."""
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-").rstrip("-")[:64]
    return clean or "repo"


def strip_credentials(url: str) -> str:
    """A remote's URL without what could let somebody in.

    Passwords go everywhere; over http and ftp the user goes too, since tokens are written there,
    and so does a query. `git@host:path` and `ssh://git@host/` need their user and keep it.
    """
    found = re.match(r"(?P<scheme>(?:[\w+.-]+::)?[A-Za-z][\w+.-]*)://(?P<authority>[^/?#]*)", url)
    if found is None:
        return url
    scheme = found["scheme"]
    user, at, host = found["authority"].rpartition("@")
    rest = url[found.end() :]
    if scheme.rpartition("::")[2].lower() in ("http", "https", "ftp", "ftps"):
        return f"{scheme}://{host}{re.split(r'[?#]', rest, maxsplit=1)[0]}"
    return f"{scheme}://{user.partition(':')[0]}{at}{host}{rest}"
