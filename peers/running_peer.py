"""A running peer: it joins a swarm, connects directory, transport and service, and moves to other blocks.

A `SpanServer` serves one span; a peer that moves replaces the `SpanServer`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from peers.any_model import ChosenModel, ModelChoice
from peers.compression import CompressionService
from peers.counters import Counters
from peers.directory_service import DirectoryService
from peers.engine import Engine
from peers.joined_swarm import JoinedSwarm, join_swarm
from peers.page_copies import PageCopies
from peers.peer_links import Neighbours, NextHops, Outbox
from peers.peer_options import PeerOptions, Report, SpanWish
from peers.peer_paths import PeerPaths
from peers.power import EnergyMeter, find_sources
from peers.prefixes import STATES, PageFiles, PrefixStore
from peers.queue import WorkQueue
from peers.relocation import (
    NOBODY,
    HolderWatch,
    Mover,
    Relocation,
    answering,
    choose_blocks,
    expected_block_ms,
    fitting_blocks,
    position_bytes,
)
from peers.rows import AHEAD
from peers.served import ServedBlocks, renumbered
from peers.service import SessionService
from peers.sessions import TENSOR_BYTES, KeyPolicy, SessionTable
from peers.speed import KnownSpeeds, ObservedSpeed, speed_of
from peers.weights import DEFAULT_RATE, WeightService
from scheduler.placement import BLOCKS_SHARE
from splitnet.blocks.chosen_device import find_device
from splitnet.blocks.span import Span
from splitnet.blocks.vision import VisionTower
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.families import can_cut
from splitnet.checkpoint.transfer.fetching import Fetcher
from splitnet.directory.announcer import Announcer
from splitnet.directory.record import PeerRecord
from splitnet.errors import ModelNotFound, OutOfMemory, ProtocolError, SplitnetError
from splitnet.nat.tunnel import Tunnels
from splitnet.process import Watchdog
from splitnet.quant.choose import choose_weights
from splitnet.quant.device import free_memory, give_back_memory, trim_memory
from splitnet.security.identity import AuthorizedKeys, Identity, PublicKey, kept_proof
from splitnet.security.swarm_key import OPEN
from splitnet.transport.addresses import (
    Reach,
    hosts_of,
    peer_address,
    public_address,
    reachable_host,
    with_literal_host,
)
from splitnet.transport.transport import Transport
from splitnet.version import __version__
from splitnet.wire.codecs import CODECS, DEFAULT_INT8, codec_by_name
from splitnet.wire.endpoints import Connection, Destination, Endpoint, Relay
from splitnet.wire.messages import (
    PROTOCOL_VERSION,
    Announce,
    AskCompression,
    AskWeights,
    CopyPages,
    LookUp,
    Payload,
    Pong,
    decode,
)
from splitnet.wire.receipts import RECORD

log = logging.getLogger(__name__)

MOVE_DRAIN_S = 15.0  # longest time that a moving peer waits until other peers have its sessions
FIRST_REMEASURE_S = 20.0  # idle time before the speed of the device is measured again; doubles with each measurement
TRIM_S = 20.0  # time after the last pass over whole sequences until the C library returns free memory to the system

# Bytes. Waiting steps may occupy half as much as the KV memory, and at least this; one key may use half of these bytes.
LEAST_STEP_MEMORY = 128 * 2**20


class IsLeaving(Exception):
    """The peer is closed while it downloads or loads blocks."""


def _row_positions(checkpoint: Checkpoint, span: Span, options: PeerOptions) -> int:
    """Approximate maximum number of positions in one row."""
    memory = options.kv_memory if options.kv_memory is not None else free_memory(span.device) // 4
    held = int(memory / (1 + AHEAD)) // max(1, span.kv_bytes_per_position)
    return min(held, checkpoint.max_positions or held)


def _load(
    checkpoint: Checkpoint, start: int, end: int, options: PeerOptions, progress: Callable[[int, int], None]
) -> Span:
    device, dtype, weights, kv = options.device, options.dtype, options.weights, options.kv
    return Span.load(checkpoint, start, end, device=device, dtype=dtype, weights=weights, kv=kv, progress=progress)


class SpanServer:
    """Serves one span: a service for its sessions, and an engine for their steps.

    Raises OutOfMemory: the `kv_memory` of the options is less than the states of one sequence.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        span: Span,
        speed: ObservedSpeed,
        outbox: Outbox,
        next_hops: NextHops,
        options: PeerOptions,
        counters: Counters,
        policy: KeyPolicy | None = None,
        tower: VisionTower | None = None,
        *,
        sign: Callable[[bytes], bytes],
    ) -> None:
        kv_memory, training_memory = options.kv_memory, options.training_memory
        if kv_memory is not None and kv_memory <= span.row_bytes != 0:
            what = (
                "states"
                if span.row_bytes == span.state_bytes
                else "states and the positions that are held in full precision"
            )
            raise OutOfMemory(
                f"the {what} of a sequence in blocks {span.start}:{span.end} take {span.row_bytes / 2**20:.1f} MiB, "
                f"but KV caches may use {kv_memory / 2**20:.1f} MiB: increase --kv-memory, or serve fewer blocks"
            )
        self.span = span
        self.speed = speed
        policy = policy or KeyPolicy()
        if kv_memory is None:
            kv_memory = free_memory(span.device) // 4
        usual = codec_by_name(DEFAULT_INT8).bytes_per_position(checkpoint.hidden_size)
        sessions = SessionTable(
            kv_memory,
            idle_s=options.idle_s,
            position_bytes=span.kv_bytes_per_position,
            row_bytes=span.row_bytes + 2 * TENSOR_BYTES * (span.end - span.start),
            digest_bytes=RECORD,
            usual_log_bytes=usual if span.end < checkpoint.num_blocks else 0,
            ahead=AHEAD,
            num_blocks=checkpoint.num_blocks,
            keys=policy.keys,
        )
        where = span.device.type
        on_cpu = where == "cpu"
        beside = 0 if on_cpu else min(kv_memory, free_memory(torch.device("cpu")) // 4)
        if options.prefixes:
            folder = options.prefix_folder
            sessions.prefixes = PrefixStore(
                f"{__version__} {torch.__version__} {where} {checkpoint.fingerprint} {span.held_as} {span.dtype}",
                (lambda: sessions.memory.free) if on_cpu else (lambda: beside),
                lambda owner: 1.0 if owner.startswith(b"group ") else policy.weight(owner),
                PageFiles(folder, options.prefix_disk) if folder is not None and options.prefix_disk != 0 else None,
            )
        pass_s = partial(speed.pass_s, blocks=span.end - span.start)
        queue = WorkQueue(pass_s, policy.weight, max(LEAST_STEP_MEMORY, kv_memory // 2), outbox.unsent)
        page, states = span.page_layout() if options.prefixes else ({}, {})
        page = renumbered(page | {STATES + name: each for name, each in states.items()}, span.start)
        facts = checkpoint.num_blocks, checkpoint.hidden_size, checkpoint.max_positions
        reads = span.rotary_axes, span.joins_positions, span.per_layer_size
        served = ServedBlocks(checkpoint.fingerprint, span.start, span.end, *facts, span.held_as, page, *reads)
        if training_memory is None:
            training_memory = free_memory(span.device) // 8
        self.service = SessionService(
            served,
            sessions,
            queue,
            outbox,
            next_hops,
            training_memory=training_memory,
            counters=counters,
            policy=policy,
            tower=tower,
            sign=sign,
        )
        self.engine = Engine(span, self.service, speed)
        self._measured_at = time.monotonic()
        self._measure_after_s = FIRST_REMEASURE_S

    def remeasure_if_idle(self) -> None:
        """Has the speed of an idle device measured again, at growing intervals: other processes may slow the device
        down."""
        now = time.monotonic()
        last = max(self._measured_at, self.service.load.last_at)
        if now - last > self._measure_after_s and not self.service.queue.has_work:
            self.engine.measure_when_idle()
            self._measured_at = now
            self._measure_after_s *= 2
        elif (passed_at := self.engine.passed_at) is not None and now - passed_at > TRIM_S:
            self.engine.passed_at = None
            self.service.queue.put_idle_job(trim_memory)

    def drain(self, timeout_s: float) -> None:
        """Takes no new sessions, and has the clients of open sessions replace this peer.

        Returns when no session is in use, or after `timeout_s` seconds.
        """
        self.service.leave()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.service.in_use(time.monotonic()):
            self.service.sessions.wait_for_end(0.2)

    def close(self) -> None:
        self.engine.close()
        self.service.forget_all()
        if self.service.sessions.prefixes is not None:
            self.service.sessions.prefixes.close()


class RunningPeer:
    """A running peer of one model. Use `RunningPeer.start`, then `close`.

    Raises SplitnetError, whose text says what helps: a problem of the model, the swarm, the address, or memory.
    """

    def __init__(
        self,
        joined: JoinedSwarm,
        span: Span,
        speed: ObservedSpeed,
        options: PeerOptions,
        identity: Identity,
        counters: Counters,
        max_blocks: int,
        choice: ModelChoice | None = None,
        tower: VisionTower | None = None,
    ) -> None:
        self._choice = choice
        self._tower = tower
        self.checkpoint = checkpoint = joined.checkpoint
        self.identity = identity
        self.counters = counters
        self.directory = directory = joined.directory
        self._lan, self._fetcher = joined.lan, joined.fetcher
        self._max_blocks = max_blocks
        self._mover = Mover(checkpoint.num_blocks, position_bytes(checkpoint), partial(can_cut, checkpoint.config))
        self._last_record: PeerRecord | None = None
        self._options = options
        self._proof = 0
        self._leaving = threading.Event()
        self._watchdog = Watchdog()
        self._authorized = AuthorizedKeys(options.authorized_keys) if options.authorized_keys else None
        self._policy = KeyPolicy(self._authorized)
        self._tunnels = Tunnels(identity)
        self.transport = Transport(
            identity,
            on_message=self._receive_message,
            on_link=lambda endpoint, state: self.service.link_changed(endpoint, state),
            on_lost=lambda connection: self.service.connection_lost(connection, time.monotonic()),
            on_dropped=lambda _, frames, reason: self.service.dropped(decode(frames), reason),
            on_tick=self._tick,
            on_received=self._run_here,
            authorized=self._authorized,
            listen=options.listen,
            tunnels=self._tunnels,
        )
        self._outbox = Outbox(self.transport, self.counters.traffic)
        self._next_hops = NextHops(self._outbox)
        try:
            self._server: SpanServer | None = self._server_of(span, speed)
        except BaseException:
            self.transport.close()
            raise
        self.service = self._server.service  # while the peer moves: the service of its former blocks
        self._placed_at = time.time()
        self._watch = HolderWatch(self._next_hops, self.transport.link_state)
        self._joined_at = hosts_of(options.initial_peers)
        self.paths = PeerPaths(
            self.transport,
            self._tunnels,
            identity,
            options,
            public_address(options.listen, self.transport.port, options.public_host),
            authorized=self._authorized,
            others=self._others,
            directory=directory,
            vouched=self._vouches,
            changed=lambda: self._announcer.publish_soon(),
        )
        self._neighbours = Neighbours(self._others, self._next_hops, self._outbox.prober, self.record)
        swarm = options.swarm_key or OPEN
        self._directory_service = DirectoryService(directory, checkpoint.fingerprint, self._outbox, swarm)
        self.weights = self._weights_of(checkpoint)
        self._copies = PageCopies(lambda: self.service, self._outbox, identity, swarm)
        clients = AuthorizedKeys(options.compress_for) if options.compress_for else None
        self._compression = CompressionService(
            lambda: self.checkpoint,
            lambda: (self.span.start, self.span.end),
            self._outbox,
            clients,
            options.compress_folder,
        )
        self._announcer = Announcer(directory, identity, self.record, self._look_around)
        self.relocation = Relocation(
            self._mover,
            self._watch,
            self._leaving,
            own=self.record,
            others=lambda: self._neighbours.answering(self._others()),
            publish=self._announcer.publish,
            move=self._move_span,
            leave=self._leave_model,
        )

    def _weights_of(self, checkpoint: Checkpoint) -> WeightService:
        return WeightService(
            checkpoint.held_pieces(),
            self._outbox,
            shares=partial(self._options.shares_weights, self._authorized),
            rate=self._options.share_rate or DEFAULT_RATE,
            swarm=self._options.swarm_key or OPEN,
            serving=lambda: self.service.in_use(time.monotonic()),
            page=lambda name: store.packed(name) if (store := self.service.sessions.prefixes) is not None else None,
        )

    @classmethod
    def start(cls, model: str | Path | None, options: PeerOptions, *, progress: Report | None = None) -> RunningPeer:
        """Joins or starts a swarm, loads blocks and serves them. model: hub id or checkpoint folder; None: the model
        with the highest demand among those that `options` allow.

        progress: called with a stage, bytes done and total bytes, repeatedly while the start waits. An error that
        `progress` raises ends the start.
        """
        report = progress or (lambda stage, done, total: None)
        report("open the checkpoint", 0, 0)
        checkpoint: Checkpoint | None = None
        absent: ModelNotFound | None = None
        try:
            if model is not None:
                checkpoint = Checkpoint.open(model)
                _ = checkpoint.is_whole
        except ModelNotFound as error:
            if not (options.initial_peers or options.join_file or options.model_id):
                raise
            checkpoint, absent = None, error
        # Options are checked before slow work.
        authorized = AuthorizedKeys(options.authorized_keys) if options.authorized_keys is not None else None
        if options.public_host is not None:
            reach = Reach.direct if options.reach is Reach.auto else options.reach
            options = replace(options, public_host=with_literal_host(options.public_host), reach=reach)
        else:
            with_literal_host(reachable_host(options.listen))
        options = replace(options, device=find_device(options.device).device)
        if checkpoint is not None:
            choose_weights(options.weights, options.dtype, checkpoint.dtype, torch.device(options.device))
            if options.wish.blocks is not None:
                choose_blocks(checkpoint, options.wish, 0, NOBODY)
        identity = options.identity or (
            Identity.load_or_create(options.key_file) if options.key_file else Identity.generate()
        )
        choice: ModelChoice | None = None
        if options.any_model is not None:
            if options.wish.memory is None:  # fixed now, because free memory changes when models are loaded
                memory = int(free_memory(torch.device(options.device)) * BLOCKS_SHARE)
                options = replace(options, wish=SpanWish(memory=memory))
            choice = ModelChoice(options, identity, report, authorized)
        try:
            joined = join_swarm(options, model, checkpoint, identity, report, choice.choose_first if choice else None)
        except ModelNotFound as error:
            raise (
                error if absent is None else ModelNotFound(f"{absent}. The peers do not have the model either: {error}")
            ) from error
        checkpoint = joined.checkpoint
        try:
            choose_weights(options.weights, options.dtype, checkpoint.dtype, torch.device(options.device))
            tower = None
            if options.vision:  # before blocks are chosen, which then have the rest of the memory
                report("load the vision tower", 0, 0)
                tower = VisionTower(checkpoint, options.device, options.dtype)
            fitting = fitting_blocks(checkpoint, options.wish, options.device, options.dtype, options.weights)
            present, own_ms = NOBODY, None
            if fitting:
                report("ping the other peers", 0, 0)
                present = answering(joined.directory.peers(checkpoint.fingerprint), identity)
            if present.records:
                own_ms = expected_block_ms(checkpoint, options.device, options.dtype, options.weights)
            start, end = choose_blocks(checkpoint, options.wish, fitting, present, own_ms)
            span = _load(checkpoint, start, end, options, partial(report, f"load blocks {start}..{end - 1}"))
            report("measure the device", 0, 0)
            find = partial(find_sources, torch.device(options.device), options.sysfs)
            counters = Counters(EnergyMeter(find, options.watts))
            most = _row_positions(checkpoint, span, options)
            speed = speed_of(span, checkpoint.fingerprint, options.speeds_file, counters.energy, most)
            peer = cls(joined, span, speed, options, identity, counters, fitting, choice, tower)
        except BaseException:
            joined.close()
            raise
        if joined.fetcher is not None:
            joined.fetcher.report = peer._go_on
        if choice is not None:
            choice.go_on = peer._go_on
            choice.serves((checkpoint, joined.fetcher))
        try:
            peer._serve()
        except BaseException:
            peer.close()
            raise
        return peer

    @property
    def endpoint(self) -> Endpoint:
        """The present endpoint of the peer for direct connections."""
        return self.paths.endpoint

    @property
    def join_address(self) -> str:
        """`tcp://IP:port?key=...`, with which others join the swarm through this peer."""
        return peer_address(self.endpoint)

    @property
    def server(self) -> SpanServer:
        """The server of the present blocks. Raises SplitnetError while the peer moves to other blocks."""
        if self._server is None:
            raise SplitnetError("this peer is moving to other blocks: try again when it serves them")
        return self._server

    @property
    def span(self) -> Span:
        """The served blocks. Raises SplitnetError while the peer moves to other blocks."""
        return self.server.span

    def record(self) -> PeerRecord:
        """The present record of the peer."""
        if self._last_record is not None:
            return replace(self._last_record, issued_at=time.time())
        server = self.server
        wait_ms, batch = server.service.load.estimate_at(time.monotonic())
        coordinate, coordinate_error = self._neighbours.coordinate
        return PeerRecord(
            key=self.identity.public,
            model=self.checkpoint.fingerprint,
            model_name=self.checkpoint.name,
            address=self.paths.address,
            start=server.span.start,
            end=server.span.end,
            num_blocks=self.checkpoint.num_blocks,
            protocol=PROTOCOL_VERSION,
            codecs=tuple(CODECS),
            device=str(server.span.device),
            dtype=server.span.held_as,
            block_ms=server.speed.block_ms,
            queue_ms=wait_ms,
            batch=batch,
            kv_free_positions=server.service.sessions.free_positions,
            sessions=len(server.service.sessions),
            max_blocks=self._max_blocks,
            placed_at=self._placed_at,
            moving_to=self._mover.intended,
            serves=not server.service.leaving,
            coordinate=coordinate,
            coordinate_error=coordinate_error,
            bytes_per_ms=self._neighbours.network_coordinates.own_place.bytes_per_ms,
            links=self._neighbours.seen_links,
            version=__version__,
            issued_at=time.time(),
            state_bytes=server.span.row_bytes,
            proof=self._proof,
            watts=self.counters.energy.watts,
            relays=self.paths.hidden.relays,
            relay_port=self.paths.relay_port,
            kv_capacity=server.service.sessions.capacity,
            past_ms=server.speed.past.ms,
            kv=server.span.kv,
            reads_images=self._tower is not None,
        )

    def drain(self, timeout_s: float) -> None:
        """Leaves the directory and drains sessions, see `SpanServer.drain`."""
        self._leaving.set()
        with self.relocation.lock:
            self.service.leave()  # before the peer leaves the directory, which may take long
            self._announcer.close()
            if self._choice is not None:
                self._choice.stay(self.directory)
            if self._lan is not None:
                self._lan.close()
            if self._server is not None:
                self._server.drain(timeout_s)

    def close(self) -> None:
        self._leaving.set()
        with self.relocation.lock:
            self._announcer.close()
            self.transport.close()
            self._directory_service.close()
            self.weights.close()
            self._copies.close()
            self._compression.close()
            self.paths.close()
            if self._server is not None:
                self._server.close()
        self.relocation.join()
        if self._lan is not None:
            self._lan.close()
        self.directory.close()

    def _serve(self) -> None:
        self.server.engine.start()
        self.weights.start()
        self._compression.start()
        self.transport.start()
        self.paths.start()
        self._announcer.start()
        if self._max_blocks:
            self.relocation.start()

    def _run_here(self) -> None:
        if (server := self._server) is not None:
            server.engine.run_here()

    def _tick(self) -> None:
        self.service.tick(time.monotonic())
        if self.paths.moves(time.monotonic()):
            self._announcer.publish_soon(moved=True)
        self._watchdog.alive()  # reached only if no thread keeps a lock that this thread needs

    def _look_around(self) -> None:
        self.counters.energy.find_sources()
        if self._server is not None:  # no local variable: its reference would keep a move from freeing the span
            self._server.remeasure_if_idle()
        self.paths.check_reachability()
        if self._lan is not None:
            self._lan.announce_addresses()
        if self._choice is not None:
            self._choice.renew(self.directory)
        self._neighbours.hear_used()
        self._neighbours.look_around()
        self._prove_work()

    def _prove_work(self) -> None:
        """Makes the proof of work of a key that is kept in a file, if it has no proof yet; takes seconds."""
        if self._options.key_file is None or self._proof:
            return
        file = self._options.key_file.with_name(f"{self._options.key_file.name}.proof")
        try:
            self._proof = kept_proof(self.identity.public, file, self._leaving)
        except OSError as error:
            log.warning("the proof of work of this key cannot be kept in %s: %s", file, error.strerror)

    def _others(self) -> list[PeerRecord]:
        present = self.directory.peers(self.checkpoint.fingerprint)
        return [record for record in present if record.key != self.identity.public]

    def _vouches(self, relay: Relay) -> bool:
        """Whether a relay has an authorized key, or an address through which the user has joined."""
        is_friend = self._authorized is not None and self._authorized.lists_key(PublicKey(relay.key).curve_raw)
        return is_friend or relay.address.removeprefix("tcp://").rpartition(":")[0] in self._joined_at

    def _leave_model(self, own: PeerRecord, others: Sequence[PeerRecord]) -> bool | None:
        """See `Relocation.leave`."""
        if self._choice is None:
            return False
        chosen: ChosenModel | None = None
        try:
            in_use = self.service.in_use(time.monotonic())
            size = position_bytes(self.checkpoint)
            chosen = self._choice.better_model_now(self.directory, own, others, size=size, in_use=in_use)
            if chosen is None:
                return None if self._choice.is_leaving else False
            self._move_span(chosen.span, chosen=chosen)
        except IsLeaving:
            return False
        except SplitnetError as error:
            log.warning("this peer cannot serve a model with higher demand: %s", error)
            if chosen is None:
                return False
            self._choice.give_up(self.directory, chosen)
        return True

    def _move_span(self, span: tuple[int, int], urgent: bool = False, chosen: ChosenModel | None = None) -> None:
        """Drains sessions, then serves other blocks under the same key and address.

        urgent: some blocks have no server, so sessions cannot continue and the move does not wait for them. chosen:
        another model that has the blocks.
        """
        try:
            (chosen or self).checkpoint.get_blocks(*span)  # the present blocks are still served
        except IsLeaving:
            return
        self._last_record = replace(self.record(), moving_to=None if chosen else span, serves=False)
        try:
            self._announcer.publish()
        except SplitnetError as error:  # nodes of the DHT may be lost together with the blocks
            log.warning("could not announce the move to the swarm: %s", error)
        if self._change_to(*span, 0.0 if urgent else MOVE_DRAIN_S, chosen):
            self._last_record = None
            self._announcer.publish()
            start, end = self.span.start, self.span.end
            of = f" of {self.checkpoint.name}" if chosen else ""
            log.warning("serving blocks %d..%d%s", start, end - 1, of, extra={"blocks": f"{start}:{end}"})

    def _change_to(self, start: int, end: int, drain_s: float, chosen: ChosenModel | None) -> bool:
        """Drains sessions, then serves other blocks, or the old blocks after an error; False: the peer ends."""
        server, leaves = self.server, self._last_record
        old, speed = (server.span.start, server.span.end), server.speed
        former = self.checkpoint, self._fetcher, self._max_blocks
        blocks = {"former_blocks": "{}:{}".format(*old), "blocks": f"{start}:{end}"}
        of = f" of {chosen.checkpoint.name}" if chosen else ""
        log.warning("moving from blocks %d..%d to %d..%d%s", old[0], old[1] - 1, start, end - 1, of, extra=blocks)
        server.drain(drain_s)
        server.close()
        # The new blocks need the memory of the old blocks. Until they are loaded, the old service answers messages.
        self._server = server = None
        give_back_memory()
        try:
            if chosen is not None and leaves is not None:
                self._serve_model(chosen.checkpoint, chosen.fetcher, chosen.max_blocks, chosen.arriving(leaves))
            self._load_and_serve(start, end, None if chosen else speed)
        except IsLeaving:
            return False
        except Exception:
            log.exception("could not load blocks %d..%d, going back", start, end - 1)
            if chosen is not None:
                self._serve_model(*former, leaves)
                if self._choice is not None:
                    self._choice.give_up(self.directory, chosen)
            self._load_and_serve(*old, speed)
        else:
            self.counters.moves += 1
        return True

    def _serve_model(
        self, checkpoint: Checkpoint, fetcher: Fetcher | None, max_blocks: int, record: PeerRecord | None
    ) -> None:
        """Changes everything that depends on the model; record: announced until its blocks are served."""
        former, self._last_record = self._last_record, record
        self.checkpoint, self._fetcher, self._max_blocks = checkpoint, fetcher, max_blocks
        if fetcher is not None:
            fetcher.report = self._go_on
        self._mover = self.relocation.mover = Mover(
            checkpoint.num_blocks, position_bytes(checkpoint), partial(can_cut, checkpoint.config)
        )
        self._directory_service.serve_model(checkpoint.fingerprint)
        weights, self.weights = self.weights, self._weights_of(checkpoint)
        self.weights.sent = weights.sent
        self.weights.start()
        weights.close()
        if self._lan is not None:
            self._lan = self._lan.of_model(checkpoint)
        if self._choice is not None:
            self._choice.serves((checkpoint, fetcher))
        try:
            if former is not None:
                self.directory.withdraw(former, self.identity)
            self._announcer.publish()
        except SplitnetError as error:
            log.warning("could not announce the move to the swarm: %s", error)

    def _load_and_serve(self, start: int, end: int, speed: ObservedSpeed | None) -> None:
        """speed: of other blocks of the model; None: the new blocks are timed."""
        options = self._options
        span = _load(self.checkpoint, start, end, options, self._go_on)
        if speed is None:
            most = _row_positions(self.checkpoint, span, options)
            speed = speed_of(span, self.checkpoint.fingerprint, options.speeds_file, self.counters.energy, most)
        # All blocks of a model have about the same speed. The new blocks are timed when the peer is idle.
        elif options.speeds_file is not None:
            KnownSpeeds(options.speeds_file).follow(span, self.checkpoint.fingerprint, speed)
        server = self._server_of(span, speed)
        server.engine.start()
        self._server, self.service = server, server.service
        self._placed_at = time.time()

    def _server_of(self, span: Span, speed: ObservedSpeed) -> SpanServer:
        links = self._outbox, self._next_hops
        about = self._options, self.counters, self._policy, self._tower
        return SpanServer(self.checkpoint, span, speed, *links, *about, sign=self.identity.sign)

    def _go_on(self, *_: object) -> None:
        if self._leaving.is_set():
            raise IsLeaving

    def _receive_message(self, source: Destination, frames: Sequence[Payload]) -> None:
        try:
            message = decode(frames)
        except ProtocolError as error:
            self.counters.traffic.count(source, None, frames, sent=False)
            self.service.reject(source, error)
            return
        self.counters.traffic.count(source, message, frames, sent=False)
        if isinstance(message, Pong) and isinstance(source, Endpoint):
            self._outbox.prober.pong(source, message)
            self._neighbours.message_received(source)
            self._watch.message_received(source, time.monotonic())
            self.service.ping_answered(source)
        elif isinstance(message, LookUp | Announce) and isinstance(source, Connection):
            self._directory_service.receive_question(source, message, time.monotonic())
        elif isinstance(message, AskWeights) and isinstance(source, Connection):
            self.weights.receive_request(source, message)
        elif isinstance(message, CopyPages) and isinstance(source, Connection):
            self._copies.receive_request(source, message)
        elif isinstance(message, AskCompression) and isinstance(source, Connection):
            self._compression.receive_request(source, message)
        else:
            self.service.receive_message(source, message, time.monotonic())
