"""Calls of tools in the text of a model, as Hermes, Qwen and others write them: JSON in `<tool_call>` tags."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field

from splitnet.serve.stop_strings import held_back

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
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    return ToolCall(call["name"], json.dumps(arguments, ensure_ascii=False))
