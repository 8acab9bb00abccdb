"""A chat of any protocol: from messages to a prompt, and from tokens to messages."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from splitnet.images import KEPT_PIXELS, MOST_BYTES, ImageError, Prompt, images_of, without_images
from splitnet.serve.admission import ApiClient
from splitnet.serve.answer_records import random_seed
from splitnet.serve.answers.call_forms import PLAIN, Forms
from splitnet.serve.answers.grammars import AnswerConstraints, Function
from splitnet.serve.answers.parser import AnswerParser, ParsedParts, ToolCall
from splitnet.serve.answers.sampling import Sampling, ScoredToken
from splitnet.serve.failures import ApiError
from splitnet.serve.generation import Ended, Finish, GenerationRequest, Numbered, ScoredPrompt, TextDelta
from splitnet.serve.request_gate import REQUEST_CALLBACKS, cancel_on_disconnect
from splitnet.serve.responses import AnswerWriter, ServedModel

MAX_SCORES = 2**19  # Scores of one request's prompt tokens, including scores of the likeliest alternatives


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A request for a chat or for the continuation of a text, independent of any protocol.

    Messages have the form that chat templates expect: `role`; `content`, one string, or parts if there are images (see
    `splitnet.serve.message_parts`); for assistants `reasoning_content`
    and `tool_calls` (`id`, `function` with `name` and `arguments`, an object); for tools `tool_call_id`.
    """

    messages: Sequence[dict[str, Any]]
    functions: Sequence[Function] = ()  # the functions that the model may call
    to_call: Sequence[Function] = ()  # the model must call one of these functions; empty: no call is required
    several_calls: bool = True
    answer_schema: Mapping[str, Any] | None = None  # the JSON schema that the answer must fit; None: the answer is text
    rule: str | None = None  # a grammar that the answer must match, see `AnswerConstraints`
    schema_param: str = "response_format"  # the parameter of the request that gives the schema or the grammar
    # Variables for the chat template besides messages and tools, by the parameter of the request that gives them.
    variables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)  # see `sampling_of`
    max_tokens: int | None = None  # maximum tokens of each answer; None: as many as the context has room for
    suffix: str | None = None  # the text after the gap that the model fills; None: the request has no gap
    is_text: bool = False  # the last message is a bare text that the answer continues; calls and reasoning stay text
    fits: bool = True  # the context must have room for `max_tokens`; if False, answers may end with the context
    choices: int = 1
    stop_strings: Sequence[str] = ()
    top_logprobs: int | None = None  # see `GenerationRequest`
    stop_tokens: Collection[int] = ()
    ignores_ends: bool = False
    scores_prompt: bool = False
    last_tokens: int | None = None  # how many last tokens of the prompt are read; None: all
    begins_answer: bool = True  # the prompt ends with the marks that begin an answer
    continues_last_message: bool = False  # the answer continues the last message, which is from the assistant
    echoes: bool = False  # the text of the last message is sent before the answer

    @property
    def restricts_calls(self) -> bool:
        """Whether a grammar must restrict the calls of an answer that may also be text."""
        return not self.several_calls or any(function.strict for function in self.functions)


@dataclass(frozen=True)
class Delta:
    """The new part of one message of the assistant."""

    choice: int  # the index of the answer in the request
    text: str = ""
    reasoning: str = ""
    calls: Sequence[ToolCall] = ()  # newly completed calls
    scored: tuple[ScoredToken, ...] = ()
    finish: Finish | Literal["tool_calls"] | None = None  # why the answer ends here; None: the answer continues
    stopped: str | None = None  # the stop string that ended the answer
    tokens: tuple[int, ...] = ()  # new token ids
    scored_prompt: tuple[ScoredToken, ...] = ()


def sampling_of(served: ServedModel, given: Mapping[str, Any]) -> Sampling:
    """The sampling of a request. given: fields of `Sampling`; a field that is missing or None gets its default.

    Raises ApiError if the model does not know a token in `bias`.
    """
    given = {name: value for name, value in given.items() if value is not None}
    served.prompts.check_known([token for token, _ in given.get("bias", ())], "logit_bias")
    chosen: dict[str, Any] = {**asdict(served.defaults), **given}
    chosen["top_k"] = max(chosen["top_k"], 0)
    seed = given.get("seed")
    chosen["seed"] = random_seed() if seed is None else seed % 2**64
    return Sampling(**chosen)


