"""What chats and completions share: an answer as chunks of a stream or as a whole, with its usage."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from splitnet.serve.events import DONE, Numbered, framed
from splitnet.serve.failures import failure_of
from splitnet.serve.generation import Ended, Piece, ScoredPrompt
from splitnet.serve.sampling import ScoredToken
from splitnet.serve.text import ToolCall, ToolCallParser


class Answer(ABC):
    """Takes the events of a request and tells them to the client.

    Args:
        model: its name.
        prompt_tokens: of all prompts.

    Attributes:
        id: by which clients know the answer.
    """

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self.id = f"{self.id_prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._answer_tokens = 0
        self._cached_tokens = 0

    @abstractmethod
    def take(self, number: int, event: ScoredPrompt | Piece) -> dict[str, Any] | None:
        """Takes an event of the prompt with this number; gives the choice of a chunk, if there is something to tell."""

    @abstractmethod
    def choices(self) -> list[dict[str, Any]]:
        """All choices as a whole."""

    async def whole(self, events: AsyncGenerator[Numbered]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        async for number, event in events:
            self._take(number, event)
        return {**self._head(self.whole_object), "choices": self.choices(), "usage": self._usage()}

    async def chunks(
        self, first: Numbered, events: AsyncGenerator[Numbered], *, with_usage: bool
    ) -> AsyncGenerator[str]:
        """The events of a stream; an error is the last of them.

        Args:
            first: the first event, which has been waited for already.
        """
        head = self._head(self.chunk_object)
        usage = {"usage": None} if with_usage else {}
        try:
            if (choice := self._take(*first)) is not None:
                yield framed({**head, "choices": [choice], **usage})
            async for number, event in events:
                if (choice := self._take(number, event)) is not None:
                    yield framed({**head, "choices": [choice], **usage})
        except Exception as error:
            yield framed(failure_of(error).reply())
            return
        if with_usage:
            yield framed({**head, "choices": [], "usage": self._usage()})
        yield DONE

    def _take(self, number: int, event: ScoredPrompt | Piece | Ended) -> dict[str, Any] | None:
        if isinstance(event, Ended):
            self._answer_tokens += event.answer_tokens
            self._cached_tokens += event.cached_tokens
            return None
        return self.take(number, event)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._answer_tokens,
            "total_tokens": self._prompt_tokens + self._answer_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


TextOf = Callable[[int], str]


class ChatAnswer(Answer):
    """Messages of the assistant.

    Args:
        choices: how many.
        with_tools: whether calls of tools are looked for.
        only_calls: what is not a whole call is not told.
        with_logprobs: whether tokens are scored.
        text_of: the text of a token, also of a special one.
    """

    id_prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        model: str,
        prompt_tokens: int,
        *,
        choices: int,
        with_tools: bool,
        only_calls: bool,
        with_logprobs: bool,
        text_of: TextOf,
    ) -> None:
        super().__init__(model, prompt_tokens)
        self._choices = [_ChatChoice(index, with_tools, only_calls, with_logprobs, text_of) for index in range(choices)]

    def take(self, number: int, event: ScoredPrompt | Piece) -> dict[str, Any] | None:
        assert isinstance(event, Piece)
        return self._choices[event.choice].take(event)

    def choices(self) -> list[dict[str, Any]]:
        return [choice.whole() for choice in self._choices]


class _ChatChoice:
    """One message as it grows."""

    def __init__(self, index: int, with_tools: bool, only_calls: bool, with_logprobs: bool, text_of: TextOf) -> None:
        self._index = index
        self._only_calls = only_calls
        self._parser = ToolCallParser() if with_tools else None
        self._with_logprobs = with_logprobs
        self._text_of = text_of
        self._begun = False
        self._text = ""
        self._calls: list[ToolCall] = []
        self._scored: list[ScoredToken] = []
        self._finish: str | None = None

    def take(self, piece: Piece) -> dict[str, Any] | None:
        text, calls = self._without_calls(piece)
        delta: dict[str, Any] = {} if self._begun else {"role": "assistant", "content": ""}
        if text:
            delta["content"] = text
        if calls:
            delta["tool_calls"] = [
                {"index": index, **_call(call)} for index, call in enumerate(calls, start=len(self._calls))
            ]
        self._begun = True
        self._text += text
        self._calls += calls
        self._scored += piece.scored
        self._finish = "tool_calls" if piece.finish == "stop" and self._calls else piece.finish
        if not delta and not piece.scored and not piece.finish:
            return None
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": self._logprobs(piece.scored),
            "finish_reason": self._finish,
        }

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._text, "refusal": None}
        if self._calls or self._only_calls:
            message["content"] = self._text or None
        if self._calls:
            message["tool_calls"] = [_call(call) for call in self._calls]
        return {
            "index": self._index,
            "message": message,
            "logprobs": self._logprobs(self._scored),
            "finish_reason": self._finish,
        }

    def _without_calls(self, piece: Piece) -> tuple[str, list[ToolCall]]:
        if self._parser is None:
            return piece.text, []
        text, calls = self._parser.push(piece.text)
        if piece.finish:
            last_text, last_calls = self._parser.rest()
            text, calls = text + last_text, calls + last_calls
        return "" if self._only_calls else text, calls

    def _logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        content = [
            {
                **self._scored_token(each.token, each.logprob),
                "top_logprobs": [self._scored_token(token, logprob) for token, logprob in each.top],
            }
            for each in scored
        ]
        return {"content": content, "refusal": None}

    def _scored_token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text_of(token)
        # The replacement character stands for a part of a character, whose bytes are not known here.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class CompletionAnswer(Answer):
    """Texts that go on from prompts.

    Args:
        prompts: the text of each prompt, which is told first; empty if it is not wanted.
        begins: where in that text each of its tokens begins, if these are scored.
        choices: how many answers to each prompt.
        with_logprobs: whether tokens are scored.
        text_of: the text of a token, also of a special one.
    """

    id_prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        model: str,
        prompt_tokens: int,
        *,
        prompts: Sequence[str],
        begins: Sequence[Sequence[int]],
        choices: int,
        with_logprobs: bool,
        text_of: Callable[[int], str],
    ) -> None:
        super().__init__(model, prompt_tokens)
        self._per_prompt = choices
        self._choices = [
            _CompletionChoice(number * choices + choice, prompt, offsets, with_logprobs, text_of)
            for number, (prompt, offsets) in enumerate(zip(prompts, begins, strict=True))
            for choice in range(choices)
        ]

    def take(self, number: int, event: ScoredPrompt | Piece) -> dict[str, Any] | None:
        choices = self._choices[number * self._per_prompt : (number + 1) * self._per_prompt]
        if isinstance(event, Piece):
            return choices[event.choice].take(event)
        for choice in choices:
            choice.scored_prompt = event.scored
        return None

    def choices(self) -> list[dict[str, Any]]:
        return [choice.whole() for choice in self._choices]


class _CompletionChoice:
    """One text as it grows."""

    def __init__(
        self, index: int, prompt: str, begins: Sequence[int], with_logprobs: bool, text_of: Callable[[int], str]
    ) -> None:
        self.scored_prompt: tuple[ScoredToken, ...] = ()
        self._index = index
        self._prompt = prompt
        self._with_logprobs = with_logprobs
        self._text_of = text_of
        self._begun = False
        self._text = ""
        self._scored: list[ScoredToken] = []
        self._begins = list(begins)
        self._finish: str | None = None

    def take(self, piece: Piece) -> dict[str, Any] | None:
        told, text, scored = len(self._scored), piece.text, piece.scored
        if not self._begun:
            self._begun = True
            text, scored = self._prompt + text, self.scored_prompt + scored
        self._text += text
        self._scored += scored
        self._begins += [len(self._prompt) + piece.begins] * len(piece.scored)
        self._finish = piece.finish
        if not text and not scored and not piece.finish:
            return None
        return self._told(text, told)

    def whole(self) -> dict[str, Any]:
        return self._told(self._text, 0)

    def _told(self, text: str, first: int) -> dict[str, Any]:
        """A text, with the scores from the one with number `first` on."""
        return {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs(self._scored[first:], self._begins[first:]),
            "finish_reason": self._finish,
        }

    def _logprobs(self, scored: Sequence[ScoredToken], begins: list[int]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {
            "tokens": [self._text_of(each.token) for each in scored],
            "token_logprobs": [each.logprob for each in scored],
            "top_logprobs": [self._top(each) for each in scored],
            "text_offset": begins,
        }

    def _top(self, scored: ScoredToken) -> dict[str, float] | None:
        if scored.logprob is None:
            return None
        top: dict[str, float] = {}
        # Of tokens that look the same, the likeliest counts; the chosen one is always there.
        for token, logprob in (*scored.top, (scored.token, scored.logprob)):
            top.setdefault(self._text_of(token), logprob)
        return top
