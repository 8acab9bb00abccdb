"""Calls and reasoning in the form of every family: the form is found from the family's chat template, answers are
parsed correctly however they are cut into pieces, and grammars force answers to keep to the form."""

# ruff: noqa: RUF001 (marks have such characters)

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

import splitnet
from splitnet.checkpoint.chat_template import render
from splitnet.serve.answers.call_forms import (
    FORMS,
    REASONING,
    Form,
    Forms,
    Reasoning,
    form_in,
    form_of_marks,
    history_for_template,
    probe,
)
from splitnet.serve.answers.call_forms import PROBE_TOOL as TOOL
from splitnet.serve.answers.calls import NoCall, json_types_of
from splitnet.serve.answers.grammars import AllowedTokens, AnswerConstraints, Grammars
from splitnet.serve.answers.parser import AnswerParser, ParsedParts
from splitnet.serve.apis.openai_requests import FunctionDefinition
from splitnet.serve.failures import ApiError

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "units": {"enum": ["c", "f"]},
        "more": {"type": "object", "properties": {"deep": {"type": "array", "items": {"type": "boolean"}}}},
    },
    "required": ["city", "days"],
}
SCHEMAS: Mapping[str, Any] = {"weather": WEATHER, "clock": {}}
CALLS: list[tuple[str, Any]] = [
    ("weather", {"city": 'Zürich "x" <b>\n{}', "days": 3, "units": "c", "more": {"deep": [True, False]}}),
    ("clock", {}),
]
HARMONY, THINK = REASONING[0], REASONING[-1]


def reasonings(form: Form) -> list[Reasoning | None]:
    """The forms of reasoning that models use together with a form of calls."""
    return [HARMONY] if form is FORMS["harmony"] else [None, *REASONING[1:]]


def written(form: Form, reasoning: Reasoning | None, calls: Sequence[tuple[str, Any]]) -> tuple[str, str]:
    """An answer with reasoning, text and calls, and the text alone."""
    thought = f"{reasoning.opening}Is it\n\n1 < 2? {reasoning.closing}{reasoning.resumes}" if reasoning else ""
    said = "" if form.is_answer else "Let me look."
    between = "<|end|><|start|>assistant" if form is FORMS["harmony"] else "\n\n"
    return thought + (form.lead + said + between if said else "") + form.format_calls(calls), said


def read(pieces: Sequence[str], forms: Forms, begun: str = "", schemas: Any = SCHEMAS) -> ParsedParts:
    parser, whole = AnswerParser(forms, schemas, begun), ParsedParts()
    for new in [*map(parser.push_text, pieces), parser.flush()]:
        whole.text += new.text
        whole.reasoning += new.reasoning
        whole.calls += new.calls
    return whole


def named(said: ParsedParts) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in said.calls]


@pytest.mark.parametrize("name", FORMS)
def test_calls_are_read_in_any_pieces(name: str) -> None:
    form = FORMS[name]
    calls = CALLS[:1] if form.is_answer else CALLS
    for reasoning in reasonings(form):
        text, said = written(form, reasoning, calls)
        for pieces in [[text[:at], text[at:]] for at in range(len(text) + 1)] + [list(text)]:
            answer = read(pieces, Forms(form, reasoning))
            assert (answer.text, answer.reasoning) == (said, "Is it\n\n1 < 2?" if reasoning else "")
            assert named(answer) == calls


