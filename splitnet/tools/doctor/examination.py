"""All checks of a machine and of its connection to a swarm, ordered so that earlier checks explain later ones."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from statistics import median

from scheduler.cost import encodings_of, route_ms
from scheduler.facts import CLIENT, CONTEXTS, UNMEASURED, Link, missing_blocks, most_positions
from scheduler.partition import first_token_ms
from scheduler.route import best_route
from splitnet.blocks.chosen_device import AUTO
from splitnet.blocks.model_sizes import ModelSizes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.hivemind_node import NO_HIVEMIND, NodeAnswer, ask_nodes, import_hivemind
from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.joining import join as join_swarm
from splitnet.directory.mdns import LocalNetwork, what_was_found
from splitnet.directory.record import MAX_CLOCK_SKEW_S, PeerRecord, facts_of, network_of
from splitnet.errors import AddressInUse, LanError, SplitnetError
from splitnet.nat.port_mapping import MappingError, look_for_router
from splitnet.nat.punch import PathKind
from splitnet.quant.device import free_memory
from splitnet.security.identity import Identity
from splitnet.security.swarm_key import OPEN, OpenSwarm
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.client_links import Links, refusal
from splitnet.swarm.plan import blocks_text
from splitnet.swarm.swarm import short_key
from splitnet.swarm.trial import PeerLinks, TriedPeer
from splitnet.tools.doctor import machine_checks
from splitnet.tools.doctor.machine_checks import SHOWN_DIGITS, CheckResult, Status, failed, passed, warned
from splitnet.transport.addresses import (
    check_listen_address,
    endpoint_of,
    is_reachable,
    public_address,
    split_addresses,
)
from splitnet.transport.transport import Transport
from splitnet.wire.codecs import CODECS
from splitnet.wire.endpoints import Endpoint, LinkState, is_address
from splitnet.wire.messages import PROTOCOL_VERSION

_SILENCE = (
    "it does not answer: check that the machine is on, and that no firewall or router drops connections to this port"
)
_CAUSES = {
    NO_HIVEMIND: "such an address needs hivemind, which is not installed here: join through a peer, with "
    "--join tcp://HOST:PORT?key=... as it prints",
    "connection refused": "nothing listens there: check that the peer runs, and copy the address that it prints",
    "no answer in time": _SILENCE,
    "i/o timeout": _SILENCE,
    "no good addresses": "its host name has no address: check the name",
    "no route to host": "no route leads there: check the network of both machines",
    "network is unreachable": "no route leads there: check the network of this machine",
}
_OTHER_CAUSE = "copy the whole address that the peer prints, and check the network"


def local_network(checkpoint: Checkpoint) -> tuple[CheckResult, list[str]]:
    """Searches the local network for a swarm of the model, and returns the addresses to join it with."""
    try:
        with LocalNetwork(checkpoint.fingerprint if checkpoint.knows_manifest else "") as lan:
            nodes = lan.search()
    except LanError as error:
        return warned("lan", f"this network cannot be searched for a swarm ({error}): give --join"), []
    if not nodes:
        return warned(
            "lan",
            f"no swarm for {checkpoint.name} on this network, or multicast is filtered there: start a peer with "
            f"`{shlex.join(['splitnet', 'peer', checkpoint.source])}`, or give --join",
        ), []
    return passed("lan", what_was_found(nodes)), [address for node in nodes for address in node.addresses]


def join_addresses(answers: Sequence[NodeAnswer], *, others_answer: bool = False) -> Iterator[CheckResult]:
    """Whether the nodes to join through answer with the keys of their addresses. others_answer: others do."""
    # One node is enough to join. If another node answers, a silent node only costs time.
    wrong = warned if others_answer or any(not answer.fault for answer in answers) else failed
    for answer in answers:
        if not answer.fault:
            yield passed("join", f"{answer.address} answers in {answer.rtt_ms:.1f} ms")
        elif answer.other_id:
            yield wrong(
                "join",
                f"{answer.address}: what answers there has another key, {answer.other_id}: if the peer was started "
                "anew, copy the address that it prints now; otherwise do not trust it",
            )
        else:
            advice = next((words for cause, words in _CAUSES.items() if cause in answer.fault), None)
            yield wrong("join", f"{answer.address}: {advice or f'{answer.fault}; {_OTHER_CAUSE}'}")


def clocks(answers: Sequence[NodeAnswer], allowed_s: float) -> CheckResult:
    """Whether this machine's clock and the clocks of nodes differ by at most `allowed_s` seconds.

    At least one node must have answered.
    """
    ahead_s = {answer.address: answer.ahead_s for answer in answers if not answer.fault}
    usual_s = median(ahead_s.values())
    if abs(usual_s) > allowed_s:
        direction = "behind" if usual_s > 0 else "ahead of"
        return failed(
            "clock",
            f"the clock of this machine is {abs(usual_s):.0f} s {direction} the swarm's, and {allowed_s:.0f} s are "
            "allowed: set it, for instance with `timedatectl set-ntp true`",
        )
    for address, seconds in ahead_s.items():
        if abs(seconds) > allowed_s:
            return warned(
                "clock",
                f"the clock of {address} is {abs(seconds):.0f} s {'ahead' if seconds > 0 else 'behind'}, other clocks "
                "agree with this machine's: have that clock set, for instance with `timedatectl set-ntp true`",
            )
    return passed("clock", f"within {abs(usual_s):.2f} s of the swarm's, {allowed_s:.0f} s are allowed")


def served_marks(models: Mapping[str, str], checkpoint: Checkpoint | None) -> list[str]:
    """The fingerprints of a swarm's models that match the user's model; None matches all models.

    If parts of the user's model are missing on this machine, models with the same name match.
    """
    if checkpoint is None:
        return list(models)
    if checkpoint.knows_manifest:
        return [checkpoint.fingerprint] * (checkpoint.fingerprint in models)
    return [mark for mark, name in models.items() if name == checkpoint.name]


def served_model(models: Mapping[str, str], checkpoint: Checkpoint | None) -> CheckResult:
    """Whether a swarm with these models (names by fingerprint) serves the model of `checkpoint`; None: any model."""
    names = ", ".join(sorted(set(models.values())))
    if not models:
        return failed("swarm", "no peer serves a model here: start one with `splitnet peer MODEL --join ADDR`")
    if checkpoint is None:
        return passed("swarm", f"serves {names}")
    if served_marks(models, checkpoint):
        same = "with the same weights" if checkpoint.knows_manifest else "by name: some files to compare are missing"
        return passed("swarm", f"serves {checkpoint.name}, {same}")
    revisions = [mark[:SHOWN_DIGITS] for mark, name in models.items() if name == checkpoint.name]
    if revisions and checkpoint.knows_manifest:
        return failed(
            "swarm",
            f"serves another revision of {checkpoint.name}: its fingerprint is {' or '.join(revisions)}, yours is "
            f"{checkpoint.fingerprint[:SHOWN_DIGITS]}: use the same files on all machines",
        )
    return failed(
        "swarm", f"serves {names}, not your {checkpoint.name}: use that model, or the address of a swarm of yours"
    )


def coverage(name: str, count: int, silent: Sequence[PeerRecord], others: Sequence[PeerRecord]) -> CheckResult:
    """Whether each of a model's `count` blocks is served by a peer that answers.

    silent, others: the records of the peers that do not answer, and of all other peers.
    """
    holes = missing_blocks([facts_of(record) for record in others if record.serves], count)
    if not holes:
        return passed("coverage", f"all {count} blocks of {name} are served by peers that answer")
    blocks = ", ".join(f"{start}..{end - 1}" for start, end in holes)
    fix = f"start a peer with --blocks {holes[0][0]}:{holes[0][1]}"
    if any(record.start < end and start < record.end for record in silent for start, end in holes):
        return failed(
            "coverage",
            f"blocks {blocks} of {name} are served only by peers that do not answer: {fix}, or repair the peers above",
        )
    return failed("coverage", f"blocks {blocks} of {name} are served by nobody: {fix}")


def context(
    checkpoint: Checkpoint, positions: int, records: Sequence[PeerRecord], rtt_ms: Mapping[str, float]
) -> CheckResult:
    """Whether a session of this many positions fits at present, which blocks lack memory, and how fast it would be.

    records: records of peers that together serve all blocks. rtt_ms: round trips to the tried peers, by name.
    """
    count, most = checkpoint.num_blocks, checkpoint.max_positions
    if most is not None and positions > most:
        return failed("context", f"{checkpoint.name} was made for {most} positions, not {positions}: ask for fewer")
    peers = [facts_of(record) for record in records if record.serves]
    able = [replace(peer, kv_free=positions) for peer in peers if not 0 < peer.kv_capacity < positions]
    too_small = missing_blocks(able, count)
    full = too_small or missing_blocks([peer for peer in peers if peer.kv_free >= positions], count)
    what = f"a session of {positions} positions"
    held = attrgetter("kv_capacity" if too_small else "kv_free")
    verb = "hold" if too_small else "have room for"
    lacking = [f"blocks {blocks_text(*each)} {verb} {most_positions(peers, each, held)}" for each in full]
    lack = f"{' and '.join(lacking)} at most{'' if too_small else ' now'}"
    if too_small:
        fix = "start peers for these blocks with more --kv-memory or fewer bits (--kv), or ask for fewer positions"
        return failed("context", f"{what} fits into no route: {lack}: {fix}")
    rates = {record.key.text: record.bytes_per_ms or UNMEASURED.bytes_per_ms for record in records}
    ways = ((name, Link(ms / 2, rates[name])) for name, ms in rtt_ms.items())
    links = {pair: link for name, link in ways for pair in ((CLIENT, name), (name, CLIENT))}
    network, by_name = network_of(records, links, {}), {peer.id: peer for peer in able}
    encodings = encodings_of({name: codec.bytes_per_position(checkpoint.hidden_size) for name, codec in CODECS.items()})
    plan = partial(best_route, able, (0, count), network, encodings=encodings, kv_needed=positions)
    hops = plan(prompt=positions, context=positions).hops
    token_ms = route_ms(hops, by_name, network, positions=1, encodings=encodings, context=positions)
    first_s = first_token_ms(hops, by_name, network, encodings=encodings, prompt=positions) / 1000
    unknown = positions >= CONTEXTS[0] and any(not by_name[hop.peer].context_cost.ms for hop in hops)
    least = ", without the time to read such a context, which some peers do not report" if unknown else ""
    speed = f"{first_s:.1f} s to the first token of a prompt that long, then {1000 / token_ms:.1f} tokens/s{least}"
    if full:
        return warned("context", f"{what} does not fit now: {lack}: try again later, or start more peers ({speed})")
    return passed("context", f"{what} fits: {speed}")


_HIDDEN_SILENCE = (
    "the peer is not reached through any of its helpers: the peer or its helpers have ended, or the helpers are full; "
    "within a minute, its record expires or names other helpers"
)


def peer(record: PeerRecord, answer: TriedPeer, ahead_s: float, allowed_s: float) -> CheckResult:
    """The finding about one peer. ahead_s: how many seconds after the present time the record was signed."""
    blocks = f"blocks {record.start}..{record.end - 1}"
    name = f"{short_key(record.key.text)} at {record.address}, {blocks}"
    if record.relays:
        name = f"{short_key(record.key.text)} behind a router, {blocks}"
    if record.protocol != PROTOCOL_VERSION:
        older = "this machine" if record.protocol > PROTOCOL_VERSION else "it"
        return failed("peer", f"{name}: speaks protocol {record.protocol}, this is {PROTOCOL_VERSION}: upgrade {older}")
    if answer.state.is_final:
        return failed("peer", f"{name}: {refusal(Endpoint(record.address, record.key), answer.state)}")
    if answer.rtt_ms is None:
        return warned("peer", f"{name}: {_HIDDEN_SILENCE if record.relays else _silence(answer.state)}")
    if ahead_s > allowed_s:
        return warned("peer", f"{name}: its clock is {ahead_s:.0f} s ahead: have the clock set by NTP")
    path_text = "" if answer.path_kind is PathKind.DIRECT else f", {answer.path_kind.value}"
    return passed("peer", f"{name}: answers in {answer.rtt_ms:.1f} ms, with its key{path_text}")


def peer_to_join(
    address: str, endpoint: Endpoint, answer: TriedPeer, wrong: Callable[[str, str], CheckResult]
) -> CheckResult:
    """Whether a peer to join through answers with the key of its address. wrong: makes the result for a problem."""
    if answer.state is LinkState.WRONG_KEY:
        text = "what answers there ends the handshake as if it has another key"
        return wrong("join", f"{address}: {text}: copy the address that the peer prints now")
    if answer.state is LinkState.REFUSED:
        return wrong("join", f"{address}: {refusal(endpoint, answer.state)}")
    if answer.rtt_ms is None:
        return wrong("join", f"{address}: {_silence(answer.state)}")
    return passed("join", f"{address} answers in {answer.rtt_ms:.1f} ms, with its key")


def _silence(state: LinkState) -> str:
    if state is LinkState.DOWN:
        return (
            "nothing listens there: the peer has ended and its record expires within a minute, or the peer announces a "
            "wrong address: start it with --public-host"
        )
    if state is LinkState.UP:
        return "accepts the connection and does not answer: restart the peer, which hangs"
    return (
        "the connection gets no answer: have the peer's port opened in firewalls and routers on the way, or start the "
        "peer with the --public-host at which others reach it"
    )


ASKED_PEERS = 3


@dataclass
class AddressChecks:
    """The checks of one address."""

    identity: Identity
    listen: str  # `tcp://host:port`, where a peer would listen
    public_host: str | None  # `HOST` or `HOST:PORT` at which others reach this machine; None: detected
    needed: bool  # whether this machine should serve, so that an unreachable port is a failure
    _serving: PeerRecord | None = None

    def __post_init__(self) -> None:
        self._address = self.listen  # the address to which others were asked to connect

    def port(self, own: PeerRecord | None = None) -> CheckResult:
        """Whether the port is free, or used by this machine's peer. own: the peer's record, if the peer is running."""
        try:
            check_listen_address(self.listen)
        except AddressInUse as error:
            if own is not None:
                self._serving = own
                return passed("port", f"{self.listen} is taken by the peer that has the key of this machine")
            return failed("port", str(error))
        except SplitnetError as error:
            return failed("port", str(error))
        return passed("port", f"{self.listen} can be listened on")

    def from_outside(self, links: PeerLinks, answering: Sequence[PeerRecord]) -> CheckResult:
        """Whether some of the answering peers reach this machine; call this method after `port` has passed."""
        if self._serving is not None:
            return self._ask_peers(links, answering, self._serving.address)
        try:
            listener = Transport(self.identity, on_message=lambda *_: None, listen=self.listen)
        except SplitnetError as error:
            return failed("reach", str(error))
        listener.start()
        with closing(listener):
            try:
                address = public_address(self.listen, listener.port, self.public_host)
            except SplitnetError as error:
                return failed("reach", str(error))
            return self._ask_peers(links, answering, address)

    def router(self, found: CheckResult) -> Iterator[CheckResult]:
        """Whether the router offers ports, if `found` shows that peers cannot connect. Requests no port."""
        if found.status is Status.passed or self.public_host is not None or not is_reachable(self._address):
            return
        try:
            yield passed("router", f"{look_for_router()} gives ports, and a peer here asks it for one")
        except MappingError as error:
            yield warned("router", f"the router gives no ports ({error}): enable NAT-PMP or UPnP, or forward a port")

    def _ask_peers(self, links: PeerLinks, answering: Sequence[PeerRecord], address: str) -> CheckResult:
        self._address = address
        wrong = failed if self.needed else warned
        if not is_address(address):
            return failed("reach", f"peers cannot connect to {address}: give --public-host as HOST or HOST:PORT")
        others = [record for record in answering if record.key != self.identity.public][:ASKED_PEERS]
        if not others:
            return warned("reach", "no answering peer could try to reach this machine: see above")
        here = Endpoint(address, self.identity.public)
        reached = dict(links.ask_back(others, here))
        # A peer that knows this address waits for some time before its next attempt, but opens a new link at once.
        again = [record for record in others if reached.get(record.key.text) is False]
        reached |= links.ask_back(again, here) if again else {}
        count = sum(reached.values())
        if not reached:
            return warned("reach", f"no peer had room to try whether it reaches {address}: try again later")
        if count == len(reached):
            note = ", which only this machine can use" if not is_reachable(address) else ""
            return passed("reach", f"{count} of {count} peers reach this machine at {address}{note}")
        who = f"only {count} of {len(reached)} peers reach" if count else "no peer reaches"
        helpers = sum(record.helper is not None for record in answering)
        if helpers and not count:
            return warned(
                "reach",
                f"{who} this machine at {address}: a peer here is reached through helpers ({helpers} peers help); "
                "for direct connections, open the port, forward it in the router, and name it with --public-host",
            )
        purpose = "" if self.needed else "a client needs no open port, but to serve here "
        return wrong(
            "reach",
            f"{who} this machine at {address}: {purpose}open the port in firewalls, forward it in the router, and name "
            "with --public-host the HOST:PORT that others see",
        )


MAX_PEERS = 64
ANY_PORT = "tcp://0.0.0.0:0"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The setup to check, as in the options of `splitnet peer`; None: no model, or no address to listen at."""

    model: str | None = None
    options: ConnectionOptions
    listen: str | None = None
    public_host: str | None = None
    context: int | None = None  # number of positions of a session that should fit; None: no session is checked
    clock: Callable[[], float] = time.time  # returns Unix time in seconds


