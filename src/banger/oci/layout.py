"""Images in files: an OCI layout (a directory, or the tar of one), the tar of `docker save`, and
the plain tar of a root filesystem.

A source is opened, read and closed within one pull; files stay the user's and are only read. An
archive that is compressed as a whole cannot be read at random: the caller has it unpacked to a file
of its own first.

Source: OCI image-spec 1.1, image-layout.md; Docker image spec 1.2, "Combined Image JSON".
"""

from __future__ import annotations

import io
import os
from typing import IO, TYPE_CHECKING, Protocol

import msgspec

from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError
from banger.files import sha256_file
from banger.oci.documents import (
    MOST_DOCUMENT_BYTES,
    ConfigFile,
    Descriptor,
    Document,
    Index,
    Manifest,
    check_digest,
    choose_manifest,
    digest_of,
    parse_config,
    parse_document,
    parse_manifest_or_index,
    short,
)
from banger.oci.errors import BadImage, reading
from banger.oci.merge import Layer
from banger.oci.tar_read import HARD_LINK, REGULAR, SYMLINK, TarReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_REF_NAME = "org.opencontainers.image.ref.name"
_MOST_MEMBERS = 20_000
_MOST_INDEXES = 3


class OciImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image of one platform. `digest` is that of what the reference names (an index or a
    manifest; the configuration for `docker save`)."""

    digest: str
    config: ConfigFile
    layers: tuple[Layer, ...]


class _Files(Protocol):
    """Named files, of a directory or of a tar."""

    def open(self, name: str) -> IO[bytes]:
        """Raises BadImage: there is no such file."""

    def size(self, name: str) -> int: ...


class _SaveEntry(Document, frozen=True, kw_only=True, rename="pascal"):
    """One image of `manifest.json` in a `docker save` tar."""

    config: str
    repo_tags: tuple[str, ...] | None = None
    layers: tuple[str, ...] | None = None


def read_layout(path: Path, tag: str | None) -> OciImage:
    """The image of an OCI layout, a directory or an uncompressed tar of one.

    `tag` is the annotation that names the image; it may be None where there is one only.

    Raises:
        BangerError: not_found: no such file, or no image of that tag. operation_failed, reason
            bad_image: the layout is damaged or for another platform.
    """
    with reading(f"the OCI layout {path}"):
        files = _open_files(path)
        index = parse_document(_document(files, "index.json"), Index)
        descriptor = _choose_tag(index, tag, path)
        digest = descriptor.digest
        for _ in range(_MOST_INDEXES):
            found = parse_manifest_or_index(_checked(files, descriptor))
            if isinstance(found, Manifest):
                return _layout_image(files, digest, found)
            descriptor = choose_manifest(found)
        raise BadImage("indexes are nested too deeply")


def read_docker_archive(path: Path, tag: str | None) -> OciImage:
    """The image of a `docker save` tar; `tag` chooses where it holds several.

    Raises:
        BangerError: as `read_layout`.
    """
    with reading(f"the archive {path}"):
        files = _open_files(path)
        try:
            entries = decode_json(_document(files, "manifest.json"), type=tuple[_SaveEntry, ...])
        except MALFORMED as e:
            raise BadImage(f"manifest.json: {e}") from e
        names = [name for entry in entries for name in entry.repo_tags or ()]
        if tag is not None:
            wanted = [e for e in entries if _is_tagged(e, tag)]
        else:
            wanted = list(entries)
        if len(wanted) != 1:
            raise _not_one(path, len(wanted), tag, names)
        return _saved_image(files, wanted[0])


def read_any_archive(path: Path, tag: str | None) -> OciImage:
    """The image of an uncompressed tar, by what is in it: an OCI layout, what `docker save` writes,
    or else a root filesystem, which is an image of one layer that says nothing of itself.

    Raises:
        BangerError: as `read_layout`; bad_request: a `tag` for a root filesystem.
    """
    with reading(f"the archive {path}"):
        found = _find_documents(path)
        if "index.json" in found:
            return read_layout(path, tag)
        if "manifest.json" in found:
            return read_docker_archive(path, tag)
        if tag is not None:
            raise _not_one(path, 0, tag, [])
        layer = Layer(
            diff_id=None, digest=None, size=path.stat().st_size, open=lambda: path.open("rb")
        )
        digest = f"sha256:{sha256_file(path)}"
        return OciImage(digest=digest, config=ConfigFile(), layers=(layer,))


def _find_documents(path: Path) -> set[str]:
    """Which documents lie at the top of an archive; a system has none of them there."""
    if not path.is_file():
        raise BadImage("it is no file")
    found = set()
    with path.open("rb") as f:
        chunks = _Seeking(f)
        reader = TarReader(iter(chunks))
        while (m := reader.next()) is not None:
            name = m.name.decode(errors="replace").removeprefix("./")
            if name in ("index.json", "manifest.json"):
                found.add(name)
            if m.stored:
                chunks.skip_data(reader, m.stored)
    return found


def _choose_tag(index: Index, tag: str | None, path: Path) -> Descriptor:
    fitting = [
        d
        for d in index.manifests
        if tag is None or (d.annotations or {}).get(_REF_NAME, "").split(":")[-1] == tag
    ]
    # One image for several platforms may be listed flat.
    if len(fitting) > 1 and all(d.platform for d in fitting):
        return choose_manifest(Index(manifests=tuple(fitting)))
    if len(fitting) != 1:
        names = [name for d in index.manifests if (name := (d.annotations or {}).get(_REF_NAME))]
        raise _not_one(path, len(fitting), tag, names)
    return fitting[0]


def _not_one(path: Path, count: int, tag: str | None, names: list[str]) -> BangerError:
    there = f" ({', '.join(name[:100] for name in names[:8])})" if names else ""
    if tag is not None and not count:
        problem = f"there is no image {tag!r} in {path}{there}"
    elif count:
        problem = f"there are {count} images in {path}{there}; say which, as in FILE:TAG"
    else:
        problem = f"there is no image in {path}"
    return BangerError(
        "not_found" if not count else "bad_request", problem, hint="banger image pull --help"
    )


def _is_tagged(entry: _SaveEntry, tag: str) -> bool:
    return any(tag in (name, name.rpartition(":")[2]) for name in entry.repo_tags or ())


def _layout_image(files: _Files, digest: str, manifest: Manifest) -> OciImage:
    config = parse_config(_checked(files, manifest.config), len(manifest.layers))
    layers = []
    for descriptor, diff_id in zip(manifest.layers, config.rootfs.layers, strict=True):
        name = _blob(descriptor.digest)
        if files.size(name) != descriptor.size:
            raise BadImage(
                f"the layer {short(descriptor.digest)} has {files.size(name)} bytes, "
                f"announced were {descriptor.size}"
            )
        layers.append(
            Layer(
                diff_id=diff_id,
                digest=descriptor.digest,
                size=descriptor.size,
                open=_opener(files, name),
            )
        )
    return OciImage(digest=digest, config=config, layers=tuple(layers))


def _saved_image(files: _Files, entry: _SaveEntry) -> OciImage:
    text = _document(files, entry.config)
    names = entry.layers or ()
    config = parse_config(text, len(names))
    layers = [
        Layer(diff_id=diff_id, digest=None, size=files.size(name), open=_opener(files, name))
        for name, diff_id in zip(names, config.rootfs.layers, strict=True)
    ]
    return OciImage(digest=digest_of(text), config=config, layers=tuple(layers))


def _opener(files: _Files, name: str) -> Callable[[], IO[bytes]]:
    return lambda: files.open(name)


def _blob(digest: str) -> str:
    return "blobs/" + check_digest(digest).replace(":", "/")


def _checked(files: _Files, descriptor: Descriptor) -> bytes:
    """A document that has the size and the digest that its descriptor says."""
    data = _document(files, _blob(descriptor.digest))
    if len(data) != descriptor.size or digest_of(data) != descriptor.digest:
        raise BadImage(f"the document {short(descriptor.digest)} is damaged")
    return data


def _document(files: _Files, name: str) -> bytes:
    with files.open(name) as f:
        return f.read(MOST_DOCUMENT_BYTES + 1)


def _open_files(path: Path) -> _Files:
    try:
        return _Directory(path) if path.is_dir() else _Archive(path)
    except FileNotFoundError as e:
        raise BangerError(
            "not_found", f"there is no file {path}", hint="banger image pull --help"
        ) from e
    except OSError as e:
        raise BadImage(e.strerror or str(e)) from e


class _Directory:
    def __init__(self, root: Path) -> None:
        self._root = root

    def _path(self, name: str) -> Path:
        """Names of `docker save` are the image's own words, and it may be anybody's."""
        if name.startswith("/") or ".." in name.split("/"):
            raise BadImage(f"it names a file outside of its directory: {name[:200]}")
        return self._root / name

    def open(self, name: str) -> IO[bytes]:
        try:
            # A pipe in the place of a file would wait for its writer.
            fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as e:
            raise BadImage(f"{name}: {e.strerror}") from e
        return os.fdopen(fd, "rb")

    def size(self, name: str) -> int:
        try:
            return self._path(name).stat().st_size
        except OSError as e:
            raise BadImage(f"{name}: {e.strerror}") from e


class _Archive:
    """The members of a tar by name, found in one pass over its headers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[str, tuple[int, int]] = {}
        links: dict[str, str] = {}
        with path.open("rb") as f:
            chunks = _Seeking(f)
            reader = TarReader(iter(chunks))
            while (m := reader.next()) is not None:
                name = m.name.decode(errors="replace").removeprefix("./")
                if m.kind == REGULAR and m.sparse is None:
                    self._places[name] = (chunks.skip_data(reader, m.stored), m.stored)
                elif m.kind in (SYMLINK, HARD_LINK):
                    # Old versions of Docker write a layer that two images share once.
                    target = m.link.decode(errors="replace")
                    base = os.path.dirname(name) if m.kind == SYMLINK else ""  # noqa: PTH120 - no path of the host
                    links[name] = os.path.normpath(os.path.join(base, target))  # noqa: PTH118 - as above
                if len(self._places) + len(links) > _MOST_MEMBERS:
                    raise BadImage(f"the archive has more than {_MOST_MEMBERS} members")
        for name, target in links.items():
            if target in self._places:
                self._places[name] = self._places[target]

    def open(self, name: str) -> IO[bytes]:
        offset, size = self._find(name)
        f = self._path.open("rb")
        f.seek(offset)
        return io.BufferedReader(_Slice(f, size), 1 << 18)

    def size(self, name: str) -> int:
        return self._find(name)[1]

    def _find(self, name: str) -> tuple[int, int]:
        if name not in self._places:
            raise BadImage(f"there is no {name[:200]} in it")
        return self._places[name]


class _Seeking:
    """A file in small pieces, for a reader that wants the headers only: data is jumped over."""

    def __init__(self, f: IO[bytes]) -> None:
        self._f = f

    def __iter__(self) -> Iterator[bytes]:
        while piece := self._f.read(512):
            yield piece

    def skip_data(self, reader: TarReader, size: int) -> int:
        """Jump over the data that follows the header just read; return where it begins."""
        start = self._f.tell()
        reader.forget_data()
        self._f.seek(start + size + -size % 512)
        if self._f.tell() > os.fstat(self._f.fileno()).st_size:
            raise BadImage("the archive is cut off")
        return start


class _Slice(io.RawIOBase):
    """`size` bytes of an open file, which it owns."""

    def __init__(self, f: IO[bytes], size: int) -> None:
        self._f, self._left = f, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._f.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def close(self) -> None:
        self._f.close()
        super().close()