@pytest.mark.parametrize("name", FORMS)
def test_an_unfinished_call_is_text(name: str) -> None:
    """Wherever a call is cut off, no character is lost or doubled, except white space and marks of messages."""
    form = FORMS[name]
    text = form.format_calls(CALLS[:1])
    begins = text.index(form.opening) + len(form.opening)
    ends = text.rindex(form.closing) if form.closing else len(text)
    for at in range(begins, ends):
        answer = read([text[:at]], Forms(form))
        if not answer.calls:
            assert answer.text == text[:at]


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=40)
@given(data=st.data())
def test_no_text_is_lost_or_doubled(name: str, data: st.DataObject) -> None:
    form = FORMS[name]
    parts = [form.opening, form.closing, *form.around, *form.also, *form.noise, "{", '"a"', "}", " ", "\n", "text", "é"]
    pieces = data.draw(st.lists(st.sampled_from([*filter(None, parts), form.format_calls(CALLS[:1])]), max_size=8))
    answer = read(pieces, Forms(form))
    whole = read(["".join(pieces)], Forms(form))
    assert (answer.text, named(answer)) == (whole.text, named(whole))
    if not answer.calls:
        left = "".join(pieces)
        for mark in sorted(form.noise, key=len, reverse=True):
            left = left.replace(mark, "")
        assert re.sub(r"\s", "", answer.text) == re.sub(r"\s", "", left) or form.noise


def test_a_closing_mark_within_a_string_does_not_end_a_call() -> None:
    for name in ("hermes", "qwen-coder", "glm-4.5", "gemma-4", "nemotron", "kimi"):
        form = FORMS[name]
        calls = [("weather", {"city": f"a{form.closing}b", "days": 1}), ("clock", {})]
        assert named(read(list(form.format_calls(calls)), Forms(form))) == calls, name


def test_a_call_after_an_invalid_call_is_found() -> None:
    form = FORMS["hermes"]
    bad = '<tool_call>\n{"name": "f", "arguments": {"a": "\n'
    answer = read(list(bad + form.format_calls(CALLS[1:])), Forms(form))
    assert (answer.text, named(answer)) == (bad.rstrip(), CALLS[1:])


BARE = '{"name": "weather", "arguments": {"city": "Rome \\"}\\" ```", "days": 3}}'
SPACED = '\n{\n  "name": "weather",\n  "parameters": {"city": "Rome", "days": 3}\n}\n'
ROME: list[tuple[str, Any]] = [("weather", {"city": "Rome", "days": 3})]
QUOTED: list[tuple[str, Any]] = [("weather", {"city": 'Rome "}" ```', "days": 3})]
CLOCK_CALL = '{"name": "clock", "arguments": {}}'


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (BARE, QUOTED),
        (SPACED, ROME),
        (f"```json\n{BARE}\n```", QUOTED),
        (f" ```\n{SPACED}```\n", ROME),
        (f"```json\n{BARE}", QUOTED),
        ('{"type": "function", "name": "weather", "parameters": {"city": "Rome", "days": 3}}', ROME),
        ('{"arguments": {"city": "Rome", "days": 3}, "name": "weather"}', ROME),
        (f"{BARE}\n{CLOCK_CALL}", [*QUOTED, ("clock", {})]),
        (f"{BARE}; {CLOCK_CALL}", [*QUOTED, ("clock", {})]),
    ],
)
@pytest.mark.parametrize("name", ["hermes", "llama"])
def test_an_unmarked_call_that_is_the_whole_answer_is_read(name: str, text: str, calls: list[tuple[str, Any]]) -> None:
    forms = Forms(FORMS[name], THINK)
    for pieces in [[text[:at], text[at:]] for at in range(len(text) + 1)] + [list(text)]:
        answer = read(pieces, forms)
        assert (answer.text, named(answer)) == ("", calls)
    thought = read(list(f"<think>Hm.</think>\n\n{text}"), forms)
    assert (thought.reasoning, thought.text, named(thought)) == ("Hm.", "", calls)