def examine(setup: Setup) -> Iterator[CheckResult]:
    """Yields the results of all checks that the setup allows; a failed check does not end the examination.

    Raises KeyFileError if the file with the swarm's key cannot be used.
    """
    swarm = setup.options.load_swarm_key() or OPEN
    yield from machine_checks.software()
    yield machine_checks.devices(setup.options.device)
    yield machine_checks.kernels()
    checkpoint = None
    if setup.model is None:
        yield passed("memory", f"{machine_checks.gib(free_memory('cpu'))} are free")
    else:
        found, checkpoint = machine_checks.open_model(setup.model)
        yield found
        yield from _room(setup.model, checkpoint)
    identity = setup.options.identity
    if identity is None:
        found, identity = machine_checks.key_of(setup.options.key_file)
        yield found
        identity = identity or Identity.generate()
    needed = setup.listen is not None or setup.public_host is not None
    reach = AddressChecks(identity, setup.listen or ANY_PORT, setup.public_host, needed=needed)
    join = setup.options.initial_peers
    if not join and setup.options.lan and checkpoint is not None:
        found, join = local_network(checkpoint)
        yield found
    if join:
        yield from _way_to(setup, join, checkpoint, reach, swarm)
    else:
        if setup.context is not None:
            yield warned("context", "no swarm was found to check the session with: give --join")
        yield reach.port()


