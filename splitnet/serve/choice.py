"""One answer as it grows: which text is certain, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from splitnet.serve.detokenizing import Detokenizer
from splitnet.serve.sampling import ScoredToken
from splitnet.serve.stop_strings import StopStrings

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What is new of one answer.

    Attributes:
        choice: which answer of the request.
        text: may be empty while a character or a stop string is not complete.
        scored: the new tokens, if they are scored; also one that ends the answer and is no text.
        begins: characters of the answer before those tokens.
        finish: why the answer ends here; None: it goes on.
    """

    choice: int
    text: str
    scored: tuple[ScoredToken, ...]
    finish: Finish | None
    begins: int = 0


class Choice:
    """Takes the tokens of one answer.

    Args:
        index: which answer of the request.
        decode: the text of a list of tokens.
        max_tokens: after which it ends.
        end_tokens: with which it ends; they are not text.
        stop_strings: before which it ends.
        prompt: the tokens whose text it goes on from; empty: it stands alone.

    Attributes:
        tokens: how many there were so far.
    """

    def __init__(
        self,
        index: int,
        decode: Callable[[list[int]], str],
        max_tokens: int,
        end_tokens: Collection[int],
        stop_strings: Sequence[str],
        prompt: Sequence[int] = (),
    ) -> None:
        self.index = index
        self.tokens = 0
        self.finished = False
        self._max_tokens = max_tokens
        self._end_tokens = end_tokens
        self._characters = 0
        self._detokenizer = Detokenizer(decode, prompt)
        self._stops = StopStrings(stop_strings)

    def push(self, token: int, scored: ScoredToken | None) -> Piece:
        """Takes the next token, with its score if it is wanted."""
        self.tokens += 1
        begins = self._characters
        text, finish = self._text_of(token)
        self.finished = finish is not None
        return Piece(self.index, text, (scored,) if scored is not None else (), finish, begins)

    def _text_of(self, token: int) -> tuple[str, Finish | None]:
        if token in self._end_tokens:
            text, stopped = self._stops.push(self._detokenizer.rest())
            return text + ("" if stopped else self._stops.rest()), "stop"
        new = self._detokenizer.push(token)
        self._characters += len(new)
        text, stopped = self._stops.push(new)
        if stopped:
            return text, "stop"
        if self.tokens < self._max_tokens:
            return text, None
        last, stopped = self._stops.push(self._detokenizer.rest())
        if stopped:
            return text + last, "stop"
        return text + last + self._stops.rest(), "length"
