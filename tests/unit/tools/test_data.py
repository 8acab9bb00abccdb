"""Training data: accepted formats, and errors for all other files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitnet.errors import DataError
from splitnet.tools.tune.data import FIELDS, Form, read_examples
from tests.tiers import examples

CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
SAMPLES: dict[Form, dict[str, Any]] = {
    "chat": CHAT,
    "completion": {"prompt": "one two", "completion": " three"},
    "classification": {"text": "it is dark", "label": "lights"},
    "text": {"text": "any text"},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


def write(file: Path, *examples: Any) -> Path:
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return file


@pytest.mark.parametrize("form", SAMPLES)
def test_the_first_example_decides_the_format(file: Path, form: Form) -> None:
    examples = read_examples(write(file, {**SAMPLES[form], "source": 7, "id": "a"}, SAMPLES[form]))
    assert examples.form == form
    assert [row.fields for row in examples.rows] == [SAMPLES[form]] * 2


def test_lines_are_counted_like_in_an_editor(file: Path) -> None:
    file.write_bytes("\ufeff\n".encode() + b'{"text": "a"}\r\n\r\n' + '{"text": "b\u2028c"}'.encode())
    examples = read_examples(file)
    assert [(row.line, row.fields["text"]) for row in examples.rows] == [(2, "a"), (4, "b\u2028c")]


def test_labels_may_be_numbers(file: Path) -> None:
    examples = read_examples(write(file, {"text": "a", "label": 1}, {"text": "b", "label": 0}))
    assert examples.labels == ["0", "1"]


def test_white_space_around_a_label_is_ignored(file: Path) -> None:
    examples = read_examples(write(file, {"text": " a", "label": "cat"}, {"text": "b", "label": " cat\n"}))
    assert examples.labels == ["cat"] and examples.rows[0].fields["text"] == " a"


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"text": "a"', "line 2: no JSON at character 13"),
        ("[]", "line 2: an example is an object"),
        ('{"label": "a"}', "line 2: 'text' is missing"),
        ('{"text": 3}', "line 2: 'text' must be a text in quotes"),
        ('{"text": " "}', "line 2: 'text' is empty"),
        ('{"text": "\\ud800"}', "line 2: 'text' holds half a character"),
        ("[" * 100_000, "line 2"),
        (f'{{"text": "a", "n": {"7" * 6000}}}', "line 2: a number in the line is NaN, infinite or too long"),
        ('{"text": "a", "n": NaN}', "line 2: a number in the line is NaN"),
    ],
)
def test_a_bad_line_is_named(file: Path, bad: str, said: str) -> None:
    file.write_text('{"text": "a"}\n' + bad)
    with pytest.raises(DataError, match=said):
        read_examples(file)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "must be a list"),
        ([], "must be a list"),
        (["hello"], "message 1 must be an object"),
        ([{"role": "user", "content": None}], "message 1 must be an object"),
        ([{"role": "human", "content": "a"}], "role 'human': take one of system, user"),
        ([{"role": "user", "content": "a"}], "no message of the assistant"),
        (CHAT["messages"][1:], "the chat begins with the assistant: begin with a message of the user"),
        ([CHAT["messages"][0], {**CHAT["messages"][1], "weight": 0}], "no message of the assistant of weight 1"),
        ([{**CHAT["messages"][0], "weight": 1}], "message 1 has the key 'weight'"),
        ([CHAT["messages"][0], {**CHAT["messages"][1], "weight": 0.5}], "message 2 has the weight 0.5"),
        ([CHAT["messages"][0], {**CHAT["messages"][1], "weight": 2}], "message 2 has the weight 2"),
        (
            [CHAT["messages"][0], {**CHAT["messages"][1], "function_call": {"name": "f"}}],
            "message 2 has the key 'function_call'",
        ),
    ],
)
def test_the_error_of_a_bad_chat_says_why(file: Path, messages: Any, said: str) -> None:
    with pytest.raises(DataError, match=f"line 1: .*{said}"):
        read_examples(write(file, {"messages": messages}))


USER = CHAT["messages"][0]


def calling(*calls: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [*calls], **more}


def call(arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}, **more}


def answer(content: str = "rain", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


def test_tool_calls_are_read_in_the_form_of_chat_templates(file: Path) -> None:
    function = {"parameters": {"type": "object"}, "name": "f", "strict": True, "description": None}
    told = {"id": "x", "type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}
    as_text = calling(call('{"a": [1]}', id="x"), content=None, refusal=None)
    as_object = calling(call({"a": [1]}, id="x"), call("", id="y"), content="Wait.", weight=0)
    answers = [answer("2", tool_call_id="y"), answer("1")]
    chat = {"messages": [USER, as_text, answer(tool_call_id="x"), CHAT["messages"][1]], "parallel_tool_calls": False}
    both = {"messages": [USER, as_object, *answers, CHAT["messages"][1]], "tools": []}
    tools = [{"type": "function", "function": function}]
    first, second = read_examples(write(file, {**chat, "tools": tools}, both)).rows
    assert first.fields == {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [told]},
            {"role": "tool", "content": "rain", "tool_call_id": "x"},
            CHAT["messages"][1],
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    }
    assert list(first.fields["tools"][0]["function"]) == ["name", "parameters"], "as the gateway tells them"
    said = second.fields["messages"]
    assert "tools" not in second.fields and said[1]["weight"] == 0
    assert [one["function"]["arguments"] for one in said[1]["tool_calls"]] == [{"a": [1]}, {}]
    assert [one["tool_call_id"] for one in said[2:4]] == ["y", "x"], "a result without an id is of the first open call"


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ({"functions": [{"name": "f"}]}, "the chat has the key 'functions': remove it"),
        ({"tools": "f"}, "the chat: 'tools' must be a list"),
        ({"tools": [{"type": "function"}]}, "tool 1 must be an object with function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tool 1 must be an object with name"),
        ({"tools": [{"function": {"name": "f", "returns": 1}}]}, "tool 1 has the key 'returns'"),
        ({"parallel_tool_calls": "no"}, "'parallel_tool_calls' must be true or false"),
        (
            {"messages": [USER, calling(call(), call())], "parallel_tool_calls": False},
            "'parallel_tool_calls' is false, and a message has several calls",
        ),
        ({"messages": [USER, {**USER, "tool_calls": [call()]}]}, "message 2 has the key 'tool_calls'"),
        ({"messages": [USER, calling("f")]}, "a call of message 2 must be an object with function"),
        ({"messages": [USER, calling(call("{"))]}, "no JSON at character 2 of a call of message 2"),
        ({"messages": [USER, calling(call("[]"))]}, "a call of message 2: 'arguments' must be an object"),
        ({"messages": [USER, calling(call('{"a": NaN}'))]}, "a number in a call of message 2 is NaN"),
        ({"messages": [USER, calling(call("[" * 10**5))]}, "nested too deep"),
        ({"messages": [USER, calling(call('{"a": "\\ud800"}'))]}, "'messages' holds half a character"),
        ({"messages": [USER, calling(call(index="0"))]}, "a call of message 2: 'index' must be a whole number"),
        ({"messages": [USER, calling(call(id="x"), call(id="x"))]}, "has the id 'x' of another call without an answer"),
        ({"messages": [USER, calling(call()), answer(tool_call_id="z")]}, "message 3 answers the call 'z'"),
        ({"messages": [USER, calling(call()), answer(), answer()]}, "message 4 answers the call ''"),
    ],
)
def test_an_unsupported_key_of_a_chat_is_refused(file: Path, chat: Any, said: str) -> None:
    with pytest.raises(DataError, match=f"line 2: .*{said}"):
        read_examples(write(file, CHAT, {**CHAT, **chat}))


def test_ids_of_tool_calls_may_recur_and_missing_ids_are_made(file: Path) -> None:
    turns = [USER, calling(call(id="call_1"), call()), answer(), answer(), USER, calling(call(id="call_1", index=0))]
    last = {**CHAT["messages"][1], "weight": 1.0, "annotations": []}
    (example,) = read_examples(write(file, {"messages": [*turns, answer(), last]})).rows
    said = example.fields["messages"]
    assert [one["id"] for one in said[1]["tool_calls"]] == ["call_1", "call_0"]
    assert [one["tool_call_id"] for one in said if one["role"] == "tool"] == ["call_1", "call_0", "call_1"]


def test_the_error_of_an_unknown_format_lists_all_formats(file: Path) -> None:
    with pytest.raises(DataError, match=r'line 1: no example with the fields question, answer: give one of .*"prompt"'):
        read_examples(write(file, {"question": "a", "answer": "b"}))


def test_held_out_data_must_have_the_format_of_the_training_data(file: Path) -> None:
    with pytest.raises(DataError, match="line 1: 'label' is missing"):
        read_examples(write(file, {"text": "a"}), "classification")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(DataError, match="holds no example"):
        read_examples(file)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(tmp_path / "none")
    (tmp_path / "latin").write_bytes(b'{"text": "\xe9"}')
    with pytest.raises(DataError, match=r"not UTF-8 text .byte 10"):
        read_examples(tmp_path / "latin")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from(["text", "label", "prompt", "completion", "messages"]), json_values)


@settings(max_examples=examples(200), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary() | st.lists(objects).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()))
def test_any_content_is_read_or_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        examples = read_examples(file)
    except DataError:
        return
    assert examples.rows
    assert all(list(row.fields) == list(FIELDS[examples.form]) for row in examples.rows)
