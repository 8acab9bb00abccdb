"""Answers of `/v1/completions`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from splitnet.serve.answering import Answer
from splitnet.serve.generation import Piece, ScoredPrompt
from splitnet.serve.sampling import ScoredToken


class CompletionAnswer(Answer):
    """Texts that go on from prompts.

    Args:
        prompts: the text of each prompt, which is told first; empty if it is not wanted.
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
        choices: int,
        with_logprobs: bool,
        text_of: Callable[[int], str],
    ) -> None:
        super().__init__(model, prompt_tokens)
        self._per_prompt = choices
        self._choices = [
            _CompletionChoice(index, prompts[index // choices], with_logprobs, text_of)
            for index in range(len(prompts) * choices)
        ]

    def take(self, number: int, event: ScoredPrompt | Piece) -> dict[str, Any] | None:
        choices = self._choices[number * self._per_prompt : (number + 1) * self._per_prompt]
        if isinstance(event, Piece):
            return choices[event.choice].take(event.text, event.scored, event.finish)
        for choice in choices:
            choice.scored_prompt = event.scored
        return None

    def choices(self) -> list[dict[str, Any]]:
        return [choice.whole() for choice in self._choices]


class _CompletionChoice:
    """One text as it grows."""

    def __init__(self, index: int, prompt: str, with_logprobs: bool, text_of: Callable[[int], str]) -> None:
        self.scored_prompt: tuple[ScoredToken, ...] = ()
        self._index = index
        self._prompt = prompt
        self._with_logprobs = with_logprobs
        self._text_of = text_of
        self._begun = False
        self._text = ""
        self._scored: list[ScoredToken] = []
        self._offset = 0
        self._finish: str | None = None

    def take(self, text: str, scored: tuple[ScoredToken, ...], finish: str | None) -> dict[str, Any] | None:
        if not self._begun:
            self._begun = True
            text, scored = self._prompt + text, self.scored_prompt + scored
        self._text += text
        self._scored += scored
        self._finish = finish
        if not text and not scored and not finish:
            return None
        return self._told(text, scored)

    def whole(self) -> dict[str, Any]:
        self._offset = 0
        return self._told(self._text, self._scored)

    def _told(self, text: str, scored: Sequence[ScoredToken]) -> dict[str, Any]:
        return {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs(scored),
            "finish_reason": self._finish,
        }

    def _logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        texts = [self._text_of(each.token) for each in scored]
        offsets: list[int] = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [each.logprob for each in scored],
            "top_logprobs": [self._top(each) for each in scored],
            "text_offset": offsets,
        }

    def _top(self, scored: ScoredToken) -> dict[str, float] | None:
        if scored.logprob is None:
            return None
        top: dict[str, float] = {}
        # Of tokens that look the same, the likeliest counts; the chosen one is always there.
        for token, logprob in (*scored.top, (scored.token, scored.logprob)):
            top.setdefault(self._text_of(token), logprob)
        return top
