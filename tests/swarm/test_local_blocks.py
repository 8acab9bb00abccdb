"""A client with local blocks gets the same tokens and gradients, wherever in the model the blocks are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model

from splitnet.blocks.span import block_bytes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import CoverageError, SplitnetError
from splitnet.hf import remote_model
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.session.inference import Session
from splitnet.session.local import MixedSession
from splitnet.swarm.plan import Planner
from tests.swarm.harness import LocalSwarm, local_swarm, repairs

pytestmark = pytest.mark.swarm

PLACES = ("0:2", "4:6", "2:3", "0:1,5:6", "1:2,3:5", "0:6")


@pytest.fixture(scope="module")
def swarm(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with local_swarm(folder, [(0, 1), (1, 4), (4, 6)], node=node) as started:
        yield started


@pytest.fixture(scope="module", params=PLACES)
def remote(swarm: LocalSwarm, request: pytest.FixtureRequest) -> Iterator[RemoteCausalLM]:
    with swarm.visit() as visit:
        yield visit.model(local_blocks=request.param)


def tokens(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(length))


def options(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **more}


@pytest.mark.default_cases(remote=("0:1,5:6", "0:6"))
def test_greedy_generation_with_local_blocks(local: Any, remote: RemoteCausalLM) -> None:
    assert torch.equal(remote.generate(tokens(7), **options()), local.generate(tokens(7), **options()))


@pytest.mark.default_cases(remote=("0:1,5:6",))
def test_beams_on_a_padded_batch(local: Any, remote: RemoteCausalLM) -> None:
    ids = tokens(9, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    chosen = options(num_beams=3, num_return_sequences=2)
    assert torch.equal(remote.generate(**inputs, **chosen), local.generate(**inputs, **chosen))


@pytest.mark.default_cases(remote=("0:1,5:6",))
def test_rejected_drafts_are_forgotten(local: Any, remote: RemoteCausalLM) -> None:
    repeating = tokens(6).repeat(1, 3)
    chosen = options(prompt_lookup_num_tokens=4)
    assert torch.equal(remote.generate(repeating, **chosen), local.generate(repeating, **chosen))


@pytest.mark.default_cases(remote=("0:1,5:6",))
def test_all_logits_of_a_prompt_in_several_steps(
    local: Any, remote: RemoteCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of all positions or of the last ones only, for a prompt in chunks."""
    monkeypatch.setattr(Session, "step_positions", lambda *_: 64)
    ids = tokens(230)
    with torch.no_grad():
        expected = local(ids).logits
        torch.testing.assert_close(remote(ids, use_cache=True).logits, expected, rtol=1e-4, atol=1e-4)
        last = remote(ids, use_cache=True, logits_to_keep=3).logits
    torch.testing.assert_close(last, expected[:, -3:], rtol=1e-4, atol=1e-4)


@pytest.mark.default_cases(remote=("0:1,5:6",))
def test_a_conversation_continues_from_the_held_positions(local: Any, remote: RemoteCausalLM) -> None:
    with remote.session() as cache:
        first = remote.generate(tokens(7), **options())
        moved = cache.session.traffic.positions if cache.session else 0
        second = remote.generate(torch.cat((first, tokens(5)), dim=1), speculate="off", **options())
        assert isinstance(cache.session, MixedSession)
        assert cache.session.traffic.positions - moved == 1 + 5 + 11
    assert torch.equal(second, local.generate(torch.cat((first, tokens(5)), dim=1), **options()))


@pytest.mark.default_cases(remote=("0:1,5:6",))
def test_keys_and_values_are_fetched_from_peers_and_local_blocks(swarm: LocalSwarm, remote: RemoteCausalLM) -> None:
    with swarm.visit() as visit:
        expected = visit.model().keys_and_values(tokens(5))
    got = remote.keys_and_values(tokens(5))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_gradients_equal_those_of_local_training(folder: Path, swarm: LocalSwarm, method: str) -> None:
    task = TaskType.CAUSAL_LM
    config = (
        LoraConfig(task_type=task, r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        if method == "lora"
        else PrefixTuningConfig(task_type=task, num_virtual_tokens=5)
    )
    ids = tokens(9, batch=2)
    found: list[dict[str, torch.Tensor]] = []
    with swarm.visit() as visit:
        for model in (visit.model(), visit.model(local_blocks="0:1,3:4")):
            torch.manual_seed(3)
            tuned: Any = get_peft_model(model, config)
            loss = tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
            loss.backward()
            found.append({name: weight.grad for name, weight in tuned.named_parameters() if weight.grad is not None})
            with torch.no_grad():
                text = tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options())
            found[-1]["text"] = text
    expected, got = found
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_lost_hop_between_local_blocks_is_replaced(node: DhtDirectory, own_folder: Path, own_local: Any) -> None:
    with local_swarm(own_folder, [(0, 6), (0, 6)], node=node) as twins:
        model = twins.model(local_blocks="0:1,5:6")
        with model.session() as cache:
            first = model.generate(tokens(7), **options())
            assert isinstance(cache.session, MixedSession)
            used = cache.session.hops[0].endpoint
            next(peer for peer in twins.peers if peer.endpoint == used).close()
            second = model.generate(torch.cat((first, tokens(5)), dim=1), **options())
            assert len(repairs(cache.session)) == 1
    assert torch.equal(second, own_local.generate(torch.cat((first, tokens(5)), dim=1), **options()))


