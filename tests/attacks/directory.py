"""Attacks on the directory of a live swarm: strangers fill it, hide records, or make peers move.

Each function takes addresses to join the DHT with and the fingerprint of a model, attacks for some seconds, and returns
the number of its attempts or successes. It leaves no process running, only the records that it has stored.
"""

from __future__ import annotations

import dataclasses
import os
import random
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from zeroconf import IPVersion, ServiceInfo, Zeroconf

from splitnet.directory import mdns as lan
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.directory.hivemind_node import import_hivemind
from splitnet.directory.mdns import LanNode
from splitnet.directory.record import MAX_TTL_S, MODELS_KEY, PeerRecord, SeenLink, shard_key, shard_keys
from splitnet.security.identity import Identity
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import PROTOCOL_VERSION, Found, LookUp
from tests.attacks.transport import Client

NODE = ["/ip4/127.0.0.1/tcp/0"]
_BATCH = 50
_NODES_OF_PACKET = 15
_FOR_EVER_S = 2**31 - 1
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def fake_record(identity: Identity, model: str, **claims: Any) -> PeerRecord:
    """A record of a peer that is better than any real one, at an address without a listener."""
    facts: dict[str, Any] = {
        "key": identity.public,
        "model": model,
        "model_name": "a model",
        "address": "tcp://127.0.0.1:9",
        "start": 0,
        "end": 6,
        "num_blocks": 6,
        "protocol": 1,
        "codecs": ("none", "int8"),
        "device": "cpu",
        "dtype": "float32",
        "block_ms": (0.0,) * 5,
        "queue_ms": 0.0,
        "batch": 0.0,
        "kv_free_positions": 1 << 40,
        "sessions": 0,
        "max_blocks": 0,
        "placed_at": time.time() - 3600,
        "moving_to": None,
        "serves": True,
        "coordinate": (0.0,) * 4,
        "coordinate_error": 0.5,
        "bytes_per_ms": 1.0,
        "links": (),
        "version": "1",
        "issued_at": time.time(),
        "ttl_s": MAX_TTL_S,
    }
    return PeerRecord(**{**facts, **claims})


def long_record(identity: Identity, model: str, **claims: Any) -> PeerRecord:
    """A fake record of 2.6 kB."""
    codecs = tuple(f"c{index:02d}{'x' * 58}" for index in range(28))
    links = tuple(SeenLink(os.urandom(8), 1.0, 1.0) for _ in range(16))
    return fake_record(identity, model, codecs=codecs, links=links, **claims)


def flood_records(
    addresses: Sequence[str],
    model: str,
    *,
    seconds: float = 600.0,
    count: int = 1 << 30,
    pause_s: float = 0.0,
    **claims: Any,
) -> int:
    """Announces long records of new keys under all keys of the DHT that readers ask for. Returns how often a node has
    stored a record."""
    taken = 0
    with DhtDirectory.start(initial_peers=addresses) as node:
        ends = time.monotonic() + seconds
        while count > 0 and time.monotonic() < ends:
            fakes = [Identity.generate() for _ in range(min(_BATCH, count))]
            records = [(long_record(fake, model, **claims), fake) for fake in fakes]
            count -= len(records)
            places = [(shard_key(model, record.key), record.key.text, record, fake) for record, fake in records]
            taken += _store(node, places)
            time.sleep(pause_s)
    return taken


def list_models(addresses: Sequence[str], model: str, *, seconds: float = 600.0, count: int = 1 << 30) -> int:
    """Announces new models with one key. Returns the number of records that nodes have stored."""
    taken, mallory = 0, Identity.generate()
    with DhtDirectory.start(initial_peers=addresses) as node:
        ends = time.monotonic() + seconds
        while count > 0 and time.monotonic() < ends:
            records = [fake_record(mallory, os.urandom(16).hex()) for _ in range(min(_BATCH, count))]
            count -= len(records)
            taken += _store(node, [(MODELS_KEY, record.model, record, mallory) for record in records])
    return taken


def hide_in_caches(addresses: Sequence[str], model: str, *, seconds: float = 600.0, count: int = 1 << 30) -> int:
    """Makes each node cache a fake record with a late expiration, which would hide all records in its storage."""
    done, mallory = 0, Identity.generate()
    with DhtDirectory.start(initial_peers=addresses) as node:
        ends = time.monotonic() + seconds
        while done < count and time.monotonic() < ends:
            record = fake_record(mallory, model)
            key = shard_key(model, record.key)
            node._request(lambda own, record=record, key=key: _store_cached(own, key, record, mallory))
            done += 1
    return done


def repeat_keys(addresses: Sequence[str], model: str, *, seconds: float = 600.0, count: int = 1 << 30) -> int:
    """Sends messages that ask nodes for all records of the model a thousand times. Returns the number of messages."""
    done = 0
    with DhtDirectory.start(initial_peers=addresses) as node:
        ends = time.monotonic() + seconds
        keys = [import_hivemind().dht_id(shard_keys(model)[0])] * 1000
        while done < count and time.monotonic() < ends:
            for peer in list(node._initial_peer_ids):
                node._request(lambda own, peer=peer: own.protocol.call_find(peer, keys))
            done += 1
    return done


def withhold(addresses: Sequence[str], model: str, *, seconds: float = 600.0) -> int:
    """Runs nodes with ids next to the keys of the model. The nodes claim to store all records, and return none."""
    with ExitStack() as stack:
        fakes = [stack.enter_context(withholding_node(addresses, shard_keys(model)[0])) for _ in range(5)]
        time.sleep(seconds)
        return len(fakes)


