"""An arithmetic model behind a simulated chain of hops, for tests of the decoding loop."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from splitnet.hf.cache import RemoteCache
from splitnet.hf.decoding import GrowingText, Outputs
from splitnet.swarm.plan import Prediction

VOCABULARY = 50


def next_token(text: Sequence[int]) -> int:
    """The token that the model chooses after a text; it depends on all tokens of the text."""
    return zlib.crc32(bytes(text)) % VOCABULARY


def feature(text: Sequence[int]) -> float:
    """The feature of the last position of a text; it is unique to the text."""
    return float(zlib.crc32(bytes(text)))


def continued(prompt: Sequence[int], count: int) -> list[int]:
    """The prompt, continued by the model by `count` tokens, one at a time."""
    text = [*prompt]
    while len(text) < len(prompt) + count:
        text.append(next_token(text))
    return text


def text_of(prompt: Sequence[int], most: int, stop: Sequence[int] = (VOCABULARY,)) -> GrowingText:
    """A text of at most `most` tokens, which ends at a token of `stop`."""
    criteria = StoppingCriteriaList([MaxLengthCriteria(most), EosTokenCriteria([*stop])])
    config = GenerationConfig(max_length=most, do_sample=False)
    return GrowingText(torch.tensor([[*prompt]]), LogitsProcessorList(), criteria, config, None)


class Clock:
    """Replaces the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


@dataclass
class _Pass:
    """One pass at a hop; times in seconds."""

    begins: float
    ends: float
    sent: Sent


@dataclass(eq=False)
class Sent:
    """Positions in flight."""

    chain: Chain
    outputs: Outputs
    comes_at: float
    is_abandoned: bool = False

    def abandon(self) -> None:
        self.is_abandoned = True
        self.chain.under_way.remove(self)


class Chain:
    """Hops with links of `delay_ms` between them, and a client that takes `client_ms` for a step.

    pass_ms: duration of a pass of `positions` positions at a hop. told_ms: duration that predictions assume. A pass
    that has begun runs to its end; a waiting pass is dropped when later positions show that its drafts were rejected.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        before: int = 0,
        delay_ms: float = 20.0,
        hops: int = 3,
        client_ms: float = 1.0,
        pass_ms: Callable[[int], float] = lambda positions: 5.0 + positions,
        told_ms: Callable[[int], float] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.cache: Any = RemoteCache(lambda reservation: self)  # type: ignore[arg-type, return-value]
        self.layer = self.cache.remote
        self.layer.session, self.layer.columns, self.layer.closed = self, before + len(prompt), True
        self.before = before
        self.held = [*prompt]
        self.under_way: deque[Sent] = deque()
        self.clock = clock or Clock()
        self.passes: list[list[_Pass]] = [[] for _ in range(hops)]
        self._delay_s, self._client_s = delay_ms / 1000, client_ms / 1000
        self._pass_ms, self._told_ms = pass_ms, told_ms or pass_ms

    @property
    def prompted(self) -> Outputs:
        """The outputs of the positions of the prompt."""
        return self._outputs(0)

    def predictions(self) -> Callable[[int], Prediction]:
        return self._prediction

    def _prediction(self, positions: int) -> Prediction:
        hops, told_ms = len(self.passes), self._told_ms(positions)
        return Prediction((hops + 1) * self._delay_s * 1000 + hops * told_ms, told_ms)

    def step(self, input_ids: torch.Tensor, cache: Any) -> Outputs:
        return self.receive_outputs(self.send_tokens(input_ids, cache), input_ids, cache)

    def send_tokens(self, input_ids: torch.Tensor, cache: Any) -> Any:
        past = self.layer.columns - self.before
        assert 0 < past <= len(self.held)
        del self.held[past:]
        self.held += input_ids[0].tolist()
        self.layer.columns += input_ids.shape[1]
        self.clock.now += self._client_s / 2
        sent = Sent(self, self._outputs(past), 0.0)
        at = self.clock.now + self._delay_s
        for passes in self.passes:
            passes[:] = [each for each in passes if not each.sent.is_abandoned or each.begins < at]
            begins = max([at, *(each.ends for each in passes)])
            passes.append(_Pass(begins, begins + self._pass_ms(input_ids.shape[1]) / 1000, sent))
            del passes[:-16]
            at = passes[-1].ends + self._delay_s
        sent.comes_at = at
        self.under_way.append(sent)
        return sent

    def receive_outputs(self, exchange: Any, input_ids: torch.Tensor, cache: Any) -> Outputs:
        assert exchange is self.under_way.popleft() and not exchange.is_abandoned
        waited_s = max(0.0, exchange.comes_at - self.clock.now)
        self.layer.waited_ms += waited_s * 1000
        self.clock.now += waited_s + self._client_s / 2
        return exchange.outputs

    def _outputs(self, past: int) -> Outputs:
        prefixes = [self.held[: end + 1] for end in range(past, len(self.held))]
        chosen = torch.tensor([next_token(prefix) for prefix in prefixes])
        logits = torch.nn.functional.one_hot(chosen, VOCABULARY).to(torch.float32)
        return Outputs(logits, torch.tensor([[feature(prefix)] for prefix in prefixes], dtype=torch.float64))