NOT_ALL = [
    f"So: {BARE}",
    f"{BARE} is the call.",
    f"```json\n{BARE}\n```\nThat is the call.",
    f"```python\n{BARE}\n```",
    '{"name": "other", "arguments": {}}',
    '{"name": "weather"}',
    '{"city": "Rome", "days": 3}',
    '{"name": "weather", "arguments": {"city": "Rome", "days": 3}',
    '{"name": "weather", "arguments": "Rome"}',
    "{'name': 'weather', 'arguments': {}}",
    '{"name": "weather", "arguments": {"city": NaN, "days": 3}}',
    "```js\n",
    "{",
    "```",
]
NOT_FITTING = [
    '{"name": "weather", "arguments": {"city": "Rome"}}',
    '{"name": "weather", "arguments": {"city": 7, "days": 3}}',
    '{"name": "weather", "arguments": {"city": "Rome", "days": true}}',
    '{"name": "weather", "arguments": {"city": "Rome", "days": 3, "units": "k"}}',
    '{"name": "weather", "arguments": {"city": "Rome", "days": 3, "more": {"deep": [true, "no"]}}}',
    f'[{{"name": "clock", "arguments": {{}}}}, {BARE}]',
]


@pytest.mark.parametrize("text", [*NOT_ALL, *NOT_FITTING])
def test_json_that_is_not_a_fitting_call_stays_text(text: str) -> None:
    for pieces in [[text[:at], text[at:]] for at in range(len(text) + 1)] + [list(text)]:
        answer = read(pieces, Forms(FORMS["hermes"]))
        assert (answer.text, answer.calls) == (text, [])


def test_json_is_text_in_forms_without_unmarked_calls() -> None:
    others = [form for form in FORMS.values() if not form.also_bare and not form.is_answer]
    assert others
    for form in others:
        answer = read(list(BARE), Forms(form))
        assert (answer.text, answer.calls) == (BARE, [])
    parser = AnswerParser(Forms(FORMS["hermes"]), SCHEMAS, bare=False)
    said = [parser.push_text(BARE), parser.flush()]
    assert "".join(each.text for each in said) == BARE and not any(each.calls for each in said)


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ('{"name": "weather", "arguments": {"city": "Ro', True),
        ('```json\n{"name": "wea', True),
        ("``", True),
        ('{"name": "wet', False),
        ('{"city"', False),
        ("```python", False),
        (BARE, True),
        (f"{BARE} i", False),
        ('{"name": "weather", "arguments": oh, no}, so I say', False),
    ],
)
def test_text_that_may_become_an_unmarked_call_is_held_back(text: str, held: bool) -> None:
    told = AnswerParser(Forms(FORMS["hermes"]), SCHEMAS).push_text(text)
    assert (told.text, told.calls) == ("" if held else text, [])


@pytest.mark.parametrize("deep", [{"$ref": "#"}, {"anyOf": [{"$ref": "#/properties/n"}] * 200}])
def test_circular_schemas_make_no_call(deep: Any) -> None:
    schemas = {"weather": {"type": "object", "properties": {"n": deep, "a": {"$ref": "#/$defs/n"}}}}
    answer = read(['{"name": "weather", "arguments": {"n": 1}}'], Forms(FORMS["hermes"]), schemas=schemas)
    assert not answer.calls and answer.text


def test_without_functions_calls_are_text_but_reasoning_is_found() -> None:
    text, _ = written(FORMS["hermes"], THINK, CALLS)
    answer = read(list(text), Forms(FORMS["hermes"], THINK), schemas=None)
    assert answer.reasoning == "Is it\n\n1 < 2?" and not answer.calls
    assert answer.text == text.partition("</think>")[2].lstrip()


def test_marks_mentioned_in_a_text_are_text() -> None:
    forms = Forms(FORMS["hermes"], THINK)
    for text in ('{"a": "<think>x", "b": 1}', "Use `<think>` for thoughts.\n\nThen answer.", "a <think>b</think> c"):
        assert read(list(text), forms) == ParsedParts(text)
    llama = Forms(FORMS["llama"])
    for text in ('{"name": "Bob", "age": 3}', '{"name": "clock"}', '{"name": "Bob", "parameters": {}}'):
        assert read(list(text), llama) == ParsedParts(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": "\\ud83d"}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": NaN}}\n</tool_call>'),
        ("lfm2", "<|tool_call_start|>[f(a={1,2})]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[f(a=...)]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[f(**{'a': 1})]<|tool_call_end|>"),
    ],
)
def test_values_that_json_cannot_have_make_no_call(name: str, text: str) -> None:
    assert read([text], Forms(FORMS[name])) == ParsedParts(text)


