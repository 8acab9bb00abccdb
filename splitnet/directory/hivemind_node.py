"""The parts of hivemind that the directory uses, with patches that bound them, and the event loop of the node."""

from __future__ import annotations

import asyncio
import heapq
import importlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial, wraps
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Final, cast

from splitnet import process
from splitnet.directory.interface import RECORDS_PER_KEY, RecordTable
from splitnet.directory.record import PeerRecord, stored_record
from splitnet.errors import NotAuthorized, ProtocolError
from splitnet.import_shims import late_package
from splitnet.nat.stream import end_all
from splitnet.wire.fields import ValueReader

_REAP_TIMEOUT_S = 2.0  # longest wait for the end of killed child processes
_OUTDATED = 64  # outdated entries of a heap that are allowed in addition to the number of valid ones
KEYS_PER_FIND: Final = 16  # keys in one question; no version of splitnet asks for more


class NodeLoop(asyncio.SelectorEventLoop):
    """An event loop that starts child processes in their own session, so that after Ctrl-C the peer can still leave the
    DHT."""

    def __init__(self) -> None:
        super().__init__()
        self._children: list[asyncio.SubprocessTransport] = []

    async def subprocess_exec(self, protocol_factory: Any, *args: Any, **options: Any) -> Any:
        transport, protocol = await super().subprocess_exec(protocol_factory, *args, start_new_session=True, **options)
        self._children.append(transport)
        process.running.add(transport)
        return transport, protocol

    async def reap_children(self) -> None:
        """Kills the children that have not ended, and waits at most `_REAP_TIMEOUT_S` until they have."""
        deadline = self.time() + _REAP_TIMEOUT_S
        for child in self._children:
            with suppress(ProcessLookupError):
                child.kill()
            while child.get_returncode() is None and self.time() < deadline:
                await asyncio.sleep(0.005)
            child.close()
            process.running.discard(child)
        self._children.clear()

    async def cancel_all_tasks(self) -> None:
        """Ends the background tasks that hivemind has left running."""
        await end_all([task for task in asyncio.all_tasks() if task is not asyncio.current_task()])
        await self.shutdown_asyncgens()
        await self.shutdown_default_executor()


def have_hivemind() -> bool:
    """Whether hivemind is installed, without which this process cannot join a DHT. Some systems have no wheel of it."""
    return find_spec("hivemind") is not None


@cache
def import_hivemind() -> Any:
    """Imports hivemind once, and patches it. Returns the parts that the directory uses, without type information."""
    late_package("hivemind")  # other parts of hivemind train models, and import scipy
    node, protocol, p2p, messages, routing, storage, values, multiaddr = (  # late: these imports take 0.2 s
        importlib.import_module(f"hivemind.{name}")
        for name in (
            *("dht.node", "dht.protocol", "p2p", "proto.dht_pb2", "dht.routing", "utils.timed_storage"),
            *("dht.storage", "utils.multiaddr"),
        )
    )
    # hivemind's messages then go to the program's own log.
    importlib.import_module("hivemind.utils.logging").use_hivemind_log_handler("nowhere")
    storage.TimedStorage.store = _refuse_older(storage.TimedStorage.store)
    mended: Any = protocol
    mended.DHTLocalStorage = _bounded(mended.DHTLocalStorage)
    mended.DHTProtocol.rpc_find = _few_keys(mended.DHTProtocol.rpc_find)
    mended.DHTProtocol.serializer = _flat(mended.DHTProtocol.serializer, values.DictionaryDHTValue)
    routing.RoutingTable.add_or_update_node = _few_spares(routing.RoutingTable.add_or_update_node)
    logging.getLogger("asyncio").addFilter(_is_not_about_reaped_children)
    return SimpleNamespace(
        P2P=p2p.P2P,
        PeerID=p2p.PeerID,
        Multiaddr=multiaddr.Multiaddr,
        DHTNode=node.DHTNode,
        stub=cast(Any, super(protocol.DHTProtocol, protocol.DHTProtocol)).get_stub,  # calls a node without joining
        messages=messages,  # of the DHT's protocol
        dht_id=routing.DHTID.generate,  # makes the id of a key
        max_skew_s=storage.MAX_DHT_TIME_DISCREPANCY_SECONDS,  # between the clocks of two nodes at a join, in seconds
    )


