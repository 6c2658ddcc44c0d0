"""What a session printed, shown on a terminal and in a file."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from banger.cli.vm_session_stream import _show
from banger.errors import BangerError
from banger.rpc.frames import FrameType

_END = b'{"cursor": "9", "dropped": 0, "state": "running"}'


class Connection:
    """Frames that an agent has sent."""

    def __init__(self, end: bytes = _END) -> None:
        self._end = end

    def frames(self) -> Iterator[tuple[FrameType, bytes]]:
        yield FrameType.STDOUT, b"\x1b[32mgreen\x1b[2J \x1b]0;ti"
        yield FrameType.STDOUT, b"tle\x07end\r"
        yield FrameType.STDOUT, b"\n"
        yield FrameType.RESULT, self._end


class Terminal(io.BytesIO):
    def isatty(self) -> bool:
        return True


def shown(out: io.BytesIO) -> bytes:
    _show(Connection(), stdout=out)  # type: ignore[arg-type]
    return out.getvalue()


def test_a_terminal_gets_text_and_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown(Terminal()) == b"\x1b[32mgreen end\n\x1b[m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(Terminal()) == b"green end\n"


def test_a_file_gets_every_byte() -> None:
    assert shown(io.BytesIO()) == b"\x1b[32mgreen\x1b[2J \x1b]0;title\x07end\r\n"


def test_a_cursor_that_a_terminal_would_act_on_is_refused() -> None:
    end = b'{"cursor": "\\u001b[2J", "dropped": 0, "state": "running"}'
    with pytest.raises(BangerError, match="malformed"):
        _show(Connection(end), stdout=io.BytesIO())  # type: ignore[arg-type]
