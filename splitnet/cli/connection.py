"""How a command reaches a model: the swarm, what of the model is here, and the key."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from splitnet.cli.invite import Invite
from splitnet.cli.local_network import find_swarm
from splitnet.cli.logs import tell
from splitnet.client.session import Preference, check_preference
from splitnet.client.swarm import ModelFacts, Swarm
from splitnet.model.checkpoint import Checkpoint
from splitnet.model.device_choice import AUTO, find_device
from splitnet.net.identity import AuthorizedKeys, Identity
from splitnet.net.swarm_key import SwarmKey


@dataclass(frozen=True)
class Connection:
    """As the options of the commands say.

    Attributes:
        model: hub id, checkpoint folder or GGUF file.
        join: addresses of the swarm; empty: it is looked for on the local network, if `lan`.
        wait_s: how long to wait for blocks that are suddenly served by nobody.
        local_blocks, local_weights: what runs here, see `splitnet.AutoModelForCausalLM`.
        tokenizer: hub id or folder, in place of the checkpoint's own.
        device: that runs what is here; see `splitnet.model.device_choice`.
        prefer, energy_slowdown: which route is the best, see `splitnet.AutoModelForCausalLM`.
        swarm_key: file with the key of a closed swarm.
        trusted_peers: file with the keys of the peers that may be used; None: any.
        invite: file of an invitation, of which addresses, swarm key and key are taken.

    Raises:
        SplitnetError: a preference that cannot be.
    """

    model: str
    join: Sequence[str]
    codec: str = "auto"
    key_file: Path | None = None
    wait_s: float = 30.0
    local_blocks: str | None = None
    local_weights: str | None = None
    lan: bool = True
    tokenizer: str | None = None
    device: str = AUTO
    prefer: Preference = "latency"
    energy_slowdown: float | None = None
    swarm_key: Path | None = None
    trusted_peers: Path | None = None
    invite: Path | None = None

    def __post_init__(self) -> None:
        check_preference(self.prefer, self.energy_slowdown)

    @cached_property
    def computes_on(self) -> str:
        """The device that was chosen; the user is told of one that is not the CPU, the log of all.

        Raises:
            SplitnetError: the one asked for is not here, or does not work.
        """
        choice = find_device(self.device)
        if choice.device != "cpu":
            tell(logging.INFO, f"computes on {choice}")
        return choice.device

    def checkpoint(self) -> Checkpoint:
        """The model's; errors as `Checkpoint.open`, after those of `computes_on`."""
        _ = self.computes_on
        return Checkpoint.open(self.model, tokenizer=self.tokenizer)

    def swarm(self, checkpoint: Checkpoint) -> Swarm:
        """Joins.

        Raises:
            DirectoryError: no address of the swarm answers, or none is given or found.
            KeyFileError: a file with keys cannot be used.
        """
        return self.swarm_of(ModelFacts.of(checkpoint))

    def swarm_of(self, facts: ModelFacts) -> Swarm:
        """The same, of a model of which no more is known."""
        trusted = AuthorizedKeys.from_file(self.trusted_peers) if self.trusted_peers else None
        if self.invite:
            invite = Invite.load(self.invite)
            addresses, swarm_key, identity = [*self.join, *invite.join], invite.swarm_key, invite.identity
        else:
            swarm_key = SwarmKey.load(self.swarm_key) if self.swarm_key else None
            addresses = self.join or (() if swarm_key else find_swarm(facts, lan=self.lan))
            identity = Identity.load_or_create(self.key_file)
        return Swarm(facts, addresses, identity=identity, swarm_key=swarm_key, trusted=trusted)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of what attaches a model to the swarm."""
        preference = {"prefer": self.prefer, "energy_slowdown": self.energy_slowdown}
        return {
            "codec": self.codec,
            "recovery_timeout_s": self.wait_s,
            "device": self.computes_on,
            "local_blocks": self.local_blocks,
            "local_weights": self.local_weights,
            **(preference if self.prefer != "latency" else {}),  # which not every model takes
        }
