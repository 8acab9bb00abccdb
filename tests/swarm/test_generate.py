"""Generation with remote blocks has the features and the tokens of transformers with a local model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from splitnet.blocks import head as head_module
from splitnet.blocks.head import Head
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import ContextTooLong, UnsupportedModel, UnsupportedParameter
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.quant.native import has_float_kernels
from splitnet.session.inference import Session
from tests.swarm.generation import Collector
from tests.swarm.harness import local_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm


@pytest.fixture(scope="module")
def remote(folder: Path, node: DhtDirectory) -> Iterator[RemoteCausalLM]:
    with local_swarm(folder, [(0, 1), (1, 4), (4, 6)], node=node) as swarm:
        yield swarm.model()


def prompt(length: int = 7, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(batch: torch.Tensor, pads: list[int]) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(batch)
    ids = batch.clone()
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
        ids[row, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def same(local: Any, remote: RemoteCausalLM, inputs: Any, *, speculate: Any = "auto", **options: Any) -> torch.Tensor:
    """Generates with both models, and expects equal tokens."""
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    if isinstance(inputs, torch.Tensor):
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    torch.manual_seed(5)
    expected = local.generate(**inputs, **options)
    torch.manual_seed(5)
    got = remote.generate(**inputs, speculate=speculate, **options)
    assert torch.equal(got, expected)
    return got


def test_greedy_generation(local: Any, remote: RemoteCausalLM) -> None:
    same(local, remote, prompt())


def test_decode_steps_bypass_transformers_forward_unless_the_model_has_a_hook(
    local: Any, remote: RemoteCausalLM
) -> None:
    calls: list[int] = []
    hook = remote.get_decoder().register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        same(local, remote, prompt())
        assert len(calls) == 1
        watch = remote.register_forward_hook(lambda module, args, output: None)
        try:
            same(local, remote, prompt(), speculate="off")
        finally:
            watch.remove()
        assert len(calls) == 1 + 24
    finally:
        hook.remove()


@pytest.mark.skipif(not has_float_kernels(), reason="the kernels were not compiled for this CPU")
def test_a_changed_row_of_the_head_takes_effect_in_the_next_call(
    remote: RemoteCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    head: Any = remote.get_output_embeddings()
    assert isinstance(head, Head)
    monkeypatch.setattr(head_module, "CHANGES_S", math.inf)
    monkeypatch.setattr(head, "_narrows", True)
    monkeypatch.setattr(head_module, "_SAMPLE", 8)
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    first = int(remote.generate(prompt(), **options)[0, -1])
    other, before = (first + 1) % len(head.weight), head.weight.detach().clone()
    try:
        head.weight.data[other] = 2 * before[first]
        assert int(remote.generate(prompt(), **options)[0, -1]) == other
    finally:
        head.weight.data.copy_(before)


def test_threads_that_share_a_model_get_the_same_tokens_as_alone(local: Any, remote: RemoteCausalLM) -> None:
    prompts = [prompt(4 + seed, seed=seed) for seed in range(6)]
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def generate(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    with ThreadPoolExecutor(len(prompts)) as threads:
        got = list(threads.map(lambda ids: generate(remote, ids), prompts))
    for ids, output in zip(prompts, got, strict=True):
        assert torch.equal(output, generate(local, ids))


def test_sampling_with_a_seed(local: Any, remote: RemoteCausalLM) -> None:
    same(local, remote, prompt(), do_sample=True, temperature=0.8, top_p=0.9)


def test_left_padded_batch(local: Any, remote: RemoteCausalLM) -> None:
    same(local, remote, left_padded(prompt(9, 3), [0, 4, 2]))


def test_beam_search(local: Any, remote: RemoteCausalLM) -> None:
    same(local, remote, prompt(), num_beams=4)


def test_beam_search_on_a_padded_batch_with_several_answers(local: Any, remote: RemoteCausalLM) -> None:
    same(local, remote, left_padded(prompt(9, 2), [3, 0]), num_beams=3, num_return_sequences=2)


def test_several_samples_per_prompt(local: Any, remote: RemoteCausalLM) -> None:
    same(local, remote, prompt(), do_sample=True, num_return_sequences=3)


def test_prompt_lookup(local: Any, remote: RemoteCausalLM) -> None:
    repeating = prompt(6).repeat(1, 3)
    same(local, remote, repeating, prompt_lookup_num_tokens=4)


def test_assisted_decoding(local: Any, remote: RemoteCausalLM, tmp_path: Path) -> None:
    # The assistant is another random model, so that most of its drafts are rejected and cropped.
    assistant = AutoModelForCausalLM.from_pretrained(random_checkpoint("llama", tmp_path, blocks=2, seed=0)).eval()
    same(local, remote, prompt(), assistant_model=assistant)


def test_generation_without_a_cache(local: Any, remote: RemoteCausalLM) -> None:
    same(local, remote, prompt(), use_cache=False, max_new_tokens=6)


def test_a_prompt_longer_than_a_step(local: Any, remote: RemoteCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt passes the hops in several steps."""
    monkeypatch.setattr(Session, "step_positions", lambda *_: 64)
    same(local, remote, prompt(220), max_new_tokens=4)


