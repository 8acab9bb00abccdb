"""What chats and completions share: an answer as chunks of a stream or as a whole, with its usage."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import Any

from splitnet.serve.events import Numbered
from splitnet.serve.failures import failure_of
from splitnet.serve.generation import Ended, Piece, ScoredPrompt
from splitnet.serve.sse import DONE, framed


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
