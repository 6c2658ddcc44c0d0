"""Logins for registries, where `docker login` keeps them: config.json and credential helpers.

Read at each pull, never written, never logged. A helper is a program of the user's that is named in
the file; it gets the registry's name on stdin and prints what it knows.

Source: Docker's config.json; docker-credential-helpers, "Development" (protocol of `get`).
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError
from banger.oci.reference import SHORT_NAME_REGISTRY
from banger.process import find_program, run

if TYPE_CHECKING:
    from collections.abc import Callable

# Under this key the oldest registry's login has been kept since there were no others.
_SHORT_NAME_KEY = "https://index.docker.io/v1/"
_MOST_BYTES = 1 << 20
_HELPER_TIMEOUT_S = 60.0
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Where keyrings and password stores are found.
_PASSED_ON = (
    "DBUS_SESSION_BUS_ADDRESS", "DISPLAY", "WAYLAND_DISPLAY", "GNUPGHOME", "GPG_TTY",
    "PASSWORD_STORE_DIR", "DOCKER_CONFIG",
)  # fmt: skip
# The user name that marks a helper's secret as an identity token.
_TOKEN_USER = "<token>"  # noqa: S105 - a marker, no secret


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """A user name with a password, or an identity token (an OAuth2 refresh token)."""

    username: str = ""
    password: str = ""
    identity_token: str = ""

    def __repr__(self) -> str:
        return f"Credentials(username={self.username!r}, …)"


class _Auth(msgspec.Struct, frozen=True, kw_only=True):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""


class _DockerConfig(msgspec.Struct, frozen=True, kw_only=True):
    auths: dict[str, _Auth] = {}
    creds_store: str = msgspec.field(default="", name="credsStore")
    cred_helpers: dict[str, str] = msgspec.field(default_factory=dict, name="credHelpers")


class _HelperReply(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    username: str = ""
    secret: str = ""


def config_path() -> Path:
    """Docker's configuration file of this user."""
    directory = os.environ.get("DOCKER_CONFIG", "")
    return (Path(directory) if directory else Path.home() / ".docker") / "config.json"


def find_credentials(
    registry: str, *, path: Path, warn: Callable[[str], None]
) -> Credentials | None:
    """The login for a registry (as references name it), or None.

    A file that cannot be read and a helper that fails are told by `warn`: the pull goes on without
    a login, which public images do not need.
    """
    try:
        config = _read(path)
        key = _SHORT_NAME_KEY if registry == SHORT_NAME_REGISTRY else registry
        helper = config.cred_helpers.get(registry) or config.cred_helpers.get(key)
        if helper := helper or config.creds_store:
            found = _ask(helper, key)
            if found is not None:
                return found
        return _stored(config, registry, key)
    except BangerError as e:
        warn(f"no login for {registry}: {e}")
        return None


def _read(path: Path) -> _DockerConfig:
    try:
        with path.open("rb") as f:
            text = f.read(_MOST_BYTES)
        return decode_json(text, type=_DockerConfig)
    except (FileNotFoundError, NotADirectoryError):
        return _DockerConfig()
    except OSError as e:
        raise BangerError("operation_failed", f"reading {path}: {e.strerror}") from e
    except MALFORMED as e:
        # Its words name the place, never the content.
        raise BangerError("operation_failed", f"reading {path}: {e}") from e


def _stored(config: _DockerConfig, registry: str, key: str) -> Credentials | None:
    wanted = {registry, key}
    for name, entry in config.auths.items():
        # Old entries are addresses: https://HOST/v1/.
        host = re.sub(r"^https?://", "", name).partition("/")[0]
        if name not in wanted and host != registry:
            continue
        if entry.identitytoken:
            return Credentials(identity_token=entry.identitytoken)
        if entry.username:
            return Credentials(username=entry.username, password=entry.password)
        if entry.auth:
            try:
                words = base64.b64decode(entry.auth, validate=True).decode()
            except (binascii.Error, UnicodeDecodeError) as e:
                raise BangerError("operation_failed", f"the entry {name} is damaged") from e
            user, _, password = words.partition(":")
            return Credentials(username=user, password=password.rstrip("\0"))
    return None


def _ask(helper: str, key: str) -> Credentials | None:
    if not _HELPER_NAME.fullmatch(helper):
        raise BangerError("operation_failed", f"{helper[:60]!r} is no credential helper's name")
    name = f"docker-credential-{helper}"
    program = find_program(name)
    if program is None:
        raise BangerError("not_found", f"the credential helper {name} is not installed")
    env = {v: value for v in _PASSED_ON if (value := os.environ.get(v))}
    done = run(
        [program, "get"], stdin=key.encode(), env=env, timeout_s=_HELPER_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        # By convention it says so on stdout; other failures may say anything, secrets included.
        if b"credentials not found" in done.stdout:
            return None
        raise BangerError("operation_failed", f"{name} ended with status {done.returncode}")
    try:
        reply = decode_json(done.stdout[:_MOST_BYTES], type=_HelperReply)
    except MALFORMED as e:
        raise BangerError("operation_failed", f"{name} gave no answer that makes sense") from e
    if reply.username == _TOKEN_USER:
        return Credentials(identity_token=reply.secret)
    return Credentials(username=reply.username, password=reply.secret) if reply.username else None