def test_streamer_stopping_criterion_and_logits_processor(local: Any, remote: RemoteCausalLM) -> None:
    class OnlyEven(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, 1::2] = -torch.inf
            return scores

    streamer = Collector()
    inputs = prompt()
    options: dict[str, Any] = {
        "max_new_tokens": 20,
        "do_sample": False,
        "logits_processor": LogitsProcessorList([OnlyEven()]),
        "stopping_criteria": [lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 15] * len(ids))],
        "attention_mask": torch.ones_like(inputs),
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    expected = local.generate(inputs, **options)
    got = remote.generate(inputs, streamer=streamer, **options)
    assert torch.equal(got, expected)
    assert got.shape[1] == 15
    assert streamer.tokens == [*got[0].tolist(), -1]
    assert all(token % 2 == 0 for token in got[0, 7:].tolist())


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_and_loss(local: Any, remote: RemoteCausalLM, side: str) -> None:
    ids = prompt(8, 2)
    mask = torch.ones_like(ids)
    if side != "none":
        mask[1, : 3 if side == "left" else None] = 0
        mask[1] = mask[1] if side == "left" else torch.tensor([1, 1, 1, 1, 1, 0, 0, 0])
    labels = torch.where(mask.bool(), ids, -100)
    with torch.no_grad():
        expected = local(ids, attention_mask=mask, labels=labels)
        got = remote(ids, attention_mask=mask, labels=labels)
    kept = mask.bool()
    torch.testing.assert_close(got.logits[kept], expected.logits[kept], atol=1e-5, rtol=1e-4)
    # A padded position can be the one before a label, and its logits are arbitrary.
    if side != "left":
        torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_a_session_keeps_the_cache_between_calls(local: Any, remote: RemoteCausalLM) -> None:
    with remote.session(max_length=128) as cache:
        first = same(local, remote, prompt())
        assert cache.session is not None
        moved = cache.session.traffic.positions
        longer = torch.cat([first, prompt(5, seed=1)], dim=1)
        same(local, remote, longer, speculate="off")
        # Only positions that the peers did not hold were sent: the last token of the first answer, 5 new tokens, 23
        # decoded ones.
        assert cache.session.traffic.positions - moved == 1 + 5 + 23
        # A conversation without a common beginning starts over; one with a common beginning is cropped to it.
        same(local, remote, prompt(9, seed=2))
        same(local, remote, torch.cat([longer[:, :10], prompt(3, seed=3)], dim=1))
        same(local, remote, prompt(6, batch=3, seed=4))


