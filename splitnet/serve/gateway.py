"""What every protocol of the server uses: a model with its prompts and grammars, and a way to answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from splitnet.limits import FairAccount
from splitnet.serve.admission import Admission
from splitnet.serve.events import UNREAD, EventStream, Numbered, events, unless_gone
from splitnet.serve.failures import ApiError
from splitnet.serve.gate import Preparing, client_of
from splitnet.serve.generation import Ask, Generations
from splitnet.serve.grammars import Grammars
from splitnet.serve.metrics import GatewayMetrics
from splitnet.serve.prompts import Prompts
from splitnet.serve.sampling import SamplingDefaults

UNREAD_BYTES = 64 * 2**20
"""Of streams, whose clients read more slowly than the model answers."""


class Answer(Protocol):
    """Writes the events of a request as a protocol has them.

    Attributes:
        id: by which clients know the answer.
    """

    id: str

    async def whole(self, events: AsyncGenerator[Numbered]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        ...

    def chunks(self, first: Numbered, events: AsyncGenerator[Numbered]) -> AsyncGenerator[str]:
        """The server-sent events of a stream; an error is the last of them. `first` has been waited for already."""
        ...

    def failed(self, failure: ApiError) -> str:
        """The last event of a stream that has failed."""
        ...


@dataclass(frozen=True)
class Gateway:
    """What the paths use.

    Attributes:
        model: the name that answers give.
        defaults: of what requests leave out.
        other_names: of the model, which requests may give, too.
    """

    model: str
    generations: Generations
    prompts: Prompts
    grammars: Grammars
    admission: Admission
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    other_names: Sequence[str] = ()
    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
    preparing: Preparing = field(default_factory=Preparing)
    unread: FairAccount = field(default_factory=lambda: FairAccount(UNREAD_BYTES))

    @property
    def names(self) -> list[str]:
        """All that requests may give."""
        return list(dict.fromkeys([self.model, *self.other_names]))

    def check_model(self, name: str) -> None:
        """Refuses other models."""
        if name not in self.names:
            use = " or ".join(map(repr, self.names))
            raise ApiError(404, f"this server has no model {name!r}: use {use}", param="model", code="model_not_found")

    async def respond(self, request: Request, asks: Sequence[Ask], answer: Answer, *, stream: bool) -> Response:
        """Runs a request; the session ends when the client goes."""
        client = client_of(request)
        source = events(self.generations, self.admission, client, asks, answer.id)
        running = self.metrics.watch(source, asks)
        if not stream:
            async with aclosing(running):
                return JSONResponse(await unless_gone(request, answer.whole(running)))
        # Until the first event an error still has a status of its own.
        try:
            first = await unless_gone(request, _first_of(running))
        except BaseException:
            await running.aclose()
            raise
        return EventStream(answer.chunks(first, running), running, self.unread, client, answer.failed(UNREAD))


async def _first_of(running: AsyncGenerator[Numbered]) -> Numbered:
    return await anext(running)
