"""Text from tokens that come one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from splitnet.drafts.drafter import shared

INCOMPLETE = "\ufffd"  # What tokenizers write for the bytes of a character of which some are missing
_MOST_CONTEXT = 32  # Tokens of a prompt that are looked at for the place where its last text begins


class Detokenizer:
    """Gives the text of each new token, once its last character is complete.

    The text goes on from the tokens of a prompt; empty: it stands alone. Some tokenizers, such as Llama 2's, drop the
    space that a text begins with.
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
        return text[shared(told, text) :]


def _last_text(decode: Callable[[list[int]], str], prompt: Sequence[int]) -> list[int]:
    """The fewest last tokens of a prompt that are text and begin with a whole character, if there are such."""
    for count in range(1, min(len(prompt), _MOST_CONTEXT) + 1):
        tokens = list(prompt[-count:])
        text = decode(tokens)
        if text and not text.startswith(INCOMPLETE):
            return tokens
    return list(prompt[-_MOST_CONTEXT:])


def held_back(text: str, strings: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `strings`."""
    longest = max(map(len, strings), default=0)
    lengths = range(min(len(text), longest), 0, -1)
    return next((one for one in lengths if any(string.startswith(text[-one:]) for string in strings)), 0)


_ENDED, _OPEN = "\ud800", "\ud801"  # In place of each character of a part without stop strings; no request has these


class StopStrings:
    """Ends a text before the first of some strings; the beginning of a string is held back.

    `apart`: marks that begin a part without stop strings, and the mark that ends it (empty: the end of the text).
    A part that has no end yet is held back.
    """

    def __init__(self, strings: Sequence[str], apart: tuple[Sequence[str], str] = ((), "")) -> None:
        self._strings = strings
        begins, end = "|".join(map(re.escape, apart[0])) or "(?!)", re.escape(apart[1]) or "(?!)"
        self._apart = re.compile(f"(?:{begins})(?:.*?(?P<end>{end})|.*)", re.DOTALL)
        self._marks = [*strings, *apart[0]]
        self._held = ""
        self.found: str | None = None  # the string that ended it

    def push(self, piece: str) -> tuple[str, bool]:
        """Takes the next piece; gives the text that is certain, and whether it has ended."""
        text = self._held + piece
        # The one that is complete first, so that it does not matter how the text was cut.
        seen = self._apart.sub(lambda part: (_ENDED if part["end"] else _OPEN) * len(part[0]), text)
        found = [(at + len(string), at, string) for string in self._strings if (at := seen.find(string)) >= 0]
        if found:
            self._held = ""
            _, at, self.found = min(found)
            return text[:at], True
        certain = len(seen[: len(seen) - held_back(seen, self._marks)].rstrip(_OPEN))
        self._held = text[certain:]
        return text[:certain], False

    def rest(self) -> str:
        """What was held back, once nothing follows."""
        held, self._held = self._held, ""
        return held