def _room(model: str, checkpoint: Checkpoint | None) -> Iterator[CheckResult]:
    sizes = None
    if checkpoint is not None:
        try:
            sizes = ModelSizes.of(model)
            yield machine_checks.memory(ModelSizes.of(model, weights=AUTO), free_memory("cpu"))
        except SplitnetError as error:
            yield failed("memory", str(error))
    yield machine_checks.room_on_disk(model, sizes)


def _way_to(
    setup: Setup, join: Sequence[str], checkpoint: Checkpoint | None, reach: AddressChecks, swarm: OpenSwarm
) -> Iterator[CheckResult]:
    multiaddrs, addresses = split_addresses(join)
    answers = ask_nodes(multiaddrs, clock=setup.clock) if multiaddrs else []
    present = [answer for answer in answers if not answer.fault]
    found, joined = _peers_to_ask(addresses, reach.identity, others_answer=bool(present))
    yield from join_addresses(answers, others_answer=bool(joined))
    yield from found
    allowed_s = MAX_CLOCK_SKEW_S
    if present:
        allowed_s = import_hivemind().max_skew_s
        agreement = clocks(present, allowed_s)
        yield agreement
        # If this machine's clock is wrong, records of peers seem to be expired, or to be from the future.
        in_time = [] if agreement.status is Status.failed else present
        present = [answer for answer in in_time if abs(answer.ahead_s) <= allowed_s]
    joined = [*joined, *(answer.address for answer in present)]
    if not joined:
        yield reach.port()
        return
    with closing(Links(reach.identity)) as links:
        try:
            with join_swarm(joined, lambda: links, swarm=swarm) as directory:
                yield from _swarm(setup, directory, checkpoint, reach, allowed_s)
        except SplitnetError as error:
            yield failed("swarm", str(error))


