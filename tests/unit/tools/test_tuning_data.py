"""Training data: what is accepted, and what is said of the rest."""

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
def test_the_first_example_tells_the_form(file: Path, form: Form) -> None:
    examples = read_examples(write(file, {**SAMPLES[form], "source": 7}, SAMPLES[form]))
    assert examples.form == form
    assert [row.fields for row in examples.rows] == [SAMPLES[form]] * 2


def test_lines_are_counted_as_an_editor_does(file: Path) -> None:
    file.write_bytes("\ufeff\n".encode() + b'{"text": "a"}\r\n\r\n' + '{"text": "b\u2028c"}'.encode())
    examples = read_examples(file)
    assert [(row.line, row.fields["text"]) for row in examples.rows] == [(2, "a"), (4, "b\u2028c")]


def test_labels_may_be_numbers(file: Path) -> None:
    examples = read_examples(write(file, {"text": "a", "label": 1}, {"text": "b", "label": 0}))
    assert examples.labels == ["0", "1"]


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
    ],
)
def test_a_bad_chat_is_told_why(file: Path, messages: Any, said: str) -> None:
    with pytest.raises(DataError, match=f"line 1: .*{said}"):
        read_examples(write(file, {"messages": messages}))


def test_a_first_line_of_no_form_lists_the_forms(file: Path) -> None:
    with pytest.raises(DataError, match=r'line 1: no example with the fields question, answer: give one of .*"prompt"'):
        read_examples(write(file, {"question": "a", "answer": "b"}))


def test_a_held_out_file_has_the_form_of_the_training_data(file: Path) -> None:
    with pytest.raises(DataError, match="line 1: 'label' is missing"):
        read_examples(write(file, {"text": "a"}), "classification")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(DataError, match="holds no example"):
        read_examples(file)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
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
def test_whatever_a_file_holds_it_is_read_or_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        examples = read_examples(file)
    except DataError:
        return
    assert examples.rows
    assert all(list(row.fields) == list(FIELDS[examples.form]) for row in examples.rows)
