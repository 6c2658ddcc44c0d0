"""The configuration document that a guest's initramfs carries (docs/protocol.md).

Pure: built from values, encoded to bytes. It holds secrets, so it is written 0600 and never logged.
"""

from __future__ import annotations

import msgspec

from banger.api.base import Wire
from banger.api.records import ImageConfig

CONFIG_MEMBER = "banger/config.json"
AGENT_PORT = 7000
ANNOUNCE_PORT = 7001


class Network(Wire, frozen=True, kw_only=True):
    mac: str
    address: str
    prefix: int
    gateway: str
    mtu: int
    dns: tuple[str, ...]


class VsockTransport(Wire, frozen=True, kw_only=True, tag_field="kind", tag="vsock"):
    listen_port: int = AGENT_PORT
    announce_port: int = ANNOUNCE_PORT


class TcpTransport(Wire, frozen=True, kw_only=True, tag_field="kind", tag="tcp"):
    """`announce` is "address:port" on the host's side; `peer` the address calls come from."""

    announce: str
    peer: str
    listen_port: int = AGENT_PORT


class Mounts(Wire, frozen=True, kw_only=True):
    image: str = "/dev/vda"
    overlay: str = "/dev/vdb"
    work: str = "/dev/vdc"
    modules: str | None = "/dev/vdd"


class GitIdentity(Wire, frozen=True, kw_only=True):
    name: str
    email: str


class GuestConfig(Wire, frozen=True, kw_only=True):
    vm_id: str
    name: str
    hostname: str
    network: Network
    transport: VsockTransport | TcpTransport
    time_unix_ns: int
    token: str
    authorized_keys: tuple[str, ...]
    host_key: str
    host_key_pub: str
    mounts: Mounts = Mounts()
    docker_dirs: bool = True
    install_sshd: bool = False
    image_config: ImageConfig | None = None
    git_identity: GitIdentity | None = None
    schema: int = 1

    def encode(self) -> bytes:
        return msgspec.json.encode(self)
