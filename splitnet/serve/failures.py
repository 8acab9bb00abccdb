"""Errors that clients receive: a status, a sentence, and a code."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from splitnet.errors import (
    ContextTooLong,
    CoverageError,
    DirectoryError,
    NotAuthorized,
    PeerBusy,
    PeerFailed,
    PeerLied,
    PeerLost,
    SessionClosed,
    SplitnetError,
)
from splitnet.serve.admission import Overloaded, QuotaExceeded

log = logging.getLogger(__name__)

RETRY_AFTER_S = 2
IMAGES = "image", "image_url", "input_image"  # Types of message parts that are images
MAX_QUOTED_CHARACTERS = 64  # Maximum number of characters of a value that an error message quotes
MOST_MESSAGE = 2000  # Maximum number of characters of an error message, which may quote the request


class ApiError(SplitnetError):
    """An error with the HTTP status and the code that the client receives."""

    def __init__(
        self,
        status: int,  # the HTTP status
        message: str,  # one sentence that describes the error and how to fix it
        *,
        param: str | None = None,  # the parameter that is wrong
        code: str | None = None,  # identifies the kind of error for programs
        headers: dict[str, str] | None = None,  # None: a 429 or 503 gets Retry-After
    ) -> None:
        super().__init__(message if len(message) <= MOST_MESSAGE else f"{message[:MOST_MESSAGE]} ...")
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or ({"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {})


_STATUS_OF: list[tuple[type[SplitnetError], int, str]] = [
    (ContextTooLong, 400, "context_length_exceeded"),
    (Overloaded, 429, "overloaded"),
    (QuotaExceeded, 429, "rate_limit_exceeded"),
    (PeerBusy, 429, "peers_busy"),
    (CoverageError, 503, "blocks_not_served"),
    (DirectoryError, 503, "swarm_unreachable"),
    (PeerLost, 502, "peer_lost"),
    (PeerFailed, 502, "peer_failed"),
    (PeerLied, 502, "peer_lied"),
    (NotAuthorized, 502, "peers_refuse_this_server"),
]


def api_error_of(error: BaseException) -> ApiError:
    """The error that a client receives for any error. An unexpected error is logged without text of the request."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SessionClosed):
        return ApiError(
            503,
            "the server is ending: send the request again, with the same Idempotency-Key if it had one",
            code="server_ending",
        )
    for kind, status, code in _STATUS_OF:
        if isinstance(error, kind):
            headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, QuotaExceeded) else None
            return ApiError(status, str(error), code=code, headers=headers)
    if isinstance(error, SplitnetError):
        return ApiError(502, str(error))
    if isinstance(error, RequestValidationError):
        return validation_error(error.errors())
    if isinstance(error, HTTPException):
        if isinstance(error.__cause__, ApiError):  # FastAPI wraps errors that are raised while it reads a body
            return error.__cause__
        return ApiError(error.status_code, error.detail)
    # Only the traceback is logged, because the message of the error may contain a part of a prompt.
    log.error("%s in\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return ApiError(500, "unexpected error in the server: its log has the details")


def validation_error(errors: Sequence[Any]) -> ApiError:
    """The error for a body that pydantic rejects. errors: pydantic's errors, whose `loc` begins with `body`."""

    def named(error: Any) -> str:
        given = error.get("ctx", {}).get("tag", error.get("input"))
        return given if isinstance(given, str) and len(given) <= MAX_QUOTED_CHARACTERS else ""

    # If a value may have several forms, the error at the deepest place belongs to the form that fits best.
    # Within an object, an unknown literal such as `type` matters most, because it determines the allowed fields.
    first = max(errors, key=lambda each: (len(each["loc"]), each["type"] == "literal_error" and named(each) != ""))
    if first["loc"] == ("body",) and first["type"] in ("missing", "model_attributes_type", "model_type"):
        return ApiError(400, "the body must be a JSON object")
    place, context = ".".join(str(part) for part in first["loc"][1:]), first.get("ctx", {})
    if first["type"] == "extra_forbidden":
        message = f"{place} is not supported: leave it out"
    elif (name := named(first)) in IMAGES:
        message = f"{place}: images are not supported here: send them in messages of the user"
    elif first["type"] in ("literal_error", "union_tag_invalid"):
        known = context.get("expected_tags") or context["expected"]
        message = f"{place}: {f'{name!r} is not supported, only {known}' if name else f'only {known} is supported'}"
    elif first["type"] == "value_error":
        message = str(first["ctx"]["error"])
    else:
        message = f"{place}: {first['msg']}"
    return ApiError(400, message, param=place.split(".")[0] or None, code="invalid_parameter")
