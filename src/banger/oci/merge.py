"""Layers to one tar stream, in two passes over the compressed layers.

The first pass reads every layer, oldest first, checks its digests and builds the tree of names. The
second reads those layers again from which something survives, and writes: first all directories,
then each surviving member, with its further names right behind it. That is the order which sqfstar
needs. Memory holds names, never content; nothing touches the host's filesystem.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import msgspec

from banger.oci.compression import LayerStream, ceiling_bytes
from banger.oci.documents import short
from banger.oci.errors import BadImage, reading
from banger.oci.prefetch import prefetched
from banger.oci.tar_read import DIRECTORY, REGULAR, Member, TarReader
from banger.oci.tar_write import write_end, write_link, write_member
from banger.oci.tree import Survivors, Tree
from banger.units import TIB, format_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from banger.oci.tree import Meta
    from banger.oci.work import Work

# What squashfs can hold. ACLs (system.posix_acl_*) are not among them.
_XATTRS = (b"user.", b"trusted.", b"security.")
# Labels of the machine that built the image, and words of an overlay that it was built on, which
# the guest's own overlay would obey.
_FOREIGN_XATTRS = (b"security.selinux", b"trusted.overlay.")
_MOST_CONTENT = 1 * TIB
_OS_RELEASE = frozenset((b"etc/os-release", b"usr/lib/os-release"))
_MOST_OS_RELEASE = 64 << 10
_OS_ID = re.compile(rb"^ID=[\"']?([a-z0-9][a-z0-9._-]{0,63})[\"']?\s*$", re.MULTILINE)
_DEFAULT_MODE = 0o755


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One stored layer. `open` gives its bytes as stored, from the start, each time it is called.

    `digest` and `diff_id` are None where a source does not name them; `size` is in bytes, as
    stored.
    """

    diff_id: str | None
    digest: str | None
    size: int
    open: Callable[[], IO[bytes]]


@dataclass(kw_only=True)
class Merged:
    """What the second pass finds out while it runs."""

    members: int = 0
    content_bytes: int = 0
    distro: str = "unknown"


class LayerIndex(msgspec.Struct, frozen=True, kw_only=True):
    """What the first pass has found out. `content_bytes` are those of all files of all layers."""

    layers: tuple[Layer, ...]
    survivors: Survivors
    tree: Tree
    content_bytes: int
    newest: int
    """The latest time in it, as squashfs can hold it, in Unix seconds."""

    @property
    def root_mode(self) -> int:
        return self.tree.root.meta.mode if self.tree.root.meta else _DEFAULT_MODE


def index_layers(layers: Sequence[Layer], *, what: str, work: Work) -> LayerIndex:
    """The first pass. `what` is the image, for messages.

    Raises:
        BangerError: operation_failed, reason bad_image: a digest that differs, a damaged layer, a
            name that leaves the root, a bomb.
    """
    tree = Tree()
    content = apparent = done = 0
    total = sum(layer.size for layer in layers)
    for layer in layers:
        with reading(_called(layer, what)):
            tree.begin_layer()
            with layer.open() as stored:
                stream = LayerStream(stored, ceiling=ceiling_bytes(layer.size), check=work.check)
                with prefetched(iter(stream)) as pieces:
                    reader = TarReader(pieces)
                    while (m := reader.next()) is not None:
                        tree.add(m)
                        if m.kind == REGULAR:
                            content += m.stored
                            apparent += m.size
                            if apparent > _MOST_CONTENT:
                                raise BadImage(
                                    f"its files have more than {_MOST_CONTENT >> 40} TiB"
                                )
                    reader.drain()
            tree.end_layer()
            if stream.stored_bytes != layer.size:
                raise BadImage(f"it has {stream.stored_bytes} bytes, announced were {layer.size}")
            if layer.digest is not None and stream.digest != layer.digest:
                raise BadImage(f"its content has the digest {short(stream.digest)}")
            if layer.diff_id is not None and stream.diff_id != layer.diff_id:
                raise BadImage(
                    f"unpacked it has the digest {short(stream.diff_id)}, "
                    f"the configuration says {short(layer.diff_id)}"
                )
        done += layer.size
        work.advance(done, total, "reading layers")
    for kind, count in tree.dropped.items():
        work.warn(f"{what}: {kind} left out, {count} of them")
    return LayerIndex(
        layers=tuple(layers),
        survivors=tree.survivors(),
        tree=tree,
        content_bytes=content,
        newest=min(tree.newest, (1 << 32) - 1),
    )


