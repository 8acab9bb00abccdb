"""The parts of hivemind that the directory uses, and the event loop that its node runs in."""

from __future__ import annotations

import asyncio
import heapq
import importlib
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, Final, cast

from splitnet.errors import NotAuthorized, ProtocolError
from splitnet.light_imports import late_package
from splitnet.net import children
from splitnet.net.dht_places import Places
from splitnet.net.fields import Values
from splitnet.net.records import stored_record

_OUTDATED = 64
"""Entries of a heap that are kept beside those that count."""


KEYS_PER_FIND: Final = 16
"""As many as nodes of any version ask for at once."""


class NodeLoop(asyncio.SelectorEventLoop):
    """Starts children in a session of their own: a Ctrl-C ends this process only after the peer has left the DHT."""

    def __init__(self) -> None:
        super().__init__()
        self._children: list[asyncio.SubprocessTransport] = []

    async def subprocess_exec(self, protocol_factory: Any, *args: Any, **options: Any) -> Any:
        transport, protocol = await super().subprocess_exec(protocol_factory, *args, start_new_session=True, **options)
        self._children.append(transport)
        children.running.add(transport)
        return transport, protocol

    async def reap_children(self, timeout_s: float) -> None:
        """Kills the children that have not ended and waits until the system has let go of them."""
        deadline = self.time() + timeout_s
        for child in self._children:
            with suppress(ProcessLookupError):
                child.kill()
            while child.get_returncode() is None and self.time() < deadline:
                await asyncio.sleep(0.005)
            child.close()
            children.running.discard(child)
        self._children.clear()

    async def cancel_all_tasks(self) -> None:
        """Ends the background tasks that hivemind leaves behind."""
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.shutdown_asyncgens()
        await self.shutdown_default_executor()


@dataclass(frozen=True)
class Hivemind:
    """The parts of hivemind that are used here; it has no type information."""

    P2P: Any
    PeerID: Any
    Multiaddr: Any
    DHTNode: Any
    DHTLocalStorage: Any  # as hivemind has it, without bounds
    stub: Callable[[Any, Any], Any]  # of (P2P, PeerID): what a node can be asked without being a node oneself
    messages: Any  # of the DHT's protocol
    dht_id: Callable[[str], Any]  # of a key
    key_id: Callable[[str], bytes]  # the same in 20 bytes
    max_skew_s: float  # by which the clocks of two nodes may differ when one joins the other


def have_hivemind() -> bool:
    """Whether this process can join a DHT: some systems have no wheel of hivemind."""
    return find_spec("hivemind") is not None


@cache
def import_hivemind() -> Hivemind:
    """Imports hivemind, once, and mends it."""
    late_package("hivemind")  # the rest of it trains models, and brings scipy
    node, protocol, p2p, messages, routing, storage, values, multiaddr = (  # late: these imports take 0.2 s
        importlib.import_module(f"hivemind.{name}")
        for name in (
            *("dht.node", "dht.protocol", "p2p", "proto.dht_pb2", "dht.routing", "utils.timed_storage"),
            *("dht.storage", "utils.multiaddr"),
        )
    )
    # What it logs goes where the program's own log goes, and looks the same.
    importlib.import_module("hivemind.utils.logging").use_hivemind_log_handler("nowhere")
    storage.TimedStorage.store = _refuse_older(storage.TimedStorage.store)
    mended: Any = protocol
    unbounded, mended.DHTLocalStorage = mended.DHTLocalStorage, _bounded(mended.DHTLocalStorage)
    mended.DHTProtocol.rpc_find = _few_keys(mended.DHTProtocol.rpc_find)
    mended.DHTProtocol.serializer = _flat(mended.DHTProtocol.serializer, values.DictionaryDHTValue)
    routing.RoutingTable.add_or_update_node = _few_spares(routing.RoutingTable.add_or_update_node)
    logging.getLogger("asyncio").addFilter(_is_not_about_reaped_children)
    return Hivemind(
        P2P=p2p.P2P,
        PeerID=p2p.PeerID,
        Multiaddr=multiaddr.Multiaddr,
        DHTNode=node.DHTNode,
        DHTLocalStorage=unbounded,
        stub=cast(Any, super(protocol.DHTProtocol, protocol.DHTProtocol)).get_stub,
        messages=messages,
        dht_id=routing.DHTID.generate,
        key_id=lambda key: routing.DHTID.generate(key).to_bytes(),
        max_skew_s=storage.MAX_DHT_TIME_DISCREPANCY_SECONDS,
    )


