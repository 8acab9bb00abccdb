"""Examines pieces with other peers of the same blocks, for clients without the weights."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from splitnet.audit.comparison import EQUAL, FLOOR, FLOOR_OF_HALF, MIN_POSITIONS, Verdict, coarse_type, judge_all
from splitnet.audit.piece import Piece
from splitnet.audit.recompute import adapter_of
from splitnet.blocks.block_inputs import decode_inputs
from splitnet.errors import SessionClosed, SplitnetError
from splitnet.security.identity import AuthorizedKeys
from splitnet.session.driver import LinkCodecs
from splitnet.session.inference import Session
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.plan import HeldBlocks, PlannedHop
from splitnet.swarm.swarm import Swarm
from splitnet.wire.codecs import EXACT, Codec, codec_by_code, codec_by_name
from splitnet.wire.messages import Chunk

WAIT_S = 10.0  # for a peer in place of a lost auditor


class OtherPeers:
    """Computes pieces again at one other peer, and at a third one if the results differ. One thread at a time.

    Two of three peers are believed, so the result is no proof for others.

    routed: whether blocks choose experts.
    """

    MOST_POSITIONS = 1024  # of a piece: auditors send outputs as float32

    def __init__(self, swarm: Swarm, options: ConnectionOptions, *, routed: bool) -> None:
        plain = {"prefer": "latency", "energy_slowdown": None, "prefixes": "off", "standby": None}
        self._options = replace(options, **plain, any_weights=False, recovery_timeout_s=WAIT_S)
        self._swarm, self._routed = swarm, routed
        self._may_audit = AuthorizedKeys(Path(options.auditors)) if options.auditors is not None else None
        self._session: Session | None = None
        self._closed = False

    def examine(self, piece: Piece) -> Verdict:
        """Whether other peers compute the same. An auditor whose result a third peer contradicts is left for a while.

        Raises SplitnetError: too few other peers serve these blocks in the weight format of the hop, no two results are
        alike, or there are too few positions to tell.
        """
        if (count := len(piece.positions)) < MIN_POSITIONS:
            raise SplitnetError(f"the outputs of {count} positions are too few to tell, {MIN_POSITIONS} are needed")
        given, own = piece.hidden(self._swarm.facts.hidden_size)
        at, codec = list(piece.positions), codec_by_code(piece.receipt.codec)
        floor = FLOOR if coarse_type(piece.receipt.weights.partition(" ")[0]) is None else FLOOR_OF_HALF

        def compared(outputs: Tensor, expected: Tensor) -> Verdict:
            if codec.decode(codec.encode(expected), *expected.shape).equal(outputs):
                return EQUAL
            return judge_all(given[at], outputs, expected, None, {}, codec, routed=self._routed, floor=floor)

        first, auditors = self._compute(piece, given, {piece.key.text})
        verdict = compared(own, first)
        if verdict.honest:
            return verdict
        second, _ = self._compute(piece, given, {piece.key.text, *auditors})
        again = compared(own, second)
        if again.honest:
            for name in auditors:
                self._swarm.ban(name)
            return again
        if not compared(first, second).honest:
            raise SplitnetError("three peers give three results, so that none of them is named")
        return again

    def close(self) -> None:
        """Ends an examination under way. Any thread may call this."""
        self._closed = True
        if (session := self._session) is not None:
            session.close()

    def _compute(self, piece: Piece, given: Tensor, avoided: Collection[str]) -> tuple[Tensor, set[str]]:
        """The outputs at the known positions, `[positions, hidden]` float32, and the names of the peers that have
        computed them. One peer that holds all blocks is drawn at random; only where there is none, a chain is planned.
        """
        start, end = piece.blocks
        weights = piece.receipt.weights
        peers = {record.key.text: record for record in self._swarm.peers()}
        may = self._may_audit
        avoided = set(avoided) | {name for name, each in peers.items() if may and not may.allows(each.key.curve_raw)}
        alone = [
            name
            for name, each in peers.items()
            if name not in avoided and each.dtype == weights and each.start <= start and end <= each.end
        ]
        usable = peers.keys() - self._swarm.bans.unusable(peers.values(), self._swarm.links)
        if alone := [name for name in alone if name in usable]:
            avoided = peers.keys() - {random.choice(alone)}
        codecs = _CopiedCodecs(self._swarm, codec_by_code(piece.codec))
        session = Session(self._swarm, self._options, reservation=piece.length, blocks=piece.blocks, codecs=codecs)
        session.state.held = (HeldBlocks(start, end, weights),)
        session.avoid = frozenset(avoided)
        self._session = session
        with closing(session):
            if self._closed:
                raise SessionClosed("the client is closed")
            if (adapter := adapter_of(piece)) is not None:
                session.use_adapter(adapter)
            outputs = [self._step(session, piece, index, given) for index in range(len(piece.ranges))]
            return torch.cat(outputs)[list(piece.positions)], {hop.name for hop in session.hops}

    def _step(self, session: Session, piece: Piece, index: int, given: Tensor) -> Tensor:
        start, length, rope_length = piece.ranges[index]
        part, inputs = Chunk(piece.receipt.row, start, length, length), []
        if piece.inputs:
            described, data = piece.inputs[index]
            inputs = decode_inputs(described, data, [part], given.shape[1], range(*piece.blocks))
        how = {"step_positions": length, "rope_length": rope_length, "inputs": inputs}
        return session.finish(session.begin(given[start : start + length], [part], None if index else [], **how))


class _CopiedCodecs(LinkCodecs):
    """The codec of the audited hop's inputs on the first link, so that the same bytes are sent; then exact codecs."""

    def __init__(self, swarm: Swarm, first: Codec) -> None:
        super().__init__(swarm, EXACT)
        self._first = first

    def along(self, route: Sequence[PlannedHop]) -> tuple[Codec, ...]:
        return (self._first, *[codec_by_name(EXACT)] * len(route))
