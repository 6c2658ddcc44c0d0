"""The documents of an image: index, manifest, configuration; and digests.

They come from strangers: capped before they are parsed, decoded strictly by type, unknown fields
accepted. Source: OCI image-spec 1.1 (descriptor.md, image-index.md, manifest.md, config.md) and
Docker's manifest v2 schema 2, whose fields are the same.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, TypeVar

import msgspec

from banger.api.records import ImageConfig
from banger.decoding import MALFORMED, decode_json
from banger.oci.errors import BadImage

INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
CONFIG_TYPES = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
MOST_DOCUMENT_BYTES = 4 << 20
_MOST_LAYERS = 1000
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MOST_VOLUMES = 256
# Of all that a program would be started with; no single string may be longer (execve(2)).
_MOST_WORDS_BYTES = 128 << 10

D = TypeVar("D", bound="Document")


class Document(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A document that accepts unknown fields: there are newer writers."""


class Platform(Document, frozen=True, kw_only=True):
    architecture: str = ""
    os: str = ""
    variant: str | None = None


class Descriptor(Document, frozen=True, kw_only=True):
    """What a digest refers to. `size` is in bytes."""

    media_type: str = ""
    digest: str
    size: int
    platform: Platform | None = None
    annotations: dict[str, str] | None = None
    urls: tuple[str, ...] | None = None
    """Where else it may be had. Nobody is asked there: it is a stranger's wish."""

    def __post_init__(self) -> None:
        check_digest(self.digest)
        if self.size < 0:
            raise ValueError("a descriptor's size is negative")


class Index(Document, frozen=True, kw_only=True):
    media_type: str | None = None
    manifests: tuple[Descriptor, ...]


class Manifest(Document, frozen=True, kw_only=True):
    media_type: str | None = None
    config: Descriptor
    layers: tuple[Descriptor, ...]


class _Kind(Document, frozen=True, kw_only=True):
    """Enough of any of the two to tell them apart."""

    schema_version: int | None = None
    media_type: str | None = None
    manifests: Any = None
    config: Any = None


