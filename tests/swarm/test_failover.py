"""Peers fail, and the text continues with the same tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import CoverageError, OtherWeights, SessionClosed
from splitnet.security.identity import Identity
from tests.swarm.generation import GREEDY, After, prompt
from tests.swarm.harness import SPANS, LocalSwarm, local_swarm, repairs

pytestmark = pytest.mark.swarm


def kill_hops(swarm: LocalSwarm, cache: Any, *indexes: int) -> Callable[[], None]:
    def kill() -> None:
        assert cache.session is not None
        doomed = [cache.session.hops[index].endpoint for index in indexes]
        for peer in swarm.peers:
            if peer.endpoint in doomed:
                peer.close()

    return kill


@pytest.mark.default_cases(indexes=((0, 1, 2),))
@pytest.mark.parametrize("indexes", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)], ids=str)
def test_lost_hops_are_replaced(twins: LocalSwarm, local: Any, indexes: tuple[int, ...]) -> None:
    model = twins.model()
    with model.session() as cache:
        got = model.generate(**prompt(), **GREEDY, streamer=After(10, kill_hops(twins, cache, *indexes)))
    assert torch.equal(got, local.generate(**prompt(), **GREEDY))
    # A session may also move to a better route, for example if a busy machine slows down a hop for a long time.
    told = [event.kind for event in model.swarm.events.since(0) if event.kind != "rerouted"]
    assert told.count("lost") >= len(indexes) and told[-1] == "repaired" and "failed" not in told


def test_beam_search_continues_after_a_lost_hop(twins: LocalSwarm, local: Any) -> None:
    model = twins.model()
    options = {**GREEDY, "num_beams": 3}
    calls = 0

    def kill_at_tenth(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 10:
            kill_hops(twins, cache, 1)()
        return torch.zeros(len(ids), dtype=torch.bool)

    with model.session() as cache:
        got = model.generate(**prompt(), **options, stopping_criteria=[kill_at_tenth])
    assert calls > 10
    assert torch.equal(got, local.generate(**prompt(), **options))


@pytest.mark.full
def test_a_batch_of_many_short_rows_continues_after_a_lost_hop(twins: LocalSwarm, local: Any) -> None:
    model, inputs = twins.model(), prompt(batch=8)
    with model.session() as cache:
        kill = kill_hops(twins, cache, 1)

        def kill_once(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            if ids.shape[1] == inputs["input_ids"].shape[1] + 5:
                kill()
            return torch.zeros(len(ids), dtype=torch.bool)

        got = model.generate(**inputs, **GREEDY, stopping_criteria=[kill_once])
    assert torch.equal(got, local.generate(**inputs, **GREEDY))


@pytest.mark.full
def test_two_hops_lost_one_after_the_other_are_replaced(twins: LocalSwarm, local: Any) -> None:
    model = twins.model()
    with model.session() as cache:
        first, second = After(5, kill_hops(twins, cache, 0)), After(15, kill_hops(twins, cache, 2))

        class Both(BaseStreamer):
            def put(self, value: torch.Tensor) -> None:
                first.put(value)
                second.put(value)

            def end(self) -> None:
                pass

        got = model.generate(**prompt(), **GREEDY, streamer=Both())
    assert torch.equal(got, local.generate(**prompt(), **GREEDY))


def test_failover_with_the_int8_codec_gives_the_same_tokens(twins: LocalSwarm) -> None:
    model = twins.model("int8")
    undisturbed = model.generate(**prompt(), **GREEDY)
    with model.session() as cache:
        got = model.generate(**prompt(), **GREEDY, streamer=After(12, kill_hops(twins, cache, 1)))
    assert torch.equal(got, undisturbed)


def test_a_session_that_all_peers_have_dropped_is_rebuilt(twins: LocalSwarm, local: Any) -> None:
    def forget() -> None:
        for peer in twins.peers:
            service = peer.service
            for session in list(service.sessions):
                service.sessions.remove(session)

    model = twins.model()
    with model.session():
        got = model.generate(**prompt(), **GREEDY, streamer=After(12, forget))
    assert torch.equal(got, local.generate(**prompt(), **GREEDY))


def test_a_session_waits_for_a_late_replacement(node: DhtDirectory, own_folder: Path, own_local: Any) -> None:
    with local_swarm(own_folder, SPANS, node=node) as swarm:
        model = swarm.model()

        def restart() -> None:
            swarm.peers[1].close()
            swarm.add(2, 4)

        with model.session():
            got = model.generate(**prompt(), **GREEDY, streamer=After(12, restart))
        assert torch.equal(got, own_local.generate(**prompt(), **GREEDY))


def test_a_hop_that_hangs_is_replaced(twins: LocalSwarm, local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang() -> None:
        assert cache.session is not None
        hung = next(peer for peer in twins.peers if peer.endpoint == cache.session.hops[1].endpoint)
        monkeypatch.setattr(hung.service, "receive_message", lambda *_: None)

    model = twins.model()
    with model.session() as cache:
        got = model.generate(**prompt(), **GREEDY, streamer=After(12, hang))
        assert cache.session is not None
        assert len(repairs(cache.session)) == 1
    assert torch.equal(got, local.generate(**prompt(), **GREEDY))


def test_a_message_lost_between_hops_is_sent_again(twins: LocalSwarm, local: Any) -> None:
    def lose_one() -> None:
        assert cache.session is not None
        sender = next(peer for peer in twins.peers if peer.endpoint == cache.session.hops[0].endpoint)
        send = sender.transport.send

        def drop(*_: Any) -> None:
            sender.transport.send = send  # type: ignore[method-assign]

        sender.transport.send = drop  # type: ignore[method-assign]

    model = twins.model()
    with model.session() as cache:
        got = model.generate(**prompt(), **GREEDY, streamer=After(12, lose_one))
    assert torch.equal(got, local.generate(**prompt(), **GREEDY))


def test_the_error_without_a_replacement_names_the_blocks(node: DhtDirectory, own_folder: Path) -> None:
    with local_swarm(own_folder, SPANS, node=node) as swarm:
        model = swarm.model(recovery_timeout_s=1.0)
        with model.session() as cache, pytest.raises(CoverageError, match=r"2\.\.3"):
            model.generate(**prompt(), **GREEDY, streamer=After(12, kill_hops(swarm, cache, 1)))
        assert [event.kind for event in model.swarm.events.since(0)] == ["lost", "failed"]


@pytest.mark.full
def test_a_session_that_waits_for_missing_blocks_can_be_closed(node: DhtDirectory, own_folder: Path) -> None:
    with local_swarm(own_folder, SPANS, node=node) as swarm:
        model = swarm.model(recovery_timeout_s=60.0)
        events = model.swarm.events
        with model.session() as cache:

            def close_once_a_hop_is_lost() -> None:
                while not events.since(0):
                    time.sleep(0.005)
                cache.close()

            closing = threading.Thread(target=close_once_a_hop_is_lost)
            closing.start()
            with pytest.raises(SessionClosed):
                model.generate(**prompt(), **GREEDY, streamer=After(12, kill_hops(swarm, cache, 1)))
            closing.join()
        # It was the client's own wish, and no failure.
        assert "failed" not in [event.kind for event in events.since(0)]


def test_generation_can_continue_from_the_tokens_before_an_error(
    node: DhtDirectory, own_folder: Path, own_local: Any
) -> None:
    with local_swarm(own_folder, SPANS, node=node) as swarm:
        model = swarm.model(recovery_timeout_s=0.5)
        with model.session() as cache:
            with pytest.raises(CoverageError) as caught:
                kill = After(12, kill_hops(swarm, cache, 1))
                model.generate(**prompt(), **GREEDY, streamer=kill, speculate="off")
            generated = caught.value.generated
            assert generated.shape == (1, prompt()["input_ids"].shape[1] + 12)
            swarm.add(2, 4)
            before = cache.session.traffic.positions if cache.session else 0
            options = {**GREEDY, "max_new_tokens": GREEDY["max_new_tokens"] - 12}
            mask = torch.ones_like(generated)
            got = model.generate(generated, attention_mask=mask, speculate="off", **options)
            assert cache.session is not None
            # Only the token whose step failed and later tokens were sent, not the prompt.
            assert cache.session.traffic.positions - before == options["max_new_tokens"]
        assert torch.equal(got, own_local.generate(**prompt(), **GREEDY))


@pytest.mark.full
def test_a_peer_with_another_weight_format_replaces_a_hop_only_if_allowed(
    node: DhtDirectory, own_folder: Path, own_local: Any
) -> None:
    with local_swarm(own_folder, SPANS, node=node) as swarm:
        strict, lenient = swarm.model(recovery_timeout_s=3.0), swarm.model("auto")
        with torch.no_grad():
            exact = strict(**prompt()).logits
        with lenient.session(), strict.session() as cache:
            lenient.generate(**prompt(), **GREEDY | {"max_new_tokens": 2})
            strict.generate(**prompt(), **GREEDY | {"max_new_tokens": 2})
            swarm.add(2, 4, weights="int4")
            with pytest.raises(OtherWeights, match=r"2\.\.3 of .* held as int4/float32 by .* as float32 in") as caught:
                kill = After(12, kill_hops(swarm, cache, 1))
                strict.generate(**prompt(), **GREEDY, streamer=kill, speculate="off")
            with torch.no_grad(), pytest.raises(OtherWeights):
                strict(**prompt())
            assert not [event for event in strict.swarm.events.since(0) if event.kind == "weights"]
            lenient.generate(**prompt(), **GREEDY)
            told = [event.text for event in strict.swarm.events.since(0) if event.kind == "weights"]
            assert len(told) == 1 and "blocks 2..3 as int4/float32 instead of float32" in told[0]
            swarm.add(2, 4)
            generated = caught.value.generated
            got = strict.generate(
                generated, attention_mask=torch.ones_like(generated), **GREEDY | {"max_new_tokens": 30 - 12}
            )
        assert torch.equal(got, own_local.generate(**prompt(), **GREEDY))
        with torch.no_grad():
            assert torch.equal(strict(**prompt()).logits, exact)


@pytest.mark.full
def test_lost_hops_with_links_relayed_by_the_client_are_replaced(
    node: DhtDirectory, own_folder: Path, own_local: Any, tmp_path: Path
) -> None:
    client = Identity.generate()
    keys = tmp_path / "authorized_keys"
    keys.write_text(client.public.text + "\n")
    with local_swarm(own_folder, [(0, 2)], node=node) as swarm:
        for start, end in ((2, 4), (2, 4), (4, 6)):
            # These peers accept only the client, so that it relays between all hops.
            swarm.add(start, end, authorized_keys=keys)
        model = swarm.model(identity=client)
        with model.session() as cache:
            got = model.generate(**prompt(), **GREEDY, streamer=After(12, kill_hops(swarm, cache, 1)))
            assert cache.session is not None
            assert [hop.relayed for hop in cache.session.hops] == [True, True, False]
        assert torch.equal(got, own_local.generate(**prompt(), **GREEDY))