def test_a_text_full_of_marks_is_read_in_linear_time() -> None:
    """Each opening mark is tried with only a few closing marks."""
    reads = 0

    class Counting:
        def parse_calls(self, body: str, schemas: Any) -> Any:
            nonlocal reads
            reads += 1
            return FORMS["qwen-coder"].syntax.parse_calls(body, schemas)

    form = replace(FORMS["qwen-coder"], syntax=Counting())
    text = "<tool_call>\n<function=f>\n<parameter=a>\nx</tool_call>" * 200
    assert re.sub(r"\s", "", read([text], Forms(form)).text) == re.sub(r"\s", "", text)
    assert reads <= 16 * 201


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        ({"anyOf": [{"type": "array"}, {"type": "string"}]}, '["x", "y"]', ["x", "y"]),
        ({"type": ["object", "string"]}, '{"x": 1}', {"x": 1}),
        ({"anyOf": [{"type": "integer"}, {"enum": ["all"]}]}, "5", 5),
        ({"enum": [1, "a"]}, "1", 1),
        ({"enum": ["a", None]}, "null", None),
        ({"$ref": "#/$defs/text"}, "123", "123"),
        ({"allOf": [{"type": "string"}]}, "123", "123"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "None", None),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "12", "12"),
        ({}, "12", 12),
    ],
)
def test_values_in_tags_have_a_type_of_their_schema(schema: Any, written: str, value: Any) -> None:
    text = f"<tool_call>\n<function=f>\n<parameter=a>\n{written}\n</parameter>\n</function>\n</tool_call>"
    schemas = {"f": {"properties": {"a": schema}, "$defs": {"text": {"type": "string"}}}}
    assert named(read([text], Forms(FORMS["qwen-coder"]), schemas=schemas)) == [("f", {"a": value})]


def test_names_that_python_or_gemma_syntax_does_not_allow() -> None:
    lfm2, gemma = Forms(FORMS["lfm2"]), Forms(FORMS["gemma-4"])
    text = '<|tool_call_start|>[get-it(a="b")]<|tool_call_end|>'
    assert named(read([text], lfm2, schemas={"get-it": {}})) == [("get-it", {"a": "b"})]
    text = '<|tool_call>call:f{first name:<|"|>None<|"|>,b:None,c:[True,False]}<tool_call|>'
    assert named(read([text], gemma)) == [("f", {"first name": "None", "b": None, "c": [True, False]})]


def test_reasoning_that_begins_in_the_prompt() -> None:
    assert read(list("\nwell</think>\n\nYes."), Forms(None, THINK), "<think>") == ParsedParts("Yes.", "well")
    assert read(["never ends <"], Forms(None, THINK), "<think>") == ParsedParts("", "never ends <")
    harmony = Forms(FORMS["harmony"], HARMONY)
    calls = " to=functions.clock<|channel|>commentary json<|message|>{}"
    assert named(read(list(calls), harmony, "<|start|>assistant")) == CALLS[1:]
    answer = read(list("<|channel|>final<|message|>Yes."), harmony, "<|start|>assistant")
    assert answer == ParsedParts("Yes.")