class RootFs(Document, frozen=True, kw_only=True, rename=None):
    diff_ids: tuple[str, ...] | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The digests of the unpacked layers; an image without any may say null."""
        return self.diff_ids or ()


class RunConfig(Document, frozen=True, kw_only=True, rename="pascal"):
    """`config` of the configuration: how to run the image. Absent and null are the same."""

    user: str | None = None
    env: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    working_dir: str | None = None
    volumes: dict[str, Any] | None = None
    stop_signal: str | None = None


class ConfigFile(Document, frozen=True, kw_only=True, rename=None):
    architecture: str = ""
    os: str = ""
    config: RunConfig | None = None
    rootfs: RootFs = RootFs()


def check_digest(text: str) -> str:
    """Return a digest unchanged.

    Raises:
        BadImage: it is none, or not sha256, which is the only algorithm in use.
    """
    if not _DIGEST.fullmatch(text):
        raise BadImage(f"{text[:80]!r} is no sha256 digest")
    return text


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def short(digest: str) -> str:
    """A digest as messages show it."""
    return digest.removeprefix("sha256:")[:12]


def count_layers(number: int) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number} layer{'' if number == 1 else 's'}"


def parse_document(data: bytes, kind: type[D]) -> D:
    """Decode one document.

    Raises:
        BadImage: too large, no JSON, or not of that kind; the message names the field.
    """
    if len(data) > MOST_DOCUMENT_BYTES:
        raise BadImage(f"a document of more than {MOST_DOCUMENT_BYTES >> 20} MiB")
    try:
        return decode_json(data, type=kind)
    except BadImage:
        raise
    except MALFORMED as e:
        raise BadImage(f"{kind.__name__.lower()}: {e}") from e


def parse_manifest_or_index(data: bytes) -> Manifest | Index:
    """An index has `manifests`, a manifest has `config`.

    A document may not be read as both: CVE-2021-41190 is about readers that disagree on which.

    Raises:
        BadImage: neither, both, or the old schema 1, which says so.
    """
    kind = parse_document(data, _Kind)
    if kind.schema_version == 1:
        raise BadImage("it is in Docker's old schema 1, which has no digests of its layers")
    if (kind.manifests is None) == (kind.config is None):
        raise BadImage("the document is neither an index nor a manifest")
    if kind.manifests is not None:
        return parse_document(data, Index)
    manifest = parse_document(data, Manifest)
    if manifest.config.media_type not in ("", *CONFIG_TYPES):
        raise BadImage(f"it is no container image but {manifest.config.media_type[:120]!r}")
    if len(manifest.layers) > _MOST_LAYERS:
        raise BadImage(f"it has {len(manifest.layers)} layers, {_MOST_LAYERS} at most")
    if bad := [x.media_type for x in manifest.layers if x.media_type.endswith("+encrypted")]:
        raise BadImage(f"a layer is encrypted ({bad[0][:120]})")
    return manifest


def choose_manifest(index: Index, architecture: str = "amd64") -> Descriptor:
    """The index's manifest for linux on this architecture.

    Raises:
        BadImage: there is none; the message lists what there is.
    """
    entries = index.manifests
    fitting = [
        m
        for m in entries
        if m.platform and (m.platform.os, m.platform.architecture) == ("linux", architecture)
    ]
    # Without a variant it runs on every processor; v2 and v3 ask for newer ones.
    fitting.sort(key=lambda m: m.platform.variant or "" if m.platform else "")
    if fitting:
        return fitting[0]
    if len(entries) == 1 and entries[0].platform is None:
        return entries[0]
    there = sorted(
        {f"{m.platform.os}/{m.platform.architecture}" for m in entries if m.platform}
        - {"unknown/unknown"}
    )
    raise BadImage(f"there is no linux/{architecture} image, only {', '.join(there) or 'nothing'}")


def parse_config(data: bytes, layers: int, architecture: str = "amd64") -> ConfigFile:
    """Decode a configuration and check that it fits this many layers and this machine.

    Raises:
        BadImage: it does not.
    """
    config = parse_document(data, ConfigFile)
    if config.os not in ("", "linux") or config.architecture not in ("", architecture):
        raise BadImage(
            f"the image is for {config.os}/{config.architecture}, not linux/{architecture}"
        )
    if len(config.rootfs.layers) != layers:
        raise BadImage(f"{layers} layers, but {len(config.rootfs.layers)} diff_ids")
    for diff_id in config.rootfs.layers:
        check_digest(diff_id)
    return config


def guest_config(config: ConfigFile, *, digest: str, reference: str) -> ImageConfig:
    """The part of a configuration that a guest honours.

    Raises:
        BadImage: a string that no program could be started with, too many of them or of volumes.
    """
    run = config.config or RunConfig()
    volumes = tuple(run.volumes or ())
    if len(volumes) > _MOST_VOLUMES:
        raise BadImage(f"it names {len(volumes)} volumes, {_MOST_VOLUMES} at most")
    made = ImageConfig(
        env=tuple(run.env or ()),
        user=run.user or "",
        workdir=run.working_dir or "",
        entrypoint=tuple(run.entrypoint or ()),
        cmd=tuple(run.cmd or ()),
        stop_signal=run.stop_signal or "",
        volumes=volumes,
        digest=digest,
        reference=reference,
    )
    words = (*made.env, made.user, made.workdir, *made.entrypoint, *made.cmd, *volumes)
    if any("\0" in word for word in words):
        raise BadImage("its configuration holds a NUL byte")
    size = sum(len(word.encode(errors="replace")) for word in words)
    if size > _MOST_WORDS_BYTES:
        raise BadImage(f"its configuration has {size} bytes of words, {_MOST_WORDS_BYTES} at most")
    return made