def _refuse_older(store: Callable[[Any, Any, Any, float], bool]) -> Callable[[Any, Any, Any, float], bool]:
    """Patches `TimedStorage.store` of hivemind 1.1.12, which refuses an older value but takes over its expiration. A
    replayed earlier record of a peer could thereby make the DHT forget the current record too early."""

    def store_newer(self: Any, key: Any, value: Any, expiration_time: float) -> bool:
        held = self.data.get(key)
        if held is not None and held.expiration_time >= expiration_time:
            return False
        stored = store(self, key, value, expiration_time)
        if len(self.expiration_heap) > 2 * len(self.key_to_heap) + _OUTDATED:  # renewed values leave outdated entries
            self.expiration_heap = list(self.key_to_heap.values())
            heapq.heapify(self.expiration_heap)
        return stored

    return store_newer


def _few_keys(find: Callable[[Any, Any, Any], Coroutine[Any, Any, Any]]) -> Any:
    """Bounds the keys of a question. hivemind answers any number of keys, also repeated ones, which could take all
    memory."""

    @wraps(find)
    async def find_few(self: Any, request: Any, context: Any) -> Any:
        if len(request.keys) > KEYS_PER_FIND:
            raise ValueError(f"at most {KEYS_PER_FIND} keys are looked up at once")
        return await find(self, request, context)

    return find_few


def _flat(serializer: Any, dictionary: Any) -> Any:
    """Restricts hivemind's serializer to the types in records. It would read extension types of any nesting (300 levels
    in 2 kB end the process) and lists of lists, which take 64 times their bytes in memory."""

    msgpack: Any = importlib.import_module("msgpack")  # msgpack has no type information

    class FlatSerializer(serializer):
        @classmethod
        def loads(cls, buf: bytes) -> Any:
            return msgpack.loads(buf, ext_hook=read_dictionary, raw=False, max_array_len=0, max_map_len=0)

    def read_dictionary(code: int, data: bytes) -> Any:
        if code != serializer._ext_types[dictionary]:
            raise ValueError(f"extension type {code} is not read")
        read = dictionary()
        try:
            values = ValueReader(data, most_text=len(data), most_bytes=len(data))
            _ = values.array(3), values.value(), values.value()  # size and latest time of the dictionary
            with read.freeze():  # keeps expired entries, which the caller refuses
                for _ in range(values.array(len(data))):
                    values.array(3)
                    subkey, value, expiration_time = values.value(), values.value(), values.value()
                    if not (type(subkey) is str and type(value) is bytes and type(expiration_time) is float):
                        raise ProtocolError("a dictionary must hold texts, bytes and times")
                    read.store(subkey, value, expiration_time)
        except ProtocolError as error:
            raise ValueError(f"a dictionary is not read: {error}") from None
        return read

    return FlatSerializer