@contextmanager
def withholding_node(addresses: Sequence[str], key: str) -> Iterator[DhtDirectory]:
    """A node of the DHT with the id nearest to a key, which returns none of the records that it stores."""
    hivemind = import_hivemind()
    nearest = hivemind.dht_id(key)
    node_id = type(nearest)(int(nearest) ^ int.from_bytes(os.urandom(4), "big"))
    create = hivemind.DHTNode.create

    async def create_near(**options: Any) -> Any:
        return await create(node_id=node_id, **options)

    hivemind.DHTNode.create = create_near
    try:
        node = DhtDirectory.start(initial_peers=addresses, listen=NODE)
    finally:
        hivemind.DHTNode.create = create
    with node:
        storage = node._node.protocol.storage
        storage.store_subkey = lambda *_: True
        storage.get = lambda _: None
        yield node


def announce_fakes(
    addresses: Sequence[str], model: str, *, seconds: float = 600.0, count: int = 2, **claims: Any
) -> int:
    """Keeps fake records of peers in the directory. claims: values of fields of the records. Returns the number of
    announcements."""
    done, fakes = 0, [Identity.generate() for _ in range(count)]
    with DhtDirectory.start(initial_peers=addresses) as node:
        ends = time.monotonic() + seconds
        while True:
            for fake in fakes:
                done += node.announce(fake_record(fake, model, **claims), fake)
            if time.monotonic() >= ends:
                return done
            time.sleep(min(1.0, max(ends - time.monotonic(), 0.01)))


def ask_of_nothing(peer: Endpoint, *, seconds: float = 600.0, keys: int = 16) -> int:
    """Asks a peer about new models that no peer serves, with many keys. Returns the number of answers."""
    answered = 0
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(peer)) for _ in range(keys)]
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            for number, client in enumerate(clients, start=1):
                client.say(LookUp(number, os.urandom(32).hex(), 0))
            for client in clients:
                answered += isinstance(client.hear(), Found)
    return answered


@contextmanager
def flooded_lan(model: str, *, count: int = 70) -> Iterator[None]:
    """Announces fake nodes on the local network (loopback)."""
    mdns = Zeroconf(interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only)
    try:
        for number in range(count):
            name = "12D3KooW" + "".join(random.choice(_BASE58) for _ in range(44))
            host = f"192.168.77.{number % 250 + 1}"
            addresses = tuple(f"/ip4/{host}/tcp/{4000 + port}/p2p/{name}" for port in range(8))
            fake = LanNode(model, PROTOCOL_VERSION, addresses)
            info = ServiceInfo(
                lan.SERVICE_TYPE,
                f"{name}.{lan.SERVICE_TYPE}",
                port=4000,
                addresses=[socket.inet_aton(host)],
                properties=fake.txt_entries(),
            )
            mdns.register_service(info, cooperating_responders=True)
        yield
    finally:
        mdns.close()


def hide_on_lan(model: str, nodes: int = 6000) -> None:
    """Sends records of fake nodes by multicast on loopback, with a time to live of 68 years."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
        sending.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        for _ in range(0, nodes, _NODES_OF_PACKET):
            answers = b"".join(_fake_records(model) for _ in range(_NODES_OF_PACKET))
            head = struct.pack("!HHHHHH", 0, 0x8400, 0, 2 * _NODES_OF_PACKET, 0, 0)
            sending.sendto(head + answers, ("224.0.0.251", 5353))
            time.sleep(0.001)  # the kernel drops packets if its buffer is full


def _fake_records(model: str) -> bytes:
    name = "12D3KooW" + "".join(random.choice(_BASE58) for _ in range(44))
    entries = (f"model={model}", f"protocol={PROTOCOL_VERSION}", f"dht0=/ip4/192.168.77.1/tcp/4000/p2p/{name}")
    text = b"".join(bytes([len(entry)]) + entry.encode() for entry in entries)
    full = _labels(f"{name}.{lan.SERVICE_TYPE}")
    pointer = _labels(lan.SERVICE_TYPE) + struct.pack("!HHIH", 12, 1, _FOR_EVER_S, len(full)) + full
    return pointer + full + struct.pack("!HHIH", 16, 0x8001, _FOR_EVER_S, len(text)) + text


def _labels(name: str) -> bytes:
    return b"".join(bytes([len(part)]) + part.encode() for part in name.rstrip(".").split(".")) + b"\0"


def _store(node: DhtDirectory, entries: Sequence[tuple[str, str, PeerRecord, Identity]]) -> int:
    stored = node._request(
        lambda own: own.store_many(
            [key for key, *_ in entries],
            [record.pack(identity) for _, _, record, identity in entries],
            [record.expires_at for _, _, record, _ in entries],
            subkeys=[subkey for _, subkey, _, _ in entries],
            exclude_self=True,
        )
    )
    return sum(map(bool, stored.values()))


async def _store_cached(own: Any, key: str, record: PeerRecord, identity: Identity) -> None:
    late = dataclasses.replace(record, issued_at=time.time())
    for peer in own.protocol.routing_table.uid_to_peer_id.values():
        await own.protocol.call_store(
            peer,
            [import_hivemind().dht_id(key)],
            [own.protocol.serializer.dumps(late.pack(identity))],
            late.expires_at,
            subkeys=[late.key.text],
            in_cache=True,
        )


ATTACKS = (flood_records, list_models, hide_in_caches, repeat_keys, withhold, announce_fakes)
"""Attacks that take addresses, the fingerprint of a model, and `seconds`."""
