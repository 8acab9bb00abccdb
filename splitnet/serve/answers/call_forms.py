"""A table of the forms in which models write calls and reasoning, and the choice of a form by a chat template."""

# ruff: noqa: RUF001 (some marks contain ambiguous characters)

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from splitnet.checkpoint.chat_template import render
from splitnet.serve.answers.calls import Gemma, JsonCalls, NamedJson, NoCall, Python, Syntax, Tagged


@dataclass(frozen=True)
class Form:
    """How calls are written: an opening mark, the call, and a closing mark."""

    opening: str
    closing: str  # empty: the end of the answer closes the call
    syntax: Syntax
    also: tuple[str, ...] = ()  # other opening marks
    around: tuple[str, str] = ("", "")  # the marks before and after all calls of an answer
    between: str = ""  # text between two calls
    noise: tuple[str, ...] = ()  # marks of a message that are not part of its text
    lead: str = ""  # the mark before the text of an answer
    aside: tuple[str, str] = ("", "")  # the marks before and after a text that precedes the answer or a call
    is_answer: bool = False  # a call is the whole answer, and `opening` is the beginning of the call itself
    # Small models of this form leave out the marks: a call that is the whole answer is also read without them.
    also_bare: bool = False
    one_call: bool = False  # a message has at most one call: the template refuses or omits further calls
    # The form of call ids in a history; "nine": nine letters and digits, "numbered": functions.NAME:NUMBER, "": any.
    ids: str = ""

    @property
    def openings(self) -> tuple[str, ...]:
        return (self.opening, *self.also)

    def format_calls(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Writes calls in the form of the model."""
        texts = [self.syntax.format_call(name, arguments) + self.closing for name, arguments in calls]
        opening = "" if self.is_answer else self.opening
        return self.around[0] + self.between.join(opening + text for text in texts) + self.around[1]


@dataclass(frozen=True)
class Reasoning:
    """The marks around the reasoning of an answer. resumes: the mark with which the answer continues afterwards."""

    opening: str
    closing: str
    resumes: str = ""


_TOOL_CALL = "<tool_call>", "</tool_call>"
_DSML = Tagged(
    '">\n',
    '<｜DSML｜parameter name="',
    '" string="true">',
    "</｜DSML｜parameter>\n",
    before_json='" string="false">',
)
_DSML_MARKS = '<｜DSML｜invoke name="', "</｜DSML｜invoke>"
_DEEPSEEK: Any = {"around": ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")}
_MINIMAX = Tagged('">\n', '<parameter name="', '">', "</parameter>\n")
_HARMONY = r"(?:<\|channel\|>\w++\s*+)?(?:<\|constrain\|>\s*+)?(?:\w++\s*+)?<\|message\|>"

FORMS = {
    "hermes": Form(*_TOOL_CALL, JsonCalls(), between="\n", also_bare=True),
    "qwen-coder": Form(
        *_TOOL_CALL,
        Tagged(">\n", "<parameter=", ">\n", "\n</parameter>\n", "\n<function=", "</function>\n"),
        between="\n",
    ),
    "glm-4.5": Form(
        *_TOOL_CALL,
        Tagged("\n", "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
        between="\n",
    ),
    "glm-4.7": Form(*_TOOL_CALL, Tagged("", "<arg_key>", "</arg_key><arg_value>", "</arg_value>")),
    "minimax": Form(
        '<invoke name="',
        "</invoke>",
        _MINIMAX,
        around=("<minimax:tool_call>\n", "\n</minimax:tool_call>"),
        between="\n",
    ),
    "deepseek-v3": Form(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        NamedJson("\n```json\n", "\n```", r"```(?:json)?\s*+"),
        between="\n",
        **_DEEPSEEK,
    ),
    "deepseek-v3.1": Form("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", NamedJson("<｜tool▁sep｜>"), **_DEEPSEEK),
    "deepseek-v3.2": Form(
        *_DSML_MARKS, _DSML, around=("<｜DSML｜function_calls>\n", "\n</｜DSML｜function_calls>"), between="\n"
    ),
    "deepseek-v4": Form(
        *_DSML_MARKS, _DSML, around=("<｜DSML｜tool_calls>\n", "\n</｜DSML｜tool_calls>"), between="\n"
    ),
    "kimi": Form(
        "<|tool_call_begin|>functions.",
        "<|tool_call_end|>",
        NamedJson(":0<|tool_call_argument_begin|>", also=r"(?::\d++)?\s*+<\|tool_call_argument_begin\|>"),
        also=("<|tool_call_begin|>",),
        around=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        ids="numbered",
    ),
    "harmony": Form(
        "<|channel|>commentary to=functions.",
        "<|call|>",
        NamedJson(" <|constrain|>json<|message|>", also=_HARMONY),
        also=("<|start|>assistant to=functions.", "<|channel|>analysis to=functions."),
        noise=("<|start|>assistant", "<|channel|>final<|message|>", "<|channel|>commentary<|message|>", "<|end|>"),
        lead="<|channel|>final<|message|>",
        aside=("<|channel|>commentary<|message|>", "<|end|><|start|>assistant"),
        one_call=True,
        between="<|start|>assistant",
    ),
    "gemma-4": Form("<|tool_call>call:", "<tool_call|>", Gemma()),
    "lfm2": Form("<|tool_call_start|>", "<|tool_call_end|>", Python()),
    "nemotron": Form("<TOOLCALL>", "</TOOLCALL>", JsonCalls("[", "]")),
    "mistral": Form("[TOOL_CALLS]", "", JsonCalls("[", "]"), ids="nine"),
    "mistral-named": Form("[TOOL_CALLS]", "", NamedJson("[ARGS]", also=r"(?:\[CALL_ID\]\w*)?\[ARGS\]"), ids="nine"),
    "llama": Form(
        '{"name"',
        "",
        JsonCalls("", "", "parameters", has_arguments=True),
        also=('{"type": "function"', "<|python_tag|>"),
        is_answer=True,
        one_call=True,
    ),
}

REASONING = (
    Reasoning("<|channel|>analysis<|message|>", "<|end|>", "<|start|>assistant"),
    Reasoning("<|channel>thought\n", "<channel|>"),
    Reasoning("[THINK]", "[/THINK]"),
    Reasoning("<seed:think>", "</seed:think>"),
    Reasoning("<think>", "</think>"),
)


@dataclass(frozen=True)
class Forms:
    """The forms of one model's calls and reasoning. calls: None if the form of the model's calls is unknown."""

    calls: Form | None = None
    reasoning: Reasoning | None = None
    arguments_as_text: bool = False  # the chat template expects arguments of earlier calls as JSON text
    shows_calls: bool = True  # the chat template writes calls of earlier messages

    @property
    def marks(self) -> str:
        """All marks in one text; a special token that occurs in this text is part of a mark."""
        calls, reasoning = self.calls, self.reasoning
        of_calls = (*calls.openings, calls.closing, *calls.around, *calls.noise) if calls is not None else ()
        of_reasoning = (reasoning.opening, reasoning.closing) if reasoning is not None else ()
        written = calls.format_calls([("f", {"a": "b"})]) if calls is not None else ""
        return "\0".join((*of_calls, *of_reasoning, written))


PLAIN = Forms()

PROBE = "probe_call", {"text": "probe value", "count": 7}
PROBE_SCHEMA: Any = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "count": {"type": "integer"}},
    "required": ["text", "count"],
}
PROBE_TOOL: Any = {
    "type": "function",
    "function": {"name": PROBE[0], "description": "A probe.", "parameters": PROBE_SCHEMA},
}
PROBE_TEXT = "Call it."
_PROBE_ID = "abcdefghi"  # valid for Mistral's templates


def probe(*, as_text: bool) -> list[dict[str, Any]]:
    """Messages with a function call; when a chat template renders them, the form of the call is visible.

    as_text: the arguments of the call are JSON text.
    """
    arguments = json.dumps(PROBE[1]) if as_text else PROBE[1]
    call = {"id": _PROBE_ID, "type": "function", "function": {"name": PROBE[0], "arguments": arguments}}
    return [{"role": "user", "content": PROBE_TEXT}, {"role": "assistant", "content": "", "tool_calls": [call]}]


def forms_of(tokenizer: Any) -> Forms:
    """The forms of a model's calls and reasoning, determined from its chat template and its tokens."""
    if not tokenizer.chat_template:
        return PLAIN
    template = tokenizer.get_chat_template(tools=[PROBE_TOOL])
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values()}
    ends = [*filter(None, (each for each in tokenizer.special_tokens_map.values() if isinstance(each, str)))]
    reasoning = reasoning_of(tokens, template)
    shows_calls = False
    for as_text in (False, True):
        with suppress(TemplateError):
            shown = render(tokenizer, probe(as_text=as_text), answer=False, tools=[PROBE_TOOL])
            if (form := form_in(shown, [*ends, "<|eot_id|>"])) is not None:
                return Forms(form, reasoning, arguments_as_text=as_text)
            shows_calls |= PROBE[0] in shown.rpartition(PROBE_TEXT)[2]
    form = form_of_marks(tokens, template) or (None if shows_calls else FORMS["hermes"])
    return Forms(form, reasoning, shows_calls=shows_calls)


