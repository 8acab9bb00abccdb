"""The directory of peers: signed records in a Kademlia DHT (hivemind's `DHTNode` over libp2p).

The node runs in an event loop in its own thread, and has one child process (`p2pd`), which implements libp2p.

DHT keys: `splitnet.peers.<fingerprint>.<shard>` holds one record per peer; the subkey is the text of the peer's key.
`splitnet.models` holds one record per model; the subkey is the fingerprint. Every node checks the signatures of
records, and holds a bounded number (`RecordTable`).
"""

from __future__ import annotations

import asyncio
import atexit
import errno
import logging
import socket
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from splitnet.directory.hivemind_node import LookUpResult, NodeLoop, import_hivemind, overhear, read_records
from splitnet.directory.interface import OWN_DEPTH, SwarmDirectory, latest
from splitnet.directory.record import MODELS_KEY, PeerRecord, RecordValidator, shard_key, shard_keys
from splitnet.errors import AddressInUse, DirectoryError

logger = logging.getLogger(__name__)

START_TIMEOUT_S: Final = 20.0  # longest start of a node
CALL_TIMEOUT_S: Final = 10.0  # longest read or store
RPC_TIMEOUT_S: Final = 3.0  # longest wait for the answer of one node to one message
WAITING_S: Final = 0.1  # between two calls of `waiting`
READS: Final = 2  # attempts to read keys that look empty while all initial nodes are silent, before an error is raised
MAX_INITIAL_PEERS: Final = 16  # initial nodes after which `meet` adds no more; each read asks all initial nodes
SEARCHES_AT_ONCE: Final = 16  # nodes that a search asks at the same time, so that silent nodes delay it little

_NOBODY_ANSWERS = "failed to connect to bootstrap peers"  # the error text of p2pd
_SHUT_DOWN_S = 2.0  # longest wait for the end of the node, and of libp2p
_EXAMPLE_ADDRESS = "/ip4/192.0.2.7/tcp/31330/p2p/12D3KooW..."

T = TypeVar("T")


