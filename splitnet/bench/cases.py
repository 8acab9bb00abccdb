"""What `splitnet bench` measures: prompts of some lengths, and answers after some contexts by some clients at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitnet.errors import ContextTooLong


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