def test_arguments_have_the_types_of_their_schema() -> None:
    form = FORMS["qwen-coder"]
    schema = {"properties": {"a": {"type": "string"}, "b": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}
    given = {"a": "5", "b": None, "c": 5}
    answer = read([form.format_calls([("f", given)])], Forms(form), schemas={"f": schema})
    assert named(answer) == [("f", given)]


CALL = "{% set f = call.function %}"
TEMPLATES = {
    # Each template writes a call as the family's own template does, without other text.
    "hermes": '<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>',
    "qwen-coder": "<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}<parameter={{ k }}>\n"
    "{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>",
    "glm-4.5": "<tool_call>{{ f.name }}\n{% for k, v in f.arguments.items() %}<arg_key>{{ k }}</arg_key>\n"
    "<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}</tool_call>",
    "glm-4.7": "<tool_call>{{ f.name }}{% for k, v in f.arguments.items() %}<arg_key>{{ k }}</arg_key>"
    "<arg_value>{{ v if v is string else v | tojson }}</arg_value>{% endfor %}</tool_call>",
    "minimax": '<minimax:tool_call>\n<invoke name="{{ f.name }}">\n{% for k, v in f.arguments.items() %}'
    '<parameter name="{{ k }}">{{ v }}</parameter>\n{% endfor %}</invoke>\n</minimax:tool_call>',
    "deepseek-v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ f.name }}\n```json\n"
    "{{ '' + f.arguments }}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-v3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ f.name }}<｜tool▁sep｜>{{ f.arguments | tojson }}"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-v3.2": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="{{ f.name }}">\n'
    "{% for k, v in f.arguments.items() %}"
    '<｜DSML｜parameter name="{{ k }}" string="{{ "true" if v is string else "false" }}">{{ v }}</｜DSML｜parameter>\n'
    "{% endfor %}</｜DSML｜invoke>\n</｜DSML｜function_calls>",
    "deepseek-v4": '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{{ f.name }}">\n{% for k, v in f.arguments.items() %}'
    '<｜DSML｜parameter name="{{ k }}" string="{{ "true" if v is string else "false" }}">{{ v }}</｜DSML｜parameter>\n'
    "{% endfor %}</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.{{ f.name }}:0<|tool_call_argument_begin|>"
    "{{ f.arguments | tojson }}<|tool_call_end|><|tool_calls_section_end|>",
    "harmony": "<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>"
    "{{ f.arguments | tojson }}<|call|>",
    "gemma-4": "<|tool_call>call:{{ f.name }}{{ '{' }}"
    "{% for k, v in f.arguments | dictsort %}{{ ',' if not loop.first }}{{ k }}:"
    "{{ '<|\"|>' + v + '<|\"|>' if v is string else v }}{% endfor %}}<tool_call|>",
    "lfm2": "<|tool_call_start|>[{{ f.name }}({% for k, v in f.arguments.items() %}{{ ', ' if not loop.first }}"
    "{{ k }}={{ v | tojson }}{% endfor %})]<|tool_call_end|>",
    "nemotron": '<TOOLCALL>[{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}]</TOOLCALL>',
    "mistral-named": "[TOOL_CALLS]{{ f.name }}[CALL_ID]{{ call.id }}[ARGS]{{ f.arguments | tojson }}</s>",
    "mistral": '[TOOL_CALLS][{{ (f | tojson)[:-1] }}, "id": "{{ call.id }}"}]</s>',
    "llama": '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eot_id|>',
}


class Templated:
    special_tokens_map: Mapping[str, str] = {}

    def __init__(self, call: str) -> None:
        self.template = (
            "{{ tools | tojson }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
            f"{{% for call in m.tool_calls or [] %}}{CALL}{call}{{% endfor %}}{{% endfor %}}"
        )

    def get_chat_template(self, tools: Any) -> str:
        return self.template


@pytest.mark.parametrize("name", FORMS)
def test_the_form_is_found_from_the_template(name: str) -> None:
    shown = render(Templated(TEMPLATES[name]), probe(as_text=name == "deepseek-v3"), answer=False, tools=[TOOL])
    assert form_in(shown, ["</s>", "<|eot_id|>"]) is FORMS[name]


@pytest.mark.parametrize("name", sorted(FORMS.keys() - {"llama", "deepseek-v3", "glm-4.5"}))
def test_the_form_is_found_from_the_marks_of_a_template_without_calls(name: str) -> None:
    assert form_of_marks((), TEMPLATES[name]) is FORMS[name]
    assert form_of_marks((), "no marks") is None


def test_the_documents_name_the_forms_of_the_whole_catalogue() -> None:
    root = Path(__file__).parents[3]
    rows = [
        row.split(" | ")
        for row in (root / "docs" / "serve.md").read_text(encoding="utf-8").splitlines()
        if "| read |" in row
    ]
    assert {name for row in rows for name in row[0].strip("| ").split(", ")} == set(FORMS)
    named = [name for row in rows for name in row[2].split(", ") if not row[2].startswith("(")]
    models = (root / "docs" / "models.md").read_text(encoding="utf-8")
    listed = models[models.index("| models | family |") : models.index("## Families")]
    catalogue = [name for row in listed.splitlines()[2:] if row for name in row.split(" | ")[0].strip("| ").split(", ")]
    assert sorted(named) == sorted(catalogue) and len(named) == 49


def test_history_takes_the_form_of_the_template() -> None:
    def told(form: str, id: str) -> tuple[str, str]:
        call = {"id": id, "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
        history = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": id},
        ]
        made, answered = history_for_template(history, Forms(FORMS[form], arguments_as_text=form == "deepseek-v3"))
        assert answered["name"] == "f"
        assert made["tool_calls"][0]["id"] == answered["tool_call_id"]
        return made["tool_calls"][0]["id"], made["tool_calls"][0]["function"]["arguments"]

    assert told("hermes", "call_1") == ("call_1", {"a": 1})
    assert told("kimi", "call_1") == ("functions.f:0", {"a": 1})
    assert told("deepseek-v3", "x") == ("x", '{"a": 1}')
    assert told("mistral", "abcdefgh9")[0] == "abcdefgh9"
    assert re.fullmatch(r"\w{9}", told("mistral", "call_1")[0])


def test_calls_get_separate_messages_where_the_template_takes_one() -> None:
    calls = [{"id": id, "type": "function", "function": {"name": "f", "arguments": {}}} for id in "ab"]
    answers = [{"role": "tool", "content": id, "tool_call_id": id} for id in "ba"]
    history = [
        {"role": "assistant", "content": "Well", "tool_calls": calls},
        *answers,
        {"role": "user", "content": "?"},
    ]
    told = history_for_template(history, Forms(FORMS["llama"]))
    assert [one["content"] for one in told] == ["Well", "a", "", "b", "?"]
    assert [len(one.get("tool_calls", [])) for one in told] == [1, 0, 1, 0, 0]
    assert len(history_for_template(history, Forms(FORMS["hermes"]))) == 4


@pytest.fixture(scope="module")
def tokenizer(demo_checkpoint: Path) -> Any:
    """A tokenizer with a token for each mark that is a special token of some model."""
    tokenizer = splitnet.AutoTokenizer.from_pretrained(demo_checkpoint)
    marks = {
        mark
        for form in FORMS.values()
        for mark in re.findall(r"<[|｜][^<>]*?[|｜]>|<\|\w+>|<\w+\|>|\[[A-Z_]+\]", form.format_calls(CALLS))
    }
    marks |= {'<|"|>', "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>", "<|start|>", "<think>", "</think>"}
    tokenizer.add_tokens(
        [AddedToken(mark, special=True, normalized=False) for mark in sorted(marks)], special_tokens=True
    )
    return tokenizer


Bound = tuple[Any, Grammars]


@pytest.fixture(scope="module")
def bound(tokenizer: Any) -> Bound:
    return tokenizer, Grammars(tokenizer, len(tokenizer), {2})


def is_kept_to(bounds: AnswerConstraints, forms: Forms, bound: Bound, text: str, *, thinks: bool = False) -> bool:
    """Whether a grammar allows a text as a whole answer."""
    tokenizer, grammars = bound
    allowed = AllowedTokens(grammars.of_answer(bounds, forms, thinks=thinks))
    answer = tokenizer(text, add_special_tokens=False).input_ids
    for length, token in enumerate([*answer, 2]):
        scores = torch.zeros(len(tokenizer))
        allowed.forbid_others(answer[:length], scores)
        if not scores[token].isfinite():
            return False
    return True


FUNCTIONS = [
    FunctionDefinition(name="weather", parameters=WEATHER, strict=True),
    FunctionDefinition(name="clock", parameters={"type": "object", "properties": {}, "additionalProperties": False}),
]
GOOD = ("weather", {"city": "Rome", "days": 3, "units": "f", "more": {"deep": [True]}})
SHORT = ("weather", {"city": "Rome", "days": 3})
BAD = [
    ("weather", {"city": "Rome"}),
    ("weather", {"city": "Rome", "days": "many"}),
    ("weather", {"city": "Rome", "days": 3, "units": "k"}),
    ("other", {}),
]


@pytest.mark.parametrize("name", FORMS)
def test_required_calls_are_bound_in_the_form_of_the_model(name: str, bound: Bound) -> None:
    form = FORMS[name]
    required = AnswerConstraints(FUNCTIONS, required=True)
    for call in (GOOD, SHORT, CALLS[1]):
        assert is_kept_to(required, Forms(form), bound, form.format_calls([call])), call
        thought = f"<think>yes</think>\n\n{form.format_calls([call])}"
        assert is_kept_to(required, Forms(form, THINK), bound, thought)
        assert is_kept_to(required, Forms(form, THINK), bound, thought.removeprefix("<think>"), thinks=True)
    for call in BAD:
        assert not is_kept_to(required, Forms(form), bound, form.format_calls([call])), call
    assert not is_kept_to(required, Forms(form), bound, "Hello")


WORDS = ["type", "properties", "required", "enum", "const", "anyOf", "oneOf", "items", "$ref", "$defs", "a", "city"]
WORDS += ["pattern", "minLength", "maxLength"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.sampled_from(["string", "object", "array", "#/$defs/a", "a", "^["]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"a{n}": {"type": "integer"} for n in range(3000)}},
        {
            "$defs": {"big": {"description": "x" * 200_000}},
            "properties": {f"a{n}": {"$ref": "#/$defs/big"} for n in range(200)},
        },
    ],
)
def test_schemas_that_are_too_large_are_refused(schema: Any, bound: Bound) -> None:
    for name in ("qwen-coder", "minimax"):
        function = FunctionDefinition(name="f", parameters={"type": "object"} | schema)
        with pytest.raises(ApiError, match="cannot be kept to"):
            bound[1].of_answer(AnswerConstraints([function], required=True), Forms(FORMS[name]))


