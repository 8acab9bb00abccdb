"""The demand for models that gateways publish, and the bounds on false claims of strangers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import pytest

from splitnet.directory.demand import REQUEST_TOKENS, DemandPublisher, demand_of
from splitnet.directory.interface import OWN_DEPTH, RECORDS_PER_KEY, KeptRecords, SwarmDirectory
from splitnet.directory.record import DEMAND, MAX_RECORD_BYTES, MAX_WANTED, MAX_WANTED_TOKENS, PeerRecord, Wanted
from splitnet.errors import ProtocolError
from splitnet.security.identity import Identity
from splitnet.swarm.swarm import ModelFacts
from splitnet.swarm.swarm_models import models_of
from tests.unit.directory.test_directory import record_of

FIRST, SECOND = "ab" * 32, "cd" * 32


class Kept(SwarmDirectory):
    """A directory in memory."""

    def __init__(self) -> None:
        self.addresses, self._kept = [], KeptRecords()

    def store_record(self, record: PeerRecord, packed: bytes, depth: int = OWN_DEPTH) -> bool:
        return self._kept.add_record(PeerRecord.unpack(packed))

    def records(self, model: str, depth: int = OWN_DEPTH) -> list[PeerRecord]:
        return self._kept.records(model)

    def close(self) -> None:
        pass


IDENTITY = Identity.generate()


def told(wanted: tuple[Wanted, ...], identity: Identity = IDENTITY) -> PeerRecord:
    return record_of(identity, model=DEMAND, demand=wanted, issued_at=time.time())


def wants(tokens_per_s: float, models: Iterable[str] = (FIRST,), name: str = "tiny") -> tuple[Wanted, ...]:
    return tuple(Wanted(bytes.fromhex(model), name, 6, tokens_per_s) for model in models)


def claim(directory: Kept, wanted: tuple[Wanted, ...]) -> None:
    identity = Identity.generate()
    directory.announce(told(wanted, identity), identity)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_gateway_publishes_its_demand_until_it_closes() -> None:
    directory, now = Kept(), [0.0]
    publisher = DemandPublisher(directory, IDENTITY, clock=lambda: now[0])
    assert demand_of(directory) == {}
    publisher.asked(ModelFacts(FIRST, "tiny", 6, 64, None), 600)
    publisher.asked(ModelFacts(SECOND, "\N{SNOWMAN}" * 200, 4, 64, None), 1)
    wait_for(lambda: len(demand_of(directory)) == 2)
    found = demand_of(directory)
    assert list(found) == [FIRST, SECOND]
    assert found[FIRST].tokens_per_s == pytest.approx(10)
    assert found[SECOND].tokens_per_s == pytest.approx(REQUEST_TOKENS / 60)
    now[0] += 120.0
    later = publisher._demand_record()
    assert later is not None and later.demand[0].tokens_per_s == pytest.approx(10 / math.e**2)
    now[0] += 600.0
    assert publisher._demand_record() is None  # the record expires by itself
    publisher.close()
    assert demand_of(directory) == {} and directory.models() == {}


def test_what_a_key_claims_is_bounded() -> None:
    directory = Kept()
    with pytest.raises(ProtocolError, match="demand"):
        told(wants(MAX_WANTED_TOKENS * 2))
    with pytest.raises(ProtocolError, match="demand"):
        told(wants(float("nan")))
    with pytest.raises(ProtocolError, match="demand"):
        told(wants(1.0, [f"{at:064x}" for at in range(MAX_WANTED + 1)]))
    many = wants(MAX_WANTED_TOKENS, [f"{at:064x}" for at in range(MAX_WANTED)], "\N{SNOWMAN}" * 26)
    assert len(told(many).pack(IDENTITY)) <= MAX_RECORD_BYTES
    claim(directory, many)
    found = demand_of(directory)
    assert sum(one.tokens_per_s for one in found.values()) == pytest.approx(MAX_WANTED_TOKENS)


def test_a_flood_of_keys_counts_as_one_and_hides_no_gateway() -> None:
    directory = Kept()
    claim(directory, wants(3.0, [SECOND]))
    for _ in range(2 * RECORDS_PER_KEY):
        claim(directory, wants(MAX_WANTED_TOKENS))
    found = demand_of(directory)
    assert found[FIRST].tokens_per_s == MAX_WANTED_TOKENS
    assert found[SECOND].tokens_per_s == 3.0
    assert len(directory.records(DEMAND)) == RECORDS_PER_KEY
    listed = demand_of(directory, lambda key: key == IDENTITY.public)
    assert listed == {}


def test_the_models_of_a_swarm_with_what_they_lack() -> None:
    directory = Kept()
    for start, end in ((0, 2), (0, 4)):
        one = Identity.generate()
        record = record_of(one, model=FIRST, model_name="tiny", start=start, end=end, num_blocks=6, serves=True)
        directory.announce(record, one)
    claim(directory, wants(5.0, [SECOND], "wanted"))
    wanted, served = models_of(directory)
    assert (wanted.name, wanted.fingerprint, wanted.demand, wanted.missing) == ("wanted", SECOND, 5.0, [(0, 6)])
    assert (served.name, served.replicas, served.missing, served.demand) == ("tiny", [2, 2, 1, 1, 0, 0], [(4, 6)], 0.0)
    assert served.commands(["--join", "ADDR"]) == ["splitnet peer tiny --blocks 4:6 --join ADDR"]
