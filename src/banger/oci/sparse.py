"""Sparse files laid out so that sqfstar reads them, and what fills the gaps on the way.

sqfstar (4.5.1) loses its place in the stream unless each piece of data begins and ends on a block
of tar. Only the last one may be shorter, where the file's size is no multiple of a block; then it
has to be there, behind another piece. So pieces grow to whole blocks, with zeros of the hole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from banger.oci.tar_read import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Piece = tuple[int, int]


def lay_out(pieces: Sequence[Piece], size: int) -> tuple[Piece, ...]:
    """The pieces (offset, length) to write for those that are there, in order.

    Each piece that is there lies in what is written, or in two neighbours. `size` is at least one
    block.
    """
    spans: list[list[int]] = []
    for offset, length in pieces:
        start = offset - offset % BLOCK
        end = min(offset + length + -(offset + length) % BLOCK, size)
        if spans and start <= spans[-1][1]:
            spans[-1][1] = max(end, spans[-1][1])
        else:
            spans.append([start, end])
    tail = size - size % BLOCK
    if tail != size:
        if spans and spans[-1][1] == size:
            start, _ = spans.pop()
            if start < tail:
                spans.append([start, tail])
        if not spans:
            spans.append([0, BLOCK])
        spans.append([tail, size])
    elif not spans or spans[-1][1] != size:
        # A hole at the end is an empty piece behind it, as GNU tar has it; sqfstar insists.
        spans.append([size, size])
    return tuple((start, end - start) for start, end in spans)


class Filler:
    """Takes the data of `pieces` as it comes and writes that of `laid`; then `end`."""

    def __init__(
        self, write: Callable[[bytes], object], pieces: Sequence[Piece], laid: Sequence[Piece]
    ) -> None:
        self._write = write
        self._gaps: list[Piece] = []  # zeros, then data
        at = span = before = 0
        for offset, length in pieces:
            while not laid[span][0] <= offset < sum(laid[span]):
                before += laid[span][1]
                span += 1
            start = before + offset - laid[span][0]
            self._gaps.append((start - at, length))
            at = start + length
        self._rest = sum(length for _, length in laid) - at
        self._gaps.reverse()
        self._left = 0  # of the present piece's data

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if not self._left:
                zeros, self._left = self._gaps.pop()
                self._write(bytes(zeros))
            self._write(bytes(view[: self._left]))
            taken = min(self._left, len(view))
            self._left -= taken
            view = view[taken:]

    def end(self) -> None:
        self._write(bytes(self._rest))
