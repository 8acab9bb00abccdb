"""Stop strings in a text that comes in pieces, wherever the pieces are cut."""

from __future__ import annotations

from collections.abc import Sequence


def held_back(text: str, strings: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `strings`."""
    longest = max((len(string) for string in strings), default=0)
    for length in range(min(len(text), longest), 0, -1):
        if any(string.startswith(text[-length:]) for string in strings):
            return length
    return 0


class StopStrings:
    """Ends a text before the first of some strings; what may become one of them is held back."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Takes the next piece; gives the text that is certain, and whether it has ended."""
        text = self._held + piece
        # The one that is complete first, so that it does not matter how the text was cut.
        found = [(at + len(string), at) for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        certain = len(text) - held_back(text, self._strings)
        self._held = text[certain:]
        return text[:certain], False

    def rest(self) -> str:
        """What was held back, once nothing follows."""
        held, self._held = self._held, ""
        return held