def test_types_of_exponentially_many_choices_are_found_fast() -> None:
    levels = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"} for _ in range(200)]} for n in range(8)}
    schema = {"$ref": "#/$defs/d0", "$defs": levels | {"d8": {"type": "integer"}}}
    assert json_types_of(schema, schema) == {"integer"}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "text",
    [
        "f{}x",
        "{{}}{}",
        "commentary to=functions.f{}",
        "f{{a b{}c",
        "f\n<arg_key>a</arg_key>\n<arg_value>{}</arg_value>{}x",
    ],
)
def test_a_text_full_of_white_space_is_read_in_linear_time(name: str, text: str) -> None:
    def took_s(given: str) -> float:
        began = time.process_time()
        with suppress(NoCall):
            FORMS[name].syntax.parse_calls(given, {"f": {}})
        return time.process_time() - began

    short, long = (min(took_s(text.format(*[" " * length] * 2)) for _ in range(3)) for length in (4_000, 40_000))
    assert long < 30 * short + 0.05


def test_exponentially_many_choices_are_refused_in_tagged_forms(bound: Bound) -> None:
    levels = {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(27)}
    parameter = {"$ref": "#/$defs/a0"}
    schema = {"type": "object", "$defs": levels | {"a27": {"type": "string"}}, "properties": {"p": parameter}}
    function = FunctionDefinition(name="f", parameters=schema)
    with pytest.raises(ApiError, match="too many choices"):
        bound[1].of_answer(AnswerConstraints([function], required=True), Forms(FORMS["qwen-coder"]))


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "description": "finds", "parameters": {"type": "object", "properties": {}}}',
        '{"name": "f", "arguments": {"other": 1}}',
    ],
)
def test_the_definition_of_a_tool_and_unknown_arguments_are_no_call(text: str) -> None:
    parser = AnswerParser(Forms(FORMS["hermes"]), {"f": {"type": "object", "properties": {"a": {}}}})
    said = [parser.push_text(text), parser.flush()]
    assert "".join(each.text for each in said) == text and not any(each.calls for each in said)


