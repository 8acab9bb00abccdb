"""Answers of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from splitnet.serve.answering import Answer
from splitnet.serve.generation import Piece, ScoredPrompt
from splitnet.serve.sampling import ScoredToken
from splitnet.serve.tool_calls import ToolCall, ToolCallParser

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
