"""Published and registered images and kernels: what is asked for, and what comes back."""

from __future__ import annotations

from typing import Literal

from banger.api.base import Params, Wire


class RegisterImage(Params, frozen=True, kw_only=True):
    """`image.register`: files of the user's by absolute paths.

    Either `kernel_ref`, or `kernel` with at most one of `initrd` and `modules`.
    """

    name: str
    rootfs: str
    kernel_ref: str | None = None
    kernel: str | None = None
    initrd: str | None = None
    modules: str | None = None
    distro: str = "linux"


class ImportKernel(Params, frozen=True, kw_only=True):
    """`kernel.import`: a directory with vmlinux or vmlinuz, optionally `modules/` and `config`."""

    name: str
    directory: str
    distro: str
    arch: str = "amd64"
    force: bool = False


class BuildKernel(Params, frozen=True, kw_only=True):
    """`kernel.build`: `recipe` names what is built, `name` the entry where it is another one.

    `fragment` and `signing_key` are the contents of files, `source` and `signature` the absolute
    paths of a tarball of the kernel project's and its detached signature.
    """

    recipe: str
    name: str | None = None
    fragment: str | None = None
    jobs: int | None = None
    force: bool = False
    source: str | None = None
    signature: str | None = None
    signing_key: str | None = None


class Exported(Wire, frozen=True, kw_only=True):
    """What an index says of a bundle, apart from file, hash and size, which its writer knows."""

    kind: Literal["image", "kernel"]
    name: str
    distro: str
    arch: str
    kernel_ref: str | None = None
    kernel_version: str | None = None
    description: str = ""


class AvailableKernel(Wire, frozen=True, kw_only=True):
    """A kernel that can be had. `size_bytes` is the download's where that is known."""

    name: str
    distro: str
    arch: str
    pulled: bool
    version: str | None
    size_bytes: int | None
    source: str
    description: str


class KernelCatalog(Wire, frozen=True, kw_only=True):
    """`problem`: why the configured index does not count."""

    kernels: tuple[AvailableKernel, ...]
    problem: str | None = None
