"""Training data: files of JSON lines, checked to the last line before anything else happens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from splitnet.errors import DataError

Form = Literal["chat", "completion", "classification", "text", "prompt"]

FIELDS: dict[Form, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
    "prompt": ("prompt",),  # without what it is answered with
}
"""What an example of each form has; the first form whose fields a file's first example has is that of the file."""

ROLES = ("system", "user", "assistant", "tool")

TEMPLATE = "{text} Label:"  # What a model reads of a text before its label comes


@dataclass(frozen=True, slots=True)
class Example:
    """One example and the line it stands on, counted from 1."""

    line: int
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Examples:
    """All examples of a file, of one form."""

    path: Path
    form: Form
    rows: list[Example]

    @property
    def labels(self) -> list[str]:
        return sorted({row.fields["label"] for row in self.rows if "label" in row.fields})

    def fail(self, row: Example, problem: str) -> NoReturn:
        raise DataError(f"{self.path}, line {row.line}: {problem}")


def read_examples(path: Path, form: Form | None = None, *, answered: bool = True) -> Examples:
    """Reads a file with one JSON object per line; empty lines are skipped, other fields are left alone.

    The examples must be of a form; None: that of the first one. answered: chats without an answer are refused.
    Raises DataError if the file or a line cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a file of JSON lines") from None
    rows: list[Example] = []
    for number, fields in _objects(path, text):
        try:
            form = form or _form_of(fields)
            rows.append(Example(number, _checked(fields, form, answered)))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    if form is None:
        raise DataError(f"{path} holds no example: write one JSON object per line, such as {_SAMPLES}")
    return Examples(path, form, rows)


def _objects(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(): it also splits at characters that may stand within JSON strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: no JSON at character {error.pos + 1} ({error.msg}); every line must be one "
                "whole object"
            ) from None
        except RecursionError:
            raise DataError(f"{path}, line {number}: nested too deep for an example") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: an example is an object in braces, such as {_SAMPLES}")
        yield number, value


def _form_of(fields: dict[str, Any]) -> Form:
    for form, names in FIELDS.items():
        if all(name in fields for name in names):
            return form
    raise ValueError(f"no example with the fields {', '.join(fields) or 'none'}: give one of {_SAMPLES}")


def _checked(fields: dict[str, Any], form: Form, answered: bool) -> dict[str, Any]:
    missing = [name for name in FIELDS[form] if name not in fields]
    if missing:
        raise ValueError(f"{missing[0]!r} is missing; all examples of a file have the same form")
    if form == "chat":
        return {"messages": _checked_messages(fields["messages"], answered)}
    if form == "classification" and isinstance(fields["label"], int):
        fields = {**fields, "label": str(fields["label"])}
    for name in FIELDS[form]:
        if not isinstance(fields[name], str):
            raise ValueError(f"{name!r} must be a text in quotes")
        if not fields[name].strip() and name != "prompt":
            raise ValueError(f"{name!r} is empty: fill it or remove the line")
        _refuse_surrogates(name, fields[name])
    return {name: fields[name] for name in FIELDS[form]}


def _checked_messages(messages: Any, answered: bool) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list of messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f'message {number} must be an object as {{"role": "user", "content": "..."}}')
        if message.get("role") not in ROLES:
            raise ValueError(f"message {number} has the role {message.get('role')!r}: take one of {', '.join(ROLES)}")
        _refuse_surrogates(f"message {number}", message["content"])
    if answered and not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise ValueError("no message of the assistant, so there is nothing to learn: add the answer")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _refuse_surrogates(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} holds half a character (a lone \\ud800 to \\udfff): write the whole one") from None


_SAMPLES = (
    '{"messages": [...]}, {"prompt": "...", "completion": "..."}, {"text": "..."} or {"text": "...", "label": "..."}'
)
