"""A chat, whatever protocol asks for it: from its messages to a prompt, and from the tokens to messages."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from splitnet.serve.generation import Ask, Ended, Finish, Numbered, Piece
from splitnet.serve.grammars import Function, Grammar
from splitnet.serve.responses import Answer, ServedModel
from splitnet.serve.sampling import Sampling, ScoredToken
from splitnet.serve.text import ToolCall, ToolCallParser


@dataclass(frozen=True, kw_only=True)
class Chat:
    """What is wanted of a chat.

    Messages are as chat templates expect them: `role`, `content` (text in one piece), of assistants `reasoning_content`
    and `tool_calls` (`id`, `function` with `name` and `arguments`, an object), of tools `tool_call_id`.
    """

    messages: Sequence[dict[str, Any]]
    functions: Sequence[Function] = ()  # that the model may call
    to_call: Sequence[Function] = ()  # one of these must be called; none: the model may do as it likes
    several_calls: bool = True
    answer_schema: Mapping[str, Any] | None = None  # the JSON schema that the answer keeps to; None: it is text
    schema_param: str = "response_format"  # the parameter that gives it
    # what the chat template is given besides messages and tools, by the parameter that gives it
    variables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)  # see `sampling_of`
    max_tokens: int | None = None  # of each answer; None: as many as there is room for
    fits: bool = True  # whether there must be room for them; otherwise an answer ends where the context does
    choices: int = 1
    stop_strings: Sequence[str] = ()
    top_logprobs: int | None = None  # see `Ask`

    @property
    def binds_calls(self) -> bool:
        """Whether calls, if the model makes some, must keep to anything."""
        return not self.several_calls or any(function.strict for function in self.functions)


@dataclass(frozen=True)
class Delta:
    """What is new of one message of the assistant."""

    choice: int  # which answer of the request
    text: str = ""
    reasoning: str = ""
    calls: Sequence[ToolCall] = ()  # those that are complete now
    scored: tuple[ScoredToken, ...] = ()
    finish: Finish | Literal["tool_calls"] | None = None  # why the answer ends here; None: it goes on
    stopped: str | None = None  # the stop string that ended it


def sampling_of(served: ServedModel, given: Mapping[str, Any]) -> Sampling:
    """How tokens are chosen, where a request gives some of the fields of `Sampling`, of which None is none.

    Raises ApiError if a token in `bias` is not known.
    """
    given = {name: value for name, value in given.items() if value is not None}
    served.prompts.check_known([token for token, _ in given.get("bias", ())], "logit_bias")
    chosen: dict[str, Any] = {**asdict(served.defaults), **given}
    chosen["top_k"] = max(chosen["top_k"], 0)
    seed = given.get("seed")
    chosen["seed"] = secrets.randbits(64) if seed is None else seed % 2**64
    return Sampling(**chosen)


async def prompt_of(served: ServedModel, request: Request, chat: Chat) -> list[int]:
    """The tokens of a chat, ready for the next answer. Raises ApiError for what cannot be honoured."""
    described = [_described(function) for function in chat.functions]
    return await served.preparing.run(
        len(await request.body()), lambda: served.prompts.of_chat(chat.messages, described, chat.variables)
    )


async def answer_chat(
    served: ServedModel,
    request: Request,
    chat: Chat,
    answer: Answer[Delta | Ended],
    *,
    stream: bool,
    prompt: list[int] | None = None,
) -> Response:
    """Runs a chat; `answer` is told the `Delta` of each message, and at last the tokens that it took.

    prompt: its tokens; None: those of its messages. Raises ApiError for what cannot be honoured.
    """
    prompts, size = served.prompts, len(await request.body())
    if prompt is None:
        prompt = await prompt_of(served, request, chat)
    ask = Ask(
        prompt=prompt,
        max_tokens=prompts.room_for(prompt, chat.max_tokens, fits=chat.fits),
        sampling=sampling_of(served, chat.sampling),
        choices=chat.choices,
        stop_strings=chat.stop_strings,
        top_logprobs=chat.top_logprobs,
        grammar=await served.preparing.run(size, _grammar_of, served, chat),
        owner=request.state.client.name,
    )
    events = _deltas(served.running(request.state.client, [ask], answer.id), chat)
    return await served.respond(request, events, answer, stream=stream)


def _described(function: Function) -> dict[str, Any]:
    """A function as chat templates expect it."""
    told = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {"type": "function", "function": {name: value for name, value in told.items() if value is not None}}


def _grammar_of(served: ServedModel, chat: Chat) -> Grammar | None:
    grammars = served.grammars
    if chat.to_call:
        return grammars.of_calls(chat.to_call, required=True)
    if chat.functions and chat.binds_calls:
        return grammars.of_calls(chat.functions, required=False, several=chat.several_calls)
    return None if chat.answer_schema is None else grammars.of_schema(dict(chat.answer_schema), chat.schema_param)


async def _deltas(running: AsyncGenerator[Numbered], chat: Chat) -> AsyncGenerator[Delta | Ended]:
    messages = [_Message(chat) for _ in range(chat.choices)]
    async with aclosing(running):
        async for _, event in running:
            if isinstance(event, Piece):
                yield messages[event.choice].delta(event)
            elif isinstance(event, Ended):
                yield event


class _Message:
    """A message as it grows."""

    def __init__(self, chat: Chat) -> None:
        self._parser = ToolCallParser() if chat.functions else None
        self._called = False

    def delta(self, piece: Piece) -> Delta:
        text, calls = self._without_calls(piece)
        self._called |= bool(calls)
        finish = "tool_calls" if piece.finish == "stop" and self._called else piece.finish
        return Delta(piece.choice, text, "", calls, piece.scored, finish, piece.stopped)

    def _without_calls(self, piece: Piece) -> tuple[str, list[ToolCall]]:
        if self._parser is None:
            return piece.text, []
        text, calls = self._parser.push(piece.text)
        if piece.finish:
            last_text, last_calls = self._parser.rest()
            text, calls = text + last_text, calls + last_calls
        return text, calls