def _few_spares(add: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Bounds the spare nodes of a full bucket. hivemind keeps every node that it has ever heard of as a spare."""

    def add_few(self: Any, node_id: Any, peer_id: Any) -> Any:
        answer = add(self, node_id, peer_id)
        bucket = self.buckets[self.get_bucket_index(node_id)]
        while len(bucket.replacement_nodes) > bucket.size:
            del self[next(iter(bucket.replacement_nodes))]
        bucket.nodes_requested_for_ping &= bucket.nodes_to_peer_id.keys()
        return answer

    return add_few


def _bounded(storage: Any) -> Any:
    """hivemind's storage of a node, bounded by a `RecordTable`."""

    class BoundedStorage(storage):
        def __init__(self, maxsize: int | None = None) -> None:
            storage.__init__(self, maxsize)
            self._places = RecordTable()

        def store_subkey(self, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
            try:
                gone = self._places.add_record((key.to_bytes(), subkey), stored_record(value), time.time())
            except (ProtocolError, NotAuthorized):
                return False
            for full, name in gone or ():
                if (held := self.data.get(key.from_bytes(full))) is not None:
                    del held.value[name]
            return gone is not None and storage.store_subkey(self, key, subkey, value, expiration_time)

        def items(self) -> Any:
            # hivemind sends all items to each new node that claims to be near. Peers refresh their records anyway.
            return iter(())

    return BoundedStorage


def _is_not_about_reaped_children(record: logging.LogRecord) -> bool:
    """A log filter: False for asyncio's warning that a child process was already waited for, which asyncio's own
    `terminate` and `kill` cause."""
    return not str(record.msg).lower().startswith(("unknown child process pid", "child process pid"))


SEARCH_S: Final = 5.0  # a search ends after this time with the answers so far, so that silent nodes cannot delay it
MOST_PER_KEY: Final = 4 * RECORDS_PER_KEY
"""Records that are read under one key. A malicious node may return any number."""


@dataclass(frozen=True)
class LookUpResult:
    """The answers of nodes. records: for each key, pairs of a subkey and its latest record. vouched: one of the nodes
    that are always asked has answered for all keys."""

    records: Mapping[str, Sequence[tuple[str, PeerRecord]]]
    vouched: bool


_heard: ContextVar[list[tuple[Any, Mapping[Any, Any]]] | None] = ContextVar("_heard", default=None)
"""For one call of `read_records`: the nodes that have answered, and the values that they hold under each wanted key."""


def overhear(protocol: Any) -> None:
    """Patches a protocol so that `read_records` gets the valid records in the answer of each node. hivemind would drop
    a whole answer for one invalid record, so a record that is invalid only by this node's clock could hide others."""
    call_find = protocol.call_find
    is_valid = protocol._validate_record
    protocol._validate_dictionary = partial(_leave_valid, is_valid, protocol.serializer.dumps)

    async def heard_call_find(peer: Any, keys: Collection[Any]) -> Any:
        answer = await call_find(peer, keys)
        heard = _heard.get()
        if heard is not None and answer is not None:
            heard.append((peer, {key: found.value if found else {} for key, (found, _) in answer.items()}))
        return answer

    protocol.call_find = heard_call_find


async def read_records(node: Any, keys: Sequence[str], always: Collection[Any]) -> LookUpResult:
    """Reads the records under some keys.

    node: a node of hivemind whose protocol was passed to `overhear`. always: nodes to ask for every key, because the
    nodes nearest to a key may all belong to one attacker; nodes on the blacklist of silent nodes are not asked.
    """
    ids = {key: import_hivemind().dht_id(key) for key in keys}
    heard: list[tuple[Any, Mapping[Any, Any]]] = []
    _heard.set(heard)
    with suppress(TimeoutError):
        await asyncio.wait_for(node.find_nearest_nodes(list(ids.values())), SEARCH_S)
    told = {(peer, key) for peer, held in heard for key in held}
    # One key per message, so that no answer becomes too long.
    missing = [(peer, key) for peer in always for key in ids.values() if (peer, key) not in told]
    await asyncio.gather(*(node._call_find_with_blacklist(peer, [key]) for peer, key in missing))
    told = {(peer, key) for peer, held in heard for key in held}
    own = {key: held.value for key in ids.values() if (held := node.protocol.storage.get(key))}
    sources = [own, *(held for _, held in heard)]
    return LookUpResult(
        {key: _together([held[key_id] for held in sources if key_id in held]) for key, key_id in ids.items()},
        not always or any(all((peer, key) in told for key in ids.values()) for peer in always),
    )


def _leave_valid(is_valid: Callable[..., bool], packed: Callable[[Any], bytes], key: bytes, dictionary: Any) -> bool:
    with dictionary.freeze():
        for index, (subkey, entry) in enumerate(list(dictionary.items())):
            if index >= MOST_PER_KEY or not is_valid(key, packed(subkey), entry.value, entry.expiration_time):
                del dictionary[subkey]
    return True


def _together(answers: Sequence[Any]) -> list[tuple[str, PeerRecord]]:
    """The latest record of each subkey. If there are more than `MOST_PER_KEY`, records of proven keys count first, then
    records that most nodes know."""
    latest: dict[str, PeerRecord] = {}
    known = Counter[str]()
    for answer in answers:
        for subkey, entry in answer.items() if hasattr(answer, "items") else ():
            with suppress(ProtocolError, NotAuthorized, TypeError):
                record = stored_record(entry.value)
                known[subkey] += 1
                if subkey not in latest or record.issued_at > latest[subkey].issued_at:
                    latest[subkey] = record
    records = list(latest.items())
    if len(records) > MOST_PER_KEY:
        records.sort(key=lambda item: (item[1].is_proven, known[item[0]]), reverse=True)
    return records[:MOST_PER_KEY]


CONNECT_TIMEOUT_S: Final = 4.0  # longest connection attempt of `ask_nodes`
ANSWER_TIMEOUT_S: Final = 3.0  # longest wait of `ask_nodes` for an answer
_OTHER_KEY = "remote key matches "

NO_HIVEMIND: Final = "hivemind is not installed"  # `NodeAnswer.fault` when this machine is the cause


@dataclass(frozen=True, slots=True)
class NodeAnswer:
    """The answer of a node at a multiaddr. fault: the network's error text if there is no answer, else empty. other_id:
    id of the node at this address if it is not the one that the address names. ahead_s: how far the node's clock is
    ahead, with an error of at most half a round trip."""

    address: str
    fault: str = ""
    other_id: str = ""
    rtt_ms: float = 0.0
    ahead_s: float = 0.0


def ask_nodes(addresses: Sequence[str], *, clock: Callable[[], float] = time.time) -> list[NodeAnswer]:
    """Asks the nodes at some multiaddrs in parallel; takes a few seconds if one is silent. clock: Unix time in
    seconds."""
    if not have_hivemind():
        return [NodeAnswer(address, NO_HIVEMIND) for address in addresses]
    loop = NodeLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        try:
            return runner.run(_ask_all(addresses, clock))
        finally:
            loop.run_until_complete(loop.reap_children())


async def _ask_all(addresses: Sequence[str], clock: Callable[[], float]) -> list[NodeAnswer]:
    return await asyncio.gather(*(_ask(address, clock) for address in addresses))


async def _ask(address: str, clock: Callable[[], float]) -> NodeAnswer:
    hivemind = import_hivemind()
    where, _, name = address.rpartition("/p2p/")
    p2p: Any = None
    try:
        # libp2p dials every address of a node that it knows, so each address needs its own child process.
        p2p = await hivemind.P2P.create(no_listen=True, dht_mode="client", nat_port_map=False)
        peer = hivemind.PeerID.from_base58(name)
        await asyncio.wait_for(p2p._client.connect(peer, [hivemind.Multiaddr(where)]), CONNECT_TIMEOUT_S)
        stub: Any = hivemind.stub(p2p, peer)
        request = hivemind.messages.PingRequest(peer=hivemind.messages.NodeInfo(), validate=False)
        asked_at, began = clock(), time.perf_counter()
        answer: Any = await stub.rpc_ping(request, timeout=ANSWER_TIMEOUT_S)
        rtt_s = time.perf_counter() - began
    except TimeoutError:
        return NodeAnswer(address, "no answer in time")
    except Exception as error:  # of libp2p's child process and of hivemind, which have no common base
        fault = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip(" *")
        return NodeAnswer(address, fault, fault.partition(_OTHER_KEY)[2].strip())
    finally:
        if p2p is not None:
            await p2p.shutdown()
    return NodeAnswer(address, rtt_ms=rtt_s * 1000, ahead_s=answer.dht_time - asked_at - rtt_s / 2)
