"""The lookup of stored pages ends, names pages by all that they depend on, and never finds more than hops have."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitnet.errors import CodecError
from splitnet.security.identity import Identity
from splitnet.session.events import EncodedPositions, LookUpPrefix
from splitnet.session.failover import RouteHop
from splitnet.session.prefix_lookup import (
    WORTH_COPYING,
    AskAgain,
    CopyFrom,
    LookUpNamespace,
    PrefixLookup,
    PrefixSource,
    Settled,
    Stage,
)
from splitnet.swarm.plan import PlannedHop
from splitnet.wire.codecs import Codec, codec_by_name
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import Chunk, Opened
from splitnet.wire.sent_log import PAGE, SentLog

SID, ROW, PLAIN = b"s" * 16, 1, codec_by_name("none")
KEYS = [Identity.generate().public for _ in range(3)]
MOST = 40
"""Pages of the text."""


def endpoint_of(index: int) -> Endpoint:
    return Endpoint(f"tcp://127.0.0.1:{index + 1}", KEYS[index])


def hop_of(index: int) -> RouteHop:
    record: Any = SimpleNamespace(key=KEYS[index], endpoint=endpoint_of(index), dtype="float32")
    return RouteHop(PlannedHop(record, index, index + 1), PLAIN)


def lookup(*, shared: bool = False) -> PrefixLookup:
    made = PrefixLookup(SID, "model", (0, 2), 1, itertools.count(1).__next__)
    made.namespace = LookUpNamespace(b"salt", shared)
    return made


def opened(positions: int, *, stored: bool, stores: bool = True) -> Opened:
    return Opened(SID, 1, True, positions, looked_up=stored, stores=stores)


def begin(prefixes: PrefixLookup) -> SentLog:
    """A text begins, and a route is being made for it."""
    payload = bytes(PLAIN.bytes_per_position(1) * MOST * PAGE)
    prefixes.begin_text(LookUpPrefix(Chunk(ROW, 0, MOST * PAGE, 0), lambda codec: (payload, ())))
    prefixes.begin_route()
    log = prefixes.expected_log(PLAIN)
    assert log is not None
    return log


def ask(prefixes: PrefixLookup, hops: list[RouteHop], log: SentLog | None) -> list[tuple[int, tuple[bytes, ...]]]:
    prefixes.begin_asking(hops, PLAIN)
    return [prefixes.question(hop, log) for hop in hops]


@given(
    held=st.lists(st.tuples(st.integers(0, MOST + 5), st.booleans()), min_size=2, max_size=2),
    source=st.integers(0, MOST),
    renames=st.integers(0, 3),
    shared=st.booleans(),
)
def test_a_lookup_ends_with_what_hops_have(
    held: list[tuple[int, bool]], source: int, renames: int, shared: bool
) -> None:
    prefixes, hops = lookup(shared=shared), [hop_of(0), hop_of(1)]
    prefixes.sources = (PrefixSource(KEYS[2].text, endpoint_of(2), (0, 2), source * PAGE),)
    log: SentLog | None = begin(prefixes)
    copied: set[Endpoint] = set()
    asked = 0
    while True:
        questions = ask(prefixes, hops, log)
        asked += 1
        assert asked <= 3, "hops are asked again and again"
        for hop, (pages, stored), (row, labels) in zip(hops, held, questions, strict=True):
            assert row == (ROW if labels else 0)
            if renames:
                hop.weights = f"int{asked}"
            pages = max(pages, source) if hop.endpoint in copied else pages
            prefixes.hop_opened(hop, opened(pages * PAGE, stored=stored or hop.endpoint in copied))
        renames = max(0, renames - 1)
        found = prefixes.all_opened(log, ())
        if isinstance(found, CopyFrom):
            assert not copied and not shared and prefixes.stage is Stage.COPYING
            for endpoint, message in found.requests:
                hop = next(each for each in hops if each.endpoint == endpoint)
                have = hop.cached_positions if hop.prefix_hit else 0
                assert source * PAGE >= have + WORTH_COPYING and len(message.labels) <= source
                copied.add(endpoint)
            found = prefixes.all_opened(log, ())
            assert isinstance(found, AskAgain)
        if isinstance(found, Settled):
            break
    have = [min(hop.cached_positions, MOST * PAGE) for hop in hops if hop.prefix_hit]
    assert prefixes.hit <= max(have, default=0)
    assert prefixes.reused <= prefixes.hit and (len(have) == 2 or not prefixes.reused)
    assert prefixes.text is None and not prefixes.hit % PAGE
    assert (found.log is None) == (prefixes.hit == 0)
    assert found.log is None or found.log.positions == prefixes.hit


def test_a_hop_that_names_other_weights_each_time_is_not_believed() -> None:
    prefixes, hops = lookup(), [hop_of(0), hop_of(1)]
    log = begin(prefixes)
    ask(prefixes, hops, log)
    for weights in ("int8", "int4"):
        hops[0].weights = weights
        for hop in hops:
            prefixes.hop_opened(hop, opened(PAGE, stored=True))
        found = prefixes.all_opened(log, ())
        if weights == "int8":
            assert isinstance(found, AskAgain)
            ask(prefixes, hops, log)
    assert found == Settled(None) and prefixes.namespace.salt is None and not prefixes.hit


def test_pages_are_named_by_all_that_they_depend_on() -> None:
    contexts: set[bytes] = set()
    for model, weights, codec in itertools.product(("a", "b"), ("float32", "int8"), ("none", "fp16")):
        prefixes = PrefixLookup(SID, model, (0, 2), 1, itertools.count(1).__next__, LookUpNamespace(b"salt"))
        hops = [hop_of(0), hop_of(1)]
        hops[0].weights = weights
        prefixes.begin_asking(hops, codec_by_name(codec))
        contexts |= {hop.context for hop in hops}
    assert len(contexts) == 16


def test_without_a_namespace_hops_are_asked_for_nothing() -> None:
    prefixes, hops = lookup(), [hop_of(0), hop_of(1)]
    log = begin(prefixes)
    prefixes.namespace = LookUpNamespace()
    assert ask(prefixes, hops, log) == [(0, ())] * 2 and not any(hop.context for hop in hops)
    for hop in hops:
        prefixes.hop_opened(hop, opened(PAGE, stored=True))
    assert prefixes.all_opened(log, ()) == Settled(None) and not prefixes.hit


def test_a_text_that_cannot_be_encoded_is_not_looked_up() -> None:
    prefixes = lookup()

    def fails(codec: Codec) -> EncodedPositions:
        raise CodecError("not finite")

    prefixes.begin_text(LookUpPrefix(Chunk(ROW, 0, PAGE, 0), fails))
    assert prefixes.expected_log(PLAIN) is None and not prefixes.abandon()


@pytest.mark.parametrize("blocks", [(0, 1), (1, 2), (0, 2)])
def test_a_source_must_have_all_blocks_of_a_hop(blocks: tuple[int, int]) -> None:
    source = PrefixSource(KEYS[2].text, endpoint_of(2), blocks, PAGE)
    assert source.has_more(hop_of(0), PAGE) == (blocks[0] == 0)
    assert not source.has_more(hop_of(0), PAGE + 1) and not source.has_more(hop_of(2), PAGE)
