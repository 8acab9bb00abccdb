"""How a client without --join finds its swarm on the local network."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress

from splitnet.client.swarm import ModelFacts
from splitnet.errors import DirectoryError, LanError
from splitnet.net.dht_node import have_hivemind
from splitnet.net.lan import LanNode, LocalNetwork, what_was_found
from splitnet.net.messages import PROTOCOL_VERSION

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