def check_scores(prompts: Sequence[Sequence[int]], top: int | None) -> None:
    """Raises ApiError if the prompts need more than `MAX_SCORES` scores. top: scored alternatives to each token."""
    scores = sum(map(len, prompts)) * (1 + (top or 0))
    if scores > MAX_SCORES:
        many = f"{scores} scores of prompts are more than {MAX_SCORES}"
        raise ApiError(400, f"{many}: ask for fewer logprobs or fewer prompts at once", param="logprobs")


async def prompt_of(served: ServedModel, request: Request, chat: Chat) -> Prompt:
    """The prompt of a chat, ready for the next answer. Raises ApiError if the request cannot be honoured."""
    if images := images_of(chat.messages):
        return await _prompt_with_images(served, request, chat, images)
    return Prompt(await _tokens_of(served, request, chat))


async def _prompt_with_images(served: ServedModel, request: Request, chat: Chat, images: Sequence[Any]) -> Prompt:
    if not served.sees_images:
        blind = f"the model {served.name!r} does not see images: send text alone, or ask a model that does"
        raise ApiError(400, blind, param="messages")
    for param, is_given in (
        ("n", chat.choices > 1),
        ("prompt_logprobs", chat.scores_prompt),
        ("truncate_prompt_tokens", chat.last_tokens is not None),
        ("suffix" if chat.suffix is not None else "raw", chat.is_text),
    ):
        if is_given:
            raise ApiError(400, f"{param} is not supported with images: leave it out", param=param)
    messages, described = without_images(chat.messages), [_described(function) for function in chat.functions]
    options = {"answer": chat.begins_answer, "goes_on": chat.continues_last_message}
    client: ApiClient = request.state.client
    try:
        if urls := [part["url"] for part in images if "url" in part]:
            _reserve(served, client, MOST_BYTES * 4 // 3)  # in base64
            fetched = iter(await cancel_on_disconnect(request, served.image_hosts.fetch_all(urls, client)))
            # More images than a prompt may have are not fetched; they are counted and refused when images are read.
            images = [{"data": next(fetched, "")} if "url" in part else part for part in images]
        read = [part["data"] for part in images]
        make = partial(served.prompts.of_chat_with_images, messages, read, described, chat.variables, **options)
        # A small file may hold many pixels, so every image counts as a large input.
        prompt = await served.prepare(request, make, 3 * KEPT_PIXELS)
    except ImageError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_image") from None
    _reserve(served, client, sum(each.nbytes for each in prompt.pixels.values() if isinstance(each, Tensor)))
    return prompt


def _reserve(served: ServedModel, client: ApiClient, size: int) -> None:
    """Reserves bytes for images until the request is answered. Raises ApiError if there are too few."""
    if not served.pixels.reserve(size, client.name):
        raise ApiError(429, "the server has no memory left for these images: try again in a moment", code="overloaded")
    REQUEST_CALLBACKS.get().callback(served.pixels.release, size, client.name)


async def _tokens_of(served: ServedModel, request: Request, chat: Chat) -> list[int]:
    prompts, last = served.prompts, served.prompts.last(chat.last_tokens, chat.max_tokens)
    if chat.suffix is not None:
        text, behind, most = chat.messages[-1]["content"], chat.suffix, chat.max_tokens
        return await served.prepare(request, lambda: prompts.tokens_of_gap(text, behind, (), most))
    if chat.is_text:
        return await served.prepare(request, lambda: prompts.tokens_of_text(chat.messages[-1]["content"], last=last))
    described = [_described(function) for function in chat.functions]
    options: Any = {"answer": chat.begins_answer, "goes_on": chat.continues_last_message, "last": last}
    return await served.prepare(
        request, lambda: prompts.tokens_of_chat(chat.messages, described, chat.variables, **options)
    )


async def with_thinking(
    served: ServedModel, request: Request, chat: Chat, param: str, on: bool | None, effort: str | None
) -> Chat:
    """Adds the variables of the chat template that turn the model's reasoning on or off, and set its effort.

    param: the parameter of the request that asks for these. on, effort: None keeps the default of the model.
    Raises ApiError if `on` is False and the model always reasons.
    """
    if on is None and effort is None:
        return chat
    prompts = served.prompts
    has, reasoning = await served.prepare(
        request, lambda: (prompts.variables(chat.functions or None), prompts.forms.reasoning)
    )
    wanted = {"enable_thinking": on, "thinking": on, "reasoning_effort": effort}
    variables = {name: value for name, value in wanted.items() if name in has and value is not None}
    if on is False and reasoning is not None and not has & {"enable_thinking", "thinking"}:
        raise ApiError(400, f"{param}: this model always thinks: do not turn thinking off", param=param)
    return replace(chat, variables={param: variables})


async def answer_chat(
    served: ServedModel,
    request: Request,
    chat: Chat,
    answer: AnswerWriter[Delta | Ended],
    *,
    stream: bool,
    prompt: Prompt | None = None,
) -> Response:
    """Runs a chat; `answer` writes the `Delta`s of the messages and the final `Ended`.

    prompt: None: it is made from the messages. Raises ApiError if the request cannot be honoured.
    """
    prompts = served.prompts
    prompts.check_known(chat.stop_tokens, "stop_token_ids")
    if prompt is None:
        prompt = await prompt_of(served, request, chat)
    tokens = prompt.tokens
    if chat.scores_prompt:
        check_scores([tokens], chat.top_logprobs)
    forms, begun = (PLAIN, "") if chat.is_text else (prompts.forms, prompts.begun(tokens))
    bounds, grammar, calls = _bounds_of(chat), None, forms.calls if chat.functions else None
    if bounds is not None:
        if chat.ignores_ends or chat.sampling.get("min_tokens"):
            raise ApiError(400, "calls set where an answer ends: leave out ignore_eos and min_tokens", param="tools")
        reasoning = forms.reasoning
        thinks = reasoning is not None and begun == reasoning.opening
        # The model may reason before the part that the grammar restricts, unless the prompt has closed the reasoning.
        thinks_no_more = reasoning is not None and prompts.ends_with(tokens, reasoning.closing)
        bound = replace(forms, reasoning=None) if thinks_no_more else forms
        grammar = await served.prepare(request, lambda: served.grammars.of_answer(bounds, bound, thinks=thinks))
    ask = GenerationRequest(
        prompt=tokens,
        pixels=prompt.pixels,
        max_tokens=prompts.room_for(tokens, chat.max_tokens, fits=chat.fits),
        sampling=sampling_of(served, chat.sampling),
        choices=chat.choices,
        # Stop strings end only text: an answer that must be a call has no stop strings, and a grammar protects calls.
        stop_strings=() if chat.to_call else chat.stop_strings,
        unstopped_parts=(calls.openings, calls.closing)
        if calls and chat.restricts_calls and chat.stop_strings
        else ((), ""),
        top_logprobs=chat.top_logprobs,
        grammar=grammar,
        continues_prompt=chat.is_text or chat.continues_last_message,
        stop_tokens=chat.stop_tokens if chat.suffix is None else prompts.infill_ends,
        ignores_ends=chat.ignores_ends,
        score_prompt=chat.scores_prompt,
        owner=request.state.client.name,
        reserve_max_tokens=chat.max_tokens is not None and chat.fits,
    )
    events = _deltas(served.running(request.state.client, [ask], answer.id), chat, forms, begun)
    return await served.respond(request, events, answer, stream=stream)


def _described(function: Function) -> dict[str, Any]:
    """A function in the form that chat templates expect."""
    told = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {"type": "function", "function": {name: value for name, value in told.items() if value is not None}}


def _bounds_of(chat: Chat) -> AnswerConstraints | None:
    if chat.to_call:
        return AnswerConstraints(chat.to_call, required=True)
    text_is_bound = chat.answer_schema is not None or chat.rule is not None
    functions = chat.functions if text_is_bound or chat.restricts_calls else ()
    if not functions and not text_is_bound:
        return None
    return AnswerConstraints(functions, False, chat.several_calls, chat.answer_schema, chat.rule, chat.schema_param)


async def _deltas(
    running: AsyncGenerator[Numbered], chat: Chat, forms: Forms, begun: str
) -> AsyncGenerator[Delta | Ended]:
    schemas = {one.name: one.parameters or {} for one in chat.functions} if chat.functions else None
    bare = chat.answer_schema is None and chat.rule is None
    parsers = [AnswerParser(forms, schemas, begun, bare=bare) for _ in range(chat.choices)]
    called = [False] * chat.choices
    echoed = [chat.messages[-1]["content"] if chat.echoes else ""] * chat.choices
    async with aclosing(running):
        async for _, event in running:
            if isinstance(event, TextDelta):
                number = event.choice
                said = parsers[number].push_text(event.text)
                last = parsers[number].flush() if event.finish else ParsedParts()
                calls = (said.calls + last.calls)[: None if chat.several_calls else 1]
                called[number] |= bool(calls)
                finish = "tool_calls" if event.finish == "stop" and called[number] else event.finish
                text, reasoning = echoed[number] + said.text + last.text, said.reasoning + last.reasoning
                echoed[number] = ""
                yield Delta(number, text, reasoning, calls, event.scored, finish, event.stopped, event.tokens)
            elif isinstance(event, ScoredPrompt):
                yield Delta(0, scored_prompt=event.scored)
            elif isinstance(event, Ended):
                yield event
