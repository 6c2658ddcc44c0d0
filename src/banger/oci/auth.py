"""Proving to a registry who asks: bearer tokens and basic logins.

A registry says with status 401 what it wants; a token is got from the place it names and kept, per
registry and scope, as long as the pull. Logins go to the registry itself and to the token service
that it names over an encrypted connection, to nobody else.

Source: distribution-spec, "Token Authentication Specification" and its OAuth2 variant; RFC 9110,
section 11 (challenges).
"""

from __future__ import annotations

import base64
import re
import urllib.parse
from typing import TYPE_CHECKING

import msgspec

from banger.decoding import MALFORMED, decode_json
from banger.errors import BangerError
from banger.oci.http import BrokenTransfer, address_from, place
from banger.oci.reference import is_loopback

if TYPE_CHECKING:
    from collections.abc import Callable

    from banger.oci.credentials import Credentials
    from banger.oci.http import Http

_CLIENT = "banger"
_MOST_TOKEN_BYTES = 1 << 20
_SCHEME = re.compile(r"(?:^|,)\s*([A-Za-z]+)(?=\s)")
_PARAMETER = re.compile(r'([A-Za-z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')


class Challenge(msgspec.Struct, frozen=True, kw_only=True):
    """One demand of a `WWW-Authenticate` header; the scheme in lower case."""

    scheme: str
    parameters: dict[str, str]


class _TokenReply(msgspec.Struct, frozen=True, kw_only=True):
    token: str = ""
    access_token: str = ""


class Login:
    """What is sent as `Authorization` for one repository; `find` is asked once, when it matters."""

    def __init__(self, http: Http, repository: str, find: Callable[[], Credentials | None]) -> None:
        self._http = http
        self._scope = f"repository:{repository}:pull"
        self._find = find
        self._asked = False
        self._credentials: Credentials | None = None
        self.header: str | None = None

    def answer(self, url: str, demanded: str) -> bool:
        """Answer the 401 of `url` with a new header; False where there is nothing better to send.

        Raises:
            BangerError: the token service refuses, fails, or is not encrypted.
        """
        before = self.header
        challenges = {c.scheme: c for c in parse_challenges(demanded)}
        if bearer := challenges.get("bearer"):
            self.header = f"Bearer {self._token(url, bearer)}"
            return True
        credentials = self._login()
        if "basic" in challenges and credentials and credentials.username:
            self.header = _basic(credentials)
            return self.header != before
        return False

    @property
    def has_login(self) -> bool:
        return self._login() is not None

    def _login(self) -> Credentials | None:
        if not self._asked:
            self._asked, self._credentials = True, self._find()
        return self._credentials

    def _token(self, url: str, challenge: Challenge) -> str:
        named = challenge.parameters.get("realm", "")
        try:
            realm = address_from(url, named)
        except ValueError as e:
            raise BangerError(
                "unauthorized", f"asking {place(url)}: it wants a token of {named[:120]!r}"
            ) from e
        parts = urllib.parse.urlsplit(realm)
        here = urllib.parse.urlsplit(url)
        local = here.scheme == "http" and is_loopback(parts.hostname or "")
        if parts.scheme != "https" and not (parts.scheme == "http" and local):
            raise BangerError(
                "unauthorized", f"asking {place(url)}: it wants a token of {realm[:120]!r}"
            )
        query = {"scope": self._scope}
        if service := challenge.parameters.get("service"):
            query["service"] = service
        credentials = self._login()
        if credentials and credentials.identity_token:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": credentials.identity_token,
                "client_id": _CLIENT,
                **query,
            }
            return self._fetch(
                "POST", realm, body=urllib.parse.urlencode(form).encode(), authorization=None
            )
        words = urllib.parse.urlencode(query)
        address = parts._replace(query=f"{parts.query}&{words}" if parts.query else words)
        return self._fetch(
            "GET",
            address.geturl(),
            body=None,
            authorization=_basic(credentials) if credentials else None,
        )

    def _fetch(
        self, method: str, url: str, *, body: bytes | None, authorization: str | None
    ) -> str:
        headers = {"Content-Type": "application/x-www-form-urlencoded"} if body else {}
        with self._http.request(
            # A form with a token in it is not sent to wherever a redirect leads.
            method, url, headers=headers, authorization=authorization, body=body, follow=not body
        ) as answer:  # fmt: skip
            if answer.status in (400, 401, 403):
                raise BangerError(
                    "unauthorized",
                    f"asking {place(url)} for a token: the login is refused",
                    hint=f"docker login {urllib.parse.urlsplit(url).hostname}",
                )
            if answer.status != 200:
                raise BangerError(
                    "operation_failed",
                    f"asking {place(url)} for a token: status {answer.status}",
                )
            try:
                reply = decode_json(answer.text(_MOST_TOKEN_BYTES), type=_TokenReply)
            except (BrokenTransfer, *MALFORMED) as e:
                raise BangerError(
                    "operation_failed", f"asking {place(url)} for a token: no sensible answer"
                ) from e
        token = reply.token or reply.access_token
        if not token or re.search(r"[\s\x00-\x1f]", token):
            raise BangerError("operation_failed", f"asking {place(url)} for a token: there is none")
        return token


def parse_challenges(header: str) -> list[Challenge]:
    """The demands in a `WWW-Authenticate` header, in order; what is malformed is left out."""
    # Strings first: a comma or a scheme's name may be inside of one.
    held: list[str] = []

    def hold(m: re.Match[str]) -> str:
        held.append(re.sub(r"\\(.)", r"\1", m[1]))
        return f"@{len(held) - 1}@"

    text = re.sub(r'"((?:[^"\\]|\\.)*)"', hold, header)
    starts = list(_SCHEME.finditer(text))
    found = []
    for i, start in enumerate(starts):
        end = starts[i + 1].start() if i + 1 < len(starts) else len(text)
        parameters = {}
        for name, value in re.findall(r"([A-Za-z_]+)\s*=\s*([^\s,]+)", text[start.end() : end]):
            m = re.fullmatch(r"@(\d+)@", value)
            parameters[name.lower()] = held[int(m[1])] if m else value
        found.append(Challenge(scheme=start[1].lower(), parameters=parameters))
    return found


def _basic(credentials: Credentials) -> str:
    words = f"{credentials.username}:{credentials.password}".encode()
    return f"Basic {base64.b64encode(words).decode()}"
