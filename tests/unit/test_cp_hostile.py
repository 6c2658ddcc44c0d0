"""What a guest can say to a copy: answers that are cut, have no end, or name other places."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.api.envelope import PROTOCOL_VERSION, Request
from banger.cli import cp_out
from banger.cli.copying import Copying
from banger.errors import BangerError
from banger.rpc.copies import PutFile, fetch_digests, put_file, read_file
from banger.rpc.frames import FrameType, encode
from banger.rpc.trees import GuestFiles

_RESULT = encode(FrameType.RESULT, b'{"files":1,"bytes":1}')
_END = encode(FrameType.DATA_END)


def _request(method: str, params: dict[str, Any]) -> Request:
    raw = msgspec.Raw(msgspec.json.encode(params))
    return Request(version=PROTOCOL_VERSION, method=method, params=raw)


def _guest(answers: dict[str, bytes]) -> GuestFiles:
    """A guest that answers each method with the same bytes, whatever is asked."""

    def serve(sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as lines:
            method = msgspec.json.decode(lines.readline())["method"]
            sock.sendall(answers[method])
            sock.shutdown(socket.SHUT_WR)
            while lines.read(1 << 16):
                pass

    def connect() -> socket.socket:
        ours, theirs = socket.socketpair()
        threading.Thread(target=serve, args=(theirs,)).start()
        return ours

    return GuestFiles(connect, _request)


def _stream(*frames: bytes) -> bytes:
    return b'{"stream":true}\n' + b"".join(frames)


def _data(payload: bytes) -> bytes:
    return encode(FrameType.DATA, payload)


def _head(size: int, before: bytes = b"") -> bytes:
    return struct.pack("<QI", size, 0o100644) + hashlib.sha256(before).digest()


@pytest.mark.parametrize(
    "answer",
    [
        _stream(_data(b"short"), _END, _RESULT),
        _stream(_END, _RESULT),
        _stream(_data(_head(5)), _data(b"more than five"), _END, _RESULT),
        _stream(_data(_head(5)), _data(b"four"), _END, _RESULT),
        _stream(_data(_head(5)), _data(b"four")),
        _stream(_data(_head(5)), _data(b"whole"), _END, encode(FrameType.RESULT, b"[")),
    ],
)
def test_file_that_is_not_what_was_announced_is_an_error(answer: bytes) -> None:
    got = bytearray()

    def receive(head: Any, chunks: Any) -> bool:
        for chunk in chunks:
            got.extend(chunk)
        return True

    with pytest.raises(BangerError):
        read_file(_guest({"read": answer}), "/x", b"", 0, receive)
    assert len(got) <= 5


@pytest.mark.parametrize("count", [0, 43, 45, 88, 1000])
def test_digests_that_are_not_one_for_each_file_are_an_error(count: int) -> None:
    guest = _guest({"digest": _stream(_data(bytes(count)), _END, _RESULT)})
    with pytest.raises(BangerError):
        fetch_digests(guest, "/x", [(b"one", 1)])


def test_offer_of_more_than_there_is_begins_anew_and_a_malformed_one_is_an_error() -> None:
    sent: list[int] = []

    def write(out: Any, at: int) -> None:
        sent.append(at)
        out.write(b"content"[at:])

    for have in (8, 1 << 63):
        offer = struct.pack("<Q", have) + hashlib.sha256(b"content").digest()
        guest = _guest({"put_file": _stream(_data(offer), _END, _RESULT)})
        put_file(guest, PutFile("/x", b"f", 7, 0o644, 0), lambda _, __: True, write)
    assert sent == [0, 0]
    for frames in ([_data(b"x")], [_END, _RESULT], []):
        guest = _guest({"put_file": _stream(*frames)})
        with pytest.raises(BangerError):
            put_file(guest, PutFile("/x", b"f", 7, 0o644, 0), lambda _, __: True, write)
    assert sent == [0, 0]


def _entry(name: bytes, size: int) -> bytes:
    return struct.pack("<IQQQQH", 0o100644, size, 1, 1, 1, len(name)) + name


@pytest.mark.parametrize(
    "name", [b"../evil", b"/etc/evil", b"a/../../evil", b".", b"./", b"link/evil", b"a\0b"]
)
@pytest.mark.parametrize("size", [7, 9 << 20])
def test_listed_name_that_leads_elsewhere_lands_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes, size: int
) -> None:
    target, outside = tmp_path / "target", tmp_path / "outside"
    target.mkdir()
    outside.mkdir()
    (target / "link").symlink_to("../outside")
    stat = {"result": {"kind": "directory", "path": "/x", "size": 0, "mode": 0o755}}
    answers = {
        "stat": msgspec.json.encode(stat) + b"\n",
        "scan": _stream(_data(_entry(name, size)), _END, _RESULT),
        "digest": _stream(_data(bytes(44)), _END, _RESULT),
        "read": _stream(_data(_head(size)), *[_data(bytes(1 << 17))] * (size >> 17), _END, _RESULT),
        "get": _stream(_data(bytes(1024)), _END, _RESULT),
    }
    copying = Copying("web", lambda _: None)
    copying.guest = _guest(answers)
    monkeypatch.setattr(Copying, "attended", _at_once)
    try:
        cp_out.download(copying, "/x/.", str(target))
    except BangerError:
        pass
    else:
        assert size == 7  # it has not come at all
    assert list(outside.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outside", "target"]
    assert [p.name for p in target.iterdir()] == ["link"]


def _at_once(_: Copying, work: Callable[[], Any]) -> Any:
    return work()


def test_size_that_no_disk_has_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    stat = {"result": {"kind": "file", "path": "/x", "size": 1 << 60, "mode": 0o644}}
    answers = {
        "stat": msgspec.json.encode(stat) + b"\n",
        "read": _stream(_data(_head(1 << 60)), _data(bytes(1000))),
    }
    copying = Copying("web", lambda _: None)
    copying.guest = _guest(answers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Copying, "attended", _at_once)
        with pytest.raises(BangerError, match="do not fit") as caught:
            cp_out.download(copying, "/x", str(tmp_path / "file"))
    assert caught.value.reason == "disk_full"
    assert list(tmp_path.iterdir()) == []
