"""From the bytes of a body to the request that it holds, beside the event loop and with its first error only."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.responses import Response

from splitnet.serve.failures import ApiError, refused

Result = TypeVar("Result")

LARGE_BYTES = 2**16
"""A request of more is prepared after others of that kind, so that small ones find a free core."""


class Preparing:
    """Does what a request needs before it runs in other threads: parsing, templates, tokens, grammars."""

    def __init__(self) -> None:
        self._small, self._large = CapacityLimiter(4), CapacityLimiter(1)

    async def run(self, size: int, work: Callable[..., Result], *arguments: Any) -> Result:
        """What `work` returns; `size`: bytes of the request."""
        limiter = self._large if size > LARGE_BYTES else self._small
        return await to_thread.run_sync(work, *arguments, limiter=limiter)


def parsed(kind: type[BaseModel], body: bytes) -> BaseModel:
    """The request that a body holds.

    Raises:
        ApiError: it is no JSON, or no such request.
    """
    try:
        document = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        deep = "recursion limit" in str(error)
        raise ApiError(400, "the body is nested too deep" if deep else "the body is not valid JSON") from None
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        raise refused([{**each, "loc": ("body", *each["loc"])} for each in errors]) from None


class ParsingRoute(APIRoute):
    """Parses bodies with `app.state.preparing`; FastAPI would do so on the event loop, and collect every error."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        kind = self.body_field.field_info.annotation if self.body_field is not None else None

        class Parsed(Request):
            async def json(self) -> Any:
                body = await self.body()
                return await self.app.state.preparing.run(len(body), parsed, kind, body)

        async def handle(request: Request) -> Response:
            return await handler(Parsed(request.scope, request.receive))

        return handle