def _refuse_older(store: Callable[[Any, Any, Any, float], bool]) -> Callable[[Any, Any, Any, float], bool]:
    """Mends `TimedStorage.store` of hivemind 1.1.12, which refuses an older value but takes over its expiration.

    Whoever repeated an earlier record of a peer could so make the DHT forget the current one before its time.
    """

    def store_newer(self: Any, key: Any, value: Any, expiration_time: float) -> bool:
        held = self.data.get(key)
        if held is not None and held.expiration_time >= expiration_time:
            return False
        stored = store(self, key, value, expiration_time)
        if len(self.expiration_heap) > 2 * len(self.key_to_heap) + _OUTDATED:  # values that were renewed often
            self.expiration_heap = list(self.key_to_heap.values())
            heapq.heapify(self.expiration_heap)
        return stored

    return store_newer


def _few_keys(find: Callable[[Any, Any, Any], Coroutine[Any, Any, Any]]) -> Any:
    """hivemind answers for as many keys as a question has, also if one is repeated; that could take all memory."""

    @wraps(find)
    async def find_few(self: Any, request: Any, context: Any) -> Any:
        if len(request.keys) > KEYS_PER_FIND:
            raise ValueError(f"at most {KEYS_PER_FIND} keys are looked up at once")
        return await find(self, request, context)

    return find_few


def _flat(serializer: Any, dictionary: Any) -> Any:
    """hivemind's serializer goes as deep into extension types as a message says: 300 levels, 2 kB, end the process.
    And it makes lists of lists, which take 64 times their bytes; nothing that is kept here holds any."""

    msgpack: Any = importlib.import_module("msgpack")  # it has no type information

    class FlatSerializer(serializer):
        @classmethod
        def loads(cls, buf: bytes) -> Any:
            return msgpack.loads(buf, ext_hook=read_dictionary, raw=False, max_array_len=0, max_map_len=0)

    def read_dictionary(code: int, data: bytes) -> Any:
        if code != serializer._ext_types[dictionary]:
            raise ValueError(f"extension type {code} is not read")
        read = dictionary()
        try:
            values = Values(data, most_text=len(data), most_bytes=len(data))
            _ = values.array(3), values.value(), values.value()  # its size and its latest time
            with read.freeze():  # what has expired is for others to refuse
                for _ in range(values.array(len(data))):
                    values.array(3)
                    subkey, value, expiration_time = values.value(), values.value(), values.value()
                    if not (type(subkey) is str and type(value) is bytes and type(expiration_time) is float):
                        raise ProtocolError("a dictionary has texts, bytes and times")
                    read.store(subkey, value, expiration_time)
        except ProtocolError as error:
            raise ValueError(f"a dictionary is not read: {error}") from None
        return read

    return FlatSerializer


def _few_spares(add: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """hivemind keeps every node that it has ever heard of as a spare for a bucket that is full."""

    def add_few(self: Any, node_id: Any, peer_id: Any) -> Any:
        answer = add(self, node_id, peer_id)
        bucket = self.buckets[self.get_bucket_index(node_id)]
        while len(bucket.replacement_nodes) > bucket.size:
            del self[next(iter(bucket.replacement_nodes))]
        bucket.nodes_requested_for_ping &= bucket.nodes_to_peer_id.keys()
        return answer

    return add_few


def _bounded(storage: Any) -> Any:
    """hivemind's storage of a node, holding no more than there are places for."""

    class BoundedStorage(storage):
        def __init__(self, maxsize: int | None = None) -> None:
            storage.__init__(self, maxsize)
            self._places = Places()

        def store_subkey(self, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
            try:
                gone = self._places.take((key.to_bytes(), subkey), stored_record(value), time.time())
            except (ProtocolError, NotAuthorized):
                return False
            for full, name in gone or ():
                if (held := self.data.get(key.from_bytes(full))) is not None:
                    del held.value[name]
            return gone is not None and storage.store_subkey(self, key, subkey, value, expiration_time)

        def items(self) -> Any:
            # hivemind sends all of these to each new node that says it is near. Peers refresh their records anyway.
            return iter(())

    return BoundedStorage


def _is_not_about_reaped_children(record: logging.LogRecord) -> bool:
    """False for asyncio's warning that a child had been waited for by someone else.

    `terminate` and `kill` of asyncio's children do so themselves when the child has just ended.
    """
    return not str(record.msg).lower().startswith(("unknown child process pid", "child process pid"))
