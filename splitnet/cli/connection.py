"""The connection of a command to a model: the swarm, the local part of the model, and the key."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial

from splitnet.blocks.chosen_device import find_device
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.invite import with_invitation
from splitnet.cli.stage_progress import StageProgress
from splitnet.directory.hivemind_node import have_hivemind
from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.joining import join
from splitnet.directory.mdns import LanNode, LocalNetwork, what_was_found
from splitnet.errors import DirectoryError, LanError, NoSwarm, WrongSwarm
from splitnet.hf.remote_model import learn_manifest
from splitnet.logs import write_user_message
from splitnet.security.identity import AuthorizedKeys, Identity
from splitnet.security.swarm_key import OPEN, SwarmKey
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.client_links import Links
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.wire.messages import PROTOCOL_VERSION

_FIX = "give --join with the address that a peer of the swarm prints"


def find_swarm(facts: ModelFacts, *, lan: bool) -> list[str]:
    """Addresses to join a model's swarm, as peers on this network announce them. Prints what it finds to stderr.

    Raises NoSwarm if there are no such addresses, or if `lan` is False and forbids the search; DirectoryError if the
    peers of this network speak another protocol.
    """
    if not lan:
        raise NoSwarm(f"no swarm is given: {_FIX}, or search this network with --lan")
    if not have_hivemind():
        raise NoSwarm(
            "no swarm is given, and joining one on this network needs hivemind, which is not installed: "
            "give --join tcp://HOST:PORT?key=..., as a peer prints"
        )
    try:
        with LocalNetwork(facts.fingerprint) as network:
            nodes = network.search()
    except LanError as error:
        raise NoSwarm(f"no swarm is given, and this network cannot be searched: {error}; {_FIX}") from error
    if not nodes:
        if network.foreign_protocols:
            spoken = max(network.foreign_protocols)
            older = "this client" if spoken > PROTOCOL_VERSION else "the peers"
            raise DirectoryError(
                f"the peers of {facts.name} on this network speak protocol {spoken}, this client speaks "
                f"{PROTOCOL_VERSION}: upgrade {older}"
            )
        command = shlex.join(["splitnet", "peer", facts.source or facts.name])
        raise NoSwarm(f"no swarm for {facts.name} on this network: start a peer with `{command}`, or {_FIX}")
    print(f"{what_was_found(nodes)}: joining ...", file=sys.stderr, flush=True)
    return [address for node in nodes for address in node.addresses]


def ask_network(model: str, *, lan: bool) -> list[str]:
    """Addresses of peers of any model on this network; `model` may be empty. Raises NoSwarm."""
    nodes: list[LanNode] = []
    if lan:
        with suppress(LanError), LocalNetwork("") as network:
            nodes = network.search()
    if not nodes:
        lacks = f"parts of {model} are not on this machine, and no swarm" if model else "no swarm"
        raise NoSwarm(f"{lacks} is given or found on this network: {_FIX}")
    return [address for node in nodes for address in node.addresses]


@dataclass(frozen=True)
class ModelConnection:
    """A model (hub id, checkpoint folder or GGUF file) and its swarm, by the options of a command.

    If no addresses are given, the swarm is searched on the local network, if the options allow the search.
    """

    model: str
    requested: ConnectionOptions

    @cached_property
    def options(self) -> ConnectionOptions:
        """The given options with the device that was found. Informs the user about a device other than the CPU.

        Raises SplitnetError if the requested device does not exist, or does not work.
        """
        choice = find_device(self.requested.device)
        if choice.device != "cpu":
            write_user_message(logging.INFO, f"computes on {choice}")
        return replace(self.requested, device=choice.device)

    def checkpoint(self) -> Checkpoint:
        """Opens the model's checkpoint. Raises errors of `options` and key files before errors of `Checkpoint.open`."""
        _ = self.options, self._keys
        return Checkpoint.open(self.model, tokenizer=self.requested.tokenizer)

    def facts_of(self, checkpoint: Checkpoint) -> ModelFacts:
        """The facts of the model. If parts of the model are not on this machine, peers are asked for the facts.

        Raises DirectoryError if no address of the swarm answers, or no address is given or found; KeyFileError if a key
        file cannot be used; ModelNotFound if parts of the model are not on this machine and no peer knows its facts;
        WrongSwarm if the fingerprint is not `model_id`.
        """
        expected = self._with_invitation.model_id
        with StageProgress() as progress:
            known = checkpoint.knows_manifest
            if known:
                checkpoint.manifest(partial(progress.update, "check the weights"))
            if not known or (expected not in (None, checkpoint.fingerprint) and not checkpoint.is_whole):
                identity, swarm_key, trusted = self._keys
                lan = self.requested.lan and swarm_key is None
                addresses = self._with_invitation.initial_peers or ask_network(checkpoint.name, lan=lan)
                learn = partial(learn_manifest, swarm_key=swarm_key, trusted=trusted, report=progress.update)
                learn(checkpoint, addresses, identity, expected=expected)
        if expected not in (None, checkpoint.fingerprint):
            raise WrongSwarm(
                f"the model must be {expected}, but {checkpoint.name} here is {checkpoint.fingerprint}: use the same "
                "files on all machines"
            )
        return ModelFacts.of(checkpoint)

    def swarm_of(self, facts: ModelFacts) -> Swarm:
        """Joins the swarm of a model. Raises the same errors as `facts_of`."""
        identity, swarm_key, trusted = self._keys
        addresses = self._with_invitation.initial_peers or (
            () if swarm_key else find_swarm(facts, lan=self.requested.lan)
        )
        # None: the peer joins with the addresses.
        join_args = self.join_args if self.requested.invite or self.requested.swarm_key else None
        return Swarm(facts, addresses, identity=identity, swarm_key=swarm_key, trusted=trusted, join_args=join_args)

    def swarm(self, checkpoint: Checkpoint) -> Swarm:
        """Joins the swarm of a checkpoint. Raises the same errors as `facts_of`."""
        return self.swarm_of(self.facts_of(checkpoint))

    @contextmanager
    def directory(self) -> Generator[SwarmDirectory]:
        """The swarm's directory, for all models. Raises DirectoryError like `facts_of`, and KeyFileError."""
        identity, swarm_key, _ = self._keys
        with closing(Links(identity)) as links:
            addresses = self._with_invitation.initial_peers or ask_network(
                "", lan=self.requested.lan and swarm_key is None
            )
            with join(addresses, lambda: links, swarm=swarm_key or OPEN) as directory:
                yield directory

    @property
    def join_args(self) -> list[str]:
        """The arguments with which other commands join the swarm; empty for a swarm that was found on the network."""
        join_args = [part for address in self.requested.initial_peers for part in ("--join", address)]
        if self.requested.invite:
            return [*join_args, "--invite", str(self.requested.invite)]
        return [*join_args, "--swarm-key", str(self.requested.swarm_key)] if self.requested.swarm_key else join_args

    @cached_property
    def _with_invitation(self) -> ConnectionOptions:
        return with_invitation(self.requested)

    @cached_property
    def _keys(self) -> tuple[Identity, SwarmKey | None, AuthorizedKeys | None]:
        reached = self._with_invitation
        swarm_key = reached.load_swarm_key()
        identity = reached.identity or Identity.load_or_create(reached.key_file)
        return identity, swarm_key, reached.load_trusted()