@pytest.mark.parametrize("blocks", ["", "3", "2:2", "4:7", "0:3,2:4", "0:2;4:6"])
def test_invalid_ranges_of_blocks_are_refused(folder: Path, swarm: LocalSwarm, blocks: str) -> None:
    with swarm.visit() as visit, pytest.raises(SplitnetError, match="local blocks"):
        visit.model(local_blocks=blocks)


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block takes 2 ms at peers and 1 ms at the client, under any load of this machine."""
    monkeypatch.setattr(Planner, "cost_ms", lambda _, __, hops: 2.0 * sum(hop.end - hop.start for hop in hops))
    monkeypatch.setattr(remote_model, "_block_ms", lambda *_: 1.0)


@pytest.mark.usefixtures("costs")
def test_auto_chooses_the_fastest_local_blocks(swarm: LocalSwarm, local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks if they fit into memory, otherwise as many as fit; none if a peer is as fast."""
    with swarm.visit() as visit:
        whole = visit.model(local_blocks="auto")
        assert torch.equal(whole.generate(tokens(7), **options()), local.generate(tokens(7), **options()))
        with whole.session() as cache:
            whole.generate(tokens(7), **options())
            assert isinstance(cache.session, MixedSession) and not cache.session.hops
        size = block_bytes(Checkpoint.open(swarm.folder), None)
        monkeypatch.setattr(remote_model, "free_memory", lambda _: int(2.5 * size / remote_model.MEMORY_SHARE))
        part = visit.model(local_blocks="auto")
        with part.session() as cache:
            part.generate(tokens(7), **options())
            assert cache.session is not None
            assert cache.session.hops[0].blocks[0] == 2
        monkeypatch.setattr(remote_model, "_block_ms", lambda *_: 2.0)
        slow = visit.model(local_blocks="auto")
        with slow.session() as cache:
            slow.generate(tokens(7), **options())
            assert isinstance(cache.session, Session)
        monkeypatch.setattr(remote_model, "free_memory", lambda _: 0)
        none = visit.model(local_blocks="auto")
        with none.session() as cache:
            none.generate(tokens(7), **options())
            assert isinstance(cache.session, Session)


@pytest.mark.usefixtures("costs")
def test_auto_compares_the_costs_of_routes_after_planning_all(
    swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[object] = []
    plan, cost_ms = Planner.plan_route, Planner.cost_ms
    monkeypatch.setattr(Planner, "plan_route", lambda *given, **options: plans.append(given) or plan(*given, **options))
    monkeypatch.setattr(Planner, "cost_ms", lambda *given: cost_ms(*given) + 100.0 * len(plans))
    size = block_bytes(Checkpoint.open(swarm.folder), None)
    monkeypatch.setattr(remote_model, "free_memory", lambda _: int(2.5 * size / remote_model.MEMORY_SHARE))
    with swarm.visit() as visit:
        model = visit.model(local_blocks="auto")
        with model.session() as cache:
            model.generate(tokens(7), **options())
            assert cache.session is not None
            assert cache.session.hops[0].blocks[0] == 2, "the route that was planned first looked fastest then"


@pytest.mark.usefixtures("costs")
def test_auto_includes_blocks_without_a_peer(
    node: DhtDirectory, own_folder: Path, own_local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_model, "_block_ms", lambda *_: 3.0)
    with local_swarm(own_folder, [(2, 6)], node=node) as few:
        model = few.model(local_blocks="auto")
        assert torch.equal(model.generate(tokens(7), **options()), own_local.generate(tokens(7), **options()))
        with model.session() as cache:
            model.generate(tokens(7), **options())
            assert cache.session is not None
            assert [hop.blocks for hop in cache.session.hops] == [(2, 6)]
        monkeypatch.setattr(remote_model, "free_memory", lambda _: 0)
        with pytest.raises(CoverageError, match=r"0\.\.1"):
            few.model(local_blocks="auto")


def test_local_blocks_in_other_weights(tmp_path: Path, swarm: LocalSwarm, local: Any) -> None:
    with swarm.visit() as visit:
        model = visit.model(local_blocks="0:3", local_weights="float16")
        with torch.no_grad():
            logits = model(tokens(9)).logits
            torch.testing.assert_close(logits, local(tokens(9)).logits, rtol=0.02, atol=0.02)
