"""What copies are made of that may be interrupted: which files are the same on both sides, and one
file in or out from where it stopped.

Each function is one exchange with the agent. Whether the two sides have the same so far is for the
caller to say, who gets the hash of what the guest has: a guest that lies spoils its own copy.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from banger.errors import BangerError
from banger.rpc.data import DataReader, DataWriter
from banger.rpc.frames import FrameType
from banger.rpc.trees import Transferred

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from banger.rpc.trees import GuestFiles

_WANTED = struct.Struct("<QH")
_DIGEST = struct.Struct("<III32s")
_HEAD = struct.Struct("<QI32s")
_OFFER = struct.Struct("<Q32s")
_AT = struct.Struct("<Q")


class Digest(NamedTuple):
    """A file in the guest. `mode` is `st_mode`; 0: there is no such file of that size."""

    mode: int
    uid: int
    gid: int
    sha256: bytes


class Head(NamedTuple):
    """A file in the guest, as it is when it is read from an offset."""

    size: int
    mode: int
    sha256_before: bytes


class PutFile(NamedTuple):
    """A file on its way into the guest: `name` below the directory `path`, which is made."""

    path: str
    name: bytes
    size: int
    mode: int
    mtime: int


def part_name(name: bytes) -> bytes:
    """The name beside `name` in the guest under which the pieces of a tree are gathered."""
    return b".banger-put-part-" + hashlib.sha256(name).hexdigest()[:32].encode()


def place_tree(files: GuestFiles, path: str) -> None:
    """Give a tree that was gathered beside `path` its name.

    Raises:
        BangerError: already_exists: something has it by now; not_found.
    """
    files.call("place", {"path": path}, f"copying files to {path} in the guest")


def fetch_digests(
    files: GuestFiles, path: str, wanted: Sequence[tuple[bytes, int]]
) -> list[Digest]:
    """For each name below `path` and size: what the guest has of that name and size.

    Raises:
        BangerError: as `GuestFiles.exchange`; the answer is malformed.
    """
    doing = f"comparing files with {path} in the guest"
    with files.exchange("digest", {"path": path}, doing) as channel:
        with DataWriter(channel).buffered() as out:
            out.writelines(_WANTED.pack(size, len(name)) + name for name, size in wanted)
        channel.write_frame(FrameType.DATA_END)
        data = DataReader(channel, doing)
        answer = bytearray()
        while (chunk := data.next_chunk()) is not None:
            answer += chunk
            if len(answer) > _DIGEST.size * len(wanted):
                raise BangerError("operation_failed", f"{doing}: the answer has no end")
        data.finish(Transferred)
    if len(answer) != _DIGEST.size * len(wanted):
        raise BangerError("operation_failed", f"{doing}: the answer is cut")
    return [Digest._make(d) for d in _DIGEST.iter_unpack(answer)]


def read_file(
    files: GuestFiles,
    path: str,
    name: bytes,
    offset: int,
    receive: Callable[[Head, Iterator[bytes]], bool],
) -> bool:
    """Read a file of the guest from an offset. `name` is below `path` and behind no link; empty:
    it is `path` itself. `receive` returns False to have no more of it, which is then the result.

    Raises:
        BangerError: as `GuestFiles.exchange`; more or less comes than the guest has announced.
    """
    doing = f"reading {path} in the guest"
    params = {"path": path, "name": base64.b64encode(name).decode(), "offset": offset}
    with files.exchange("read", params, doing) as channel:
        data = DataReader(channel, doing)
        first = data.next_chunk()
        if first is None:
            data.finish(Transferred)  # the error, if there is one
        if first is None or len(first) != _HEAD.size:
            raise BangerError("operation_failed", f"{doing}: malformed answer")
        head = Head._make(_HEAD.unpack(first))

        def chunks() -> Iterator[bytes]:
            left = max(head.size - offset, 0)
            while (chunk := data.next_chunk()) is not None:
                left -= len(chunk)
                if left < 0:
                    raise BangerError("operation_failed", f"{doing}: it has no end")
                yield chunk
            # The result, which may be an error that explains what is missing.
            data.finish(Transferred)
            if left:
                raise BangerError("operation_failed", f"{doing}: it is cut")

        return receive(head, chunks())


def put_file(
    files: GuestFiles,
    file: PutFile,
    agree: Callable[[int, bytes], bool],
    write: Callable[[BinaryIO, int], None],
) -> None:
    """Send a file. `agree` says whether its first bytes, their number and SHA-256 given, are what
    the guest has of it; `write` writes the rest, from there or from 0. It gets its name when it is
    whole; what has come of it by a failure stays in the guest for the next call.

    Raises:
        BangerError: as `GuestFiles.exchange`; in_use: another copy to that name is under way.
    """
    doing = f"copying a file to {file.path} in the guest"
    params = {
        "path": file.path, "name": base64.b64encode(file.name).decode(), "size": file.size,
        "mode": file.mode, "mtime": file.mtime,
    }  # fmt: skip
    with files.exchange("put_file", params, doing) as channel:
        data = DataReader(channel, doing)
        offer = data.next_chunk()
        if offer is None:
            data.finish(Transferred)
        if offer is None or len(offer) != _OFFER.size:
            raise BangerError("operation_failed", f"{doing}: malformed answer")
        have, sha256 = _OFFER.unpack(offer)
        at = have if 0 < have <= file.size and agree(have, sha256) else 0
        try:
            with DataWriter(channel).buffered() as out:
                out.write(_AT.pack(at))
                write(out, at)
            channel.write_frame(FrameType.DATA_END)
        except ConnectionError:
            # The agent gave up; its last frame says why.
            data.finish(Transferred)
            raise
        data.finish(Transferred)
