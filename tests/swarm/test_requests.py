"""Parameters of `generate()` and `forward()` are honoured or refused; a session never uses an uncertain cache."""

from __future__ import annotations

import gc
import inspect
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

import splitnet
from scheduler.speculation import Window
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import AdapterError, SessionClosed, SplitnetError, UnsupportedParameter
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.session.events import Phase
from splitnet.session.inference import Session
from tests.swarm.adapters import lora, wrapped
from tests.swarm.generation import force_window
from tests.swarm.harness import LocalSwarm, shared_swarm

pytestmark = [pytest.mark.swarm, pytest.mark.default_cases(remote=(None,))]


@pytest.fixture(scope="module")
def swarm(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with shared_swarm(folder, [(0, 3), (3, 6)], node=node) as started:
        yield started


@pytest.fixture(params=[None, "0:2"], ids=["remote", "partly local"])
def remote(swarm: LocalSwarm, request: pytest.FixtureRequest) -> Iterator[RemoteCausalLM]:
    with swarm.visit() as visit:
        yield visit.model(local_blocks=request.param)


def prompt(length: int = 7, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    chosen: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if ids is not None:
        chosen |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.manual_seed(4)
    output = model.generate(**(chosen | options))
    return output if isinstance(output, torch.Tensor) else output.sequences


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Sequences with padding on the left."""
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def sent(cache: Any) -> int:
    return cache.session.traffic.positions if cache.session is not None else 0


@pytest.mark.default_cases(rows=(2,))
@pytest.mark.parametrize(
    "more",
    [
        {"num_beams": 3},
        {"return_dict_in_generate": True},
        {"do_sample": True, "num_return_sequences": 3},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_generation_config_without_a_cache(local: Any, remote: RemoteCausalLM, rows: int, more: Any) -> None:
    config = GenerationConfig(use_cache=False)
    options = {"generation_config": config, "max_new_tokens": 5, **more}
    expected = generate(local, prompt(9, rows), **options)
    assert torch.equal(generate(remote, prompt(9, rows), **options), expected)


def test_a_cache_and_no_cache_exclude_each_other(remote: RemoteCausalLM) -> None:
    with pytest.raises(UnsupportedParameter, match="use_cache"):
        generate(remote, prompt(), use_cache=False, cache=remote.new_cache())


def test_positional_arguments(local: Any, remote: RemoteCausalLM) -> None:
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0, num_beams=2)
    expected = local.generate(prompt(), config, [])
    assert torch.equal(remote.generate(prompt(), config, []), expected)
    with pytest.raises(TypeError, match="twice"):
        remote.generate(prompt(), config, generation_config=config)


def test_a_cache_by_its_former_name(local: Any, remote: RemoteCausalLM) -> None:
    cache = remote.new_cache()
    got = generate(remote, prompt(), past_key_values=cache)
    assert torch.equal(got, generate(local, prompt()))
    assert cache.remote.columns == got.shape[1] - 1
    cache.close()


def test_a_deleted_cache_closes_its_session(remote: RemoteCausalLM) -> None:
    with torch.no_grad():
        session = remote(prompt(), use_cache=True).cache.session
    gc.collect()
    generate(remote, prompt())
    parts = [session] if isinstance(session, Session) else session.sessions
    deadline = time.monotonic() + 10
    while any(part.state.phase is not Phase.CLOSED for part in parts) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    for part in parts:
        with pytest.raises(SessionClosed):
            part.open()


class TestSessions:
    def test_an_adapter_that_is_switched_on(self, folder: Path, local: Any, remote: RemoteCausalLM) -> None:
        tuned = wrapped(AutoModelForCausalLM.from_pretrained(folder), lora())
        model = wrapped(remote, lora())
        with remote.session(max_length=200):
            with model.disable_adapter():
                first = generate(model, prompt())
            assert torch.equal(first, generate(local, prompt()))
            more = torch.cat([first, prompt(3, seed=4)], dim=1)
            second = generate(model, more)
            assert torch.equal(second, generate(tuned, more))
            with model.disable_adapter():
                assert torch.equal(generate(model, more), generate(local, more))

    def test_an_adapter_that_has_changed_in_the_middle_of_a_text(self, remote: RemoteCausalLM) -> None:
        model = wrapped(remote, lora())
        with torch.no_grad():
            cache = model(prompt(), use_cache=True).cache
            model(prompt(2), cache=cache, use_cache=True)
            with model.disable_adapter(), pytest.raises(AdapterError, match="another adapter"):
                model(prompt(2), cache=cache, use_cache=True)
            weight = next(weight for name, weight in model.named_parameters() if "lora_B" in name)
            weight.add_(1)
            with pytest.raises(AdapterError, match="another adapter"):
                model(prompt(2), cache=cache, use_cache=True)

    def test_adapters_belong_to_threads(self, local: Any, remote: RemoteCausalLM) -> None:
        def chat(model: Any, length: int) -> torch.Tensor:
            first = generate(model, prompt(length, seed=length))
            return generate(model, torch.cat([first, prompt(3)], dim=1))

        def chat_in_session(length: int) -> torch.Tensor:
            with remote.session(max_length=200) as cache:
                got = chat(remote, length)
                assert cache.remote.columns == got.shape[1] - 1
            return got

        with ThreadPoolExecutor(3) as threads, remote.session() as own:
            chats = [threads.submit(chat_in_session, length) for length in (5, 6)]
            other = threads.submit(chat, remote, 7)
            for length, chatting in zip((5, 6), chats, strict=True):
                assert torch.equal(chatting.result(), chat(local, length))
            assert torch.equal(other.result(), chat(local, 7))
            assert own.session is None

    def test_beams_and_then_a_batch(self, local: Any, remote: RemoteCausalLM) -> None:
        with remote.session(max_length=200):
            answers = generate(remote, prompt(), num_beams=2, num_return_sequences=2)
            more = torch.cat([answers, prompt(4, 2, 7)], dim=1)
            assert torch.equal(generate(remote, more), generate(local, more))
            assert torch.equal(generate(remote, more, num_beams=3), generate(local, more, num_beams=3))

    def test_a_batch_that_is_padded_anew_keeps_what_it_can(self, local: Any, remote: RemoteCausalLM) -> None:
        with remote.session(max_length=200) as cache:
            first = padded([prompt(5, seed=1)[0].tolist(), prompt(9, seed=2)[0].tolist()])
            answers = generate(remote, **first)
            assert torch.equal(answers, generate(local, **first))
            before = sent(cache)
            second = padded([[*answers[0, 4:].tolist(), 5, 6, 7], answers[1].tolist() + [8] * 6])
            assert torch.equal(generate(remote, **second), generate(local, **second))
            # All rows continue from one column, the last held column of the longer row: 7 columns and 11 more.
            assert sent(cache) - before == 2 * 7 + 2 * 11

    def test_embeddings_and_then_the_answer_as_a_prompt(self, local: Any, remote: RemoteCausalLM) -> None:
        embeddings = local.get_input_embeddings()(prompt()).detach() * 1.5
        with remote.session(max_length=200):
            got = generate(local, prompt(), inputs_embeds=embeddings)
            assert torch.equal(generate(remote, prompt(), inputs_embeds=embeddings), got)
            assert torch.equal(generate(remote, prompt(), inputs_embeds=embeddings), got)
            assert torch.equal(generate(remote, got), generate(local, got))
            alone = generate(remote, inputs_embeds=embeddings)
            assert torch.equal(alone, generate(local, inputs_embeds=embeddings))
            assert torch.equal(generate(remote, prompt()), generate(local, prompt()))

    def test_a_call_without_a_prompt_restarts(self, local: Any, remote: RemoteCausalLM) -> None:
        with remote.session(max_length=200):
            generate(remote, prompt())
            assert torch.equal(generate(remote), generate(local))

    def test_a_new_loop_of_the_caller_restarts(self, local: Any, remote: RemoteCausalLM) -> None:
        def one_more(model: Any, input_ids: torch.Tensor, **prepared: Any) -> torch.Tensor:
            logits = model(input_ids, cache=prepared["cache"], use_cache=True).logits
            return torch.cat([input_ids, logits[:, -1:].argmax(dim=-1)], dim=1)

        with remote.session(max_length=200), torch.no_grad():
            for length in (7, 9):
                for options in ({}, {"custom_generate": one_more, "max_new_tokens": 1}):
                    assert torch.equal(
                        generate(remote, prompt(length), **options), generate(local, prompt(length), **options)
                    )

    def test_calls_without_a_cache_keep_the_held_session(self, local: Any, remote: RemoteCausalLM) -> None:
        with remote.session(max_length=200) as cache:
            first = generate(remote, prompt())
            more = torch.cat([first, prompt(3)], dim=1)
            assert torch.equal(generate(remote, more, use_cache=False), generate(local, more))
            before = sent(cache)
            generate(remote, more, speculate="off")
            assert sent(cache) - before == 1 + 3 + 11


class TestSpeculation:
    @pytest.fixture(autouse=True, params=[Window(3, 1), Window(2, 3)], ids=str)
    def window(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        force_window(monkeypatch, request.param)

    @pytest.mark.parametrize("with_ids", [True, False])
    def test_embeddings(self, local: Any, remote: RemoteCausalLM, with_ids: bool) -> None:
        embeddings = local.get_input_embeddings()(prompt()).detach() * 1.5
        ids = prompt() if with_ids else None
        expected = generate(local, ids, inputs_embeds=embeddings, max_new_tokens=30)
        got = generate(remote, ids, inputs_embeds=embeddings, max_new_tokens=30, speculate="prompt-lookup")
        assert torch.equal(got, expected)

    def test_up_to_the_end_of_the_context(self, folder: Path, local: Any, remote: RemoteCausalLM) -> None:
        longest = local.config.max_position_embeddings
        ids = prompt(longest - 20)
        drafter = AutoModelForCausalLM.from_pretrained(folder)
        # The last token is not run through the model, so it needs no position. The loop does not know the end before.
        options = {"max_new_tokens": 60, "stopping_criteria": [lambda ids, *_: torch.tensor([ids.shape[1] > longest])]}
        got = generate(remote, ids, speculate=drafter, **options)
        assert torch.equal(got, generate(local, ids, **options))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("custom_generate", lambda *_, **__: None),
            ("prompt_lookup_num_tokens", 3),
            ("return_dict_in_generate", True),
            ("num_return_sequences", 2),
            ("position_ids", torch.arange(7)[None] * 2),
        ],
    )
    def test_ignored_parameters_are_refused(self, remote: RemoteCausalLM, name: str, value: Any) -> None:
        options = {"do_sample": True} if name == "num_return_sequences" else {}
        with pytest.raises(SplitnetError, match=name):
            generate(remote, prompt(), speculate="prompt-lookup", **options, **{name: value})


class TestForward:
    @pytest.mark.parametrize("use_cache", [False, True])
    def test_positions_that_the_peers_do_not_count(self, local: Any, remote: RemoteCausalLM, use_cache: bool) -> None:
        with torch.no_grad():
            with pytest.raises(UnsupportedParameter, match="position_ids"):
                remote(prompt(), position_ids=torch.arange(7)[None] * 3, use_cache=use_cache)
            got = remote(prompt(), position_ids=torch.arange(7)[None], use_cache=use_cache).logits
            torch.testing.assert_close(got, local(prompt()).logits, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("use_cache", [False, True])
    def test_a_hole_in_the_mask(self, remote: RemoteCausalLM, use_cache: bool) -> None:
        mask = torch.ones(1, 7, dtype=torch.long)
        mask[0, 3] = 0
        with pytest.raises(UnsupportedParameter, match="attention_mask"):
            remote(prompt(), attention_mask=mask, use_cache=use_cache)

    def test_a_hole_that_positions_pass_over(self, local: Any, remote: RemoteCausalLM) -> None:
        mask = torch.tensor([[1, 1, 1, 0, 1, 1, 1]])
        positions = (mask.cumsum(1) - 1) * mask
        with torch.no_grad():
            got = remote(prompt(), attention_mask=mask, position_ids=positions).logits
            expected = local(prompt(), attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)

    def test_a_call_leaves_no_state(self, local: Any, remote: RemoteCausalLM) -> None:
        """After a call of the backbone alone, a failed call, and a call with a positional mask."""
        one, mask = prompt(1), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
        expected = generate(local, one)
        with torch.no_grad():
            got = remote.model(prompt(), mask).last_hidden_state
            torch.testing.assert_close(
                got[:, 2:], local.model(prompt(), mask).last_hidden_state[:, 2:], atol=1e-4, rtol=0
            )
            assert torch.equal(generate(remote, one), expected)
            broken = remote.lm_head.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                remote(prompt(), attention_mask=mask)
            broken.remove()
            assert torch.equal(generate(remote, one), expected)

    def test_a_foreign_cache_is_refused(self, local: Any, remote: RemoteCausalLM) -> None:
        with torch.no_grad():
            filled = local(prompt(), use_cache=True).cache
            assert isinstance(filled, DynamicCache)
            for name in ("cache", "past_key_values"):
                with pytest.raises(UnsupportedParameter, match=f"^{name} .*new_cache"):
                    remote(prompt(2), **{name: filled})

    def test_unknown_parameters_are_refused(self, remote: RemoteCausalLM) -> None:
        with pytest.raises(UnsupportedParameter, match="atention_mask"):
            remote(prompt(), atention_mask=torch.ones(1, 7))


def test_an_option_that_does_not_exist_is_refused_with_the_nearest() -> None:
    for loader in (splitnet.AutoModelForCausalLM, splitnet.AutoModelForSequenceClassification):
        with pytest.raises(TypeError, match="local_block: did you mean local_blocks"):
            loader.from_pretrained("no-model", initial_peers=[], local_block="0:1")
        assert {"initial_peers", "codec", "local_blocks"} <= inspect.signature(loader.from_pretrained).parameters.keys()
    with pytest.raises(TypeError, match="there is no option prefer"):
        splitnet.AutoModelForSequenceClassification.from_pretrained("no-model", initial_peers=[], prefer="latency")


def test_a_long_prompt_in_chunks_with_padding(local: Any, remote: RemoteCausalLM) -> None:
    batch = padded([prompt(4, seed=1)[0].tolist(), prompt(17, seed=2)[0].tolist()])
    options = {**batch, "prefill_chunk_size": 5}
    assert torch.equal(generate(remote, **options), generate(local, **options))
