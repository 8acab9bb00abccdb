"""Text from tokens that come one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

INCOMPLETE = "\ufffd"
"""What tokenizers write for the bytes of a character of which some are missing."""

_MOST_CONTEXT = 32
"""Tokens of a prompt that are looked at for the place where its last text begins."""


class Detokenizer:
    """Gives the text of each new token, once its last character is complete.

    Args:
        decode: the text of a list of tokens.
        prompt: the tokens that the text goes on from; empty: the text stands alone. Some tokenizers, such as Llama 2's,
            drop the space that a text begins with.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        # The tokens since the last but one piece: what a token looks like may depend on the one before it.
        self._tokens = _last_text(decode, prompt)
        self._told = len(self._tokens)

    def push(self, token: int) -> str:
        """Takes a token; the text that it completes."""
        self._tokens.append(token)
        text = self._new_text()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._tokens, self._told = self._tokens[self._told :], len(self._tokens) - self._told
        return text

    def rest(self) -> str:
        """The text of the last tokens, once nothing follows, complete or not."""
        text = self._new_text()
        self._told = len(self._tokens)
        return text

    def _new_text(self) -> str:
        told, text = self._decode(self._tokens[: self._told]), self._decode(self._tokens)
        # A token may complete a character that the prompt left incomplete.
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(told, text, strict=False)))
        return text[shared:]


def _last_text(decode: Callable[[list[int]], str], prompt: Sequence[int]) -> list[int]:
    """The fewest last tokens of a prompt that are text and begin with a whole character, if there are such."""
    for count in range(1, min(len(prompt), _MOST_CONTEXT) + 1):
        tokens = list(prompt[-count:])
        text = decode(tokens)
        if text and not text.startswith(INCOMPLETE):
            return tokens
    return list(prompt[-_MOST_CONTEXT:])
