"""Options of a client: how it joins a swarm and runs a model, from the command line to the session."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from scheduler.liveness import RECOVERY_TIMEOUT_S
from splitnet.blocks.chosen_device import AUTO, find_device
from splitnet.errors import SplitnetError
from splitnet.limits import parse_bytes
from splitnet.wire.kv_forms import KVForms

if TYPE_CHECKING:
    import torch

    from splitnet.security.identity import AuthorizedKeys, Identity
    from splitnet.security.swarm_key import SwarmKey

Preference = Literal["latency", "throughput", "energy"]
Prefixes = Literal["own", "shared", "off"]
Vision = Literal["auto", "local", "peer"]

JOINING = ("initial_peers", "identity", "revision", "swarm_key", "trusted_peers")
"""Keywords of every `from_pretrained` for the swarm, the client and the model."""
RUNNING = (
    *("codec", "dtype", "device", "recovery_timeout_s", "any_weights"),
    *("gradient_codec", "local_blocks", "local_weights"),
)
"""Keywords of every `from_pretrained` and `attach` for running the model."""
GENERATING = (
    *RUNNING,
    "prefer",
    "energy_slowdown",
    "kv_at_least",
    "prefixes",
    "standby",
    "audit",
    "auditors",
)  # of a causal LM
READING_IMAGES = (*GENERATING, "vision")  # keywords of a model that reads images

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class ConnectionOptions:
    """Keywords of `from_pretrained` and `attach`, and options of commands; each caller takes a subset.

    Attributes:
        initial_peers: addresses of the swarm, multiaddrs or `tcp://HOST:PORT?key=...` of peers.
        lan: without `initial_peers`, look for the swarm on the local network.
        identity: the key of this client.
        key_file: the file of the client's key, used if `identity` is None; None: the user's own key file.
        swarm_key: the key of a closed swarm, or its file.
        trusted_peers: file with the keys of the peers that may be used; None: any.
        invite: file of an invitation with addresses, swarm key and key.
        model_id: required fingerprint of the model; None: the fingerprint in the invitation, or any.
        revision: of the model on the hub.
        tokenizer: hub id or folder, in place of the checkpoint's own.
        codec, dtype, device, recovery_timeout_s, any_weights, gradient_codec, local_blocks, local_weights, prefer,
            energy_slowdown, kv_at_least, prefixes, standby, audit, auditors: see
            `splitnet.AutoModelForCausalLM.from_pretrained`.
        vision: see `splitnet.AutoModelForImageTextToText.from_pretrained`.

    Raises:
        SplitnetError: an impossible combination or value.
    """

    initial_peers: Sequence[str] = ()
    lan: bool = True
    identity: Identity | None = None
    key_file: Path | None = None
    swarm_key: str | Path | SwarmKey | None = None
    trusted_peers: str | Path | None = None
    invite: Path | None = None
    model_id: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    codec: str = "auto"
    dtype: torch.dtype | str | None = None
    device: str = AUTO
    recovery_timeout_s: float = RECOVERY_TIMEOUT_S
    any_weights: bool | None = None
    gradient_codec: str = "auto"
    local_blocks: str | None = None
    local_weights: str | None = None
    prefer: Preference = "latency"
    energy_slowdown: float | None = None
    kv_at_least: KVForms = "int4"
    prefixes: Prefixes = "own"
    standby: str | float | None = None
    audit: float | None = None
    auditors: str | Path | None = None
    vision: Vision = "auto"

    def __post_init__(self) -> None:
        slowdown = self.energy_slowdown
        if self.prefer not in get_args(Preference):
            raise SplitnetError(f"a session prefers latency, throughput or energy, not {self.prefer!r}")
        if self.kv_at_least not in get_args(KVForms):
            raise SplitnetError(
                f"KV caches are held as {', '.join(get_args(KVForms))} at least, not {self.kv_at_least!r}"
            )
        if self.prefixes not in get_args(Prefixes):
            raise SplitnetError(f"prefixes are stored as own, shared or off, not {self.prefixes!r}")
        if self.vision not in get_args(Vision):
            raise SplitnetError(f"images are read at auto, local or peer, not {self.vision!r}")
        if self.standby is not None and (self.prefixes != "own" or not 0 < self.standby_rate < math.inf):
            raise SplitnetError(
                "a standby copies stored prefixes that no other key shares: give bytes per second, such as 8MiB, and "
                "prefixes own"
            )
        if self.audit is not None and not 0 <= self.audit <= 1:
            raise SplitnetError(f"the audited part of the work is a number from 0 to 1, not {self.audit!r}")
        if self.audit == 0 and self.auditors is not None:
            raise SplitnetError("a list of auditors is for audits: leave it out, or give another audited part than 0")
        if slowdown is None:
            return
        if self.prefer != "energy":
            raise SplitnetError(f"an energy slowdown needs the preference energy, not {self.prefer}: ask for both")
        is_number = isinstance(slowdown, int | float) and not isinstance(slowdown, bool)
        if not is_number or not 1 <= slowdown < math.inf:
            raise SplitnetError(f"an energy slowdown is a number from 1, not {slowdown!r}")

    @property
    def standby_rate(self) -> float:
        """Bytes per second that replicas copy; 0: no replica copies."""
        return float(parse_bytes(self.standby) if isinstance(self.standby, str) else self.standby or 0)

    @property
    def held_as(self) -> str | None:
        """Weight format of local blocks and the head: the given format, else AUTO, or None (as stored) with an
        exact codec."""
        from splitnet.wire.codecs import EXACT  # imports numpy and torch, which the help of commands does not need

        return self.local_weights or (None if self.codec == EXACT else AUTO)

    def load_swarm_key(self) -> SwarmKey | None:
        """The key of the closed swarm. Raises KeyFileError: its file cannot be used."""
        from splitnet.security.swarm_key import SwarmKey

        key = self.swarm_key
        return SwarmKey.load(Path(key)) if isinstance(key, str | Path) else key

    def load_trusted(self) -> AuthorizedKeys | None:
        """The keys of the peers that may be used; None: any. Raises KeyFileError: the file cannot be used."""
        from splitnet.security.identity import AuthorizedKeys

        return None if self.trusted_peers is None else AuthorizedKeys(Path(self.trusted_peers))

    @classmethod
    def of(cls, keywords: dict[str, Any], known: Sequence[str] = GENERATING, *others: str) -> ConnectionOptions:
        """The options of keywords, with the device resolved to one of this machine.

        Args:
            known: keywords of the caller that are options.
            others: keywords of the caller that are not options.

        Raises:
            TypeError: there is no such option; the message names the closest one.
            SplitnetError: the device is missing or does not work, or a value is impossible.
        """
        for name in keywords:
            if name not in known:
                near = difflib.get_close_matches(name, [*known, *others], n=1)
                meant = f"did you mean {near[0]}?" if near else f"there are {', '.join([*known, *others])}"
                raise TypeError(f"there is no option {name}: {meant}")
        given = cls(**keywords)
        return replace(given, device=find_device(str(given.device)).device)


def takes(*names: str) -> Callable[[Function], Function]:
    """Replaces `**options` by these options in the signature of a function."""

    def shown(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        options = inspect.signature(ConnectionOptions).parameters
        taken = [options[name] for name in names if name not in signature.parameters]
        function.__signature__ = signature.replace(parameters=[*own, *taken])  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return shown
