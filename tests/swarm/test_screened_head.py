"""Texts with a screened head are those with the whole head."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria

from scheduler.speculation import Window
from splitnet.blocks import head as head_module
from splitnet.blocks.head import STATES
from splitnet.blocks.screen import Screen
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.hf.decoding import GrowingText
from splitnet.quant.native import has_fast_kernels
from splitnet.serve.answers.sampling import Sampling, TokenChooser
from tests.swarm.generation import force_window, prompt
from tests.swarm.harness import local_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = [
    pytest.mark.swarm,
    pytest.mark.skipif(not has_fast_kernels(), reason="the kernels were not compiled for this CPU"),
]
WAIT_S = 60.0
NEW = 24


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteCausalLM]:
    """A model whose head has a screen."""
    folder = random_checkpoint("llama", tmp_path_factory.mktemp("model"), blocks=2, vocab=20003)
    with pytest.MonkeyPatch.context() as patch, local_swarm(folder, [(0, 2)]) as swarm, swarm.visit() as visit:
        patch.setattr(head_module, "LEAST_NUMBERS", 0)
        patch.setattr(Screen, "if_faster", Screen.of)  # whatever this machine measures
        model = visit.model()
        before = {*threading.enumerate()}
        text_of(model, max_new_tokens=STATES + 2)
        for thread in {*threading.enumerate()} - before:
            if thread.name.endswith("(_make_screen)"):
                thread.join(WAIT_S)
        yield model


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of wanted logits of all rows that screens decide."""
    found: list[int] = []
    whole = Screen.best_logits

    def best_logits(screen: Screen, state: torch.Tensor, estimates: torch.Tensor, count: int) -> Any:
        logits = whole(screen, state, estimates, count)
        found.extend([] if logits is None else [count])
        return logits

    monkeypatch.setattr(Screen, "best_logits", best_logits)
    return found


def text_of(model: RemoteCausalLM, **options: Any) -> Any:
    torch.manual_seed(3)
    chosen = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(**prompt(), **chosen)


def expected_of(model: RemoteCausalLM, **options: Any) -> Any:
    """The same with the whole head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrowingText, "best", 0)
        return text_of(model, **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [1, 20, 50])
def test_texts_are_those_of_the_whole_head(remote: RemoteCausalLM, decided: list[int], count: int, seed: int) -> None:
    options: dict[str, Any] = {"do_sample": True, "top_k": count, "temperature": 0.5 + seed, "top_p": 0.95}
    expected = expected_of(remote, **options)
    assert not decided
    assert torch.equal(text_of(remote, **options), expected)
    assert decided and {*decided} == {count}


def test_greedy_texts_are_those_of_the_whole_head(remote: RemoteCausalLM, decided: list[int]) -> None:
    assert torch.equal(text_of(remote), expected_of(remote))
    assert {*decided} == {1}


@pytest.mark.parametrize("window", [Window(3, 1), Window(2, 3)], ids=str)
def test_drafts_are_verified_by_the_best_logits(
    remote: RemoteCausalLM, decided: list[int], window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_window(monkeypatch, window)
    assert torch.equal(text_of(remote, speculate="prompt-lookup"), expected_of(remote, speculate="off"))
    assert decided


def test_the_choice_of_an_answer_is_that_of_the_whole_head(remote: RemoteCausalLM, decided: list[int]) -> None:
    for sampling in (Sampling(seed=1, temperature=0.0), Sampling(seed=1, top_k=20)):
        expected = expected_of(remote, logits_processor=[TokenChooser(sampling, None)])
        assert torch.equal(text_of(remote, logits_processor=[TokenChooser(sampling, None)]), expected)
    assert {*decided} == {1, 20}


class SeenByProcessor(LogitsProcessor):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        assert bool(scores.isfinite().all())
        return scores


class SeenByCriterion(StoppingCriteria):
    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        assert bool(scores.isfinite().all())
        return torch.zeros(1, dtype=torch.bool)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 0},
        {"repetition_penalty": 1.2},
        {"do_sample": True, "top_k": 20, "temperature": 1e-4},
        {"logits_processor": [SeenByProcessor()]},
        {"stopping_criteria": [SeenByCriterion()]},
        {"logits_processor": [TokenChooser(Sampling(seed=1, top_k=20), 3)]},
        {"logits_processor": [TokenChooser(Sampling(seed=1, top_k=20, presence_penalty=1.0), None)]},
        {"logits_processor": [TokenChooser(Sampling(seed=1), None)]},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=lambda options: ",".join(options),
)
def test_what_may_read_all_logits_gets_the_whole_head(
    remote: RemoteCausalLM, decided: list[int], options: dict[str, Any]
) -> None:
    text_of(remote, max_new_tokens=4, **options)
    assert not decided
