"""Separates text, reasoning and calls in an answer that comes in pieces."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from splitnet.serve.answer_records import random_hex
from splitnet.serve.answers.call_forms import Forms
from splitnet.serve.answers.calls import JsonCalls, NoCall, Schema, Syntax, fits_schema
from splitnet.serve.answers.text import held_back


@dataclass(frozen=True)
class ToolCall:
    """A function call by the model. arguments: JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{random_hex(12)}")


@dataclass
class ParsedParts:
    """The new parts of an answer whose kind is certain."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


MOST_TRIES = 16  # Maximum number of closing marks that are tried for one call: a mark may be inside a string

_BARE = JsonCalls(has_arguments=True)
_FENCE = "```"
_LEADS = "", _FENCE, f"{_FENCE}json", "<|python_tag|>"  # Texts that may come before calls without marks
_LEAD = re.compile(rf"\s*({_FENCE}\s*(?:json)?|<\|python_tag\|>)?\s*")
_MOST_HEAD = 512  # Number of first characters of a call without marks that are compared, white space included
_MOST_BARE = 2**15  # Maximum characters of calls without marks, because these are parsed again after each token
_UNCERTAIN = 12
"""Maximum characters of an unfinished value at the end of JSON, such as a part of `false`, or of two `\\u0000`."""


def _heads(names: Iterable[str]) -> list[str]:
    """The beginnings of calls without marks, with white space removed."""
    kinds = "", '"type":"function",'
    keys = [f'{kind}"name":"{name}"' for name in names for kind in kinds] + ['"arguments":{', '"parameters":{']
    return [f"{lead}{{{key}" for lead in _LEADS for key in keys]


def _may_be_bare(text: str, heads: Sequence[str]) -> bool:
    """Whether a text consists of calls without marks, or may become such calls."""
    begin = re.sub(r"\s", "", text[:_MOST_HEAD])
    if len(text) > _MOST_BARE or not any(head.startswith(begin) or begin.startswith(head) for head in heads):
        return False
    fenced, rest = text.lstrip().startswith(_FENCE), _LEAD.sub("", text, count=1)
    if not rest.startswith("{"):
        return True  # the text is a part of a lead
    while rest.startswith("{"):
        try:
            _, end = json.JSONDecoder().raw_decode(rest)
        except json.JSONDecodeError as error:
            return error.msg.startswith("Unterminated string") or error.pos + _UNCERTAIN >= len(rest)
        except (ValueError, RecursionError):
            return False
        rest = rest[end:].lstrip("; \n\r\t")
        if fenced and _FENCE.startswith(rest[: len(_FENCE)]):
            return not rest[len(_FENCE) :].strip()
    return not rest


class AnswerParser:
    """Separates reasoning and calls from the text of an answer that comes in pieces.

    Text between the marks of a call stays text if it cannot be read as a call. White space next to marks is dropped.
    Calls without a closing mark are read when the answer has ended. Text that may become a call without marks is held
    back.

    schemas: JSON schemas of the arguments of functions, by name; None: there are no functions. begun: the mark at the
    end of the prompt. bare: JSON without marks may be a call, if models of this form leave out the marks.
    """

    def __init__(
        self, forms: Forms, schemas: Mapping[str, Schema] | None = None, begun: str = "", *, bare: bool = True
    ) -> None:
        self._form = forms.calls if schemas is not None else None
        self._schemas = schemas or {}
        may_be_bare = self._form is not None and (self._form.is_answer or (self._form.also_bare and bare))
        self._heads = _heads(self._schemas) if may_be_bare else []
        self._reasoning = forms.reasoning
        self._noise = forms.calls.noise if forms.calls is not None else ()
        self._section = tuple(mark.strip() for mark in self._form.around) if self._form is not None else ("", "")
        self._held = begun
        self._thinks = False
        self._strips = False  # drop white space before the next text
        self._has_text = False
        self._begins = True  # only white space has come since the beginning, the last call, or a mark of a message
        self._called = self._behind_call = False
        self._lead: str | None = None  # the text up to the opening mark of the current call; None: outside of a call
        self._tries = 0
        self._ignored = 0  # number of first characters of the current call whose closing marks are inside strings

    def push_text(self, piece: str) -> ParsedParts:
        """Takes the next piece."""
        self._held += piece
        return self._parse_held(ended=False)

    def flush(self) -> ParsedParts:
        """Returns the parts that were held back until the answer ended; the last call may lack its closing mark."""
        return self._parse_held(ended=True)

    def _parse_held(self, *, ended: bool) -> ParsedParts:
        said = ParsedParts()
        step = True
        while step:
            if self._thinks:
                step = self._parse_reasoning(said, ended)
            elif self._lead is not None:
                step = self._parse_call(said, ended)
            else:
                step = self._parse_text(said, ended)
        return said

    def _stripped(self, text: str) -> str:
        text = text.lstrip() if self._strips else text
        self._strips = self._strips and not text
        return text

    def _release_text(self, said: ParsedParts, length: int) -> None:
        """Moves the first `length` held characters to the text."""
        text = self._stripped(self._held[:length])
        if text.strip():
            self._has_text, self._begins = True, False
        said.text += text
        self._held = self._held[length:]

    def _parse_reasoning(self, said: ParsedParts, ended: bool) -> bool:
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
        # Reasoning begins only where no text precedes it; elsewhere a text may mention the mark of reasoning.
        marks = [*self._noise, *([reasoning.opening] if reasoning is not None and self._begins else ())]
        return marks + list(form.openings if form is not None and not form.is_answer else ())

    def _parse_text(self, said: ParsedParts, ended: bool) -> bool:
        if self._behind_call and self._is_behind_call(ended):
            return False
        marks, held = self._marks(), self._held
        if self._heads and not self._has_text and not self._called and _may_be_bare(held, self._heads):
            if not ended:
                return False
            with suppress(NoCall):
                said.calls += self._calls_of(
                    _LEAD.sub("", held, count=1).rstrip().removesuffix(_FENCE), _BARE, bare=True
                )
                self._held = ""
                return False
        found = min(((at, -len(mark), mark) for mark in marks if (at := held.find(mark)) >= 0), default=None)
        if found is None:
            if ended and self._called and not held.strip():
                self._held = ""
            self._release_text(said, len(self._held) if ended else self._certain(marks))
            return False
        at, _, mark = found
        if not ended and any(len(one) > len(held) - at and one.startswith(held[at:]) for one in marks):
            return False
        if mark in self._noise:
            self._release_text(said, at)
            self._held, self._begins = self._held[len(mark) :], True
        elif self._form is not None and mark in self._form.openings:
            before = held[:at].rstrip()
            before = before.removesuffix(self._section[0]).rstrip() if self._section[0] else before
            self._release_text(said, len(before))
            kept = at - len(before) + len(mark)
            self._lead, self._held = self._held[:kept], self._held[kept:]
        else:
            if held[:at].strip():
                self._release_text(said, at)  # a text that mentions the mark of reasoning
                return True
            self._held, self._thinks, self._strips = held[at + len(mark) :], True, True
        return True

    def _is_behind_call(self, ended: bool) -> bool:
        """Drops the mark after all calls; returns whether the held text may still become this mark."""
        closing, text = self._section[1], self._held.lstrip()
        if closing and text.startswith(closing):
            self._held = text[len(closing) :]
            self._behind_call = False
        elif ended or not closing or not closing.startswith(text):
            self._behind_call = False
        return self._behind_call

    def _certain(self, marks: Sequence[str]) -> int:
        """How many of the held characters are certainly text."""
        if not marks:
            return len(self._held)
        held = self._held[: len(self._held) - held_back(self._held, [*marks, self._section[0]])].rstrip()
        return len(held.removesuffix(self._section[0]).rstrip() if self._section[0] else held)

    def _parse_call(self, said: ParsedParts, ended: bool) -> bool:
        assert self._form is not None and self._lead is not None
        closing = self._form.closing
        at = self._held.find(closing, self._ignored) if closing else -1
        if at < 0 and not ended:
            return False
        end = at if at >= 0 else len(self._held)
        bodies = [self._held[:end]]
        if not closing:
            bodies = bodies[0].split(self._form.opening)
        try:
            said.calls += [call for body in bodies for call in self._calls_of(body, self._form.syntax)]
            self._held = self._held[end + len(closing) :]
            self._called = self._behind_call = self._begins = True
        except NoCall as none:
            self._tries += 1
            if none.may_continue and at >= 0 and self._tries < MOST_TRIES:
                self._ignored = at + len(closing)
                return True
            said.text += self._lead
            self._has_text, self._begins = True, False
        self._tries = 0
        self._lead, self._ignored = None, 0
        return True

    def _calls_of(self, body: str, syntax: Syntax, *, bare: bool = False) -> list[ToolCall]:
        assert self._form is not None
        read = syntax.parse_calls(body, self._schemas)
        try:
            for name, arguments in read if bare else ():
                schema = self._schemas.get(name)
                if schema is None or not (self._form.is_answer or fits_schema(arguments, schema)):
                    raise NoCall  # the text is an answer in JSON
            calls = [ToolCall(name, json.dumps(each, ensure_ascii=False, allow_nan=False)) for name, each in read]
            for call in calls:
                (call.name + call.arguments).encode()
        except (ValueError, TypeError, RecursionError):  # values or characters that JSON cannot have
            raise NoCall from None
        return calls
