"""Text, reasoning and calls of an answer that comes in pieces."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from splitnet.serve.answers.calls import NoCall, Schema
from splitnet.serve.answers.forms import Forms
from splitnet.serve.answers.text import held_back


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wants to be made; `arguments` is JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


@dataclass
class Said:
    """What is new of an answer, and certain."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


MOST_TRIES = 16  # Closing marks that may be inside of a call


class AnswerParser:
    """Takes reasoning and calls out of an answer that comes in pieces. What looks like a call and is none stays text.

    White space next to marks belongs to them. `begun`: marks that the prompt ends with. Calls that no mark ends are
    read when the answer has ended. `schemas`: of the arguments of the functions that may be called; None: none may.
    """

    def __init__(self, forms: Forms, schemas: Mapping[str, Schema] | None = None, begun: str = "") -> None:
        self._form = forms.calls if schemas is not None else None
        self._schemas = schemas or {}
        self._reasoning = forms.reasoning
        self._noise = forms.calls.noise if forms.calls is not None else ()
        self._section = tuple(mark.strip() for mark in self._form.around) if self._form is not None else ("", "")
        self._held = begun
        self._thinks = False
        self._strips = False  # white space until there is something else
        self._has_text = False
        self._begins = True  # nothing but white space came since the beginning, a call, or a mark of a message
        self._called = self._behind_call = False
        self._lead: str | None = None  # what begins the call that is read, as it was written
        self._tries = 0
        self._ignored = 0  # characters of that call whose marks are inside of strings

    def push(self, piece: str) -> Said:
        """Takes the next piece."""
        self._held += piece
        return self._read(ended=False)

    def rest(self) -> Said:
        """What was held back, once nothing follows; a last call may lack its closing mark."""
        return self._read(ended=True)

    def _read(self, *, ended: bool) -> Said:
        said = Said()
        step = True
        while step:
            if self._thinks:
                step = self._think(said, ended)
            elif self._lead is not None:
                step = self._call(said, ended)
            else:
                step = self._talk(said, ended)
        return said

    def _stripped(self, text: str) -> str:
        text = text.lstrip() if self._strips else text
        self._strips = self._strips and not text
        return text

    def _tell(self, said: Said, length: int) -> None:
        """Tells so many characters of what is held as text."""
        text = self._stripped(self._held[:length])
        if text.strip():
            self._has_text, self._begins = True, False
        said.text += text
        self._held = self._held[length:]

    def _think(self, said: Said, ended: bool) -> bool:
        assert self._reasoning is not None
        closing = self._reasoning.closing
        thought, mark, after = self._held.partition(closing)
        certain = len(thought)
        if not ended or mark:
            certain -= 0 if mark else held_back(thought, [closing])
            certain = len(thought[:certain].rstrip())
        said.reasoning += self._stripped(thought[:certain])
        self._held = after if mark else thought[certain:]
        if mark:
            self._thinks, self._strips = False, True
        return bool(mark)

    def _marks(self) -> list[str]:
        form, reasoning = self._form, self._reasoning
        # Elsewhere a text may speak of the mark.
        marks = [*self._noise, *([reasoning.opening] if reasoning is not None and self._begins else ())]
        return marks + list(form.openings if form is not None and not (form.is_answer and self._has_text) else ())

    def _talk(self, said: Said, ended: bool) -> bool:
        if self._behind_call and self._is_behind_call(ended):
            return False
        marks, held = self._marks(), self._held
        found = min(((at, -len(mark), mark) for mark in marks if (at := held.find(mark)) >= 0), default=None)
        if found is None:
            if ended and self._called and not held.strip():
                self._held = ""
            self._tell(said, len(self._held) if ended else self._certain(marks))
            return False
        at, _, mark = found
        if not ended and any(len(one) > len(held) - at and one.startswith(held[at:]) for one in marks):
            return False
        if mark in self._noise:
            self._tell(said, at)
            self._held, self._begins = self._held[len(mark) :], True
        elif self._form is not None and mark in self._form.openings:
            if self._form.is_answer and held[:at].strip():
                self._tell(said, at)  # a text in which something looks like the beginning of an answer
                return True
            before = held[:at].rstrip()
            before = before.removesuffix(self._section[0]).rstrip() if self._section[0] else before
            self._tell(said, len(before))
            kept = at - len(before) + (0 if self._form.is_answer else len(mark))
            self._lead, self._held = self._held[:kept], self._held[kept:]
        else:
            if held[:at].strip():
                self._tell(said, at)  # a text in which something looks like a thought
                return True
            self._held, self._thinks, self._strips = held[at + len(mark) :], True, True
        return True

    def _is_behind_call(self, ended: bool) -> bool:
        """Drops the mark behind all calls; whether there is nothing else yet."""
        closing, text = self._section[1], self._held.lstrip()
        if closing and text.startswith(closing):
            self._held = text[len(closing) :]
            self._behind_call = False
        elif ended or not closing or not closing.startswith(text):
            self._behind_call = False
        return self._behind_call

    def _certain(self, marks: Sequence[str]) -> int:
        """How many characters of what is held are text, whatever follows."""
        if not marks:
            return len(self._held)
        held = self._held[: len(self._held) - held_back(self._held, [*marks, self._section[0]])].rstrip()
        return len(held.removesuffix(self._section[0]).rstrip() if self._section[0] else held)

    def _call(self, said: Said, ended: bool) -> bool:
        assert self._form is not None and self._lead is not None
        closing = self._form.closing
        at = self._held.find(closing, self._ignored) if closing else -1
        if at < 0 and not ended:
            return False
        end = at if at >= 0 else len(self._held)
        bodies = [self._held[:end]]
        if not closing and not self._form.is_answer:
            bodies = bodies[0].split(self._form.opening)
        try:
            said.calls += [call for body in bodies for call in self._calls_of(body)]
            self._held = self._held[end + len(closing) :]
            self._called = self._behind_call = self._begins = True
        except NoCall as none:
            self._tries += 1
            if none.goes_on and at >= 0 and self._tries < MOST_TRIES:
                self._ignored = at + len(closing)
                return True
            said.text += self._lead
            self._has_text, self._begins = True, False
        self._tries = 0
        self._lead, self._ignored = None, 0
        return True

    def _calls_of(self, body: str) -> list[ToolCall]:
        assert self._form is not None
        read = self._form.syntax.read(body, self._schemas)
        if self._form.is_answer and any(name not in self._schemas for name, _ in read):
            raise NoCall  # an answer in JSON
        try:
            calls = [ToolCall(name, json.dumps(each, ensure_ascii=False, allow_nan=False)) for name, each in read]
            for call in calls:
                (call.name + call.arguments).encode()
        except (ValueError, TypeError, RecursionError):  # what no JSON can have
            raise NoCall from None
        return calls