def test_a_schema_of_many_levels_is_refused(bound: Bound) -> None:
    levels = {f"a{n}": {"type": "array", "items": {"$ref": f"#/$defs/a{n + 1}"}} for n in range(3000)}
    with pytest.raises(ApiError, match="takes more than"):
        bound[1].of_answer(
            AnswerConstraints(schema={"$ref": "#/$defs/a0", "$defs": levels | {"a3000": {"type": "string"}}})
        )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama", '{"type": "function", "name": "weather", "parameters": {"city": 1}}'),
        ("llama", '\n{"name": "weather", "parameters": {"city": 1}}'),
        ("harmony", '<|start|>assistant to=functions.weather<|channel|>commentary<|message|>{"city": 1}'),
        ("harmony", ' to=functions.weather<|channel|>commentary<|message|>{"city": 1}'),
    ],
)
def test_strict_arguments_are_bound_for_every_opening(name: str, text: str, bound: Bound) -> None:
    assert not is_kept_to(AnswerConstraints(FUNCTIONS), Forms(FORMS[name]), bound, text)


def test_calls_of_functions_that_are_not_strict_are_unbound(bound: Bound) -> None:
    free = [FunctionDefinition(name="g", parameters={"type": "object", "properties": {"n": {"type": "integer"}}})]
    for name, form in FORMS.items():
        for arguments in ({"n": 3}, {"n": "x", "more": [1]}, {}):
            assert is_kept_to(
                AnswerConstraints(free, several=False), Forms(form), bound, form.format_calls([("g", arguments)])
            ), name