def write_merged(index: LayerIndex, stream: IO[bytes], *, what: str, work: Work) -> Merged:
    """The second pass: write the merged tree to `stream` as one tar. The root has no entry.

    Raises:
        BangerError: operation_failed, reason bad_image: a layer is not any more what was indexed.
    """
    merged = Merged()
    dropped = 0
    write = stream.write
    for path, directory in index.tree.walk_directories():
        entry = _directory_member(directory.meta, index.newest)
        dropped += keep_xattrs(entry)
        write_member(write, entry, path)
        merged.members += 1
    done, total = 0, sum(layer.size for layer in index.layers)
    for number, layer in enumerate(index.layers):
        wanted = index.survivors.count(number)
        with reading(_called(layer, what)):
            if wanted:
                for m, reader in _live_members(index, number, layer, work):
                    dropped += keep_xattrs(m)
                    _write(m, reader, index.survivors.names(number, m), stream, merged)
                    wanted -= 1
            if wanted:
                raise BadImage("it has changed while it was read")
        done += layer.size
        work.advance(done, total, f"{merged.members} files, {format_size(merged.content_bytes)}")
    write_end(write)
    if dropped:
        work.warn(f"{what}: {dropped} extended attributes (ACLs and labels) left out")
    return merged


def _called(layer: Layer, what: str) -> str:
    name = layer.digest or layer.diff_id
    return f"layer {short(name)} of {what}" if name else what


def _live_members(
    index: LayerIndex, number: int, layer: Layer, work: Work
) -> Iterator[tuple[Member, TarReader]]:
    left = index.survivors.count(number)
    with layer.open() as stored:
        stream = LayerStream(stored, ceiling=ceiling_bytes(layer.size), check=work.check)
        with prefetched(iter(stream)) as pieces:
            reader = TarReader(pieces)
            # What follows the last survivor was read and checked once, which is enough.
            while left and (m := reader.next()) is not None:
                if index.survivors.is_live(number, m.ordinal):
                    left -= 1
                    yield m, reader


def _write(
    m: Member, reader: TarReader, names: list[bytes], stream: IO[bytes], merged: Merged
) -> None:
    body = write_member(stream.write, m, names[0])
    if m.kind == REGULAR:
        if m.size <= _MOST_OS_RELEASE and m.sparse is None and not _OS_RELEASE.isdisjoint(names):
            text = reader.data()
            body.write(text)
            if found := _OS_ID.search(text):
                merged.distro = found[1].decode()
        else:
            reader.copy_data(body.write)
        body.end()
        merged.content_bytes += m.stored
    for name in names[1:]:
        write_link(stream.write, m, name, names[0])
    merged.members += len(names)


def keep_xattrs(m: Member) -> int:
    """Keep the attributes that an image can hold; return how many ACLs and labels went."""
    if not m.xattrs:
        return 0
    before = len(m.xattrs)
    m.xattrs = tuple(
        (key, value)
        for key, value in m.xattrs
        if key.startswith(_XATTRS) and not key.startswith(_FOREIGN_XATTRS)
    )
    return before - len(m.xattrs)


def _directory_member(meta: Meta | None, newest: int) -> Member:
    m = Member()
    m.ordinal, m.kind, m.link, m.major, m.minor = 0, DIRECTORY, b"", 0, 0
    m.size = m.stored = 0
    m.sparse = None
    if meta is None:
        m.mode, m.uid, m.gid, m.mtime, m.xattrs = _DEFAULT_MODE, 0, 0, newest, ()
    else:
        m.mode, m.uid, m.gid = meta.mode, meta.uid, meta.gid
        m.mtime, m.xattrs = meta.mtime, meta.xattrs
    return m
