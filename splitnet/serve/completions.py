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
