"""How a command reaches a model: the swarm, what of the model is here, and the key."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from splitnet.cli.invite import Invite
from splitnet.cli.local_network import ask_network, find_swarm
from splitnet.cli.logs import tell
from splitnet.cli.progress import StageProgress
from splitnet.client.session import Preference, check_preference
from splitnet.client.swarm import ModelFacts, Swarm
from splitnet.client.unknown_model import learn_manifest
from splitnet.errors import WrongSwarm
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
        any_weights: whether such weights may be held otherwise, see `splitnet.AutoModelForCausalLM`.
        local_blocks, local_weights: what runs here, see `splitnet.AutoModelForCausalLM`.
        tokenizer: hub id or folder, in place of the checkpoint's own.
        device: that runs what is here; see `splitnet.model.device_choice`.
        prefer, energy_slowdown: which route is the best, see `splitnet.AutoModelForCausalLM`.
        swarm_key: file with the key of a closed swarm.
        trusted_peers: file with the keys of the peers that may be used; None: any.
        invite: file of an invitation, of which addresses, swarm key and key are taken.
        model_id: the fingerprint that the model must have; None: as the invitation says, or any.

    Raises:
        SplitnetError: a preference that cannot be.
    """

    model: str
    join: Sequence[str]
    codec: str = "auto"
    key_file: Path | None = None
    wait_s: float = 30.0
    any_weights: bool | None = None
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
    model_id: str | None = None

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
        """The model's; errors as `Checkpoint.open`, after those of `computes_on` and of files with keys."""
        _ = self.computes_on, self._way, self._trusted
        return Checkpoint.open(self.model, tokenizer=self.tokenizer)

    def swarm(self, checkpoint: Checkpoint) -> Swarm:
        """Joins.

        Raises:
            DirectoryError: no address of the swarm answers, or none is given or found.
            KeyFileError: a file with keys cannot be used.
            ModelNotFound: not all of the model is here, and no peer tells what it is.
            WrongSwarm: it is not the one that `model_id` names.
        """
        return self.swarm_of(self.facts_of(checkpoint))

    def facts_of(self, checkpoint: Checkpoint) -> ModelFacts:
        """What is known of the model; where not all of it is here, peers are asked. Errors as of `swarm`."""
        expected = self.model_id or (Invite.load(self.invite).model_id if self.invite else None)
        with StageProgress() as progress:
            known = checkpoint.knows_manifest
            if known:
                checkpoint.manifest(partial(progress.update, "check the weights"))
            if not known or (expected not in (None, checkpoint.fingerprint) and not checkpoint.is_whole):
                addresses, swarm_key, identity = self._way
                addresses = addresses or ask_network(checkpoint.name, lan=self.lan and swarm_key is None)
                learn_manifest(
                    checkpoint,
                    addresses,
                    identity,
                    swarm_key=swarm_key,
                    trusted=self._trusted,
                    expected=expected,
                    report=progress.update,
                )
        if expected not in (None, checkpoint.fingerprint):
            raise WrongSwarm(
                f"the model is to be {expected}, and {checkpoint.name} here is {checkpoint.fingerprint}: use the same "
                "files on all machines"
            )
        return ModelFacts.of(checkpoint)

    def swarm_of(self, facts: ModelFacts) -> Swarm:
        """The same, of a model of which no more is known."""
        addresses, swarm_key, identity = self._way
        addresses = addresses or (() if swarm_key else find_swarm(facts, lan=self.lan))
        way = None  # with the addresses
        if self.invite or self.swarm_key:
            way = [part for address in self.join for part in ("--join", address)]
            way += ["--invite", str(self.invite)] if self.invite else ["--swarm-key", str(self.swarm_key)]
        return Swarm(facts, addresses, identity=identity, swarm_key=swarm_key, trusted=self._trusted, way=way)

    @cached_property
    def _way(self) -> tuple[Sequence[str], SwarmKey | None, Identity]:
        """Addresses that are given, the swarm key, and the key of this client."""
        if self.invite:
            invite = Invite.load(self.invite)
            return [*self.join, *invite.join], invite.swarm_key, invite.identity
        swarm_key = SwarmKey.load(self.swarm_key) if self.swarm_key else None
        return self.join, swarm_key, Identity.load_or_create(self.key_file)

    @cached_property
    def _trusted(self) -> AuthorizedKeys | None:
        return AuthorizedKeys.from_file(self.trusted_peers) if self.trusted_peers else None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of what attaches a model to the swarm."""
        preference = {"prefer": self.prefer, "energy_slowdown": self.energy_slowdown}
        return {
            "codec": self.codec,
            "recovery_timeout_s": self.wait_s,
            "any_weights": self.any_weights,
            "device": self.computes_on,
            "local_blocks": self.local_blocks,
            "local_weights": self.local_weights,
            **(preference if self.prefer != "latency" else {}),  # which not every model takes
        }
