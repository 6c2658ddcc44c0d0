"""Where a container image comes from: one way to ask for its digest and then for the whole of it.

A source lives for one pull. Asking for the digest is cheap: one request to a registry, or the
documents of an archive.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from banger.image.cache import ARCHIVE, trim_cache, using_scratch
from banger.oci.layout import OciImage, read_any_archive, read_docker_archive, read_layout
from banger.oci.reference import FileReference, RegistryReference
from banger.oci.unpacked import unpacked_archive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from banger.config.paths import Paths
    from banger.disk.background import Job


class Source(Protocol):
    """`digest` is what the reference means now."""

    @property
    def digest(self) -> str: ...

    def fetch(self) -> OciImage:
        """The image, its layers at hand."""

    def drop_damaged(self) -> bool:
        """Remove what a cache holds damaged of it; whether there was any."""


class _Opened:
    def __init__(self, image: OciImage) -> None:
        self._image = image

    @property
    def digest(self) -> str:
        return self._image.digest

    def fetch(self) -> OciImage:
        return self._image

    def drop_damaged(self) -> bool:
        return False


@contextlib.contextmanager
def open_source(
    paths: Paths,
    reference: RegistryReference | FileReference,
    *,
    job: Job,
    require_space: Callable[[int], None],
    cache_limit_bytes: int,
) -> Iterator[Source]:
    """The source that a reference names, until the block is left.

    `require_space` is called before a download with its size in bytes, and may refuse. The cache is
    kept below its limit: before a download, as far as others do not use it, and at the end.

    Raises:
        BangerError: not_found, unauthorized, operation_failed.
    """
    if isinstance(reference, RegistryReference):
        from banger.oci.registry import RegistrySource  # with urllib3, which archives do not need

        def make_room(size: int) -> None:
            trim_cache(paths, keep_bytes=cache_limit_bytes - size)
            require_space(size)

        try:
            with RegistrySource(
                reference, blobs=paths.oci_blobs, work=job, require_space=make_room
            ) as source:
                yield source
        finally:
            trim_cache(paths, keep_bytes=cache_limit_bytes)
        return
    readers = {"docker-archive": read_docker_archive, "archive": read_any_archive}
    read = readers.get(reference.scheme, read_layout)
    with (
        using_scratch(paths) as scratch,
        unpacked_archive(Path(reference.path), scratch, ARCHIVE, work=job) as archive,
    ):
        yield _Opened(read(archive, reference.tag))
