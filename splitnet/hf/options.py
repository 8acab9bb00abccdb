"""How a client runs a model: the keywords of `from_pretrained` and of `attach`, once for all kinds of models."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

import torch

from scheduler.liveness import RECOVERY_TIMEOUT_S
from splitnet.blocks.device import find_device
from splitnet.quant.choose import AUTO
from splitnet.session.inference import Preference, check_preference
from splitnet.wire.codecs import EXACT

CONNECTION = ("initial_peers", "identity", "revision", "swarm_key", "trusted_peers")
"""What `from_pretrained` takes besides: which swarm, who asks, and which model."""

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """Of every model; see `splitnet.AutoModelForCausalLM.from_pretrained`."""

    codec: str = "auto"
    dtype: torch.dtype | str | None = None
    device: str = "auto"
    recovery_timeout_s: float = RECOVERY_TIMEOUT_S
    any_weights: bool | None = None
    gradient_codec: str = "auto"
    local_blocks: str | None = None
    local_weights: str | None = None

    @property
    def held_as(self) -> str | None:
        """What local blocks and the head hold their weights as; without a wish what suits, or exactly, as the codec."""
        return self.local_weights or (None if self.codec == EXACT else AUTO)

    @classmethod
    def of(cls, keywords: dict[str, Any], *others: str) -> Self:
        """The options that these keywords give, with the device that is found here for the one that they ask for.

        Args:
            others: keywords that the caller takes besides.

        Raises:
            TypeError: there is no such option; names the one that is probably meant.
            SplitnetError: there is no such device here, or it does not work; or a value that cannot be.
        """
        known = [field.name for field in fields(cls)]
        for name in keywords:
            if name not in known:
                near = difflib.get_close_matches(name, [*known, *others], n=1)
                meant = f"did you mean {near[0]}?" if near else f"there are {', '.join([*known, *others])}"
                raise TypeError(f"there is no option {name}: {meant}")
        given = cls(**keywords)
        return replace(given, device=find_device(str(given.device)).device)


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalOptions(ClientOptions):
    """Of a causal LM."""

    prefer: Preference = "latency"
    energy_slowdown: float | None = None

    def __post_init__(self) -> None:
        check_preference(self.prefer, self.energy_slowdown)


def takes(options: type[ClientOptions]) -> Callable[[Function], Function]:
    """Shows the options in the signature of a function in the place of its `**options`."""

    def shown(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        taken = inspect.signature(options).parameters.values()
        function.__signature__ = signature.replace(parameters=[*own, *taken])  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return shown
