"""Container images made by the tests, and trees to compare: what an image is, entry by entry."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from banger import zstd
from banger.disk.background import Job
from banger.disk.squashfs import write_squashfs
from banger.oci.layout import OciImage, read_layout
from banger.oci.merge import Merged, index_layers, write_merged

MTIME = 1_600_000_000
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"


@dataclass
class Entry:
    """One member of a layer. `kind` is the tar type; names and targets may hold any bytes."""

    name: str | bytes
    kind: bytes = tarfile.REGTYPE
    content: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    target: str | bytes = ""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    mtime: int = MTIME


def directory(name: str | bytes, mode: int = 0o755, **kwargs: Any) -> Entry:
    return Entry(name, tarfile.DIRTYPE, mode=mode, **kwargs)


def symlink(name: str | bytes, target: str | bytes, **kwargs: Any) -> Entry:
    return Entry(name, tarfile.SYMTYPE, target=target, mode=0o777, **kwargs)


def link(name: str | bytes, target: str | bytes, **kwargs: Any) -> Entry:
    return Entry(name, tarfile.LNKTYPE, target=target, **kwargs)


def whiteout(name: str) -> Entry:
    head, slash, tail = name.rpartition("/")
    return Entry(f"{head}{slash}.wh.{tail}")


def opaque(name: str) -> Entry:
    return Entry(f"{name}/.wh..wh..opq" if name else ".wh..wh..opq")


def _text(name: str | bytes) -> str:
    return os.fsdecode(name) if isinstance(name, bytes) else name


def layer_tar(entries: Iterable[Entry], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A layer as the standard library writes it."""
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for e in entries:
            info = tarfile.TarInfo(_text(e.name))
            info.type, info.mode, info.uid, info.gid, info.mtime = (
                e.kind, e.mode, e.uid, e.gid, e.mtime,
            )  # fmt: skip
            info.linkname, info.size = _text(e.target), len(e.content)
            info.devmajor, info.devminor = e.device
            info.pax_headers = {f"SCHILY.xattr.{k}": os.fsdecode(v) for k, v in e.xattrs.items()}
            tar.addfile(info, io.BytesIO(e.content))
    return out.getvalue()


def compress(data: bytes, kind: str) -> bytes:
    if kind == "gzip":
        return gzip.compress(data, 1, mtime=0)
    return zstd.compress(data) if kind == "zstd" else data


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class Image:
    """An image in memory: its blobs by digest, and the digest of its manifest."""

    blobs: dict[str, bytes]
    manifest: str
    layers: list[str]


def build_image(
    layers: Sequence[bytes],
    *,
    config: Mapping[str, Any] | None = None,
    compression: str = "gzip",
    architecture: str = "amd64",
    diff_ids: Sequence[str] | None = None,
    stored: Sequence[bytes] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Image:
    """Documents and blobs around the layers' tars; `stored`: the layers as they are kept."""
    blobs = {}
    stored = stored or [compress(data, compression) for data in layers]
    suffix = {"gzip": "+gzip", "zstd": "+zstd", "none": ""}[compression]
    document = {
        "architecture": architecture,
        "os": "linux",
        "config": dict(config or {}),
        "rootfs": {
            "type": "layers",
            "diff_ids": list(diff_ids) if diff_ids else [sha256(data) for data in layers],
        },
    }
    text = json.dumps(document).encode()
    blobs[sha256(text)] = text
    for data in stored:
        blobs[sha256(data)] = data
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": sha256(text), "size": len(text)},
            "layers": [
                {
                    "mediaType": _layer_type(data) if suffix == "+gzip" else LAYER_TYPE + suffix,
                    "digest": sha256(data),
                    "size": len(data),
                    **({"annotations": dict(annotations)} if annotations else {}),
                }
                for data in stored
            ],
        }
    ).encode()
    blobs[sha256(manifest)] = manifest
    return Image(blobs, sha256(manifest), [sha256(data) for data in stored])


def _layer_type(data: bytes) -> str:
    return LAYER_TYPE + ("+gzip" if data.startswith(b"\x1f\x8b") else "")


def write_layout(root: Path, image: Image, tag: str = "latest") -> Path:
    """The image as an OCI layout directory."""
    blobs = root / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for digest, data in image.blobs.items():
        (blobs / digest.removeprefix("sha256:")).write_bytes(data)
    (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    descriptor = {
        "mediaType": MANIFEST_TYPE,
        "digest": image.manifest,
        "size": len(image.blobs[image.manifest]),
        "annotations": {"org.opencontainers.image.ref.name": tag},
    }
    (root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}))
    return root


def write_archive(path: Path, layout: Path) -> Path:
    """An `oci-archive`: the tar of a layout."""
    with tarfile.open(path, "w") as tar:
        for name in ("oci-layout", "index.json", "blobs"):
            tar.add(layout / name, name)
    return path


def squash(layout: Path, target: Path, tag: str | None = None) -> Merged:
    """Our side: merge the layout's image into a squashfs file."""
    return squash_image(read_layout(layout, tag), target)


def squash_image(image: OciImage, target: Path) -> Merged:
    job = Job()
    index = index_layers(image.layers, what="test", work=job)
    merged: list[Merged] = []
    write_squashfs(
        target,
        lambda stream: merged.append(write_merged(index, stream, what="test", work=job)),
        job=job,
        epoch=index.newest,
        root_mode=index.root_mode,
    )
    return merged[0]


def unsquash(image: Path, target: Path) -> Path:
    """The squashfs as squashfs-tools understand it. Needs root for owners and devices."""
    subprocess.run(
        ["unsquashfs", "-n", "-d", target, image], check=True, capture_output=True, timeout=120
    )
    return target


def umoci_unpack(layout: Path, bundle: Path, tag: str = "latest") -> Path:
    """The judge's side: the root filesystem that umoci makes."""
    subprocess.run(
        ["umoci", "unpack", "--image", f"{layout}:{tag}", bundle],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return bundle / "rootfs"


def describe(root: Path) -> dict[bytes, tuple[Any, ...]]:
    """Every entry below root: type and mode, owner, size, link target or device, xattrs, hash, and
    which other names it has."""
    found: dict[bytes, tuple[Any, ...]] = {}
    inodes: dict[int, list[bytes]] = {}
    top = os.fsencode(root)
    rows = []
    for place, dirs, names in os.walk(top):
        rows += [os.path.join(place, n) for n in (*dirs, *names)]
    for path in rows:
        st = os.lstat(path)
        name = os.path.relpath(path, top)
        if not stat.S_ISDIR(st.st_mode):
            inodes.setdefault(st.st_ino, []).append(name)
        detail: Any = None
        if stat.S_ISLNK(st.st_mode):
            detail = os.readlink(path)
        elif stat.S_ISREG(st.st_mode):
            with open(path, "rb") as f:
                detail = (st.st_size, hashlib.file_digest(f, "sha256").hexdigest())
        elif stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode):
            detail = (os.major(st.st_rdev), os.minor(st.st_rdev))
        attributes = {
            key: os.getxattr(path, key, follow_symlinks=False)
            for key in os.listxattr(path, follow_symlinks=False)
            if not key.startswith(("system.", "security.selinux"))
        }
        found[name] = (
            oct(st.st_mode),
            st.st_uid,
            st.st_gid,
            detail,
            tuple(sorted(attributes.items())),
            st.st_ino,
        )
    return {
        name: (*row[:-1], tuple(sorted(inodes.get(row[-1], []))))
        for name, row in sorted(found.items())
    }
