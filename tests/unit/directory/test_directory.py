from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import psutil
import pytest

from splitnet.directory import dht_directory as directory_module
from splitnet.directory import hivemind_node, interface
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.directory.hivemind_node import KEYS_PER_FIND, import_hivemind
from splitnet.directory.interface import JoinedDirectories
from splitnet.directory.record import (
    MAX_CLOCK_SKEW_S,
    MAX_TTL_S,
    MODELS_KEY,
    PeerRecord,
    RecordValidator,
    shard_key,
    shard_keys,
)
from splitnet.errors import AddressInUse, DirectoryError
from splitnet.security.identity import Identity
from splitnet.wire.fields import packb
from tests.attacks.directory import withholding_node

LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]
CHILD_EXIT_TIMEOUT_S = 20


def record_of(identity: Identity, **changes: Any) -> PeerRecord:
    """A valid record of a peer, of a model that is in no other record."""
    facts: dict[str, Any] = {
        "key": identity.public,
        "model": os.urandom(16).hex(),
        "model_name": "tiny",
        "address": "tcp://127.0.0.1:31330",
        "start": 0,
        "end": 4,
        "num_blocks": 8,
        "protocol": 1,
        "codecs": ("none",),
        "device": "cpu",
        "dtype": "float32",
        "block_ms": (1.0, 1.0, 8.0, 32.0, 128.0),
        "queue_ms": 0.0,
        "batch": 0.0,
        "kv_free_positions": 1000,
        "sessions": 0,
        "max_blocks": 0,
        "placed_at": 0.0,
        "moving_to": None,
        "serves": True,
        "coordinate": (0.0, 0.0, 0.0, 0.01),
        "coordinate_error": 1.0,
        "bytes_per_ms": 0.0,
        "links": (),
        "version": "0.2.0",
        "issued_at": time.time(),
    }
    return PeerRecord(**{**facts, **changes})


@pytest.fixture(scope="module")
def bootstrap() -> Iterator[DhtDirectory]:
    with DhtDirectory.start(listen=LOOPBACK) as directory:
        yield directory


@pytest.fixture(scope="module")
def member(bootstrap: DhtDirectory) -> Iterator[DhtDirectory]:
    with DhtDirectory.start(initial_peers=bootstrap.addresses, listen=LOOPBACK) as directory:
        yield directory


@pytest.fixture(scope="module")
def client(bootstrap: DhtDirectory, member: DhtDirectory) -> Iterator[DhtDirectory]:
    with DhtDirectory.start(initial_peers=bootstrap.addresses + member.addresses) as directory:
        yield directory


@pytest.fixture(scope="module")
def attacker(bootstrap: DhtDirectory) -> Iterator[DhtDirectory]:
    """A full node that stores and returns values without checks."""
    with DhtDirectory.start(initial_peers=bootstrap.addresses, listen=LOOPBACK) as directory:
        directory._node.protocol.record_validator = None
        directory._node.protocol.storage = import_module("hivemind.dht.storage").DHTLocalStorage()
        yield directory


def store_raw(directory: DhtDirectory, key: str, value: object, expires_at: float, subkey: object) -> None:
    directory._request(lambda node: node.store(key, value, expires_at, subkey=subkey))


def test_client_finds_what_peers_announce(bootstrap: DhtDirectory, member: DhtDirectory, client: DhtDirectory) -> None:
    anna, bert = Identity.generate(), Identity.generate()
    first = record_of(anna)
    second = record_of(bert, model=first.model, start=4, end=8)
    assert bootstrap.announce(first, anna) and member.announce(second, bert)
    for directory in (bootstrap, member, client):
        assert sorted(directory.peers(first.model), key=lambda record: record.start) == [first, second]
    assert client.models()[first.model] == "tiny"
    assert client.peers("00" * 16) == []
    assert client.addresses == []


