"""How a command reaches a model: the swarm, what of the model is here, and the key."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from splitnet.blocks.device import AUTO, find_device
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.invite import Invite
from splitnet.cli.progress import StageProgress
from splitnet.directory.hivemind_node import have_hivemind
from splitnet.directory.mdns import LanNode, LocalNetwork, what_was_found
from splitnet.errors import DirectoryError, LanError, WrongSwarm
from splitnet.hf.remote_model import learn_manifest
from splitnet.logs import tell
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.security.swarm_key import SwarmKey
from splitnet.session.inference import Preference, check_preference
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.wire.messages import PROTOCOL_VERSION

_FIX = "give --join with the address that a peer of the swarm prints"


def find_swarm(facts: ModelFacts, *, lan: bool) -> list[str]:
    """Addresses to join a model's swarm with, as its peers on this network announce them; says so on stderr.

    Args:
        facts: the model.
        lan: whether the user lets us look.

    Raises:
        DirectoryError: there is none, or nobody may look.
    """
    if not lan:
        raise DirectoryError(f"no swarm is given: {_FIX}, or look for one on this network with --lan")
    if not have_hivemind():
        raise DirectoryError(
            "no swarm is given, and to join one that is found on this network takes hivemind, which is not installed: "
            "give --join tcp://HOST:PORT?key=..., as a peer prints"
        )
    try:
        with LocalNetwork(facts.fingerprint) as network:
            nodes = network.search()
    except LanError as error:
        raise DirectoryError(f"no swarm is given, and none can be looked for: {error}; {_FIX}") from error
    if not nodes:
        if network.foreign_protocols:
            spoken = max(network.foreign_protocols)
            older = "this client" if spoken > PROTOCOL_VERSION else "the peers"
            raise DirectoryError(
                f"the peers of {facts.name} on this network speak protocol {spoken}, this client speaks "
                f"{PROTOCOL_VERSION}: upgrade {older}"
            )
        command = shlex.join(["splitnet", "peer", facts.source or facts.name])
        raise DirectoryError(f"no swarm for {facts.name} on this network: start a peer with `{command}`, or {_FIX}")
    print(f"{what_was_found(nodes)}: joining ...", file=sys.stderr, flush=True)
    return [address for node in nodes for address in node.addresses]


def ask_network(model: str, *, lan: bool) -> list[str]:
    """Addresses to ask what a model is, of whatever is served on this network.

    Raises:
        DirectoryError: there is none, or nobody may look.
    """
    nodes: list[LanNode] = []
    if lan:
        with suppress(LanError), LocalNetwork("") as network:
            nodes = network.search()
    if not nodes:
        raise DirectoryError(f"not all of {model} is on this machine, and nobody here tells what it is: {_FIX}")
    return [address for node in nodes for address in node.addresses]


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
        device: that runs what is here; see `splitnet.blocks.device`.
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
