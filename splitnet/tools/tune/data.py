"""Training data: files of JSON lines, which are checked completely before training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal, NoReturn

from splitnet.errors import DataError
from splitnet.images import DATA_URL, ImageError, image, image_file

Form = Literal["chat", "completion", "classification", "text", "prompt"]

FIELDS: dict[Form, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
    "prompt": ("prompt",),  # a prompt without an answer
}
"""Fields of an example of each form. The first form that matches a file's first example is the form of the file."""

_TEXTS = {"role": str, "content": str, "name": str}
_OF_ROLES: dict[str, dict[str, Any]] = {"system": _TEXTS, "user": _TEXTS, "tool": {**_TEXTS, "tool_call_id": str}}
_OF_ROLES["user"] = {**_TEXTS, "content": str | list}
_OF_ROLES["assistant"] = {**_TEXTS, "reasoning_content": str, "tool_calls": list, "weight": int | float}
"""Fields that messages of each role may have, with OpenAI's names."""

_TOOL = {"name": str, "description": str, "parameters": dict, "strict": bool}
_KINDS = {str: "a text in quotes", list: "a list", dict: "an object", bool: "true or false", int: "a whole number"}
_KINDS |= {int | float: "a number", str | list: "a text in quotes, or a list of texts and images"}
_OF_REQUESTS = "functions", "function_call", "tool_choice", "response_format", "system"
"""Keys next to `messages` that change a model's answers, but that chat templates do not use."""

TEMPLATE = "{text} Label:"  # The text of a classified example before the example's label


@dataclass(frozen=True, slots=True)
class Example:
    """One example and the number of its line, from 1."""

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

    @property
    def has_images(self) -> bool:
        messages = (one for row in self.rows for one in row.fields.get("messages", ()))
        return any(isinstance(one["content"], list) for one in messages)

    def fail(self, row: Example, problem: str) -> NoReturn:
        raise DataError(f"{self.path}, line {row.line}: {problem}")