def test_two_dhts_become_one_after_meet(bootstrap: DhtDirectory, client: DhtDirectory) -> None:
    anna, bert = Identity.generate(), Identity.generate()
    first = record_of(anna)
    second = record_of(bert, model=first.model)
    nobody = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWG1v6rQ3nQ2Cvp5RdrM5EezFqUsDh7yHZiTWFcYGn7gyU"
    with DhtDirectory.start(listen=LOOPBACK) as stranger:
        assert bootstrap.announce(first, anna) and stranger.announce(second, bert)
        assert client.peers(first.model) == [first]
        assert stranger.meet([nobody, "/ip4/127.0.0.1/tcp/9/p2p/2222"]) == 0
        assert stranger.meet([nobody, *bootstrap.addresses]) == 1
        assert stranger.announce(dataclasses.replace(second, issued_at=second.issued_at + 1), bert)
        for directory in (bootstrap, client, stranger):
            assert {record.key for record in directory.peers(first.model)} == {anna.public, bert.public}


def test_a_node_whose_machine_has_moved_goes_on_under_new_connections(
    member: DhtDirectory, client: DhtDirectory
) -> None:
    before = set(member.addresses)
    asked: list[Any] = []
    disconnect = member._p2p._client.disconnect

    async def count(peer: Any) -> None:
        asked.append(peer)
        await disconnect(peer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member._p2p._client, "disconnect", count)
        member.address_changed()
    assert asked and set(member.addresses) == before
    known = ["/ip6/::1/tcp/1", "/ip4/127.0.0.1/tcp/1", "/ip6/fd00::1/tcp/1", "/ip4/10.0.0.1/tcp/1"]

    async def told(*, latest: bool) -> list[str]:
        return known

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member._p2p, "get_visible_maddrs", told)
        joined = JoinedDirectories([member])
        joined.address_changed()
    assert joined.addresses == [*known[2:], *known[:2]], "what others can use comes first"
    member.address_changed()
    anna = Identity.generate()
    record = record_of(anna)
    assert member.announce(record, anna)
    assert client.peers(record.model) == [record]


def test_newest_record_of_a_peer_wins(member: DhtDirectory, client: DhtDirectory) -> None:
    anna = Identity.generate()
    old = record_of(anna)
    new = dataclasses.replace(old, queue_ms=5.0, issued_at=old.issued_at + 1)
    assert member.announce(new, anna)
    assert not member.announce(old, anna)
    assert client.peers(old.model) == [new]


def test_withdrawn_peer_is_gone_at_once_and_may_come_back(member: DhtDirectory, client: DhtDirectory) -> None:
    anna = Identity.generate()
    record = record_of(anna)
    assert member.announce(record, anna)
    assert member.withdraw(record, anna)
    assert client.peers(record.model) == []
    assert not member.announce(record, anna)
    again = dataclasses.replace(record, issued_at=record.issued_at + 10)
    assert member.announce(again, anna)
    assert client.peers(record.model) == [again]