def form_in(rendered: str, ends: Collection[str] = ()) -> Form | None:
    """The form that reads the call of `PROBE` from a rendered conversation. ends: marks that end messages."""
    at = rendered.rfind(PROBE[0])
    rendered = rendered[max(0, at - 2**14) : at + 1000]
    readable: list[Form] = []
    for form in FORMS.values():
        if form.format_calls([PROBE]) in rendered:
            return form
        for opening in form.openings:
            begin = rendered.rfind(opening, 0, rendered.rfind(PROBE[0]))
            body = rendered[begin if form.is_answer else begin + len(opening) :]
            for end in (form.closing, *ends):
                body = body.partition(end)[0] if end else body
            with suppress(NoCall):
                if begin >= 0 and form.syntax.parse_calls(body, {PROBE[0]: PROBE_SCHEMA}) == [PROBE]:
                    readable.append(form)
    return next(iter(readable), None)


def form_of_marks(tokens: Collection[str], template: str) -> Form | None:
    """The form whose marks are special tokens or occur in the chat template, for a template that renders no calls."""
    known = template + "\0".join(tokens)
    # Of two forms with the same opening mark, the later one in the table has more marks.
    for form in reversed(FORMS.values()):
        begins = not form.is_answer and any(mark in known for mark in form.openings)
        if begins and re.search(form.syntax.pattern, known) and form.around[0].strip() in known:
            return form
    return None


