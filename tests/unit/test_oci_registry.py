"""Registries, good and bad: what is fetched, what is refused, and who hears of a login."""

from __future__ import annotations

import base64
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from banger.daemon.log import start_logging
from banger.disk.background import Job, JobCancelled
from banger.errors import BangerError
from banger.oci.http import Http
from banger.oci.merge import index_layers
from banger.oci.reference import RegistryReference, parse_reference
from banger.oci.registry import RegistrySource
from fakes.registry import TOKEN, FakeRegistry, fake_registry
from oci_kit import Entry, Image, build_image, directory, layer_tar, sha256
from patience import PATIENCE_S

PIECE = 1 << 20


@pytest.fixture(scope="module")
def image() -> Image:
    """Two layers: a small one, and one of 3 MiB that does not compress."""
    return build_image(
        [
            layer_tar([directory("etc"), Entry("etc/os-release", content=b"ID=test\n")]),
            layer_tar([Entry("big", content=os.urandom(3 * PIECE))]),
        ]
    )


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as fake:
        yield fake


class Puller:
    """Fetches from a fake with a cache, a login file and short pauses."""

    def __init__(self, root: Path, registry: FakeRegistry) -> None:
        self.cache = root / "cache" / "blobs" / "sha256"
        self.config = root / "config.json"
        self.registry = registry
        self.job = Job()
        self.told: list[str] = []
        self.job.warn = self.told.append  # type: ignore[method-assign]
        self.job.advance = lambda done, total=None, detail="": self.told.append(detail)  # type: ignore[method-assign]
        self.silence_s = PATIENCE_S

    def login(self, host: str, user: str, password: str) -> None:
        self.config.write_text(
            json.dumps({"auths": {host: {"username": user, "password": password}}})
        )

    def source(self, tag: str = "latest") -> RegistrySource:
        reference = parse_reference(f"{self.registry.host}/team/app:{tag}")
        assert isinstance(reference, RegistryReference)
        return RegistrySource(
            reference,
            blobs=self.cache,
            work=self.job,
            http=Http(self.job, silence_s=self.silence_s, first_pause_s=0.01),
            docker_config=self.config,
        )

    def pull(self, tag: str = "latest") -> str:
        with self.source(tag) as source:
            fetched = source.fetch()
            index_layers(fetched.layers, what="test", work=self.job)
            return fetched.digest

    def refused(self, tag: str = "latest") -> BangerError:
        with pytest.raises(BangerError) as caught:
            self.pull(tag)
        return caught.value

    def blobs(self) -> set[str]:
        return {f"sha256:{p.name}" for p in self.cache.glob("*")}

    def parts(self) -> list[str]:
        return [p.name for p in self.cache.parent.parent.glob("fetch/*.part")]


@pytest.fixture
def puller(tmp_path: Path, registry: FakeRegistry) -> Puller:
    return Puller(tmp_path, registry)


def test_an_image_is_fetched_once(puller: Puller, registry: FakeRegistry, image: Image) -> None:
    registry.add(image)
    assert puller.pull() == image.manifest
    before = registry.count("/blobs/")
    assert puller.pull() == image.manifest
    assert registry.count("/blobs/") == before == 3
    assert puller.blobs() == set(image.blobs) - {image.manifest}