@pytest.mark.parametrize("how", [{}, {"speculate": "prompt-lookup"}, {"return_dict_in_generate": True}], ids=str)
def test_a_call_within_a_call_does_not_use_its_session(local: Any, remote: RemoteCausalLM, how: dict[str, Any]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    inner: list[torch.Tensor] = []

    def call(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if ids.shape[1] in (9, 12):
            inner.append(remote.generate(prompt(5, seed=7), **options))
        return torch.zeros(len(ids), dtype=torch.bool)

    with remote.session() as cache:
        output = remote.generate(prompt(), stopping_criteria=[call], **options, **how)
        tokens = output if isinstance(output, torch.Tensor) else output.sequences
        expected = local.generate(prompt(), **options)
        assert torch.equal(tokens, expected)
        assert cache.session is not None
        moved = cache.session.traffic.positions
        same(local, remote, tokens, max_new_tokens=1)
        assert cache.session.traffic.positions == moved + 1, "the session goes on from what it held"
    assert len(inner) == 2
    assert all(torch.equal(one, local.generate(prompt(5, seed=7), **options)) for one in inner)


def test_a_call_within_a_call_has_no_trained_prefix(local: Any, remote: RemoteCausalLM) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(0)
    tuned = get_peft_model(remote, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    within: list[torch.Tensor] = []

    def call(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        within.extend((remote(prompt(5)).logits, remote.generate(prompt(5), **options)))
        return torch.zeros(len(ids), dtype=torch.bool)

    expected = tuned.generate(input_ids=prompt(), **options)
    assert torch.equal(tuned.generate(input_ids=prompt(), stopping_criteria=[call], **options), expected)
    with torch.no_grad():
        torch.testing.assert_close(within[0], local(prompt(5)).logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(within[1], local.generate(prompt(5), **options))


@pytest.mark.parametrize("in_session", [False, True])
def test_the_cache_of_an_output_can_be_used(local: Any, remote: RemoteCausalLM, in_session: bool) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    whole = local.generate(prompt(), **{**options, "max_new_tokens": 10})
    with remote.session() if in_session else nullcontext():
        output = remote.generate(prompt(), return_dict_in_generate=True, **options)
        assert output.cache.get_seq_length() == prompt().shape[1] + 4
        assert torch.equal(remote.generate(output.sequences, cache=output.cache, **options), whole)
        output = remote.generate(prompt(), return_dict_in_generate=True, **options)
        if in_session:  # The session holds another text by now.
            remote.generate(prompt(seed=3), **options)
        assert torch.equal(remote.generate(output.sequences, past_key_values=output.cache, **options), whole)
        beams = remote.generate(prompt(), return_dict_in_generate=True, num_beams=2, **options)
        with torch.no_grad():
            assert remote(beams.sequences[:, -1:].repeat(2, 1), cache=beams.cache).logits.shape[:2] == (2, 1)


def test_a_session_notices_changes_of_its_cache_by_the_caller(local: Any, remote: RemoteCausalLM) -> None:
    with remote.session() as cache, torch.no_grad():
        first = same(local, remote, prompt())
        cache.crop(-4)
        remote(prompt(4, seed=8), cache=cache)
        same(local, remote, first)


def test_a_remote_model_may_be_the_assistant(local: Any, remote: RemoteCausalLM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = local.generate(prompt(), **options)
    assert torch.equal(local.generate(prompt(), assistant_model=remote, **options), expected)
    with remote.session():
        assert torch.equal(remote.generate(prompt(), assistant_model=remote, **options), expected)
    with pytest.raises(UnsupportedParameter, match="speculate cannot be a model with remote blocks"):
        remote.generate(prompt(), speculate=remote, **options)


def test_a_remote_model_has_its_checkpoints_name_and_cannot_be_saved(
    remote: RemoteCausalLM, folder: Path, tmp_path: Path
) -> None:
    assert remote.config._name_or_path == remote.name_or_path == str(folder)
    with pytest.raises(UnsupportedModel, match=r"blocks of .* are on peers.*peft_model\.save_pretrained"):
        remote.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_empty_prompt_is_refused(remote: RemoteCausalLM) -> None:
    nothing = torch.zeros(1, 0, dtype=torch.long)
    for call in (remote, remote.generate, lambda ids: remote(ids, use_cache=True)):
        with pytest.raises(UnsupportedParameter, match="input_ids have no token"):
            call(nothing)
    with torch.no_grad():
        padding = remote(prompt(), attention_mask=torch.zeros_like(prompt()))
    assert padding.logits.shape[:2] == prompt().shape


def test_a_forward_pass_with_a_cache(local: Any, remote: RemoteCausalLM) -> None:
    ids = prompt(10)
    with torch.no_grad():
        expected = local(ids).logits
        first = remote(ids[:, :6], use_cache=True)
        second = remote(ids[:, 6:], cache=first.cache, use_cache=True)
    got = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_text_longer_than_the_context_is_refused(remote: RemoteCausalLM) -> None:
    longest = remote.config.max_position_embeddings
    with pytest.raises(ContextTooLong, match=str(longest)):
        remote(prompt(longest + 1))


def test_a_local_cache_is_refused_with_the_fix(remote: RemoteCausalLM) -> None:
    from transformers import DynamicCache

    with pytest.raises(TypeError, match="new_cache"):
        remote.generate(prompt(), cache=DynamicCache(), max_new_tokens=2)


def test_padding_on_the_right_is_refused_for_generation(remote: RemoteCausalLM) -> None:
    ids = prompt(6, 2)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with pytest.raises(ValueError, match="left"):
        remote.generate(ids, attention_mask=mask, max_new_tokens=2)


def test_no_memory_stays_reserved(remote: RemoteCausalLM) -> None:
    remote.generate(prompt(), max_new_tokens=2, eos_token_id=None)
    records = remote.swarm.peers(fresh=True)
    assert len(records) == 3