def test_lists_of_gemma_keep_min_and_max_items(bound: Bound) -> None:
    form = FORMS["gemma-4"]
    items = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}
    function = FunctionDefinition(name="g", parameters={"properties": {"a": items}, "required": ["a"]})
    fits = [
        is_kept_to(
            AnswerConstraints([function], required=True),
            Forms(form),
            bound,
            form.format_calls([("g", {"a": [7] * count})]),
        )
        for count in range(5)
    ]
    assert fits == [False, False, True, True, False]


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=60, deadline=None)
@given(schema=st.dictionaries(st.sampled_from(WORDS), JSON, max_size=5))
def test_any_schema_is_bound_or_refused(name: str, bound: Bound, schema: dict[str, Any]) -> None:
    form = FORMS[name]
    function = FunctionDefinition(name="weather", parameters=schema)
    with suppress(ApiError):
        bound[1].of_answer(AnswerConstraints([function], required=True), Forms(form))
    answer = read([form.format_calls(CALLS[:1])], Forms(form), schemas={"weather": schema})
    assert [call.name for call in answer.calls] == ["weather"]


@pytest.mark.parametrize("name", FORMS)
def test_optional_calls_are_bound_where_they_are_strict(name: str, bound: Bound) -> None:
    form, free = FORMS[name], AnswerConstraints(FUNCTIONS)
    assert is_kept_to(free, Forms(form), bound, form.lead + "Hello")
    assert is_kept_to(free, Forms(form), bound, form.format_calls([GOOD]))
    assert not is_kept_to(free, Forms(form), bound, form.format_calls(BAD[:1]))
    both = AnswerConstraints(
        FUNCTIONS, schema={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    )
    assert is_kept_to(both, Forms(form), bound, form.format_calls([GOOD]))
    assert is_kept_to(both, Forms(form), bound, form.lead + '{"a": 1}')
    assert not is_kept_to(both, Forms(form), bound, form.lead + '{"a": "b"}')
    assert not is_kept_to(both, Forms(form), bound, "Hello")
