"""Gemma 4 E2B in small: blocks with an input of their own, and blocks that read keys and values of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import Gemma4ForCausalLM

from splitnet.blocks.block_inputs import encode_step
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import SplitnetError, UnsupportedModel
from splitnet.wire.block_inputs import PER_LAYER
from tests.image_models import IMAGE_MODELS
from tests.swarm.generation import After
from tests.swarm.harness import LocalSwarm, repairs, shared_swarm
from tests.swarm.test_failover import kill_hops

MODEL = IMAGE_MODELS["gemma4-small"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
IDS = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 9, 11, 5, 6, 7]])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, LocalSwarm]]:
    """The text model in transformers, and a swarm with two peers for every span."""
    folder = tmp_path_factory.mktemp("small") / "published"
    whole = MODEL.write(folder)
    local = Gemma4ForCausalLM(whole.config.get_text_config()).eval()
    local.model, local.lm_head = whole.model.language_model, whole.lm_head
    with shared_swarm(folder, [*MODEL.spans] * 2, dtype="float32") as swarm:
        yield local, swarm


def test_texts_give_the_same(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    remote = swarm.model(dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(remote(IDS).logits, local(IDS).logits, atol=1e-4, rtol=1e-4)
    for speculate in ("off", "prompt-lookup"):
        assert torch.equal(remote.generate(IDS, speculate=speculate, **OPTIONS), local.generate(IDS, **OPTIONS))


def test_batches_with_padding_and_beams_give_the_same(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    remote = swarm.model(dtype="float32")
    ids = torch.cat((IDS, IDS.flip(1)))
    ids[0, :4] = 0
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for more in ({}, {"num_beams": 3}):
        given = {"input_ids": ids, "attention_mask": mask, **OPTIONS, **more}
        assert torch.equal(remote.generate(**given), local.generate(**given))


@torch.no_grad()
def test_whole_sequences_may_have_padding_on_the_right(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    mask = torch.ones(3, IDS.shape[1], dtype=torch.int64)
    mask[1, 9:] = mask[2, :2] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    labels[2, 2] = -100  # the position before it is padding
    given = {"input_ids": IDS.expand(3, -1), "attention_mask": mask, "labels": labels}
    found, expected = (model(**given) for model in (swarm.model(dtype="float32"), local))
    torch.testing.assert_close(found.logits[mask > 0], expected.logits[mask > 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss)


def test_a_batch_with_more_inputs_than_a_step_has_gives_the_same(both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    ids = torch.randint(3, 200, (100, 3), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **OPTIONS, "max_new_tokens": 2}
    assert torch.equal(swarm.model(dtype="float32").generate(**given), local.generate(**given))


@pytest.mark.parametrize("victim", range(len(MODEL.spans)))
def test_an_answer_survives_the_death_of_a_hop(victim: int, both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    with swarm.mended() as visit:
        remote = visit.model(dtype="float32", prefixes="off")
        with remote.session() as cache:
            got = remote.generate(IDS, **OPTIONS, streamer=After(4, kill_hops(visit, cache, victim)))
            assert cache.session is not None and repairs(cache.session)
    assert torch.equal(got, local.generate(IDS, **OPTIONS))


@pytest.mark.parametrize("local_blocks", ["0:1", "2:6", "0:6"])
def test_local_blocks_give_the_same(local_blocks: str, both: tuple[Any, LocalSwarm]) -> None:
    local, swarm = both
    remote = swarm.model(dtype="float32", local_blocks=local_blocks)
    assert torch.equal(remote.generate(IDS, **OPTIONS), local.generate(IDS, **OPTIONS))


def test_stored_prefixes_give_the_same(both: tuple[Any, LocalSwarm]) -> None:
    local, folder = both[0], both[1].folder
    ids = torch.randint(3, 200, (1, 150), generator=torch.Generator().manual_seed(1))
    expected, hits = local.generate(ids, **OPTIONS), list[int]()
    with shared_swarm(folder, MODEL.spans, dtype="float32") as swarm:  # one peer per span, so that both routes are one
        remote = swarm.model(dtype="float32")
        for _ in range(2):
            with remote.session() as cache:
                assert torch.equal(remote.generate(ids, **OPTIONS), expected)
                assert cache.session is not None
                hits.append(cache.session.prefix_hit)
    assert hits[0] == 0 < hits[1]


def test_training_is_refused(both: tuple[Any, LocalSwarm]) -> None:
    with pytest.raises(UnsupportedModel, match="training needs a model without such inputs"):
        both[1].model(dtype="float32")(IDS)


def test_peers_refuse_passes_over_whole_sequences(both: tuple[Any, LocalSwarm]) -> None:
    checkpoint = Checkpoint.open(both[1].folder)
    with pytest.raises(UnsupportedModel, match="second input for every token"):
        span = Span.load(checkpoint, 0, 2, dtype="float32")
        span.sequences(torch.zeros(3, span.hidden_size), [3])


def test_peers_name_the_reason_why_they_refuse_passes(
    both: tuple[Any, LocalSwarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    with both[1].newcomer() as visit:
        remote = visit.model(dtype="float32")
        monkeypatch.setattr(remote._blocks, "handed", None)  # the client's own check
        with pytest.raises(SplitnetError, match="second input for every token, which passes"):
            remote(IDS)


@pytest.mark.parametrize("blocks", [(1, 4), (3, 6), (4, 5)])
def test_spans_that_part_blocks_with_shared_keys_are_refused(
    blocks: tuple[int, int], both: tuple[Any, LocalSwarm]
) -> None:
    with pytest.raises(UnsupportedModel, match="use 2:6 or more, or blocks up to 2"):
        Span.load(Checkpoint.open(both[1].folder), *blocks)


@pytest.mark.parametrize("fault", ["lacks", "is short", "is narrow"])
def test_peers_refuse_wrong_inputs_and_go_on(
    fault: str, both: tuple[Any, LocalSwarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    local, swarm = both

    def encode(hidden: Any, chunks: Any, inputs: Any, codec: Any) -> Any:
        payload, described = encode_step(hidden, chunks, inputs, codec)
        assert {each.name for each in described} == {PER_LAYER}
        size = described[-1].length * described[-1].size
        if fault == "lacks":
            return payload[:-size], described[:-1]
        last = described[-1]
        changed = last._replace(length=1) if fault == "is short" else last._replace(size=last.size // 2)
        return payload[: len(payload) - size + changed.length * changed.size], (*described[:-1], changed)

    with monkeypatch.context() as patch, swarm.newcomer() as visit:
        patch.setattr("splitnet.session.inference.encode_step", encode)
        with pytest.raises(SplitnetError, match="per_layer_input"):
            visit.model(dtype="float32", prefixes="off").generate(IDS, **OPTIONS)
    assert torch.equal(swarm.model(dtype="float32").generate(IDS, **OPTIONS), local.generate(IDS, **OPTIONS))
