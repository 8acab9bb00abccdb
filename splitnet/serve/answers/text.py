"""Makes text from tokens that come one by one, and ends the text at stop strings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from splitnet.drafts.drafter import shared

INCOMPLETE = "\ufffd"  # Tokenizers write this for a character with missing bytes
_MOST_CONTEXT = 32  # Maximum number of last tokens of a prompt that are decoded together with the answer


class Detokenizer:
    """Gives the text of each new token, once the last character of the text is complete.

    prompt: tokens whose text the answer continues; empty: the answer is a separate text. Some tokenizers, such as
    Llama 2's, drop the space at the beginning of a text.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        # The tokens of the last two pieces: the text of a token may depend on the token before it.
        self._tokens = _last_text(decode, prompt)
        self._told = len(self._tokens)

    def push_token(self, token: int) -> str:
        """Takes a token and returns the text that it completes."""
        self._tokens.append(token)
        text = self._new_text()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._tokens, self._told = self._tokens[self._told :], len(self._tokens) - self._told
        return text

    def flush(self) -> str:
        """Returns the remaining text at the end of an answer, even if its last character is incomplete."""
        text = self._new_text()
        self._told = len(self._tokens)
        return text

    def _new_text(self) -> str:
        told, text = self._decode(self._tokens[: self._told]), self._decode(self._tokens)
        # A token may complete a character that the prompt left incomplete.
        return text[shared(told, text) :]


def _last_text(decode: Callable[[list[int]], str], prompt: Sequence[int]) -> list[int]:
    """The shortest end of a prompt whose text begins with a whole character; at most `_MOST_CONTEXT` tokens."""
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


# These replace the characters of parts in which stop strings do not count; requests cannot contain these characters
_ENDED, _OPEN = "\ud800", "\ud801"


class StopStrings:
    """Ends a text before its first stop string; text that may begin a stop string is held back.

    apart: the marks that begin a part in which stop strings do not count, and the mark that ends such a part (empty:
    the part ends with the text). Such a part is held back until the part has ended.
    """

    def __init__(self, strings: Sequence[str], apart: tuple[Sequence[str], str] = ((), "")) -> None:
        self._strings = strings
        begins, end = "|".join(map(re.escape, apart[0])) or "(?!)", re.escape(apart[1]) or "(?!)"
        self._apart = re.compile(f"(?:{begins})(?:.*?(?P<end>{end})|.*)", re.DOTALL)
        self._marks = [*strings, *apart[0]]
        self._held = ""
        self.found: str | None = None  # the stop string that ended the text

    def push_text(self, piece: str) -> tuple[str, bool]:
        """Takes the next piece; returns the text that is certain, and whether the text has ended."""
        text = self._held + piece
        # The stop string that is complete first counts, so that the result does not depend on how the text was cut.
        seen = self._apart.sub(lambda part: (_ENDED if part["end"] else _OPEN) * len(part[0]), text)
        found = [(at + len(string), at, string) for string in self._strings if (at := seen.find(string)) >= 0]
        if found:
            self._held = ""
            _, at, self.found = min(found)
            return text[:at], True
        certain = len(seen[: len(seen) - held_back(seen, self._marks)].rstrip(_OPEN))
        self._held = text[certain:]
        return text[:certain], False

    def flush(self) -> str:
        """Returns the text that was held back until the end of the answer."""
        held, self._held = self._held, ""
        return held
