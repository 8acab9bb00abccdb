"""The choice of a token depends on the seed, the row and the position, and follows the probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from splitnet.serve.answers.sampling import Sampling, SamplingDefaults, TokenChooser, choose_defaults, score_tokens

LOGITS = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])


def choose(sampling: Sampling, logits: torch.Tensor, position: int) -> list[int]:
    ids = torch.zeros(len(logits), position, dtype=torch.long)
    return TokenChooser(sampling, None)(ids, logits).argmax(dim=-1).tolist()


def test_greedy() -> None:
    for temperature in (0.0, 1e-30):
        assert choose(Sampling(temperature, 1.0, seed=7), LOGITS, 3) == [2]


def test_samples_follow_the_probabilities() -> None:
    counts = torch.zeros(5)
    for position in range(4000):
        counts[choose(Sampling(0.7, 1.0, seed=7), LOGITS, position)[0]] += 1
    # Four standard deviations of a share of 4000 samples are 0.03 at most.
    assert float((counts / 4000 - (LOGITS[0] / 0.7).softmax(-1)).abs().max()) < 0.032


def test_top_p_excludes_unlikely_tokens() -> None:
    chosen = {choose(Sampling(1.0, 0.7, seed=7), LOGITS, position)[0] for position in range(300)}
    assert chosen == {1, 2}
    assert {choose(Sampling(1.0, 0.0, seed=7), LOGITS, position)[0] for position in range(20)} == {2}


def test_a_choice_depends_on_seed_row_and_position() -> None:
    flat = torch.zeros(2, 1000)

    def text(seed: int, rows: int = 2) -> list[list[int]]:
        return [choose(Sampling(1.0, 1.0, seed=seed), flat[:rows], position) for position in range(5)]

    torch.manual_seed(0)
    first = text(5)
    torch.manual_seed(1)
    assert text(5) == first
    assert [row for row, _ in first] == [row for (row,) in text(5, rows=1)]
    assert [row for row, _ in first] != [other for _, other in first]
    assert len({tuple(map(tuple, text(seed))) for seed in (0, 5, 5 + 2**32, 2**64 - 1)}) == 4


def test_prompts_with_the_same_seed_have_different_noise() -> None:
    flat = torch.zeros(1, 1000)
    texts = [
        [choose(Sampling(1.0, 1.0, seed=5, prompt=prompt), flat, position) for position in range(5)]
        for prompt in (0, 1, 255, 1)
    ]
    assert texts[0] == [choose(Sampling(1.0, 1.0, seed=5), flat, position) for position in range(5)]
    assert texts[1] == texts[3]
    assert len(set(map(str, texts))) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_are_the_models_own(temperature: float) -> None:
    chooser = TokenChooser(Sampling(temperature, 0.9, seed=7), 2)
    (chosen,) = chooser(torch.zeros(1, 4, dtype=torch.long), LOGITS).argmax(dim=-1).tolist()
    scored = chooser.scored[0, 4]
    logprobs = LOGITS[0].log_softmax(-1).tolist()
    assert scored.token == chosen and scored.logprob == pytest.approx(logprobs[chosen])
    assert [token for token, _ in scored.top] == [2, 1]
    assert [logprob for _, logprob in scored.top] == pytest.approx([logprobs[2], logprobs[1]])


def test_no_more_tokens_are_scored_than_there_are() -> None:
    (scored,) = score_tokens(LOGITS, torch.tensor([0]), 20)
    assert len(scored.top) == 5


def test_penalties_and_bias() -> None:
    """The answer begins with 2, 2, 1, after a prompt of other tokens."""
    ids = torch.tensor([[4, 4, 4, 2, 2, 1]])

    def chosen(**changes: Any) -> int:
        chooser = TokenChooser(Sampling(0.0, 1.0, seed=7, **changes), None, begins=3)
        return int(chooser(ids, LOGITS).argmax())

    assert chosen() == 2
    assert chosen(frequency_penalty=0.8) == 4  # 2 and 1 come to 0.4 and 0.2
    assert chosen(presence_penalty=0.8) == 2  # to 1.2 and 0.2
    assert chosen(presence_penalty=1.8) == 4
    assert chosen(frequency_penalty=-2.0) == 2
    assert chosen(bias=((3, 4.0), (2, -1.5))) == 3


def test_recommendations_of_a_checkpoint_can_be_used() -> None:
    """The prompt is 4, 2, and the answer begins with 2; logits become 0, 1, 1, -1, 0.25."""
    ids = torch.tensor([[4, 2, 2]])

    def chosen(**changes: Any) -> set[int]:
        choosers = [
            TokenChooser(Sampling(1.0, 1.0, seed=seed, repetition_penalty=2.0, **changes), None) for seed in range(99)
        ]
        return {int(chooser(ids, LOGITS).argmax()) for chooser in choosers}

    assert chosen() == {0, 1, 2, 3, 4}
    assert chosen(top_k=2) == {1, 2}
    assert chosen(min_p=0.4) == {1, 2, 4}  # 0.47 times as likely as the likeliest; 0 is 0.37 times


RECOMMENDED = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05}


@pytest.mark.parametrize(
    ("fields", "of_checkpoint", "defaults", "said"),
    [
        ({}, False, {}, []),
        ({}, True, {}, ["requests that do not say otherwise get the checkpoint's own defaults: none"]),
        (
            RECOMMENDED,
            False,
            {},
            [
                "the checkpoint's temperature=0.7, top_k=20, repetition_penalty=1.05 is not used: "
                "--sampling-defaults checkpoint uses it"
            ],
        ),
        (
            RECOMMENDED | {"no_repeat_ngram_size": 3},
            True,
            RECOMMENDED,
            [
                "requests that do not say otherwise get the checkpoint's temperature=0.7, top_k=20, "
                "repetition_penalty=1.05",
                "the checkpoint's no_repeat_ngram_size=3 is not used",
            ],
        ),
    ],
)
def test_used_and_unused_options_of_a_checkpoint_are_reported(
    fields: Any, of_checkpoint: bool, defaults: Any, said: list[str]
) -> None:
    config = GenerationConfig(do_sample=True, eos_token_id=[1, 2], use_cache=True, **fields)
    assert choose_defaults(config, of_checkpoint=of_checkpoint) == (SamplingDefaults(**defaults), said)
