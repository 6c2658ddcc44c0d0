"""Image references as container tools write them: `[REGISTRY/]REPOSITORY[:TAG][@DIGEST]`.

Pure. Short names get the configured registry and, there, the repository `library/`, as users of
Docker expect; files are named by a scheme in front.

Source: distribution's `reference` grammar and Docker's rules of normalisation.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Literal, TypeAlias

import msgspec

from banger.errors import BangerError

_HINT = "banger image pull --help"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*")
_HOST_PART = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = re.compile(rf"(?:{_HOST_PART}(?:\.{_HOST_PART})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MOST_REPOSITORY = 255
_DEFAULT_TAG = "latest"

# The one registry whose name in references is not its address, and which has official images
# below `library/`.
SHORT_NAME_REGISTRY = "docker.io"
_SHORT_NAME_ADDRESS = "index.docker.io"

Scheme: TypeAlias = Literal["oci", "oci-archive", "docker-archive", "archive"]
_SCHEMES: tuple[Scheme, ...] = ("oci-archive", "docker-archive", "oci", "archive")
# Words that may be a repository as well: what follows has to look like a path.
_UNCLEAR = ("oci", "archive")


class RegistryReference(msgspec.Struct, frozen=True, kw_only=True):
    """An image in a registry. `str()` of it, parsed again, is the same."""

    registry: str
    repository: str
    tag: str | None
    digest: str | None

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.registry}/{self.repository}{tag}{digest}"

    @property
    def version(self) -> str:
        """What a registry is asked for: the digest where there is one, else the tag."""
        return self.digest or self.tag or _DEFAULT_TAG

    @property
    def host(self) -> str:
        """The registry's address, with its port if it has one."""
        return _SHORT_NAME_ADDRESS if self.registry == SHORT_NAME_REGISTRY else self.registry

    @property
    def is_loopback(self) -> bool:
        """Whether the registry is on this host, where plain HTTP is safe."""
        return is_loopback(re.sub(r":[0-9]+$", "", self.registry).strip("[]"))


class FileReference(msgspec.Struct, frozen=True, kw_only=True):
    """An image in files of the host: `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`, `docker-archive:…`;
    `archive:FILE[:TAG]` is either of these two, or the tar of a root filesystem.

    `path` is as it was written; a daemon takes absolute ones only.
    """

    scheme: Scheme
    path: str
    tag: str | None

    def __str__(self) -> str:
        return f"{self.scheme}:{self.path}" + (f":{self.tag}" if self.tag else "")


def parse_reference(
    text: str, default_registry: str = SHORT_NAME_REGISTRY
) -> RegistryReference | FileReference:
    """Parse what a user wrote.

    Raises:
        BangerError: bad_request, naming what is wrong.
    """
    for scheme in _SCHEMES:
        rest = text.removeprefix(f"{scheme}:")
        if rest != text and (scheme not in _UNCLEAR or _looks_like_path(rest)):
            return _parse_file(scheme, rest)
    return _parse_registry(text, default_registry)


def is_explicit(text: str) -> bool:
    """Whether the text can only be a reference: a bare word may be an image's name as well."""
    return any(c in text for c in "/:@")


def default_name(reference: RegistryReference | FileReference) -> str:
    """The name of the image that a pull makes: `…/library/debian:bookworm` → `debian-bookworm`."""
    if isinstance(reference, FileReference):
        stem = re.sub(r"\.(tar|tgz|tar\.(gz|xz|zst)|oci)$", "", reference.path.rsplit("/", 1)[-1])
        words = f"{stem}-{reference.tag}" if reference.tag else stem
    else:
        name = reference.repository.rsplit("/", 1)[-1]
        version = reference.tag or (reference.digest or "")[7:19] or _DEFAULT_TAG
        words = f"{name}-{version}"
    return re.sub(r"[^A-Za-z0-9._-]", "-", words).lstrip("._-")[:128] or "image"


def is_loopback(host: str) -> bool:
    """Whether a host's name or address (no port, no brackets) is this host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_platform(platform: str) -> None:
    """Raises BangerError, bad_request, for a platform that no VM here can have."""
    if platform != "linux/amd64":
        raise BangerError(
            "bad_request",
            f"--platform {platform}: microVMs on this host are linux/amd64, nothing else",
            hint=_HINT,
        )


def _parse_registry(text: str, default_registry: str) -> RegistryReference:
    if text.startswith(("/", "./", "../", "~")):
        raise _refused(
            text, "a path needs docker-archive:, oci-archive:, oci: or archive: in front"
        )
    rest, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise _refused(text, f"{digest[:80]!r} is no sha256 digest")
    # A colon behind the last slash begins a tag; before it, a port.
    tag: str | None = None
    slash = rest.rfind("/")
    if (colon := rest.rfind(":")) > slash:
        rest, tag = rest[:colon], rest[colon + 1 :]
        if not _TAG.fullmatch(tag):
            raise _refused(text, f"{tag[:80]!r} is no tag")
    first, slash_found, repository = rest.partition("/")
    # As Docker tells a registry from a path: by a dot, a port, capitals, or by its being localhost.
    named = bool(slash_found) and (
        any(c in first for c in ".:") or first == "localhost" or first.lower() != first
    )
    registry, repository = (first, repository) if named else (default_registry, rest)
    if registry.lower() == _SHORT_NAME_ADDRESS:
        registry = SHORT_NAME_REGISTRY
    if not _REGISTRY.fullmatch(registry):
        raise _refused(text, f"{registry[:80]!r} is no registry's address")
    if registry == SHORT_NAME_REGISTRY and "/" not in repository:
        repository = f"library/{repository}"
    if not _REPOSITORY.fullmatch(repository) or len(repository) > _MOST_REPOSITORY:
        raise _refused(
            text, f"{repository[:80]!r} is no repository: lower case letters, digits and . _ - /"
        )
    if tag is None and not at:
        tag = _DEFAULT_TAG
    return RegistryReference(
        registry=registry.lower(), repository=repository, tag=tag, digest=digest or None
    )


def _looks_like_path(rest: str) -> bool:
    """`oci:v1` is the tag of a repository `oci`; `oci:./dir` and `oci:/dir` are places."""
    return rest.startswith(("/", "./", "../", "~")) or "/" in rest


def _parse_file(scheme: Scheme, rest: str) -> FileReference:
    path, tag = rest, None
    # A path may hold colons; a tag holds no slash.
    before, colon, after = rest.rpartition(":")
    if colon and before and _TAG.fullmatch(after):
        path, tag = before, after
    if not path or "\0" in path or "\n" in path:
        raise _refused(f"{scheme}:{rest}", "a path is missing")
    return FileReference(scheme=scheme, path=path, tag=tag)


def _refused(text: str, problem: str) -> BangerError:
    return BangerError(
        "bad_request", f"{text[:200]!r} is no image reference: {problem}", hint=_HINT
    )
