"""Renders chat templates in a bounded process, because the checkpoint's author can write any program in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from splitnet.bounded import BoundedProcess


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    answer: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The text of a conversation, as `tokenizer.apply_chat_template` would make the text. answer: whether the text ends
    with the beginning of an answer. variables: further variables of the template. Raises jinja2.TemplateError if the
    template refuses the messages, fails, or takes too long or too much memory; SplitnetError if no template can be
    rendered here."""
    question = {
        "template": tokenizer.get_chat_template(tools=tools),
        "messages": [{name: value for name, value in one.items() if value is not None} for one in messages],
        "tools": tools,
        "answer": answer,
        "variables": {**tokenizer.special_tokens_map, **variables},
    }
    return _answer(question)


def variables_of(template: str) -> set[str]:
    """The variables that a template uses and does not set, without the variables that every template gets. Raises as
    `render`."""
    return set(_answer({"template": template}))


def _answer(question: dict[str, Any]) -> Any:
    from jinja2 import TemplateError

    answer, error = _process.ask(question)
    if error is not None:
        raise TemplateError(error)
    return answer


_process = BoundedProcess("template")
begin = _process.start_process  # starts the process in advance, which takes a second
