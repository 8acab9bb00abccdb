"""Chooses the next token. A choice depends on the request alone, so that the request's seed reproduces the answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from splitnet.serve.answers.grammars import AllowedTokens

GREEDY_BELOW = 1e-3  # Below this temperature the likeliest token is always chosen


@dataclass(frozen=True)
class SamplingDefaults:
    """Values for parameters that a request leaves out; the defaults of these fields are those of OpenAI."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # how many of the likeliest tokens may be chosen; 0: all
    min_p: float = 0.0  # minimum probability of a token, as a share of the largest probability; 0: no bound
    repetition_penalty: float = 1.0  # divides the logits of tokens in prompt and answer; 1: no penalty


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingDefaults):
    """How tokens are chosen."""

    seed: int  # 64 bits
    frequency_penalty: float = 0.0  # subtracted from the logit of a token for each occurrence in the answer
    presence_penalty: float = 0.0  # subtracted once from the logit of a token that occurs in the answer
    bias: tuple[tuple[int, float], ...] = ()  # tokens, and values that are added to their logits
    min_tokens: int = 0  # an answer with fewer tokens does not end
    prompt: int = 0  # the number of the prompt in its request: prompts with the same seed have different noise

    @property
    def changes_logits(self) -> bool:
        penalties = self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1
        return bool(penalties or self.bias or self.min_tokens)


@dataclass(frozen=True)
class ScoredToken:
    """A token, its log probability (None for the first token of a prompt), and the likeliest tokens at its position."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class TokenChooser(LogitsProcessor):
    """Chooses a token for each sequence of a batch and excludes all other tokens, for `generate(do_sample=False)`.

    The noise of a choice is a function of the seed, the prompt, the sequence and the position, and does not depend on
    the state of a generator. So neither other requests nor the number of positions in a step can change the noise.

    top: how many of the likeliest tokens are scored besides the chosen one, in `scored`; None: no token is scored.
    begins: the position at which the answers begin. allowed: the allowed tokens of each answer by its grammar; empty:
    there is no grammar. ends: tokens that end an answer.
    """

    def __init__(
        self,
        sampling: Sampling,
        top: int | None,
        begins: int = 0,
        allowed: Sequence[AllowedTokens] = (),
        ends: Collection[int] = (),
    ) -> None:
        self._ends = sorted(ends)
        self._begins = begins
        self._allowed = allowed
        self.scored: dict[tuple[int, int], ScoredToken] = {}  # by row and position
        self._sampling = sampling
        self._greedy = sampling.temperature < GREEDY_BELOW
        self._top = top
        self._warpers: list[Any] = []
        if not self._greedy:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))
            if sampling.min_p:
                self._warpers.append(MinPLogitsWarper(sampling.min_p))

    @property
    def best_logits_read(self) -> int:
        """How many of the largest logits decide the choice, see `splitnet.hf.decoding.GrowingText.best`; 0: all may."""
        if self._top is not None or self._allowed or self._sampling.changes_logits:
            return 0
        return 1 if self._greedy else self._sampling.top_k

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = input_ids.shape[1]
        possible = self._possible(input_ids, scores)
        chosen = self._choose(input_ids, possible, position)
        if self._top is not None:
            for row, scored in enumerate(score_tokens(scores, chosen, self._top)):
                self.scored[row, position] = scored
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def _possible(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores with the penalties and biases of the request, and -inf for tokens that cannot come next."""
        if not self._allowed and not self._sampling.changes_logits:
            return scores
        scores = scores.clone()
        answers = input_ids[:, self._begins :]
        if self._sampling.changes_logits:
            if self._sampling.repetition_penalty != 1:
                scores = RepetitionPenaltyLogitsProcessor(self._sampling.repetition_penalty)(input_ids, scores)  # pyright: ignore[reportArgumentType]
            for row, answer in enumerate(answers):
                counts = torch.bincount(answer, minlength=scores.shape[1])
                scores[row] -= self._sampling.frequency_penalty * counts
                scores[row] -= self._sampling.presence_penalty * (counts > 0)
            for token, bias in self._sampling.bias:
                scores[:, token] += bias
            if answers.shape[1] < self._sampling.min_tokens:
                scores[:, self._ends] = -torch.inf
        for row, allowed in enumerate(self._allowed):
            allowed.forbid_others(answers[row].tolist(), scores[row])
        return scores

    def _choose(self, input_ids: torch.Tensor, scores: torch.Tensor, position: int) -> torch.Tensor:
        if self._greedy:
            return scores.argmax(dim=-1)
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        probabilities = scores.softmax(dim=-1)
        # The argmax of probabilities divided by exponential noise is a sample of the distribution (exponential race).
        noise = np.stack([self._noise(row, position, scores.shape[1]) for row in range(len(scores))])
        return (probabilities / torch.from_numpy(noise).to(scores.device)).argmax(dim=-1)

    def _noise(self, row: int, position: int, vocabulary: int) -> np.ndarray:
        key = np.array([self._sampling.seed, row], np.uint64)
        counter = np.array([0, 0, self._sampling.prompt, position], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        return generator.standard_exponential(vocabulary, dtype=np.float32).clip(min=np.finfo(np.float32).tiny)


def score_tokens(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> list[ScoredToken]:
    """Scores one token for each row: `logits` is `[rows, vocabulary]`, `tokens` is `[rows]`."""
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    best, ids = logprobs.topk(min(top, logprobs.shape[1]), dim=-1)
    return [
        ScoredToken(token, logprob, tuple(zip(row_ids, row_best, strict=True)))
        for token, logprob, row_ids, row_best in zip(tokens.tolist(), own, ids.tolist(), best.tolist(), strict=True)
    ]


_NO_SAMPLING = {
    "do_sample",
    "max_length",
    "max_new_tokens",
    "use_cache",
    "cache_implementation",
    "transformers_version",
}


def choose_defaults(config: GenerationConfig, *, of_checkpoint: bool) -> tuple[SamplingDefaults, list[str]]:
    """Returns the defaults, and sentences that tell the user which fields of the checkpoint's config are used.

    of_checkpoint: use the defaults that the config recommends.
    """
    given = {
        name: value
        for name, value in config.to_diff_dict().items()
        if not name.startswith(("_", "output_")) and not name.endswith("_token_id") and name not in _NO_SAMPLING
    }
    known = {name: given.pop(name) for name in asdict(SamplingDefaults()) if given.get(name) is not None}
    said: list[str] = []
    if of_checkpoint:
        defaults = SamplingDefaults(**known)
        said.append(f"requests that do not say otherwise get the checkpoint's {_named(known) or 'own defaults: none'}")
    else:
        defaults = SamplingDefaults()
        if known:
            said.append(f"the checkpoint's {_named(known)} is not used: --sampling-defaults checkpoint uses it")
    if given:
        said.append(f"the checkpoint's {_named(given)} is not used")
    return defaults, said


def _named(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())
