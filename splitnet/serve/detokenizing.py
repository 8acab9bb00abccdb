"""Text from tokens that come one by one."""

from __future__ import annotations

from collections.abc import Callable

INCOMPLETE = "\ufffd"
"""What tokenizers write for the bytes of a character of which some are missing."""


class Detokenizer:
    """Gives the text of each new token, once its last character is complete.

    Args:
        decode: the text of a list of tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        # The tokens since the last but one piece: what a token looks like may depend on the one before it.
        self._tokens: list[int] = []
        self._told = 0

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
        return self._decode(self._tokens)[len(self._decode(self._tokens[: self._told])) :]
