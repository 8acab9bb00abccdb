"""All checks of a machine and of its way to a swarm, in the order in which one explains the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from splitnet.blocks.device import AUTO
from splitnet.blocks.sizes import ModelSizes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.hivemind_node import allowed_skew_s, ask_nodes
from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.joining import join as join_swarm
from splitnet.directory.record import MAX_CLOCK_SKEW_S, PeerRecord
from splitnet.errors import SplitnetError
from splitnet.quant.memory import free_memory
from splitnet.security.identity import Identity
from splitnet.security.swarm_key import OPEN, OpenSwarm
from splitnet.swarm.links import Links
from splitnet.swarm.trial import PeerLinks
from splitnet.tools.doctor import machine, network
from splitnet.tools.doctor.finding import Finding, Status, failed, passed, warned
from splitnet.tools.doctor.machine import memory, open_model, room_on_disk
from splitnet.tools.doctor.peers import Reach, peer, peer_to_join
from splitnet.transport.addresses import endpoint_of, split_addresses
from splitnet.wire.endpoints import Endpoint

MAX_PEERS = 64
ANY_PORT = "tcp://0.0.0.0:0"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is to be checked, as the options of `splitnet peer` would say it.

    Attributes:
        model: hub id or checkpoint folder; None: no model.
        join: addresses of a swarm, multiaddrs or those of peers.
        lan: without them, look for a swarm of the model on the local network.
        listen: where a peer would listen; None: nowhere in particular.
        identity: the key of this machine itself, in the place of a file.
        swarm: the key of a closed one.
    """

    model: str | None = None
    join: Sequence[str] = ()
    lan: bool = False
    listen: str | None = None
    public_host: str | None = None
    key_file: Path | None = None
    device: str = AUTO
    identity: Identity | None = None
    swarm: OpenSwarm = OPEN


def examine(setup: Setup, *, clock: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Makes all checks that the set-up allows; none of them ends the examination.

    Args:
        clock: Unix time in seconds, of this machine.
    """
    yield from machine.software()
    yield machine.devices(setup.device)
    yield machine.kernels()
    checkpoint = None
    if setup.model is None:
        yield passed("memory", f"{machine.gib(free_memory('cpu'))} are free")
    else:
        found, checkpoint = open_model(setup.model)
        yield found
        yield from _room(setup.model, checkpoint)
    identity = setup.identity
    if identity is None:
        found, identity = machine.key_of(setup.key_file)
        yield found
        identity = identity or Identity.generate()
    reach = Reach(
        identity,
        setup.listen or ANY_PORT,
        setup.public_host,
        needed=setup.listen is not None or setup.public_host is not None,
    )
    join = setup.join
    if not join and setup.lan and checkpoint is not None:
        found, join = network.local_network(checkpoint)
        yield found
    if join:
        yield from _way_to(join, checkpoint, identity, reach, clock, setup.swarm)
    else:
        yield reach.port()


def _room(model: str, checkpoint: Checkpoint | None) -> Iterator[Finding]:
    sizes = None
    if checkpoint is not None:
        try:
            sizes = ModelSizes.of(model)
            yield memory(ModelSizes.of(model, weights=AUTO), free_memory("cpu"))
        except SplitnetError as error:
            yield failed("memory", str(error))
    yield room_on_disk(model, sizes)


def _way_to(
    join: Sequence[str],
    checkpoint: Checkpoint | None,
    identity: Identity,
    reach: Reach,
    clock: Callable[[], float],
    swarm: OpenSwarm,
) -> Iterator[Finding]:
    multiaddrs, addresses = split_addresses(join)
    answers = ask_nodes(multiaddrs, clock=clock) if multiaddrs else []
    present = [answer for answer in answers if not answer.fault]
    found, joined = _peers_to_ask(addresses, identity, others_answer=bool(present))
    yield from network.join_addresses(answers, others_answer=bool(joined))
    yield from found
    allowed_s = MAX_CLOCK_SKEW_S
    if present:
        allowed_s = allowed_skew_s()
        clocks = network.clock(present, allowed_s)
        yield clocks
        # With a clock that is off, records of peers are void, or of the future.
        in_time = [] if clocks.status is Status.failed else present
        present = [answer for answer in in_time if abs(answer.ahead_s) <= allowed_s]
    joined = [*joined, *(answer.address for answer in present)]
    if not joined:
        yield reach.port()
        return
    links = Links(identity)
    try:
        with join_swarm(joined, lambda: links, swarm=swarm) as directory:
            yield from _swarm(directory, checkpoint, identity, reach, clock, allowed_s)
    except SplitnetError as error:
        yield failed("swarm", str(error))
    finally:
        links.close()


def _peers_to_ask(
    addresses: Sequence[str], identity: Identity, *, others_answer: bool
) -> tuple[list[Finding], list[str]]:
    """Whether the peers to join through answer, and the addresses of those that do."""
    found = list[Finding]()
    endpoints = dict[str, Endpoint]()
    for address in addresses:
        try:
            endpoints[address] = endpoint_of(address)
        except SplitnetError as error:
            found.append(failed("join", f"{address}: {error}"))
    if not endpoints:
        return found, []
    with PeerLinks(identity) as links:
        answers = links.try_out(endpoints.values())
    joined = [address for address, endpoint in endpoints.items() if answers[endpoint].rtt_ms is not None]
    wrong = warned if joined or others_answer else failed
    found += [peer_to_join(address, endpoint, answers[endpoint], wrong) for address, endpoint in endpoints.items()]
    return found, joined


def _swarm(
    directory: SwarmDirectory,
    checkpoint: Checkpoint | None,
    identity: Identity,
    reach: Reach,
    clock: Callable[[], float],
    allowed_s: float,
) -> Iterator[Finding]:
    models = directory.models()
    yield network.served_model(models, checkpoint)
    wanted = network.served_marks(models, checkpoint)
    records = [record for model in wanted or models for record in directory.peers(model)]
    tried = records[:MAX_PEERS]
    with PeerLinks(identity) as links:
        answers = links.try_out({record.endpoint for record in tried})
        answering: list[PeerRecord] = []
        silent: list[PeerRecord] = []
        for record in tried:
            answer = answers[record.endpoint]
            yield peer(record, answer, record.issued_at - clock(), allowed_s)
            (silent if answer.rtt_ms is None else answering).append(record)
        if len(tried) < len(records):
            yield passed("peer", f"the other {len(records) - len(tried)} peers are not tried, and taken to answer")
        counted = [*answering, *records[MAX_PEERS:]]
        for model in wanted:
            told = max((record.num_blocks for record in records if record.model == model), default=0)
            if count := checkpoint.num_blocks if checkpoint else told:
                yield network.coverage(
                    models[model],
                    count,
                    [record for record in silent if record.model == model],
                    [record for record in counted if record.model == model],
                )
        own = next((record for record in records if record.key == identity.public), None)
        found = reach.port(own)
        yield found
        if found.status is Status.passed:
            found = reach.from_outside(links, answering)
            yield found
            yield from reach.router(found)