def test_the_digest_of_a_tag_takes_one_request_without_a_body(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    with puller.source() as source:
        assert source.digest == image.manifest
    assert [a.method for a in registry.asked] == ["HEAD"]


def test_a_registry_that_knows_no_head_is_asked_for_the_manifest(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    registry.no_head = True
    with puller.source() as source:
        assert source.digest == image.manifest


def test_of_several_platforms_linux_amd64_is_taken(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    other = build_image([layer_tar([])], architecture="arm64")
    registry.add(image)
    registry.add(other)
    index = registry.add_index(_index({"arm64": other, "amd64": image}), "multi")
    assert puller.pull("multi") == index
    assert other.layers[0] not in puller.blobs()


def test_an_index_without_our_platform_says_what_there_is(
    puller: Puller, registry: FakeRegistry
) -> None:
    other = build_image([layer_tar([])], architecture="arm64")
    registry.add(other)
    registry.add_index(_index({"arm64": other}), "multi")
    error = puller.refused("multi")
    assert "no linux/amd64 image, only linux/arm64" in error.message


def test_an_image_of_another_machine_is_refused(puller: Puller, registry: FakeRegistry) -> None:
    registry.add(build_image([layer_tar([])], architecture="arm64"))
    assert "the image is for linux/arm64" in puller.refused().message


@pytest.mark.parametrize("no_ranges", [False, True])
def test_a_transfer_that_is_cut_goes_on_where_it_broke(
    puller: Puller, registry: FakeRegistry, image: Image, no_ranges: bool
) -> None:
    registry.add(image)
    registry.cut_after = None if no_ranges else PIECE
    registry.no_ranges = no_ranges
    puller.pull()
    ranges = [a.headers["range"] for a in registry.asked if "range" in a.headers]
    assert len(ranges) == (0 if no_ranges else 3)


def test_a_registry_without_ranges_that_cuts_is_given_up(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    registry.cut_after = 4096
    registry.no_ranges = True
    error = puller.refused()
    assert "the connection" in error.message
    assert puller.parts() == []
    assert image.layers[1] not in puller.blobs()


def test_corrupt_bytes_are_not_kept(puller: Puller, registry: FakeRegistry, image: Image) -> None:
    registry.add(image)
    data = image.blobs[image.layers[1]]
    registry.replaced[image.layers[1]] = data[:-1] + bytes([data[-1] ^ 1])
    error = puller.refused()
    assert error.reason == "bad_image"
    assert "sends what has the sha256" in error.message
    # Once more: what was fetched in two parts may have been replaced between them.
    assert registry.count(f"/blobs/{image.layers[1]}") == 2
    assert puller.parts() == []
    assert image.layers[1] not in puller.blobs()


def test_a_manifest_that_is_another_is_refused(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    registry.replaced[image.manifest] = image.blobs[image.manifest] + b" "
    assert puller.refused().reason == "bad_image"


@pytest.mark.parametrize("lie", [1, 1 << 40])
def test_a_registry_that_lies_about_sizes_is_refused_before_it_is_read(
    puller: Puller, registry: FakeRegistry, image: Image, lie: int
) -> None:
    registry.add(image)
    registry.announce = lie
    error = puller.refused()
    assert error.reason == "bad_image"
    assert f"announces {lie} bytes" in error.message


def test_a_layer_that_does_not_unpack_to_its_diff_id_is_refused(
    puller: Puller, registry: FakeRegistry
) -> None:
    registry.add(build_image([layer_tar([Entry("a")])], diff_ids=[sha256(b"other")]))
    error = puller.refused()
    assert error.reason == "bad_image"
    assert "the configuration says" in error.message


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_bomb_is_refused(
    puller: Puller, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    # The real ceiling takes seconds to reach.
    monkeypatch.setattr("banger.oci.merge.ceiling_bytes", lambda stored: PIECE + 100 * stored)
    bomb = layer_tar([Entry("zeros", content=bytes(64 * PIECE))])
    registry.add(build_image([bomb], compression=compression))
    error = puller.refused()
    assert error.reason == "bad_image"
    assert "no honest image" in error.message


@pytest.mark.parametrize("status", [429, 503])
def test_a_registry_that_asks_for_patience_gets_it_and_says_so(
    puller: Puller, registry: FakeRegistry, image: Image, status: int
) -> None:
    registry.add(image)
    registry.statuses = [(status, {"Retry-After": "0"}), (status, {})]
    puller.pull()
    assert any("waiting" in words and str(status) in words for words in puller.told)


def test_a_registry_that_asks_for_hours_is_given_up_with_its_words(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    registry.statuses = [(429, {"Retry-After": "7200"})]
    error = puller.refused()
    assert error.reason == "rate_limited"
    assert "7200 s" in error.message


def test_a_registry_that_only_fails_is_given_up(puller: Puller, registry: FakeRegistry) -> None:
    registry.statuses = [(500, {})] * 10
    assert "status 500" in puller.refused().message
    assert len(registry.asked) == 5


def test_an_image_that_is_not_there_is_not_found(puller: Puller) -> None:
    assert puller.refused("nothing").code == "not_found"


def test_a_token_is_fetched_with_the_login_and_used(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    registry.realm = f"http://{registry.host}/token?a=b"
    registry.login = ("user", "secret")
    puller.login(registry.host, "user", "secret")
    puller.pull()
    tokens = [a for a in registry.asked if a.path.startswith("/token")]
    assert len(tokens) == 1
    assert "scope=repository%3Ateam%2Fapp%3Apull" in tokens[0].path
    assert "a=b" in tokens[0].path
    assert all(a.authorization == f"Bearer {TOKEN}" for a in registry.asked if "/blobs/" in a.path)


def test_a_token_that_ends_in_the_middle_of_a_pull_is_renewed(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    registry.realm = f"http://{registry.host}/token"
    with puller.source() as source:
        assert source.digest == image.manifest
        demand = {"WWW-Authenticate": f'Bearer realm="{registry.realm}",error="invalid_token"'}
        registry.statuses = [(401, demand)]
        index_layers(source.fetch().layers, what="test", work=puller.job)
    assert registry.count("/token") == 2


def test_a_registry_that_never_has_enough_is_not_asked_for_ever(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    registry.realm = f"http://{registry.host}/token"
    demand = {"WWW-Authenticate": f'Bearer realm="{registry.realm}"'}
    registry.statuses = [(401, demand)] * 50
    assert puller.refused().code == "unauthorized"
    assert len(registry.asked) < 10


def test_a_foreign_layer_that_the_registry_does_not_have_is_said_to_be_one(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    """Its address is not asked: an image may not send this host where it likes."""
    manifest = json.loads(image.blobs[image.manifest])
    with fake_registry() as other:
        other.blobs.update(image.blobs)
        manifest["layers"][1] |= {
            "mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            "urls": [f"http://{other.host}/elsewhere/{image.layers[1]}"],
        }
        text = json.dumps(manifest).encode()
        blobs = {**image.blobs, sha256(text): text}
        foreign = Image(blobs, sha256(text), image.layers)
        registry.add(foreign)
        registry.gone.add(image.layers[1])
        assert "a foreign layer" in puller.refused().message
        assert other.asked == []
    # One that it has is a layer like any other.
    registry.gone.clear()
    puller.pull()


def test_a_basic_login_is_used_where_it_is_asked_for(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    registry.login = ("user", "secret")
    puller.login(registry.host, "user", "secret")
    puller.pull()


@pytest.mark.parametrize("login", [None, ("user", "wrong")])
def test_without_the_right_login_it_is_unauthorized(
    puller: Puller, registry: FakeRegistry, image: Image, login: tuple[str, str] | None
) -> None:
    registry.add(image)
    registry.login = ("user", "secret")
    if login:
        puller.login(registry.host, *login)
    error = puller.refused()
    assert error.code == "unauthorized"
    assert error.hint == f"docker login {registry.host}"
    assert "wrong" not in str(error)


def test_no_login_and_no_token_goes_to_another_host(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    registry.realm = f"http://{registry.host}/token"
    registry.login = ("user", "secret")
    puller.login(registry.host, "user", "secret")
    with fake_registry() as other:
        other.blobs.update(image.blobs)
        # Another port is another host, as far as logins go.
        registry.redirect = f"http://{other.host}/elsewhere/{{name}}"
        assert puller.pull() == image.manifest
        assert other.asked
        assert [a.authorization for a in other.asked if a.authorization] == []


def test_a_redirect_out_of_this_host_in_plain_text_is_refused(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    registry.redirect = "http://registry.invalid/elsewhere/x?signature=SECRET"
    error = puller.refused()
    assert "unencrypted" in error.message
    assert "SECRET" not in str(error)


def test_a_token_service_without_encryption_elsewhere_gets_no_login(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    registry.realm = "http://tokens.invalid/token"
    puller.login(registry.host, "user", "secret")
    assert puller.refused().code == "unauthorized"


NO_ADDRESSES = ["https://[::1", "https://registry.invalid:99999/x", "https://registry.invalid:x/"]


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_a_redirect_to_what_is_no_address_is_refused(
    puller: Puller, registry: FakeRegistry, image: Image, address: str
) -> None:
    registry.add(image)
    registry.redirect = address
    assert "no address" in puller.refused().message


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_a_token_service_that_is_no_address_is_refused(
    puller: Puller, registry: FakeRegistry, image: Image, address: str
) -> None:
    registry.add(image)
    registry.realm = address
    assert puller.refused().code == "unauthorized"


def test_a_length_that_no_number_holds_is_another_length(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    registry.announce = "9" * 5000
    error = puller.refused()
    assert error.reason == "bad_image"
    assert "announces 9999" in error.message


def test_a_server_that_falls_silent_is_given_up(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    registry.hold = threading.Event()
    puller.silence_s = 0.1
    error = puller.refused()
    assert "no answer in time" in error.message
    assert puller.parts() == []


def test_a_cancellation_ends_a_transfer_that_stands_still(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    registry.hold = threading.Event()
    puller.silence_s = 1000
    outcome: list[Any] = []

    def work() -> None:
        try:
            puller.pull()
        except BaseException as e:
            outcome.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    assert registry.holding.wait(PATIENCE_S)
    puller.job.cancel()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert isinstance(outcome[0], JobCancelled)
    assert puller.parts() == []


def test_two_pulls_at_once_fetch_each_layer_once(
    tmp_path: Path, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            Puller(tmp_path, registry).pull()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert errors == []
    for digest in image.layers:
        assert registry.count(f"/blobs/{digest}") == 1


def test_a_damaged_blob_in_the_cache_is_found_and_fetched_again(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    puller.pull()
    blob = puller.cache / image.layers[1].removeprefix("sha256:")
    data = bytearray(blob.read_bytes())
    data[1000] ^= 1
    blob.write_bytes(data)
    with puller.source() as source:
        fetched = source.fetch()
        with pytest.raises(BangerError, match="damaged|digest"):
            index_layers(fetched.layers, what="test", work=puller.job)
        assert source.drop_damaged()
        index_layers(source.fetch().layers, what="test", work=puller.job)


def test_a_truncated_blob_in_the_cache_is_fetched_again(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    puller.pull()
    blob = puller.cache / image.layers[1].removeprefix("sha256:")
    os.truncate(blob, 100)
    puller.pull()


def test_a_pull_goes_on_when_the_cache_is_emptied_under_it(
    puller: Puller, registry: FakeRegistry, image: Image
) -> None:
    registry.add(image)
    with puller.source() as source:
        fetched = source.fetch()
        for blob in puller.cache.glob("*"):
            blob.unlink()
        index_layers(fetched.layers, what="test", work=puller.job)


def test_nothing_of_logins_and_signatures_gets_into_the_log(
    puller: Puller, registry: FakeRegistry, image: Image, tmp_path: Path
) -> None:
    registry.add(image)
    registry.realm = f"http://{registry.host}/token"
    registry.login = ("user", "pass-SECRET")
    puller.login(registry.host, *registry.login)
    before = logging.getLogger().handlers[:], logging.getLogger().level
    with fake_registry() as other:
        other.blobs.update(image.blobs)
        registry.redirect = f"http://{other.host}/elsewhere/{{name}}?signature=SECRET"
        other.statuses = [(500, {})]
        try:
            start_logging(tmp_path / "log", "debug")
            logging.getLogger("banger").info("it is on")
            puller.pull()
        finally:
            for handler in logging.getLogger().handlers:
                handler.close()
            logging.getLogger().handlers[:], level = before
            logging.getLogger().setLevel(level)
    log = (tmp_path / "log").read_text() + "".join(puller.told)
    assert "it is on" in log
    encoded = base64.b64encode(b"user:pass-SECRET").decode()
    assert [secret for secret in ("SECRET", TOKEN, encoded) if secret in log] == []


def _index(images: dict[str, Image]) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {
                "digest": image.manifest,
                "size": len(image.blobs[image.manifest]),
                "platform": {"os": "linux", "architecture": name},
            }
            for name, image in images.items()
        ],
    }