class DhtDirectory(SwarmDirectory):
    """One node of the DHT, see `SwarmDirectory`."""

    def __init__(self) -> None:
        self._loop = NodeLoop()
        self._loop.set_exception_handler(_log_loop_error)
        self._thread = threading.Thread(target=self._run_loop, name="splitnet-directory", daemon=True)
        self._closing = threading.Lock()
        self._closed = False
        self._p2p: Any = None
        self._node: Any = None
        self._opening: asyncio.Task[None] | None = None
        self._reopen: Callable[[], Coroutine[Any, Any, None]] | None = None  # restarts a resting node
        self._waking = asyncio.Lock()
        self._requests = 0  # requests under way
        self._stores_for_others = False
        self._joined: Sequence[str] = ()
        self._initial_peer_ids: set[Any] = set()
        self.addresses = []

    @classmethod
    def start(
        cls,
        *,
        initial_peers: Sequence[str] = (),
        listen: Sequence[str] | None = None,
        public: Sequence[str] = (),
        identity_path: Path | None = None,
        waiting: Callable[[], None] = lambda: None,
    ) -> DhtDirectory:
        """Joins the DHT through any of `initial_peers` (multiaddrs), or begins a new DHT if there are none.

        listen: multiaddrs such as `/ip4/0.0.0.0/tcp/0`; None makes a client, which stores no records of others.
        public: multiaddrs by which others reach this node, if they differ from this machine's addresses (NAT,
        containers). identity_path: file of the libp2p key that keeps this node's address over restarts; created if
        absent. waiting: called repeatedly until the node has started; an error that it raises ends the start. Raises
        DirectoryError: none of `initial_peers` answers within 20 s; AddressInUse: `listen` is taken.
        """
        for address in initial_peers:
            if not address.startswith("/") or "/p2p/" not in address:
                raise DirectoryError(
                    f"{address!r} is not an address to join with; such an address looks like {_EXAMPLE_ADDRESS}."
                )
        for address in listen or ():
            _refuse_taken_port(address)
        try:
            import_hivemind()
        except ModuleNotFoundError as error:
            raise DirectoryError(
                f"The DHT needs {error.name}, which is not installed. Join through the address that any peer prints, "
                "--join tcp://HOST:PORT?key=..., or begin a swarm without a DHT (`splitnet peer` without --join)."
            ) from None
        logging.getLogger("hivemind").setLevel(logging.CRITICAL)
        directory = cls()
        directory._thread.start()
        atexit.register(directory.close)
        with ExitStack() as on_failure:
            on_failure.callback(directory.close)
            try:
                opening = directory._submit(
                    directory._open_node(initial_peers, listen, public, identity_path), START_TIMEOUT_S
                )
                while not wait([opening], WAITING_S).done:
                    waiting()
                opening.result()
            except Exception as error:
                cause, peers = str(error), ", ".join(initial_peers)
                if peers and (not cause or _NOBODY_ANSWERS in cause):
                    said = f"No peer answers at {peers}: check that it runs and that its port is open."
                else:
                    said = f"The DHT node did not start ({cause or 'it took too long'})."
                raise DirectoryError(said) from error
            on_failure.pop_all()
        return directory

    def store_record(self, record: PeerRecord, packed: bytes, depth: int = OWN_DEPTH) -> bool:
        keys, subkeys = [shard_key(record.model, record.key)], [record.key.text]
        if not record.has_left and record.is_of_model:
            keys.append(MODELS_KEY)
            subkeys.append(record.model)
        return self._request(lambda node: self._store(node, keys, subkeys, packed, record.expires_at))

    def records(self, model: str, depth: int = OWN_DEPTH) -> list[PeerRecord]:
        found = self._read_keys(shard_keys(model) if model else [MODELS_KEY]).records.values()
        rightly_named = [
            [record for subkey, record in records if subkey == (record.key.text if model else record.model)]
            for records in found
        ]
        return latest(model, rightly_named)

    def meet(self, addresses: Sequence[str]) -> int:
        """Joins the DHT of this node with the DHTs of the nodes at `addresses` (multiaddrs). Returns how many
        answer."""
        return self._request(lambda _: self._meet_nodes(addresses))

    def address_changed(self) -> None:
        with suppress(DirectoryError):
            self._request(lambda _: self._connect_anew())

    def pause(self) -> None:
        """Ends the node of a client until the next request, because a node takes about 50 KB per minute."""
        with self._closing:
            if not (self._stores_for_others or self._closed):
                self._submit(self._rest(), CALL_TIMEOUT_S)

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        if self._thread.is_alive():
            with suppress(FutureTimeoutError, DirectoryError):
                self._call_blocking(self._shut_down(), CALL_TIMEOUT_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _read_keys(self, keys: Sequence[str]) -> LookUpResult:
        for _ in range(READS):
            reading = self._request(lambda node: read_records(node, keys, self._initial_peer_ids))
            if reading.vouched or any(reading.records.values()):
                return reading
        raise DirectoryError(
            "The DHT nodes that this process joined through did not answer, and other nodes know no peers; try again, "
            "or join through another peer."
        )

    async def _store(
        self, node: Any, keys: Sequence[str], subkeys: Sequence[str], packed: bytes, expires_at: float
    ) -> bool:
        """Stores the record; returns whether a node holds it under the first key."""
        stored = await node.store_many(
            list(keys),
            [packed] * len(keys),
            [expires_at] * len(keys),
            subkeys=list(subkeys),
            exclude_self=not self._stores_for_others,
        )
        # Attackers can choose node ids near to a key. So the record is also stored at the initial nodes, which readers
        # always ask.
        hivemind = import_hivemind()
        ids = [hivemind.dht_id(key) for key in keys]
        value = node.protocol.serializer.dumps(packed)
        told = [
            node.protocol.call_store(peer, ids, [value] * len(ids), expires_at, subkeys=list(subkeys))
            for peer in self._initial_peer_ids
            if peer not in node.blacklist
        ]
        answers = [answer for answer in await asyncio.gather(*told) if answer]
        if self._stores_for_others:
            answers.append(
                [
                    node.protocol.storage.store_subkey(key_id, subkey, value, expires_at)
                    for key_id, subkey in zip(ids, subkeys, strict=True)
                ]
            )
        return stored[keys[0], subkeys[0]] or any(answer[0] for answer in answers)

    def _request(self, request: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        self._check_open()
        try:
            timeout_s = CALL_TIMEOUT_S + (START_TIMEOUT_S if self._reopen else 0.0)
            return self._call_blocking(self._run_request(request), timeout_s)
        except DirectoryError:
            raise
        except Exception as error:
            cause = str(error) or "no answer in time"
            raise DirectoryError(f"The DHT did not answer ({cause}); check the network and try again.") from error

    def _check_open(self) -> None:
        if self._closed:
            raise DirectoryError("The directory is closed; start it again.")

    async def _rest(self) -> None:
        async with self._waking:
            if self._requests or self._node is None:
                return
            nodes = list[str]()
            with suppress(Exception):  # an error of hivemind. At the restart, the initial nodes may be gone
                nodes += [f"{at}/p2p/{node.peer_id}" for node in await self._p2p.list_peers() for at in node.addrs[:1]]
            always = self._initial_peer_ids
            await self._end_node()

            async def reopen() -> None:
                try:
                    await self._open_node([*self._joined, *nodes[:MAX_INITIAL_PEERS]], None, (), None)
                except BaseException:
                    await self._end_node()
                    raise
                self._initial_peer_ids = always

            self._reopen = reopen

    async def _run_request(self, request: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        async with self._waking:
            self._check_open()  # `close` would not end a node that starts after it
            if self._reopen is not None:
                await self._reopen()
                self._reopen = None
        self._requests += 1
        try:
            return await self._answer_awake(request)
        finally:
            self._requests -= 1

    async def _answer_awake(self, request: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        answer = await request(self._node)
        protocol = self._node.protocol
        if self._initial_peer_ids and not protocol.routing_table.uid_to_peer_id:
            # Silent nodes are forgotten. If all are, as after an outage, only the initial nodes can be asked.
            self._node.blacklist.clear()
            await asyncio.gather(*(protocol.call_ping(peer_id) for peer_id in self._initial_peer_ids))
            if protocol.routing_table.uid_to_peer_id:
                return await request(self._node)
            if not self._stores_for_others:
                raise DirectoryError("No node of the DHT answers any more; join through the address of another peer.")
        return answer

    async def _meet_nodes(self, addresses: Sequence[str]) -> int:
        hivemind = import_hivemind()
        by_node: dict[str, list[str]] = {}
        for address in addresses:
            host, _, name = address.rpartition("/p2p/")
            by_node.setdefault(name, []).append(host)

        async def greet(name: str, known_at: list[str]) -> bool:
            try:
                node = hivemind.PeerID.from_base58(name)
                connecting = self._p2p._client.connect(node, [hivemind.Multiaddr(address) for address in known_at])
                await asyncio.wait_for(connecting, RPC_TIMEOUT_S)
                answers = await self._node.protocol.call_ping(node) is not None
            except Exception as error:
                logger.info("no node of the DHT answers at %s: %s", known_at[0], error)
                return False
            if answers and len(self._initial_peer_ids) < MAX_INITIAL_PEERS:
                self._initial_peer_ids.add(node)
            return answers

        return sum(await asyncio.gather(*(greet(*node) for node in by_node.items())))

    def _call_blocking(self, request: Coroutine[Any, Any, T], timeout_s: float) -> T:
        return self._submit(request, timeout_s).result(timeout_s + 1.0)

    def _submit(self, request: Coroutine[Any, Any, T], timeout_s: float) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(request, timeout_s), self._loop)

    async def _open_node(
        self, initial_peers: Sequence[str], listen: Sequence[str] | None, public: Sequence[str], identity: Path | None
    ) -> None:
        self._opening = asyncio.current_task()
        self._joined = self._joined or initial_peers
        hivemind = import_hivemind()
        self._stores_for_others = listen is not None
        self._p2p = await hivemind.P2P.create(
            initial_peers=list(initial_peers),
            host_maddrs=listen,
            announce_maddrs=list(public),
            no_listen=listen is None,
            dht_mode="client" if listen is None else "server",
            identity_path=None if identity is None else str(identity),
            check_if_identity_free=False,
            nat_port_map=False,  # only the owner of a router may decide to open a port
        )
        self._node = await hivemind.DHTNode.create(
            p2p=self._p2p,
            initial_peers=list(initial_peers),
            client_mode=listen is None,
            wait_timeout=RPC_TIMEOUT_S,
            # A lookup always asks the nodes that store the key, so caches would only return outdated records.
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
            num_workers=SEARCHES_AT_ONCE,
            record_validator=RecordValidator(lambda key: hivemind.dht_id(key).to_bytes()),
        )
        # Any node may store in the cache of another node, and a cached value with a later expiration would hide all
        # records in its storage.
        self._node.protocol.cache = self._node.protocol.storage
        overhear(self._node.protocol)
        self._initial_peer_ids = {hivemind.PeerID.from_base58(peer.rpartition("/p2p/")[2]) for peer in initial_peers}
        if listen is not None:
            self.addresses = await self._visible_addresses()

    async def _connect_anew(self) -> None:
        """Reconnects to all nodes after the machine's address has changed. libp2p would notice dead connections only
        after a minute."""

        async def connect(known: Any) -> None:
            with suppress(Exception):  # the node is gone, or the next request connects to it
                await self._p2p._client.disconnect(known.peer_id)
                await asyncio.wait_for(self._p2p._client.connect(known.peer_id, known.addrs), RPC_TIMEOUT_S)

        await asyncio.gather(*map(connect, await self._p2p.list_peers()))
        if self._stores_for_others:
            self.addresses = await self._visible_addresses(latest=True)

    async def _visible_addresses(self, *, latest: bool = False) -> list[str]:
        found = [str(address) for address in await self._p2p.get_visible_maddrs(latest=latest)]
        return sorted(found, key=lambda address: address.startswith(("/ip4/127.", "/ip6/::1/")))  # loopback last

    async def _shut_down(self) -> None:
        if self._opening is not None:  # the start could otherwise create the child process after this shutdown
            self._opening.cancel()
            await asyncio.wait([self._opening])
        async with self._waking:
            await self._end_node()

    async def _end_node(self) -> None:
        parts, self._node, self._p2p = (self._node, self._p2p), None, None
        for part in parts:
            if part is not None:
                with suppress(Exception):
                    await asyncio.wait_for(part.shutdown(), _SHUT_DOWN_S)
        await self._loop.reap_children()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.cancel_all_tasks())
        finally:
            self._loop.close()


def _refuse_taken_port(multiaddr: str) -> None:
    # libp2p listens with SO_REUSEPORT: it would share the port with another node and lose half of the connections.
    parts = multiaddr.split("/")
    if len(parts) < 5 or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp" or not parts[4].isdecimal():
        raise DirectoryError(f"{multiaddr!r} is not an address to listen on; write one like /ip4/0.0.0.0/tcp/31330.")
    with socket.socket(socket.AF_INET if parts[1] == "ip4" else socket.AF_INET6) as probe:
        # Without this option, a port stays in use for a minute after its last connection. With this option, a listener
        # still blocks the bind.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((parts[2], int(parts[4])))
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise AddressInUse(f"The DHT address {multiaddr} is taken; choose another port.") from error
            raise DirectoryError(f"The DHT cannot listen on {multiaddr} ({error}); choose another address.") from error


def _log_loop_error(_loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    logger.debug("directory: %s", context.get("message"), exc_info=context.get("exception"))
