"""The options with which commands reach a model and its swarm, once for all of these commands."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from splitnet.cli.arguments import (
    AnyWeights,
    CodecName,
    Device,
    EnergySlowdown,
    InviteFile,
    Join,
    KeyFile,
    Lan,
    LocalBlocks,
    LocalWeights,
    ModelId,
    Prefer,
    Preferred,
    SwarmKeyFile,
    Tokenizer,
    TrustedPeers,
    Wait,
)

if TYPE_CHECKING:
    from splitnet.cli.connection import Connection

Command = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Connecting:
    """What was given of them; what a command lacks is as if it was not."""

    join: Join = None
    lan: Lan = True
    codec: CodecName = "auto"
    wait: Wait = 30.0
    any_weights: AnyWeights = None
    device: Device = "auto"
    local_blocks: LocalBlocks = None
    local_weights: LocalWeights = None
    tokenizer: Tokenizer = None
    prefer: Prefer = Preferred.latency
    energy_slowdown: EnergySlowdown = None
    key_file: KeyFile = None
    swarm_key: SwarmKeyFile = None
    trusted_peers: TrustedPeers = None
    invite: InviteFile = None
    model_id: ModelId = None

    def as_arguments(self) -> list[str]:
        """What was given of them, as another command takes it."""
        arguments: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default or (self.invite and field.name in ("key_file", "swarm_key")):
                continue
            name = field.name.replace("_", "-")
            if isinstance(value, bool):
                arguments.append(f"--{name}" if value else f"--no-{name}")
                continue
            for each in value if isinstance(value, list | tuple) else [value]:
                arguments += [f"--{name}", str(getattr(each, "value", each))]
        return arguments

    def to(self, model: str) -> Connection:
        """The way to a model: hub id, checkpoint folder or GGUF file. Errors as of `Connection`."""
        from splitnet.cli.connection import Connection

        return Connection(
            model,
            self.join or (),
            codec=self.codec,
            key_file=self.key_file,
            wait_s=self.wait,
            any_weights=self.any_weights,
            local_blocks=self.local_blocks,
            local_weights=self.local_weights,
            lan=self.lan,
            tokenizer=self.tokenizer,
            device=self.device,
            prefer=self.prefer.value,
            energy_slowdown=self.energy_slowdown,
            swarm_key=self.swarm_key,
            trusted_peers=self.trusted_peers,
            invite=self.invite,
            model_id=self.model_id,
        )


def connects(*, only: Collection[str] = (), without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Gives a command these options in the place of its parameter `connecting`, which stands behind a `*`.

    Args:
        only: the fields of those that it has; none: all.
        without: the fields of those that it does not have.
    """
    hints = get_type_hints(Connecting, include_extras=True)
    options = {
        field.name: inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(Connecting)
        if (not only or field.name in only) and field.name not in without
    }

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        parameters = list[inspect.Parameter]()
        for parameter in signature.parameters.values():
            parameters += options.values() if parameter.name == "connecting" else [parameter]

        @functools.wraps(command)
        def with_options(**given: Any) -> None:
            connecting = Connecting(**{name: given.pop(name) for name in options if name in given})
            command(**given, connecting=connecting)

        with_options.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
        del with_options.__wrapped__  # whoever asks what it takes is not to ask the command
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_options

    return decorate
