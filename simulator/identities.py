"""Simulated peers under the names that real clients know peers by."""

from __future__ import annotations

from hashlib import sha256
from ipaddress import IPv6Address

from nacl.signing import SigningKey

from scheduler.facts import PASS_SIZES, Hop
from simulator.directory import Record
from splitnet.directory.record import PeerRecord
from splitnet.security.identity import PublicKey
from splitnet.swarm.plan import PlannedHop
from splitnet.wire.endpoints import Endpoint

MODEL = "5eed" * 8


class Identities:
    """Keys, addresses and records of devices by their ids; the same device always gets the same."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._keys: dict[str, PublicKey] = {}
        self._names: dict[str, str] = {}
        self._ids: dict[str, str] = {}
        self._records: dict[tuple[str, float], PeerRecord] = {}

    def endpoint(self, device: str) -> Endpoint:
        return Endpoint(_address(device), self._key(device))

    def name(self, device: str) -> str:
        """The key as text."""
        self._key(device)
        return self._names[device]

    def device(self, name: str) -> str:
        """Whose key, which was given out before, that is."""
        return self._ids[name]

    def hop(self, hop: Hop, record: Record) -> PlannedHop:
        """A hop through the peer that published the record."""
        return PlannedHop(self._record(hop.peer, record.settled_at_s), hop.start, hop.end)

    def _key(self, device: str) -> PublicKey:
        key = self._keys.get(device)
        if key is None:
            key = PublicKey(bytes(SigningKey(sha256(device.encode()).digest()).verify_key))
            self._keys[device] = key
            self._names[device] = key.text
            self._ids[key.text] = device
        return key

    def _record(self, device: str, placed_at: float) -> PeerRecord:
        record = self._records.get((device, placed_at))
        if record is None:
            record = self._records[device, placed_at] = PeerRecord.idle(
                key=self._key(device),
                model=MODEL,
                model_name="simulated",
                address=_address(device),
                num_blocks=self._num_blocks,
                codecs=("none",),
                block_ms=(1.0,) * len(PASS_SIZES),
                placed_at=placed_at,
                serves=True,
                coordinate_error=1.0,
            )
        return record


def device_at(endpoint: Endpoint) -> str:
    """The id of the device that listens there."""
    return IPv6Address(endpoint.address.removeprefix("tcp://[").removesuffix("]:1")).packed.lstrip(b"\0").decode()


def _address(device: str) -> str:
    """Endpoints name IP addresses only: the id of at most 16 bytes is one."""
    packed = device.encode().rjust(16, b"\0")
    return f"tcp://[{IPv6Address(packed)}]:1"