def test_expired_records_are_dropped(
    member: DhtDirectory, client: DhtDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    anna = Identity.generate()
    record = record_of(anna)
    assert member.announce(record, anna)
    monkeypatch.setattr(interface, "time", SimpleNamespace(time=lambda: record.expires_at + 0.1))
    assert client.peers(record.model) == []
    assert record.model not in client.models()


def test_a_forged_record_neither_counts_nor_hides_the_peer(
    member: DhtDirectory, client: DhtDirectory, attacker: DhtDirectory
) -> None:
    anna, mallory = Identity.generate(), Identity.generate()
    record = record_of(anna)
    assert member.announce(record, anna)
    key, late = shard_key(record.model, record.key), time.time() + 3000
    own = record_of(mallory, model=record.model, address="tcp://192.0.2.66:1")
    genuine = record.pack(anna)
    forged = bytearray(genuine)
    forged[-1] ^= 1
    values: list[object] = [
        own.pack(mallory),
        bytes(forged),
        genuine,
        b"",
        b"x" * 5000,
        "text",
        None,
        [1, 2],
        {"a": b"b"},
    ]
    for value in values:
        store_raw(attacker, key, value, late, record.key.text)
        store_raw(attacker, key, value, late, None)
    store_raw(attacker, key, own.pack(mallory), own.expires_at, 7)
    store_raw(attacker, MODELS_KEY, own.pack(mallory), own.expires_at, "ff" * 16)
    store_raw(attacker, MODELS_KEY, b"garbage", late, record.model)
    assert client.peers(record.model) == [record]
    assert client.models()[record.model] == "tiny"
    assert "ff" * 16 not in client.models()


def test_lookups_drop_forgeries_even_without_the_validator(attacker: DhtDirectory) -> None:
    anna, mallory = Identity.generate(), Identity.generate()
    record = record_of(anna)
    own = record_of(mallory, model=record.model)
    elsewhere = record_of(anna)
    assert attacker.announce(record, anna)
    for subkey, value in enumerate([own.pack(mallory), elsewhere.pack(anna), b"garbage", "text", [], 5]):
        store_raw(attacker, shard_key(record.model, record.key), value, time.time() + 3000, str(subkey))
    assert attacker.peers(record.model) == [record]


def test_a_lookup_reads_a_bounded_number_of_records(attacker: DhtDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    identities = [Identity.generate() for _ in range(4)]
    model = os.urandom(16).hex()
    for identity in identities:
        assert attacker.announce(record_of(identity, model=model), identity)
    monkeypatch.setattr(hivemind_node, "MOST_PER_KEY", 0)
    assert attacker.peers(model) == []


def test_the_latest_record_of_a_peer_over_all_nodes_counts() -> None:
    anna = Identity.generate()
    early = record_of(anna, issued_at=time.time() - 20)
    late = dataclasses.replace(early, issued_at=early.issued_at + 10, end=3)
    pack: Any = packb
    stored = [pack(record.pack(anna)) for record in (early, late)]
    answers = [{"anna": SimpleNamespace(value=value)} for value in stored]
    for told in (answers, answers[::-1]):
        assert hivemind_node._together(told) == [("anna", late)]


def test_a_record_in_the_cache_of_a_node_hides_nothing(
    bootstrap: DhtDirectory, member: DhtDirectory, client: DhtDirectory
) -> None:
    anna = Identity.generate()
    record = record_of(anna)
    key = shard_key(record.model, record.key)
    mallory = next(each for each in iter(Identity.generate, None) if shard_key(record.model, each.public) == key)
    assert member.announce(record, anna)
    late = record_of(mallory, model=record.model, ttl_s=MAX_TTL_S)
    for node in (bootstrap, member):
        client._request(
            lambda own, node=node: own.protocol.call_store(
                node._p2p.peer_id,
                [import_hivemind().dht_id(key)],
                [own.protocol.serializer.dumps(late.pack(mallory))],
                late.expires_at,
                subkeys=[late.key.text],
                in_cache=True,
            )
        )
    assert record in client.peers(record.model)


def test_a_record_that_only_some_clocks_accept_hides_no_other(
    member: DhtDirectory, client: DhtDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    anna, mallory = Identity.generate(), Identity.generate()
    record = record_of(anna)
    assert member.announce(record, anna)
    early = record_of(mallory, model=record.model, issued_at=time.time() + MAX_CLOCK_SKEW_S - 5)
    assert client.announce(early, mallory)
    monkeypatch.setattr(client._node.protocol.record_validator, "_clock", lambda: time.time() - 20)
    assert client.peers(record.model) == [record]


def test_a_node_is_asked_for_few_keys_at_once(bootstrap: DhtDirectory, client: DhtDirectory) -> None:
    key = import_hivemind().dht_id(MODELS_KEY)
    for count in (KEYS_PER_FIND, KEYS_PER_FIND + 1):
        found = client._request(lambda own, count=count: own.protocol.call_find(bootstrap._node.peer_id, [key] * count))
        assert (found is not None) is (count == KEYS_PER_FIND)


@pytest.mark.default_cases(kind=("\x50",))
@pytest.mark.parametrize("kind", ["\x40", "\x50"])
def test_deeply_nested_values_crash_no_process(kind: str) -> None:
    """Neither the process of a node that is asked to store such a value, nor the process of a reader."""
    code = """
import asyncio, sys, threading
from splitnet.directory.hivemind_node import import_hivemind
hivemind = import_hivemind()
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.storage import DictionaryDHTValue
data = b"\\xc0"
for _ in range(5000):
    data = b"\\xc9" + (len(data) + 1).to_bytes(4, "big") + sys.argv[1].encode("latin-1") + b"\\x91" + data
data = b"\\xc9" + len(data).to_bytes(4, "big") + b"\\x50" + data
try:
    DHTProtocol.serializer.loads(data)
except ValueError as error:
    print(error)
held = DictionaryDHTValue()
held.store("a key", b"a record", 1e12)
assert dict(DHTProtocol.serializer.loads(DHTProtocol.serializer.dumps(held)).items()) == dict(held.items())
"""
    done = subprocess.run([sys.executable, "-c", code, kind], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "is not read" in done.stdout, done.stderr


@pytest.mark.parametrize("where", ["alone", "in a dictionary", "as an item"])
def test_values_of_lists_of_lists_take_no_memory(where: str) -> None:
    many = 1 << 20
    import_hivemind()
    from hivemind.dht.protocol import DHTProtocol

    lists = b"\xdd" + many.to_bytes(4, "big") + b"\x90" * many
    inner = {"alone": b"", "in a dictionary": b"\x93" + lists, "as an item": b"\x93\xc0\xc0\x91" + lists}[where]
    value = b"\xc9" + len(inner).to_bytes(4, "big") + b"\x50" + inner if inner else lists
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            DHTProtocol.serializer.loads(value)
        assert tracemalloc.get_traced_memory()[1] < 8 * many
    finally:
        tracemalloc.stop()


def test_a_node_remembers_few_nodes(bootstrap: DhtDirectory) -> None:
    table = bootstrap._node.protocol.routing_table
    node_id, peer = type(table.node_id), bootstrap._node.peer_id
    table = type(table)(table.node_id, bucket_size=20, depth_modulo=5)
    for _ in range(20_000):
        table.add_or_update_node(node_id.generate(), peer)
    assert len(table.uid_to_peer_id) == sum(
        len(bucket.nodes_to_peer_id) + len(bucket.replacement_nodes) for bucket in table.buckets
    )
    assert len(table.uid_to_peer_id) <= 40 * len(table.buckets) < 4_000


@pytest.mark.full
def test_nodes_that_keep_nothing_cannot_hide_a_peer(bootstrap: DhtDirectory) -> None:
    anna = Identity.generate()
    record = record_of(anna)
    with ExitStack() as stack:
        for _ in range(5):  # the number of nodes at which a record is stored
            stack.enter_context(withholding_node(bootstrap.addresses, shard_key(record.model, record.key)))
        with (
            DhtDirectory.start(initial_peers=bootstrap.addresses, listen=LOOPBACK) as publisher,
            DhtDirectory.start(initial_peers=bootstrap.addresses) as reader,
        ):
            assert publisher.announce(record, anna)
            assert reader.peers(record.model) == [record]


def test_a_missing_answer_is_an_error_not_an_empty_directory(
    bootstrap: DhtDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DhtDirectory.start(initial_peers=bootstrap.addresses) as reader:
        monkeypatch.setattr(bootstrap._node.protocol.storage, "get", None)
        assert reader._node.protocol.routing_table.uid_to_peer_id
        with pytest.raises(DirectoryError, match=r"did not answer|No node"):
            reader.peers("00" * 16)


def _dht_record(record: PeerRecord, identity: Identity, **changes: Any) -> Any:
    packed = record.pack(identity)
    fields: dict[str, Any] = {
        "key": shard_key(record.model, record.key).encode(),
        "subkey": b"\xd9" + bytes([len(record.key.text)]) + record.key.text.encode(),
        "value": b"\xc5" + len(packed).to_bytes(2, "big") + packed,
        "expiration_time": record.expires_at,
    }
    return SimpleNamespace(**{**fields, **changes})


def test_validator_ties_a_record_to_its_place_and_expiration() -> None:
    anna = Identity.generate()
    record = record_of(anna)
    validator = RecordValidator(str.encode, clock=lambda: record.issued_at)
    assert validator.validate(_dht_record(record, anna))
    elsewhere = next(key for key in shard_keys(record.model) if key != shard_key(record.model, record.key))
    for changes in (
        {"key": elsewhere.encode()},
        {"key": shard_key("00" * 16, record.key).encode()},
        {"key": MODELS_KEY.encode()},
        {"subkey": b""},
        {"subkey": b"\xa0"},
        {"subkey": b"\xc1"},
        {"value": b""},
        {"value": record.pack(anna)},
        {"expiration_time": record.expires_at + 1},
        {"expiration_time": float("inf")},
        {"expiration_time": float("nan")},
    ):
        assert not validator.validate(_dht_record(record, anna, **changes))
    models_subkey = b"\xd9" + bytes([len(record.model)]) + record.model.encode()
    in_models = {"key": MODELS_KEY.encode(), "subkey": models_subkey}
    assert validator.validate(_dht_record(record, anna, **in_models))
    assert not validator.validate(_dht_record(record.farewell(), anna, **in_models))


def test_validator_refuses_records_from_the_future() -> None:
    anna = Identity.generate()
    record = record_of(anna)
    for skew_s, accepted in ((MAX_CLOCK_SKEW_S - 1, True), (MAX_CLOCK_SKEW_S + 1, False)):
        validator = RecordValidator(str.encode, clock=lambda skew_s=skew_s: record.issued_at - skew_s)
        assert validator.validate(_dht_record(record, anna)) is accepted


def test_repeating_an_older_value_does_not_shorten_the_life_of_the_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    import_hivemind()
    from hivemind.dht.storage import DictionaryDHTValue
    from hivemind.utils import timed_storage

    now = 1000.0
    monkeypatch.setattr(timed_storage, "get_dht_time", lambda: now)
    values: Any = DictionaryDHTValue()
    assert values.store("peer", b"new", 1060.0)
    assert not values.store("peer", b"old", 1010.0)
    now = 1020.0
    assert values.get("peer").value == b"new"


def test_one_living_initial_peer_is_enough(bootstrap: DhtDirectory, member: DhtDirectory) -> None:
    gone = DhtDirectory.start(listen=LOOPBACK)
    addresses = gone.addresses
    gone.close()
    with DhtDirectory.start(initial_peers=addresses + bootstrap.addresses) as directory:
        assert directory.peers("00" * 16) == []


def test_a_client_that_lost_every_node_joins_again(member: DhtDirectory, client: DhtDirectory) -> None:
    anna = Identity.generate()
    record = record_of(anna)
    assert member.announce(record, anna)
    routing_table = client._node.protocol.routing_table
    for node_id in list(routing_table.uid_to_peer_id):
        del routing_table[node_id]
    assert client.peers(record.model) == [record]


def test_a_resting_client_has_no_child_and_restarts_for_a_request(bootstrap: DhtDirectory) -> None:
    before = children_since(set())
    anna = Identity.generate()
    with DhtDirectory.start(initial_peers=bootstrap.addresses) as first, DhtDirectory.start(listen=LOOPBACK) as other:
        other.meet(bootstrap.addresses)
        record = record_of(anna)
        assert other.announce(record, anna)
        assert first.peers(record.model) == [record]
        assert len(children_since(before)) == 2
        first.pause()
        first.pause()
        deadline = time.monotonic() + CHILD_EXIT_TIMEOUT_S
        while len(children_since(before)) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(children_since(before)) == 1
        with ThreadPoolExecutor() as pool:
            assert list(pool.map(first.peers, [record.model] * 4)) == [[record]] * 4
        first.pause()
    other.pause()
    first.pause()
    assert not children_since(before)


def test_a_request_during_close_starts_no_node(member: DhtDirectory) -> None:
    before = children_since(set())
    client = DhtDirectory.start(initial_peers=member.addresses)
    client.pause()
    waiting = threading.Event()

    async def late() -> None:
        """A request that is made just before the directory is closed, and runs after that."""
        await client._waking.acquire()
        waiting.set()
        while not client._closed:
            await asyncio.sleep(0)
        client._waking.release()

    held = client._submit(late(), CHILD_EXIT_TIMEOUT_S)
    waiting.wait()
    asked = client._submit(client._run_request(AsyncMock()), CHILD_EXIT_TIMEOUT_S)
    client.close()
    assert held.done() and isinstance(asked.exception(), DirectoryError)
    assert not children_since(before)


def children_since(before: set[int]) -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)} - before


def test_a_client_that_has_rested_joins_through_others_than_before(member: DhtDirectory) -> None:
    anna = Identity.generate()
    record = record_of(anna)
    with ExitStack() as stack:
        gone = stack.enter_context(DhtDirectory.start(listen=LOOPBACK, initial_peers=member.addresses))
        client = stack.enter_context(DhtDirectory.start(initial_peers=gone.addresses))
        assert member.announce(record, anna)
        assert client.peers(record.model) == [record]
        client.pause()
        gone.close()
        assert client.peers(record.model) == [record]


def test_a_client_whose_swarm_is_gone_says_so() -> None:
    swarm = DhtDirectory.start(listen=LOOPBACK)
    with DhtDirectory.start(initial_peers=swarm.addresses) as client:
        assert client.models() == {}
        swarm.close()
        with pytest.raises(DirectoryError, match="No node of the DHT answers"):
            client.models()


def test_closed_peer_is_reported(bootstrap: DhtDirectory) -> None:
    gone = DhtDirectory.start(listen=LOOPBACK)
    addresses = gone.addresses
    gone.close()
    with pytest.raises(DirectoryError, match="No peer answers at /ip4/127"):
        DhtDirectory.start(initial_peers=addresses)


def test_a_silent_initial_peer_costs_bounded_time(bootstrap: DhtDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "START_TIMEOUT_S", 1.0)
    peer_id = bootstrap.addresses[0].rpartition("/")[2]
    children = set(psutil.Process().children())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{peer_id}"
        begin = time.monotonic()
        with pytest.raises(DirectoryError, match="No peer answers"):
            DhtDirectory.start(initial_peers=[address])
        assert time.monotonic() - begin < 6.0
    assert set(psutil.Process().children()) <= children


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:31330", "/ip4/127.0.0.1/tcp/31330", "", "/p2p/"])
def test_a_wrong_address_to_join_is_explained(address: str) -> None:
    with pytest.raises(DirectoryError):
        DhtDirectory.start(initial_peers=[address])


def test_a_taken_port_is_reported(bootstrap: DhtDirectory) -> None:
    taken = bootstrap.addresses[0].rpartition("/p2p/")[0]
    with pytest.raises(AddressInUse, match=taken):
        DhtDirectory.start(listen=[taken])


@pytest.mark.parametrize(
    "address", ["nonsense", "/ip4/127.0.0.1/tcp/x", "/ip4/127.0.0.1/tcp/70000", "/ip4/300.1.1.1/tcp/0"]
)
def test_a_wrong_address_to_listen_on_is_explained(address: str) -> None:
    with pytest.raises(DirectoryError, match="listen on"):
        DhtDirectory.start(listen=[address])


def test_identity_file_keeps_the_address(tmp_path: Path) -> None:
    peer_ids: set[str] = set()
    for _ in range(2):
        with DhtDirectory.start(listen=LOOPBACK, identity_path=tmp_path / "libp2p") as directory:
            peer_ids.add(directory.addresses[0].rpartition("/")[2])
    assert len(peer_ids) == 1


def test_close_leaves_no_thread_and_no_child(bootstrap: DhtDirectory) -> None:
    children = set(psutil.Process().children())
    directory = DhtDirectory.start(initial_peers=bootstrap.addresses, listen=LOOPBACK)
    (child,) = set(psutil.Process().children()) - children
    assert os.getpgid(child.pid) != os.getpgid(0), "Ctrl-C in the terminal must not reach p2pd"
    directory.close()
    directory.close()
    assert not directory._thread.is_alive()
    assert not child.is_running()
    with pytest.raises(DirectoryError, match="closed"):
        directory.peers("00" * 16)


@pytest.mark.full
def test_a_killed_process_leaves_no_child() -> None:
    code = (
        "import psutil, sys; from splitnet.directory.dht_directory import DhtDirectory; "
        f"DhtDirectory.start(listen={LOOPBACK!r}); "
        "print(psutil.Process().children()[0].pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path.cwd()
    ) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        process.kill()
        child.wait(CHILD_EXIT_TIMEOUT_S)