def reasoning_of(tokens: Collection[str], template: str) -> Reasoning | None:
    return next((each for each in REASONING if each.opening.strip() in template or each.opening in tokens), None)


def history_for_template(messages: Sequence[dict[str, Any]], forms: Forms) -> list[dict[str, Any]]:
    """A history whose call ids, arguments, tool names and reasoning have the form that the chat template expects."""
    has_noise = forms.calls is not None and bool(forms.calls.noise)
    names: dict[str, str] = {}
    ids: dict[str, str] = {}
    said: list[dict[str, Any]] = []
    for message in _apart(messages) if forms.calls is not None and forms.calls.one_call else messages:
        message = dict(message)
        if message.get("reasoning_content") and message.get("content") and message.get("tool_calls") and has_noise:
            # The template of gpt-oss accepts either reasoning or content, and writes both to the same channel.
            message["content"] = f"{message.pop('reasoning_content')}\n\n{message['content']}"
        if message.get("tool_calls"):
            calls: list[dict[str, Any]] = []
            for call in message["tool_calls"]:
                function = call["function"]
                names[call["id"]] = function["name"]
                ids[call["id"]] = _id_for(call["id"], function["name"], len(ids), forms.calls)
                if forms.arguments_as_text:
                    function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
                calls.append(call | {"id": ids[call["id"]], "function": function})
            message["tool_calls"] = calls
        if message["role"] == "tool":
            given = message.get("tool_call_id", "")
            message["tool_call_id"] = ids.get(given) or _id_for(given, "", len(ids), forms.calls)
            if given in names:
                message.setdefault("name", names[given])
        said.append(message)
    return said


def _apart(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Puts each call into a separate message, followed by its result."""
    said: list[dict[str, Any]] = []
    answers = {one.get("tool_call_id"): one for one in messages if one["role"] == "tool"}
    moved: set[str] = set()
    for message in messages:
        calls = message.get("tool_calls") or []
        if len(calls) > 1:
            for number, call in enumerate(calls):
                alone = {**message, "content": "", "reasoning_content": None} if number else message
                said.append({**alone, "tool_calls": [call]})
                said += [answers[call["id"]]] if call["id"] in answers else []
                moved.add(call["id"])
        elif message["role"] != "tool" or message.get("tool_call_id") not in moved:
            said.append(message)
    return said


def _id_for(given: str, name: str, number: int, form: Form | None) -> str:
    kind = form.ids if form is not None else ""
    if kind == "numbered":
        return f"functions.{name}:{number}" if name else given
    if kind == "nine" and not (len(given) == 9 and given.isalnum()):
        return hashlib.sha256(given.encode()).hexdigest()[:9]
    return given