def read_examples(path: Path, form: Form | None = None, *, answered: bool = True) -> Examples:
    """Reads a file with one JSON object per line; empty lines and unknown fields are skipped.

    form: required form of the examples; None: the form of the first example. answered: refuse chats without an answer.
    Raises DataError if the file or a line cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a file of JSON lines") from None
    rows: list[Example] = []
    # Not splitlines(), which also splits at characters that are allowed in JSON strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = _read_json(line)
            if not isinstance(fields, dict):
                raise ValueError(f"an example is an object in braces, such as {_SAMPLES}")
            form = form or _form_of(fields)
            rows.append(Example(number, _checked(fields, form, answered)))
            for message in rows[-1].fields.get("messages", ()):
                if isinstance(message["content"], list):
                    message["content"] = _content(message["content"], path.parent)
        except RecursionError:
            raise DataError(f"{path}, line {number}: nested too deep for an example") from None
        except (ValueError, ImageError) as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    if form is None:
        raise DataError(f"{path} holds no example: write one JSON object per line, such as {_SAMPLES}")
    return Examples(path, form, rows)


def _read_json(text: str, what: str = "the line") -> Any:
    try:
        return json.loads(text, parse_constant=int)  # refuses NaN and Infinity
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON at character {error.pos + 1} of {what} ({error.msg}): give a whole object") from None
    except ValueError:
        raise ValueError(f"a number in {what} is NaN, infinite or too long: write it as a text in quotes") from None


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
        return _checked_chat(fields, answered)
    if form == "classification" and isinstance(fields["label"], int):
        fields = {**fields, "label": str(fields["label"])}
    for name in FIELDS[form]:
        if not isinstance(fields[name], str):
            raise ValueError(f"{name!r} must be a text in quotes")
        if not fields[name].strip() and name != "prompt":
            raise ValueError(f"{name!r} is empty: fill it or remove the line")
        _refuse_surrogates(name, fields[name])
    # A label is written after one space, so labels that differ only in surrounding white space are the same class.
    return {name: fields[name].strip() if name == "label" else fields[name] for name in FIELDS[form]}


def _checked_chat(given: dict[str, Any], answered: bool) -> dict[str, Any]:
    kinds = {"messages": list, "tools": list, "parallel_tool_calls": bool}
    named = {name: value for name, value in given.items() if name in (*kinds, *_OF_REQUESTS)}
    chat = _known("the chat", named, kinds)
    waiting: dict[str, bool] = {}  # by id of a call: whether the call's result is missing
    numbered = enumerate(chat.get("messages", ()), start=1)
    chat["messages"] = messages = [_checked_message(f"message {number}", one, waiting) for number, one in numbered]
    if not messages:
        raise ValueError("'messages' must be a list of messages")
    if messages[0]["role"] == "assistant":
        raise ValueError("the chat begins with the assistant: begin with a message of the user or the system")
    learned = [one for one in messages if one["role"] == "assistant" and one.get("weight", 1)]
    if answered and not any(one["content"].strip() or "tool_calls" in one for one in learned):
        raise ValueError("no message of the assistant of weight 1, so there is nothing to learn: add the answer")
    if not chat.pop("parallel_tool_calls", True) and any(len(one.get("tool_calls", ())) > 1 for one in messages):
        raise ValueError("'parallel_tool_calls' is false, and a message has several calls: leave out one of them")
    for number, tool in enumerate(chat.get("tools", ()), start=1):
        chat["tools"][number - 1] = function = _function(f"tool {number}", tool, _TOOL)
        function["function"].pop("strict", None)  # `strict` bounds answers, and is not part of the model's prompt
    _refuse_surrogates("messages", json.dumps(chat, ensure_ascii=False))
    return chat


def _checked_message(where: str, message: Any, waiting: dict[str, bool]) -> dict[str, Any]:
    """A message in the format of chat templates, see `splitnet.serve.chat.Chat`."""
    role = message.get("role") if isinstance(message, dict) else "user"
    if role not in tuple(_OF_ROLES):
        raise ValueError(f"{where} has the role {role!r}: take one of {', '.join(_OF_ROLES)}")
    if role == "assistant" and message.get("tool_calls") and message.get("content") is None:
        message = {**message, "content": ""}
    said = _known(where, message, _OF_ROLES[role], ("role", "content"))
    if said.get("weight", 1) not in (0, 1):
        raise ValueError(f"{where} has the weight {said['weight']}: give 1 to learn it, or 0")
    if "tool_calls" in said:
        said["tool_calls"] = [_checked_call(f"a call of {where}", call, waiting) for call in said["tool_calls"]]
    if role == "tool" and (waiting or "tool_call_id" in said):
        id = said.setdefault("tool_call_id", next((id for id, waits in waiting.items() if waits), ""))
        if not waiting.get(id):
            raise ValueError(f"{where} answers the call {id!r}, which is not there or has an answer: give another")
        waiting[id] = False
    return said


def _content(parts: list[Any], folder: Path) -> list[dict[str, Any]]:
    """A content of texts and images, in the form of `splitnet.images.images_of`. folder: of relative paths."""
    made: list[dict[str, Any]] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image"):
            raise ValueError(f"a part of a message has the type {kind!r}: take 'text' or 'image'")
        if kind == "text":
            made.append(_known("a text", part, {"type": str, "text": str}, ("text",)))
            continue
        given = _known("an image", part, {"type": str, "path": str, "url": str})
        url = DATA_URL.match(given.get("url", ""))
        if ("path" in given) == (url is not None):
            raise ValueError("an image is a file in 'path', or 'url' with data:image/png;base64,...: give one of them")
        made.append(image(given["url"][url.end() :] if url else image_file(folder / given["path"])))
    return made


def _checked_call(where: str, given: Any, waiting: dict[str, bool]) -> dict[str, Any]:
    free = next(name for name in map("call_{}".format, count()) if name not in waiting)
    call = {"id": free, **_function(where, given, {"name": str, "arguments": object})}
    given = call["function"].get("arguments", {})
    call["function"]["arguments"] = _read_json(given or "{}", where) if isinstance(given, str) else given
    _known(where, call["function"], {"name": str, "arguments": dict})
    if waiting.pop(call["id"], False):
        raise ValueError(f"{where} has the id {call['id']!r} of another call without an answer: give each its own")
    waiting[call["id"]] = True
    return call


def _function(where: str, given: Any, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """A tool, or a call of a tool, with its function. Raises ValueError if `given` is neither."""
    kinds_outside = {"id": str, "index": int, "type": str, "function": dict}
    outer = {"type": "function", **_known(where, given, kinds_outside, ("function",))}
    outer.pop("index", None)  # the index of a call in a stream; the list has the same order
    return outer | {"function": _known(where, outer["function"], kinds, ("name",))}


def _known(where: str, given: Any, kinds: Mapping[str, Any], needed: Sequence[str] = ()) -> dict[str, Any]:
    """The non-empty values of an object, in the order of `kinds`. Raises ValueError if a key or a type is wrong."""
    if not isinstance(given, dict) or any(given.get(name) is None for name in needed):
        raise ValueError(f"{where} must be an object with {' and '.join(needed)}, as in OpenAI's format")
    for name, value in given.items():
        if value not in (None, [], {}, "") and name not in kinds:
            raise ValueError(f"{where} has the key {name!r}: remove it (known are {', '.join(kinds)})")
        if value is not None and name in kinds and not isinstance(value, kinds[name]):
            raise ValueError(f"{where}: {name!r} must be {_KINDS[kinds[name]]}")
    return {name: given[name] for name in kinds if given.get(name) not in (None, [])}


def _refuse_surrogates(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} holds half a character (a lone \\ud800 to \\udfff): write the whole one") from None


_SAMPLES = (
    '{"messages": [...]}, {"prompt": "...", "completion": "..."}, {"text": "..."} or {"text": "...", "label": "..."}'
)
