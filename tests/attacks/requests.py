"""Sends mutated requests to nodes of the DHT: bytes are changed, cut and joined, as fast as a node answers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from splitnet.directory.dht_directory import DhtDirectory
from splitnet.directory.hivemind_node import import_hivemind
from splitnet.directory.record import MODELS_KEY, shard_key
from splitnet.security.identity import Identity
from tests.attacks.directory import NODE, fake_record
from tests.attacks.frames import mutated

AT_ONCE = 64
MODEL = bytes(16).hex()
ANSWER_S = 20.0


def asked(node: DhtDirectory, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yields endless pairs of a node's function and a mutated request to this function: bytes of the whole request or
    of one field are changed."""
    hivemind = import_hivemind()
    messages, info = hivemind.messages, node._node.protocol.node_info
    dumps = node._node.protocol.serializer.dumps
    mallory = Identity.generate()
    record = fake_record(mallory, MODEL, ttl_s=60.0)
    value, expires_at = dumps(record.pack(mallory)), record.expires_at
    places = [
        (hivemind.dht_id(key).to_bytes(), dumps(subkey))
        for key, subkey in (
            (shard_key(MODEL, mallory.public), mallory.public.text),
            (MODELS_KEY, MODEL),
        )
    ]
    held = type(node._node.protocol.storage).__mro__[1]()
    held.store_subkey(0, mallory.public.text, value, expires_at)
    dictionary = dumps(held.get(0).value)

    def store(fields: Sequence[bytes]) -> Any:
        key, subkey, content, node_id, *_ = (*fields, b"", b"", b"", b"")
        peer = messages.NodeInfo(node_id=node_id) if node_id else info
        return messages.StoreRequest(
            keys=[key], subkeys=[subkey], values=[content], expiration_time=[expires_at], in_cache=[False], peer=peer
        )

    fields = [
        *([key, subkey, value, node._node.node_id.to_bytes()] for key, subkey in places),
        [places[0][0], b"", dictionary, b""],
    ]
    whole = [
        *([b"rpc_store", store(some).SerializeToString()] for some in fields),
        [b"rpc_find", messages.FindRequest(keys=[key for key, _ in places], peer=info).SerializeToString()],
        [b"rpc_ping", messages.PingRequest(peer=info, validate=False).SerializeToString()],
    ]
    wholes, parts = mutated([some[1:] for some in whole], seed), mutated(fields, seed + 1)
    names = [some[0].decode() for some in whole]
    for number, (some, part) in enumerate(zip(wholes, parts, strict=True)):
        yield names[number % len(names)], b"".join(some)
        yield "rpc_store", store(part).SerializeToString()


def ask(address: str, *, seconds: float = 1e9, count: int = 1 << 60, seed: int = 0) -> int:
    """Sends mutated requests to the node at a multiaddr. Returns the number of requests.

    Raises:
        TimeoutError: the node does not answer.
    """
    peer = import_hivemind().PeerID.from_base58(address.rpartition("/p2p/")[2])
    until = time.monotonic() + seconds
    sent = 0
    with DhtDirectory.start(initial_peers=[address]) as node:
        requests = asked(node, seed)

        async def ask_one(own: Any, name: str, request: bytes) -> None:
            calling = own.protocol.p2p._client.call_unary_handler(peer, f"DHTProtocol.{name}", request)
            error = (await asyncio.gather(asyncio.wait_for(calling, ANSWER_S), return_exceptions=True))[0]
            if isinstance(error, TimeoutError):  # other errors are answers of the node
                raise error

        async def ask_some(own: Any) -> None:
            await asyncio.gather(*(ask_one(own, *request) for request in islice(requests, AT_ONCE)))

        while sent < count and time.monotonic() < until:
            node._call_blocking(ask_some(node._node), ANSWER_S + 5)
            sent += AT_ONCE
        assert node._call_blocking(node._node.protocol.call_ping(peer), ANSWER_S) is not None
    return sent


def hand_over(seconds: float, handed: Any, *, count: int = 1 << 60, seed: int = 0) -> None:
    """Passes mutated requests to a node of this process as if another existing node had sent them.

    Args:
        handed: a shared counter of requests.
    """
    until = time.monotonic() + seconds
    with (
        DhtDirectory.start(listen=NODE) as node,
        DhtDirectory.start(initial_peers=node.addresses) as other,
    ):
        requests, source = asked(other, seed), other._node.peer_id

        async def take_some(own: Any) -> None:
            handlers = own.protocol.p2p._client.control.unary_handlers
            for name, request in islice(requests, AT_ONCE):
                with contextlib.suppress(Exception):  # libp2p catches errors, too, and reports them to the sender
                    await asyncio.wait_for(handlers[f"DHTProtocol.{name}"](request, source), ANSWER_S)

        while handed.value < count and time.monotonic() < until:
            node._call_blocking(take_some(node._node), ANSWER_S + 5)
            handed.value += AT_ONCE
        assert other._call_blocking(other._node.protocol.call_ping(node._node.peer_id), ANSWER_S) is not None


def speak(address: str, *, seconds: float, seed: int = 0) -> int:
    """Sends bytes that are not libp2p, or only begin like libp2p, to the port of a node. Returns the number of
    messages."""
    _, _, host, _, port, *_ = address.split("/")
    hello = b"\x13/multistream/1.0.0\n"
    recorded = [[hello, b"\x07/noise\n", bytes(34)], [hello, b"\x0b/tls/1.0.0\n", b"\x16\x03\x01\x00\x05" + bytes(5)]]
    sent, until = 0, time.monotonic() + seconds
    for pieces in mutated(recorded, seed):
        if time.monotonic() > until:
            break
        try:
            with socket.create_connection((host, int(port)), 5.0) as connection:
                for piece in pieces:
                    connection.sendall(piece)
                    sent += 1
        except OSError:
            continue
    return sent
