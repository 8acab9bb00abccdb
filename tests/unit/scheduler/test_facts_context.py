"""The cost of reading a long context in the cost model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.cost import PROMPT_SHARE, Encoding, block_ms, move_ms, route_ms
from scheduler.facts import CONTEXTS, ContextCost, Hop, Link, Network, Peer, Speed
from scheduler.route import best_route

PAST = ContextCost(((1.0, 100.0), (8.0, 800.0), (40.0, 3200.0)))
NETWORK = Network(unmeasured=Link(1.0, 1e5))
PLAIN = (Encoding("plain", 100),)


def peer(name: str, past: ContextCost, decode_ms: float = 1.0) -> Peer:
    return Peer(name, 0, 4, Speed.of(decode_ms, 0.1), kv_free=100_000, context_cost=past)


@pytest.mark.parametrize(
    ("positions", "context", "ms"),
    [
        (1, 0, 0.0),
        (1, 512, 0.5),
        (1, 1024, 1.0),
        (1, (1024 + 8192) // 2, 4.5),
        (1, 65536, 80.0),
        (512, 8192, 800.0),
        (1 + 511 / 2, 8192, 404.0),
    ],
)
def test_the_cost_is_linear_between_published_contexts(positions: float, context: int, ms: float) -> None:
    assert PAST.ms_at(positions, context) == pytest.approx(ms)


def test_the_cost_is_proportional_beyond_the_longest_published_context() -> None:
    assert ContextCost(PAST.ms[:1]).ms_at(1, 4 * CONTEXTS[0]) == pytest.approx(4.0)
    assert ContextCost(PAST.ms[:2]).ms_at(512, 2 * CONTEXTS[1]) == pytest.approx(1600.0)
    assert ContextCost().ms_at(512, 10**6) == 0.0


def test_the_cost_of_steps_and_prompts_includes_reading_the_context() -> None:
    reads, none = peer("reads", PAST), peer("none", ContextCost())
    assert block_ms(reads, 1, context=8192) == pytest.approx(block_ms(none, 1) + 8.0)
    prompt = 8192
    passes = prompt / 512
    more = block_ms(reads, 1, prompt, prompt) - block_ms(none, 1, prompt, prompt)
    assert more == pytest.approx(8.0 + PROMPT_SHARE * passes * PAST.ms_at(512, prompt / 2))


def test_the_cost_of_a_move_includes_reading_during_the_replay() -> None:
    hops = [Hop("a", 0, 4)]
    ms = [
        move_ms(hops, {"a": peer("a", past)}, NETWORK, cached=8192, encodings=PLAIN) for past in (ContextCost(), PAST)
    ]
    assert ms[1] - ms[0] == pytest.approx(16 * 4 * PAST.ms_at(512, 4096))


def test_a_long_context_is_routed_to_the_peer_that_reads_it_faster() -> None:
    slow = peer("reads slowly", PAST)
    fast = peer("reads fast", ContextCost(tuple((a / 10, b / 10) for a, b in PAST.ms)), decode_ms=2.0)
    for context, chosen in ((0, slow), (512, slow), (8192, fast), (32768, fast)):
        route = best_route([slow, fast], (0, 4), NETWORK, encodings=PLAIN, kv_needed=1, context=context)
        assert [hop.peer for hop in route.hops] == [chosen.id], context
        expected = route_ms(route.hops, {chosen.id: chosen}, NETWORK, positions=1, encodings=PLAIN, context=context)
        assert route.cost_ms == expected


def test_candidates_for_a_long_context_read_it_fast() -> None:
    from scheduler.candidates import CandidateIndex

    crowd = [replace(peer(f"{number}", PAST), end=1) for number in range(20)]
    crowd[7] = replace(crowd[7], context_cost=ContextCost(), speed=Speed.of(3.0, 0.1))
    index = CandidateIndex(crowd, NETWORK)
    kept = {
        context: index.near([], (0, 1), encodings=PLAIN, kv_needed=1, context=context, limit=1)
        for context in (0, 32768)
    }
    assert crowd[7] not in kept[0] and kept[32768] == [crowd[7]]
