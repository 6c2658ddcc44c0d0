"""OpenSSH's client configuration: banger's own stanza, and its place in the user's file.

The stanza is a file of banger's, written anew whenever it differs. The user's `~/.ssh/config` is
changed only when asked to: by one fenced block at its top, because an `Include` below a `Host` line
counts for that host alone and the first value of an option wins (ssh_config(5)). Every other byte
stays as it is, and a file that changed meanwhile is not replaced.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from banger.errors import BangerError
from banger.files import new_file

if TYPE_CHECKING:
    from collections.abc import Sequence

BEGIN = b"# >>> banger: added by `banger ssh-config --install` >>>"
END = b"# <<< banger <<<"

_MOST_BYTES = 4 << 20


def build_stanza(
    *, key: Path, known_hosts: Sequence[Path], proxy: Sequence[str], direct: bool
) -> str:
    """The content of banger's own file: how any OpenSSH client gets into `<name>.vm`.

    `proxy` is a command line that joins its stdin and stdout to port 22 of the VM whose name is
    added to it. With `direct` it is used only for names that this host does not resolve.

    Raises:
        BangerError: a path with characters that ssh_config cannot say.
    """
    words = " ".join(shlex.quote(word).replace("%", "%%") for word in proxy)
    # The name comes from whoever calls ssh: OpenSSH itself refuses names that a shell would act on.
    command = f"    ProxyCommand {words} %n 22\n"
    hosts = " ".join(_quoted(path) for path in dict.fromkeys(known_hosts))
    stanza = (
        "# Written by banger, and written again when it differs.\n"
        "Host *.vm\n"
        "    User root\n"
        f"    IdentityFile {_quoted(key)}\n"
        "    IdentitiesOnly yes\n"
        "    PreferredAuthentications publickey\n"
        f"    UserKnownHostsFile {hosts}\n"
        "    GlobalKnownHostsFile /dev/null\n"
        "    StrictHostKeyChecking yes\n"
        "    UpdateHostKeys no\n"
    )
    if not direct:
        return stanza + command
    return (
        f"{stanza}"
        "# Without a resolver that knows the name, or a VM that runs: through banger's agent.\n"
        'Match host *.vm !exec "getent hosts %h >/dev/null 2>&1"\n'
        f"{command}"
    )


def _quoted(path: Path, forbidden: str = '"\n\\$') -> str:
    text = str(path)
    if any(c in forbidden for c in text):
        raise BangerError(
            "bad_request", f"the path {text!r} cannot be written into a configuration of OpenSSH"
        )
    return '"' + text.replace("%", "%%") + '"'


def include_line(stanza: Path) -> str:
    """The line that makes OpenSSH read the stanza. Raises BangerError as `build_stanza`."""
    # Include takes a pattern and no tokens.
    return "Include " + _quoted(stanza, '"\n\\*?[$').replace("%%", "%")


def add_block(content: bytes, stanza: Path) -> bytes:
    """The content with the block at its top, and nowhere else.

    Raises:
        BangerError: as `remove_block`.
    """
    block = b"\n".join([BEGIN, os.fsencode(include_line(stanza)), END]) + b"\n"
    return block + remove_block(content)


def remove_block(content: bytes) -> bytes:
    """The content without the block.

    Raises:
        BangerError: the block is damaged, or holds what banger did not write: nothing is guessed.
    """
    kept: list[bytes] = []
    inside: int | None = None
    for number, line in enumerate(re.findall(rb"[^\n]*\n|[^\n]+", content), start=1):
        words = line.strip()
        if words == BEGIN:
            if inside is not None:
                raise _damaged(inside, "begins twice")
            inside = number
        elif words == END:
            if inside is None:
                raise _damaged(number, "ends without having begun")
            inside = None
        elif inside is None:
            kept.append(line)
        elif words and not words.startswith(b"Include "):
            raise _damaged(number, "holds a line that banger did not write")
    if inside is not None:
        raise _damaged(inside, "has no end")
    return b"".join(kept)


def _damaged(line: int, how: str) -> BangerError:
    return BangerError("operation_failed", f"banger's block {how} (line {line})")


def is_installed(content: bytes, stanza: Path) -> bool:
    """Whether the block is there as `add_block` would write it. A damaged one is not."""
    try:
        return add_block(content, stanza) == content
    except BangerError:
        return False


def edit_block(path: Path, stanza: Path, *, wanted: bool) -> bool:
    """Put the block into the user's file, or take it out; whether anything changed.

    A link is followed and stays; the file keeps its mode and its owner. An absent one is made
    (0600, its directory 0700).

    Raises:
        BangerError: it cannot be read or written, its block is damaged, or it changed meanwhile.
    """
    doing = f"changing {path}"
    try:
        target = Path(os.path.realpath(path))  # also of a link that leads nowhere yet
        before = _read(target)
        content = before[1] if before is not None else b""
        changed = add_block(content, stanza) if wanted else remove_block(content)
        if changed == content:
            return False
        if before is None:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _replace(target, changed, before[0] if before is not None else None)
    except BangerError as e:
        raise BangerError(e.code, f"{doing}: {e}", hint=f"$EDITOR {path}") from e
    except OSError as e:
        raise BangerError("operation_failed", f"{doing}: {e.strerror}", hint=f"ls -l {path}") from e
    return True


def _read(target: Path) -> tuple[os.stat_result, bytes] | None:
    try:
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as f:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            raise BangerError("operation_failed", "it is no ordinary file")
        return status, f.read()


def _replace(target: Path, content: bytes, before: os.stat_result | None) -> None:
    """Put a new file in the place of the old one, with its mode and owner."""

    def check() -> None:
        if _identity(before) != _identity(_stat(target)):
            raise BangerError("operation_failed", "somebody else changed it meanwhile")

    with new_file(target, check=check) as f:
        f.write(content)
        fd = f.fileno()
        if before is not None:
            if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(fd, before.st_uid, before.st_gid)
            os.fchmod(fd, stat.S_IMODE(before.st_mode))


def _stat(target: Path) -> os.stat_result | None:
    try:
        return target.stat()
    except FileNotFoundError:
        return None


def _identity(status: os.stat_result | None) -> tuple[int, ...] | None:
    if status is None:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
