"""The file tree that layers make when they are laid over each other, as names only.

Layers are applied oldest first, as an unpacker would do it, to a tree in memory: parents that are
symbolic links are followed inside it, whiteouts hide what lower layers brought, a hard link shares
its target's inode. An inode is a number, its layer and its place there; content and metadata of
files stay in the layers and are read again when the result is written. So an entry costs some 200
bytes, whatever is in it.

Source: OCI image-spec 1.1, layer.md, "Applying Changesets" and "Whiteouts".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from banger.oci.errors import BadImage
from banger.oci.tar_read import DIRECTORY, HARD_LINK, KNOWN, SYMLINK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from banger.oci.tar_read import Member

_WHITEOUT, _OPAQUE = b".wh.", b".wh..wh..opq"
_MOST_LINKS_FOLLOWED = 40  # MAXSYMLINKS of Linux
_MOST_NAME = 255  # NAME_MAX; squashfs has 256
_MOST_PATH = 4095  # PATH_MAX, whose last byte is the NUL
_SHIFT = 32
# Estimated bytes of memory: for a file, a directory, and the whole tree.
_FILE_COST, _DIRECTORY_COST, _LINK_COST = 180, 420, 200
_MOST_MEMORY = 200 << 20


class Meta:
    """Owner, mode, time and attributes of a directory."""

    __slots__ = ("gid", "mode", "mtime", "uid", "xattrs")

    def __init__(
        self, mode: int, uid: int, gid: int, mtime: int, xattrs: tuple[tuple[bytes, bytes], ...]
    ) -> None:
        self.mode, self.uid, self.gid, self.mtime, self.xattrs = mode, uid, gid, mtime, xattrs


class Directory:
    """`touched` is the newest layer that put something into it, or below."""

    __slots__ = ("entries", "meta", "touched")

    def __init__(self, meta: Meta | None, touched: int) -> None:
        self.entries: dict[bytes, Node] = {}
        self.meta = meta  # None: no layer has an entry for it
        self.touched = touched


class Symlink:
    __slots__ = ("inode", "target")

    def __init__(self, inode: int, target: bytes) -> None:
        self.inode, self.target = inode, target


Node: TypeAlias = int | Symlink | Directory


def layer_of(inode: int) -> int:
    return inode >> _SHIFT


def ordinal_of(inode: int) -> int:
    return inode & ((1 << _SHIFT) - 1)


class Tree:
    """Take `begin_layer`, `add` for each member, `end_layer`; oldest layer first."""

    def __init__(self) -> None:
        self.root = Directory(None, -1)
        self.layer = -1
        self.counts: list[int] = []
        """Members of each layer."""
        self.newest = 0
        """The latest time that a member has."""
        self.dropped: dict[str, int] = {}
        """What was left out, in words, and how often."""
        self._linked: set[int] = set()
        self._moved: dict[int, bytes] = {}
        self._upper_links: set[tuple[Directory, bytes]] = set()
        self._waiting: list[tuple[bytes, bytes]] = []
        self._last: tuple[bytes, Directory, bytes | None] | None = None
        self._memory = 0

    def begin_layer(self) -> None:
        self.layer += 1
        self.counts.append(0)
        self._upper_links.clear()
        self._last = None

    def end_layer(self) -> None:
        """Raises BadImage: a hard link whose target came nowhere."""
        for name, target in self._waiting:
            if not self._link(name, target):
                raise BadImage(f"{name!r} is a hard link to {target!r}, which is not there")
            self._memory -= _LINK_COST + len(name) + len(target)
        self._waiting.clear()

    def add(self, m: Member) -> None:
        """Apply one member.

        Raises:
            BadImage: a name that climbs, is absolute or too long, a parent that is no directory, or
                more entries than memory is meant to hold.
        """
        self.counts[-1] = m.ordinal + 1
        parts = split_name(m.name)
        if not parts:
            if m.kind == DIRECTORY:
                self.root.meta = _meta(m)
            return
        last = parts[-1]
        if last.startswith(_WHITEOUT):
            self._whiteout(parts)
            return
        if m.kind not in KNOWN:
            kind = "socket" if m.kind == b"s" else f"entry of type {m.kind!r}"
            self.dropped[kind] = self.dropped.get(kind, 0) + 1
            return
        if m.kind == HARD_LINK:
            name = b"/".join(parts)
            if not self._link(name, m.link):
                self._spend(_LINK_COST + len(name) + len(m.link))
                self._waiting.append((name, m.link))
            return
        self.newest = max(self.newest, m.mtime)
        parent, resolved = self._parent(parts)
        existing = parent.entries.get(last)
        if m.kind == DIRECTORY:
            self._spend(_xattrs_cost(m.xattrs))
            if isinstance(existing, Directory):
                if existing.meta is not None:
                    self._memory -= _xattrs_cost(existing.meta.xattrs)
                existing.meta, existing.touched = _meta(m), self.layer
                return
            node: Node = Directory(_meta(m), self.layer)
            self._spend(_DIRECTORY_COST + len(last))
        else:
            inode = (self.layer << _SHIFT) | m.ordinal
            node = Symlink(inode, m.link) if m.kind == SYMLINK else inode
            self._spend(_FILE_COST + len(last) + (80 + len(m.link) if m.kind == SYMLINK else 0))
            if resolved is not None:
                self._moved[inode] = resolved + b"/" + last if resolved else last
                self._spend(140 + len(resolved) + len(last))
        self._put(parent, last, node, existing)

    # The result
    def walk_directories(self) -> Iterator[tuple[bytes, Directory]]:
        """Every directory but the root, parents first, with its path."""
        return ((path, directory) for path, directory in self._walk() if path)

    def survivors(self) -> Survivors:
        """What is to be written of each layer. The tree is not changed any more."""
        live = [bytearray(count) for count in self.counts]
        names: dict[int, list[bytes]] = {}
        for path, directory in self._walk():
            prefix = path + b"/" if path else b""
            for name, node in directory.entries.items():
                if isinstance(node, Directory):
                    continue
                inode = node if isinstance(node, int) else node.inode
                live[layer_of(inode)][ordinal_of(inode)] = 1
                if inode in self._linked:
                    names.setdefault(inode, []).append(prefix + name)
        return Survivors(live, names, self._moved)

    def find(self, path: bytes) -> Node | None:
        """What is at a path, links followed in its parents only; None when nothing is."""
        parts = [p for p in path.split(b"/") if p not in (b"", b".")]
        if not parts:
            return self.root
        found = self._enter(parts[:-1], make=False)
        return found[0].entries.get(parts[-1]) if found else None

    # Steps
    def _walk(self) -> Iterator[tuple[bytes, Directory]]:
        """Every directory with its path, parents first. Those that wait share what is above them:
        their whole paths would be megabytes where a few names are long."""
        stack: list[tuple[bytes, bytes, Directory]] = [(b"", b"", self.root)]
        while stack:
            above, name, directory = stack.pop()
            path = above + name
            yield path, directory
            prefix = path + b"/" if path else b""
            stack += [
                (prefix, name, node)
                for name, node in directory.entries.items()
                if isinstance(node, Directory)
            ]

    def _put(self, parent: Directory, name: bytes, node: Node, existing: Node | None) -> None:
        if existing is not None:
            self._forget(existing, name)
        parent.entries[name] = node

    def _link(self, name: bytes, target: bytes) -> bool:
        """Make `name` a further name of what is at `target`; False when nothing is there yet."""
        # A target is relative to the root also where a writer begins it with a slash.
        target_parts = split_name(target.lstrip(b"/"))
        if not target_parts:
            raise BadImage(f"{name!r} is a hard link to the root directory")
        found = self._enter(target_parts[:-1], make=False)
        node = found[0].entries.get(target_parts[-1]) if found else None
        if node is None:
            return False
        if isinstance(node, Directory):
            raise BadImage(f"{name!r} is a hard link to the directory {target!r}")
        parts = name.split(b"/")
        parent, resolved = self._parent(parts)
        existing = parent.entries.get(parts[-1])
        if existing != node:  # inodes by number, symbolic links by identity
            self._put(parent, parts[-1], node, existing)
            self._spend(_FILE_COST + len(parts[-1]))
        inode = node if isinstance(node, int) else node.inode
        # Of what has several names, the result holds the whole path of each.
        cost = len(resolved) + len(parts[-1]) if resolved is not None else len(name)
        if inode not in self._linked and found is not None:
            cost += len(b"/".join((*found[2], target_parts[-1])))
        self._linked.add(inode)
        self._upper_links.add((parent, parts[-1]))
        self._spend(_LINK_COST + cost)
        return True

    def _whiteout(self, parts: list[bytes]) -> None:
        last = parts[-1]
        found = self._enter(parts[:-1], make=False)
        if last == _OPAQUE:
            if found is not None:
                for name in list(found[0].entries):
                    self._hide(found[0], name)
            return
        hidden = last[len(_WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise BadImage(f"{b'/'.join(parts)!r} is no whiteout of anything")
        if found is not None and hidden in found[0].entries:
            self._hide(found[0], hidden)

    def _hide(self, parent: Directory, name: bytes) -> None:
        """Remove what lower layers brought; what this layer has put there stays."""
        self._last = None
        stack = [(parent, name)]
        while stack:
            where, entry = stack.pop()
            node = where.entries[entry]
            if not self._is_upper(where, entry, node):
                del where.entries[entry]
                self._forget(node, entry)
            elif isinstance(node, Directory):
                stack += [(node, below) for below in node.entries]

    def _is_upper(self, parent: Directory, name: bytes, node: Node) -> bool:
        if isinstance(node, Directory):
            return node.touched == self.layer
        inode = node if isinstance(node, int) else node.inode
        return layer_of(inode) == self.layer or (parent, name) in self._upper_links

    def _parent(self, parts: list[bytes]) -> tuple[Directory, bytes | None]:
        """The directory that a member goes into, and its path if it is another than was named."""
        key = b"/".join(parts[:-1])
        if self._last is not None and self._last[0] == key:
            return self._last[1], self._last[2]
        found = self._enter(parts[:-1], make=True)
        assert found is not None
        stack, path = found[1], b"/".join(found[2])
        if len(path) + 1 + len(parts[-1]) > _MOST_PATH:
            raise BadImage(f"the path {path[:60]!r}… has more than {_MOST_PATH} bytes")
        for directory in stack:
            directory.touched = self.layer
        resolved = path if path != key else None
        self._last = (key, found[0], resolved)
        return found[0], resolved

    def _enter(
        self, parts: Sequence[bytes], *, make: bool
    ) -> tuple[Directory, list[Directory], list[bytes]] | None:
        """Walk to a directory, through symbolic links as if the tree's root were `/`.

        Returns it, the directories on the way (itself included) and its real path; None when it is
        not there and may not be made.
        """
        stack, path = [self.root], list[bytes]()
        left = list(reversed(parts))
        followed = 0
        while left:
            part = left.pop()
            if part == b"..":  # only out of a link's target
                if path:
                    path.pop()
                    stack.pop()
                continue
            node = stack[-1].entries.get(part)
            if isinstance(node, Symlink):
                followed += 1
                if followed > _MOST_LINKS_FOLLOWED:
                    raise BadImage(f"too many symbolic links in {b'/'.join(parts)!r}")
                if node.target.startswith(b"/"):
                    stack, path = [self.root], []
                left += [p for p in reversed(node.target.split(b"/")) if p not in (b"", b".")]
                continue
            if node is None:
                if not make:
                    return None
                _check_part(part)
                node = Directory(None, self.layer)
                stack[-1].entries[part] = node
                self._spend(_DIRECTORY_COST + len(part))
            elif isinstance(node, int):
                if not make:
                    return None
                raise BadImage(f"{b'/'.join([*path, part])!r} has entries below it but is a file")
            stack.append(node)
            path.append(part)
        return stack[-1], stack, path

    def _spend(self, memory: int) -> None:
        self._memory += memory
        if self._memory > _MOST_MEMORY:
            raise BadImage(
                "it has too many files: their names alone would take more than "
                f"{_MOST_MEMORY >> 20} MiB of memory"
            )

    def _forget(self, node: Node, name: bytes) -> None:
        """Give back what a removed entry had spent."""
        if isinstance(node, Directory):
            self._last = None
        stack = [(node, name)]
        while stack:
            node, name = stack.pop()
            if isinstance(node, Directory):
                self._memory -= _DIRECTORY_COST + len(name)
                if node.meta is not None:
                    self._memory -= _xattrs_cost(node.meta.xattrs)
                stack += [(below, entry) for entry, below in node.entries.items()]
            else:
                self._memory -= _FILE_COST + len(name)
                if isinstance(node, Symlink):
                    self._last = None
                    self._memory -= 80 + len(node.target)


class Survivors:
    """Which members of each layer are in the result, and under which names."""

    def __init__(
        self, live: list[bytearray], names: dict[int, list[bytes]], moved: dict[int, bytes]
    ) -> None:
        self._live, self._names, self._moved = live, names, moved

    def count(self, layer: int) -> int:
        return self._live[layer].count(1)

    def is_live(self, layer: int, ordinal: int) -> bool:
        live = self._live[layer]
        return ordinal < len(live) and live[ordinal] == 1

    def names(self, layer: int, m: Member) -> list[bytes]:
        """The paths of a live member, one or more."""
        inode = (layer << _SHIFT) | m.ordinal
        if linked := self._names.get(inode):
            return linked
        return [self._moved.get(inode) or b"/".join(split_name(m.name))]


def split_name(name: bytes) -> list[bytes]:
    """The components of a member's name; none for the root.

    Raises:
        BadImage: it is absolute, climbs, or has a component that no filesystem takes.
    """
    if name.startswith(b"/"):
        raise BadImage(f"the name {name!r} is absolute")
    if b"\0" in name:
        raise BadImage(f"the name {name!r} holds a NUL byte")
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    for part in parts:
        _check_part(part)
        if part == b"..":
            raise BadImage(f"the name {name!r} climbs")
    return parts


def _check_part(part: bytes) -> None:
    if len(part) > _MOST_NAME:
        raise BadImage(f"the name {part[:60]!r}… has more than {_MOST_NAME} bytes")


def _xattrs_cost(xattrs: tuple[tuple[bytes, bytes], ...]) -> int:
    return sum(len(key) + len(value) + 120 for key, value in xattrs)


def _meta(m: Member) -> Meta:
    return Meta(m.mode & 0o7777, m.uid, m.gid, m.mtime, m.xattrs)
