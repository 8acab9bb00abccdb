"""Text from tokens that come one by one."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


class StopStrings:
    """Ends a text before the first of some strings; what may become one of them is held back."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.found: str | None = None  # the string that ended it

    def push(self, piece: str) -> tuple[str, bool]:
        """Takes the next piece; gives the text that is certain, and whether it has ended."""
        text = self._held + piece
        # The one that is complete first, so that it does not matter how the text was cut.
        found = [(at + len(string), at, string) for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            self._held = ""
            _, at, self.found = min(found)
            return text[:at], True
        certain = len(text) - held_back(text, self._strings)
        self._held = text[certain:]
        return text[:certain], False

    def rest(self) -> str:
        """What was held back, once nothing follows."""
        held, self._held = self._held, ""
        return held


OPENING = "<tool_call>"
CLOSING = "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wants to be made; `arguments` is JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


class ToolCallParser:
    """Takes tool calls out of a text that comes in pieces. What looks like one and is none stays text."""

    def __init__(self) -> None:
        self._space = ""  # before what may be a call
        self._held = ""
        self._inside = False
        self._found = False

    def push(self, piece: str) -> tuple[str, list[ToolCall]]:
        """Takes the next piece; gives the text that is certain, and the calls that are complete."""
        self._held += piece
        text = ""
        calls: list[ToolCall] = []
        while True:
            if not self._inside:
                before, opening, after = self._held.partition(OPENING)
                if not opening:
                    break
                said = before.rstrip()
                text += said
                self._space, self._held, self._inside = before[len(said) :], after, True
            body, closing, after = self._held.partition(CLOSING)
            if not closing:
                return text, calls
            call = _call_of(body)
            if call is None:
                text += self._space + OPENING + body + CLOSING
            else:
                calls.append(call)
                self._found = True
            self._held, self._inside = after, False
        # White space is held back, too: before and between calls it is no text of the answer.
        certain = len(self._held) - held_back(self._held, [OPENING])
        certain = len(self._held[:certain].rstrip())
        text += self._held[:certain]
        self._held = self._held[certain:]
        return text, calls

    def rest(self) -> tuple[str, list[ToolCall]]:
        """What was held back, once nothing follows; a last call may lack its closing mark."""
        held, self._held = self._held, ""
        if self._inside:
            call = _call_of(held)
            return ("", [call]) if call is not None else (self._space + OPENING + held, [])
        return ("" if self._found and not held.strip() else held), []


def _call_of(body: str) -> ToolCall | None:
    try:
        match json.loads(body):
            case {"name": str(name), **others} if isinstance(arguments := others.get("arguments", {}), dict):
                return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
    except (ValueError, RecursionError):
        pass
    return None
