"""Base class for the requests of all protocols: unlisted parameters are refused, and every value is bounded."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

STOP_STRINGS = 16
NAMES = 1024
MAX_TOKENS = 2**24
MESSAGES = 2**14
TOOLS = 256

Text = Annotated[str, Field(min_length=1)]
TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
StopStrings = Annotated[list[Text], Field(fail_fast=True, max_length=STOP_STRINGS)]


def few(given: Any) -> Any:
    """Refuses an object with very many names, before pydantic collects an error for each of these names."""
    if isinstance(given, dict) and len(given) > NAMES:
        raise ValueError(f"an object has {len(given)} names: give {NAMES} at most")
    return given


class Strict(BaseModel):
    """An object of a request; unlisted parameters and values are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    _few_names = model_validator(mode="before")(few)
