"""The choice of a model by a peer that may serve several: it follows waiting demand, uncovers no model in use, and
settles."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.facts import Peer, Speed, coverage
from scheduler.model_choice import SMOOTHED_S, DecayingRate, ModelOffer, better_model, first_model
from scheduler.peer_moves import SETTLE_S
from scheduler.placement import choose_span

FAST = Speed.of(1.0, 0.05)


def peer(name: str, start: int, end: int, ms: float = 1.0) -> Peer:
    return Peer(name, start, end, Speed.of(ms, ms / 20))


def offered(name: str, *others: Peer, own: Peer, blocks: int = 6, demand: float = 0.0) -> ModelOffer:
    return ModelOffer(name, blocks, others, own, demand, in_use=demand > 0)


def test_a_rate_is_smoothed_and_decays() -> None:
    rate = DecayingRate()
    assert rate.rate_at(5.0) == 0.0
    for second in range(600):
        rate.add_events(20.0, float(second))
    assert rate.rate_at(600.0) == pytest.approx(20.0, rel=0.02)
    assert rate.rate_at(600.0 + SMOOTHED_S) == pytest.approx(20.0 / 2.72, rel=0.02)
    assert rate.rate_at(2000.0) < 1e-7
    rate.add_events(60.0, 0.0)  # The clock has gone back.
    assert 0.9 < rate.rate_at(600.0) < 21.0


def test_an_idle_peer_moves_to_missing_blocks_and_stays() -> None:
    own = peer("m", 0, 6)
    here = offered("a", own=own)
    there = offered("b", peer("c", 0, 3), own=own, demand=1.0)
    assert better_model(here, [there]) == "b"
    assert better_model(there, [here]) is None
    assert better_model(replace(there, demand=0.0, in_use=False), [replace(here, demand=0.02)]) == "a"


@pytest.mark.parametrize("left", [[], [peer("d", 0, 6)]])
def test_an_idle_peer_helps_a_model_that_is_busy(left: list[Peer]) -> None:
    own = peer("m", 0, 6)
    here = offered("a", *left, own=own)
    others = peer("c", 0, 6, 20.0)
    slow_ms = offered("b", others, own=own).wait_ms(with_own=False)
    assert better_model(here, [offered("b", others, own=own, demand=200.0 / slow_ms)]) is None
    assert better_model(here, [offered("b", others, own=own, demand=400.0 / slow_ms)]) == "b"


def test_a_peer_leaves_a_model_in_use_only_if_other_peers_cover_it() -> None:
    own, wanted = peer("m", 0, 6), offered("b", own=peer("m", 0, 6), demand=900.0)
    assert better_model(offered("a", own=own, demand=0.02), [wanted]) is None
    # The other peer of all blocks relies on this peer to stay.
    assert better_model(offered("a", peer("z", 0, 6), own=own, demand=0.02), [wanted]) is None
    assert better_model(offered("a", peer("c", 0, 6), own=own, demand=0.02), [wanted]) == "b"


def test_a_peer_with_a_recent_move_stays_where_all_blocks_are_served() -> None:
    own = peer("m", 0, 6)
    here, there = (
        offered(name, peer("c", 0, 6), own=own, demand=demand) for name, demand in (("a", 1.0), ("b", 290.0))
    )
    assert better_model(here, [there]) == "b"
    assert better_model(here, [there], settled_s=SETTLE_S - 1) is None
    assert better_model(here, [there], sessions=10_000_000) is None


def test_the_first_model_is_the_one_with_the_most_need() -> None:
    own = peer("m", 0, 6)
    whole, holed = offered("a", peer("c", 0, 6), own=own), offered("b", peer("c", 0, 4), own=own)
    assert first_model([whole, holed]) == "b"
    assert first_model([whole, holed, offered("c", own=own, demand=1.0)]) == "c"
    assert first_model([whole]) == "a"


speeds = st.sampled_from([0.5, 1.0, 2.0, 8.0])


@st.composite
def swarms(draw: st.DrawFn) -> tuple[dict[str, tuple[int, float]], dict[str, tuple[str, int, int, float]], list[str]]:
    """Models with their blocks and demand; peers with their model, start, length and ms; names of peers that serve any
    model."""
    models = {name: (draw(st.integers(1, 8)), draw(st.sampled_from([0.0, 0.5, 5.0, 300.0]))) for name in "abc"}
    peers: dict[str, tuple[str, int, int, float]] = {}
    for at in range(draw(st.integers(1, 8))):
        model = draw(st.sampled_from("abc"))
        length = draw(st.integers(1, models[model][0]))
        peers[f"p{at}"] = model, draw(st.integers(0, models[model][0] - length)), length, draw(speeds)
    return models, peers, draw(st.lists(st.sampled_from(sorted(peers)), unique=True))


@given(swarms(), st.randoms(use_true_random=False))
def test_moves_between_models_end_and_uncover_no_model_in_use(
    swarm: tuple[dict[str, tuple[int, float]], dict[str, tuple[str, int, int, float]], list[str]], random: Random
) -> None:
    """The demand is constant, and the peers with several models decide in any order."""
    models, peers, free = swarm
    serving = {
        name: (model, Peer(name, start, start + length, Speed.of(ms, ms / 20)))
        for name, (model, start, length, ms) in peers.items()
    }

    def seen_by(name: str, model: str) -> ModelOffer:
        blocks, demand = models[model]
        others = [one for other, (where, one) in serving.items() if where == model and other != name]
        where, own = serving[name]
        if where != model:
            start, end = choose_span(others, blocks, peers[name][2])
            own = replace(own, start=start, end=end)
        return ModelOffer(model, blocks, others, own, demand, in_use=demand > 0)

    moves = 0
    while True:
        order = list(free)
        random.shuffle(order)
        for name in order:
            here = serving[name][0]
            others = [seen_by(name, model) for model in models if model != here]
            found = better_model(seen_by(name, here), others)
            if found is None:
                continue
            before = {
                model: coverage((one for at, one in serving.values() if at == model), models[model][0])
                for model in models
            }
            serving[name] = found, seen_by(name, found).own
            moves += 1
            for model, (blocks, demand) in models.items():
                after = coverage((one for at, one in serving.values() if at == model), blocks)
                if demand:
                    assert all(left or not had for left, had in zip(after, before[model], strict=True))
            break
        else:
            break
        assert moves <= 8 * len(peers)


@given(swarms())
def test_stale_views_never_uncover_a_block_in_use(
    swarm: tuple[dict[str, tuple[int, float]], dict[str, tuple[str, int, int, float]], list[str]],
) -> None:
    """All peers leave at the same time, each with the same old view."""
    models, peers, free = swarm
    placed = {name: Peer(name, start, start + length, FAST) for name, (_, start, length, _) in peers.items()}
    for model, (blocks, demand) in models.items():
        here = [one for name, one in placed.items() if peers[name][0] == model]
        wanted = ModelOffer("x", 4, [], Peer("", 0, 4, FAST), 1000.0, in_use=True)
        stay = [
            one
            for one in here
            if one.id not in free
            or better_model(
                ModelOffer(model, blocks, [each for each in here if each is not one], one, demand, demand > 0), [wanted]
            )
            is None
        ]
        if demand:
            before, after = coverage(here, blocks), coverage(stay, blocks)
            assert all(left or not had for left, had in zip(after, before, strict=True))
