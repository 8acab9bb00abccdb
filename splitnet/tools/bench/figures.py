"""Figures of what was measured: of each round, and their medians and ranges over the rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from splitnet.errors import ContextTooLong

if TYPE_CHECKING:
    from splitnet.session.driver import LinkUse


@dataclass(frozen=True, slots=True)
class Case:
    """Exact numbers of tokens to send and to generate.

    Attributes:
        tokens: of the prompt in a prefill, of each client's answer otherwise.
        decodes: whether tokens after the first are measured; otherwise it is the prompt.
        context: tokens in the KV cache before an answer is measured.
        clients: how many generate at once.
    """

    tokens: int
    decodes: bool = False
    context: int = 0
    clients: int = 1

    @property
    def name(self) -> str:
        return f"{'decode' if self.decodes else 'prefill'} {self.tokens}"

    @property
    def prompt(self) -> int:
        """Tokens of each client's prompt; an answer needs one to begin with."""
        return max(1, self.context) if self.decodes else self.tokens

    @property
    def new_tokens(self) -> int:
        """Tokens that each client generates: the first comes with the prompt, so an answer is measured after it."""
        return self.tokens + 1 if self.decodes else 1

    @property
    def positions(self) -> int:
        """Positions that each client's KV cache holds at the end; the last token is not fed any more."""
        return self.prompt + self.new_tokens - 1


def cases_of(prefills: Sequence[int], decode: int, contexts: Sequence[int], clients: Sequence[int]) -> list[Case]:
    """All prompts, then the answers of `decode` tokens for each context and number of clients.

    Args:
        prefills, decode: 0 leaves them out.
    """
    cases = [Case(tokens) for tokens in prefills if tokens]
    if decode:
        cases += [Case(decode, True, context, count) for context in contexts for count in clients]
    return list(dict.fromkeys(cases))


def check_room(cases: Sequence[Case], max_positions: int | None) -> None:
    """Checks that the model has room for all cases.

    Args:
        max_positions: the model's context; None if there is no limit.

    Raises:
        ContextTooLong: it has not; names what to lower.
    """
    for case in cases:
        if max_positions is None or case.positions <= max_positions:
            continue
        limit = f"more than the model's context of {max_positions:,}"
        if not case.decodes:
            raise ContextTooLong(f"a prompt of {case.tokens:,} tokens is {limit}: lower --prefill, or 0 leaves it out")
        raise ContextTooLong(
            f"{case.tokens:,} tokens after a context of {case.prompt:,} are {case.positions:,} positions, {limit}: "
            "lower --context or --decode"
        )


TOKENS_PER_S: Final = "tokens_per_s"
FIRST_TOKEN_MS: Final = "first_token_ms"
TOKEN_MS_P50: Final = "token_ms_p50"
TOKEN_MS_P95: Final = "token_ms_p95"
SENT_BYTES: Final = "sent_bytes_per_token"
RECEIVED_BYTES: Final = "received_bytes_per_token"
JOULES: Final = "joules_per_token"


@dataclass(frozen=True, slots=True)
class RouteHop:
    """A peer of a route, with the blocks `[start, end)` that it ran."""

    start: int
    end: int
    peer: str
    address: str
    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Route:
    """The peers that a client's tokens went through, and the links from the client back to it."""

    hops: tuple[RouteHop, ...]
    links: tuple[LinkUse, ...]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a client exchanged with peers during what is measured. Received bytes are of payloads only."""

    sent_bytes: int
    received_bytes: int
    positions: int
    """In all: the prompt and each token that was fed after it."""
    repairs: int
    route: Route
    joules_per_token: float | None = None
    """Of a decoded token in all hops, as they say; None: one does not."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one client saw, in seconds.

    Attributes:
        first_token_s: from its call until its first token.
        token_s: from each token to the next, from when all clients had their first.
        traffic: None where nothing was remote.
    """

    first_token_s: float
    token_s: tuple[float, ...]
    traffic: Traffic | None = None

    @property
    def new_tokens(self) -> int:
        return 1 + len(self.token_s)


Round = tuple[Answer, ...]
"""What all clients of a case saw in one round."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of at least one value are not above, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = ordered[int(place)]
    above = ordered[min(int(place) + 1, len(ordered) - 1)]
    return min(above, below + (above - below) * (place - int(place)))


def figures_of(case: Case, seen: Round) -> dict[str, float]:
    """The figures of one round: tokens per second of all clients together, and ms and bytes of their tokens."""
    first_token_s = statistics.median(answer.first_token_s for answer in seen)
    figures = {FIRST_TOKEN_MS: first_token_s * 1000}
    if case.decodes:
        gaps = [gap for answer in seen for gap in answer.token_s]
        figures[TOKENS_PER_S] = len(gaps) / max(sum(answer.token_s) for answer in seen)
        figures[TOKEN_MS_P50] = percentile(gaps, 0.5) * 1000
        figures[TOKEN_MS_P95] = percentile(gaps, 0.95) * 1000
    else:
        figures[TOKENS_PER_S] = case.tokens / first_token_s
    traffics = [answer.traffic for answer in seen if answer.traffic is not None]
    if traffics:
        tokens = case.tokens * len(traffics)
        figures[SENT_BYTES] = sum(traffic.sent_bytes for traffic in traffics) / tokens
        figures[RECEIVED_BYTES] = sum(traffic.received_bytes for traffic in traffics) / tokens
        joules = [traffic.joules_per_token for traffic in traffics if traffic.joules_per_token is not None]
        if case.decodes and len(joules) == len(traffics):
            figures[JOULES] = statistics.fmean(joules)
    return figures


def spreads_of(rounds: Sequence[dict[str, float]]) -> dict[str, Spread]:
    """Each figure that all rounds have; there is at least one round."""
    names = [name for name in rounds[0] if all(name in figures for figures in rounds)]
    return {name: Spread.of([figures[name] for figures in rounds]) for name in names}


def ratio_of(rounds: Sequence[dict[str, float]], others: Sequence[dict[str, float]]) -> Spread:
    """Tokens per second of one arm as a part of another's in the same round."""
    pairs = zip(rounds, others, strict=True)
    return Spread.of([figures[TOKENS_PER_S] / other[TOKENS_PER_S] for figures, other in pairs])