def _peers_to_ask(
    addresses: Sequence[str], identity: Identity, *, others_answer: bool
) -> tuple[list[CheckResult], list[str]]:
    found = list[CheckResult]()
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
    setup: Setup, directory: SwarmDirectory, checkpoint: Checkpoint | None, reach: AddressChecks, allowed_s: float
) -> Iterator[CheckResult]:
    models = directory.models()
    yield served_model(models, checkpoint)
    wanted = served_marks(models, checkpoint)
    records = [record for model in wanted or models for record in directory.peers(model)]
    tried = records[:MAX_PEERS]
    with PeerLinks(reach.identity) as links:
        answers = links.try_out({record.endpoint for record in tried})
        answering, silent = list[PeerRecord](), list[PeerRecord]()
        for record in tried:
            answer = answers[record.endpoint]
            yield peer(record, answer, record.issued_at - setup.clock(), allowed_s)
            (silent if answer.rtt_ms is None else answering).append(record)
        if len(tried) < len(records):
            yield passed("peer", f"the other {len(records) - len(tried)} peers are not tried, but assumed to answer")
        counted = [*answering, *records[MAX_PEERS:]]
        for model in wanted:
            told = max((record.num_blocks for record in records if record.model == model), default=0)
            if count := checkpoint.num_blocks if checkpoint else told:
                gone, there = ([one for one in some if one.model == model] for some in (silent, counted))
                covered = coverage(models[model], count, gone, there)
                yield covered
                if setup.context is not None and checkpoint is not None and covered.status is Status.passed:
                    rtts = ((record.key.text, answers[record.endpoint].rtt_ms) for record in there if record in tried)
                    yield context(checkpoint, setup.context, there, {name: ms for name, ms in rtts if ms is not None})
        own = next((record for record in records if record.key == reach.identity.public), None)
        found = reach.port(own)
        yield found
        if found.status is Status.passed:
            found = reach.from_outside(links, answering)
            yield found
            yield from reach.router(found)
