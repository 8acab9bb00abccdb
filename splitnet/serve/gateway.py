"""The models that a server answers requests with, by their names."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from splitnet.serve.failures import ApiError
from splitnet.serve.responses import ServedModel


@dataclass(eq=False)
class Gateway:
    """Finds the model of a request; `created`: seconds since 1970 that are told of the models."""

    served: ServedModel
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> list[str]:
        """Those that requests may give."""
        return self.served.names

    def check_name(self, name: str) -> None:
        """Raises ApiError if no model has it."""
        if name not in self.names:
            use = " or ".join(map(repr, self.names))
            raise ApiError(404, f"this server has no model {name!r}: use {use}", param="model", code="model_not_found")

    async def find(self, name: str) -> ServedModel:
        """The model of this name, ready to answer. Raises ApiError if there is none."""
        self.check_name(name)
        return self.served
