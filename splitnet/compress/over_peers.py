"""Compresses the blocks of a model at peers, one peer after the other.

The client brings the hidden states before a peer's first block, takes the compressed tensors of each block, and the
hidden states after the last block, which it brings to the next peer. Its folder so has all that another peer needs in
place of one that is gone.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Final

import torch

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.transfer.fetching import PeerQuestions
from splitnet.compress.blocks import (
    INPUTS,
    POSITIONS,
    block_file,
    check_block,
    check_finite,
    compressed_blocks,
    read_states,
    states_file,
    write_whole,
)
from splitnet.compress.published import read_block_file, rounded_in
from splitnet.compress.rounding import Compression
from splitnet.directory.record import PeerRecord
from splitnet.errors import CoverageError, NotFinite, PeerBusy, PeerFailed, PeerLost, WeightsError
from splitnet.wire.messages import (
    MAX_PART_BYTES,
    AskCompression,
    CompressionState,
    CompressionWish,
    Failure,
    FailureCode,
    Payload,
)

log = logging.getLogger(__name__)

ANSWER_S: Final = 30.0  # a peer that does not answer for this time is left
POLL_S: Final = 0.5  # between questions for the state
WAIT_S: Final = 60.0  # how long peers are looked for again while none has the next block
LOOK_S: Final = 2.0
# A peer is left when it has no new block for this time, or for the time of a device with so few operations per second.
STALL_S: Final = 600.0
LEAST_FLOPS: Final = 2e9
_PASSES = 8  # of a text through a block while it is compressed, about
# Largest difference of hidden states from a peer to outputs that are computed here, relative to these.
MOST_DIFFERENCE: Final = 0.02


def compress_over_peers(
    checkpoint: Checkpoint,
    asking: PeerQuestions,
    find_peers: Callable[[], Sequence[PeerRecord]],
    folder: Path,
    how: Compression,
    progress: Callable[[int], None] = lambda block: None,
) -> None:
    """As `compress_blocks` of all blocks, by peers. Raises CoverageError: no peer compresses a block; its text has what
    the peers answered."""
    refusals: dict[str, str] = {}  # by the key of a peer
    passing: set[str] = set()  # keys of peers that are asked again: they were gone or busy
    stuck_since: float | None = None
    while (block := compressed_blocks(folder, 0, checkpoint.num_blocks)) < checkpoint.num_blocks:
        progress(block)
        peers = [one for one in find_peers() if one.start <= block < one.end and one.serves]
        untried = [one for one in peers if str(one.key) not in refusals]
        if not untried:
            stuck_since = stuck_since or time.monotonic()
            if time.monotonic() > stuck_since + WAIT_S:
                raise CoverageError(_explanation(block, refusals))
            time.sleep(LOOK_S)
            refusals = {key: text for key, text in refusals.items() if key not in passing}
            passing.clear()
            continue
        peer = max(untried, key=lambda one: (one.end, -one.block_ms[0]))
        try:
            _PeerJob(checkpoint, asking, peer, block, folder, how, progress).run()
            stuck_since = None
        except (PeerLost, PeerBusy, PeerFailed, WeightsError, NotFinite) as error:
            log.warning("%s does not compress blocks %d..%d: %s", peer.address, block, peer.end - 1, error)
            refusals[str(peer.key)] = f"{peer.address}: {error}"
            if isinstance(error, PeerLost | PeerBusy):
                passing.add(str(peer.key))


def _explanation(block: int, refusals: dict[str, str]) -> str:
    if not refusals:
        return f"no peer serves block {block}: start one with --compress-for, and give the same command again"
    told = "; ".join(refusals.values())
    return f"no peer compresses block {block} ({told}): when one does, the same command continues"


class _PeerJob:
    """The blocks from `start` on of one peer. Raises PeerLost, PeerBusy, PeerFailed."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        asking: PeerQuestions,
        peer: PeerRecord,
        start: int,
        folder: Path,
        how: Compression,
        progress: Callable[[int], None],
    ) -> None:
        self._checkpoint, self._asking, self._peer, self._folder = checkpoint, asking, peer, folder
        self._start, self._end, self._how, self._progress = start, peer.end, how, progress
        self._inputs = states_file(folder, start - 1) if start else folder / INPUTS
        with self._inputs.open("rb") as file:
            self._digest = file_digest(file, "sha256").digest()
        self._sample = _Sample(checkpoint, start, peer.end, self._inputs, how)

    def run(self) -> None:
        state = self._ask(CompressionWish.COMPRESS)
        with self._inputs.open("rb") as file:
            size = file.seek(0, 2)
            while state.received < size:
                file.seek(state.received)
                before = state.received
                state = self._ask(CompressionWish.COMPRESS, offset=before, payload=file.read(MAX_PART_BYTES))
                if state.received <= before:
                    raise PeerFailed("the peer does not take the hidden states")
        taken, taken_at = self._start, time.monotonic()
        while taken < self._end:
            if taken < state.done <= self._end:
                self._take(CompressionWish.BLOCK, taken, block_file(self._folder, taken))
                taken, taken_at = taken + 1, time.monotonic()
                self._progress(taken)
            elif state.error:
                raise PeerFailed(state.error)
            elif (waited := time.monotonic() - taken_at) > self._most_seconds(taken):
                raise PeerFailed(f"the peer has not compressed block {taken} in {waited / 60:.0f} minutes")
            else:
                time.sleep(POLL_S)
                state = self._ask(CompressionWish.COMPRESS)
        self._take(CompressionWish.STATES, self._end - 1, states_file(self._folder, self._end - 1))
        if self._start:
            self._inputs.unlink()

    def _take(self, wish: CompressionWish, block: int, file: Path) -> None:
        """Writes a file that the peer has, in parts, and checks it before it has its name, by which a later run would
        take it."""
        is_states = wish == CompressionWish.STATES
        most = self._inputs.stat().st_size if is_states else self._most_bytes(block)

        def write(path: Path) -> None:
            with path.open("wb") as opened:
                total = most if is_states else 1
                while (at := opened.tell()) < total:
                    state = self._ask(wish, block=block, offset=at)
                    total = total if is_states else state.total
                    if not 0 < state.total == total <= most or len(state.payload) != min(total - at, MAX_PART_BYTES):
                        raise PeerFailed("the peer sends a file of another size")
                    opened.write(state.payload)
            if is_states:
                self._sample.check_states(path)
            else:
                self._sample.check_block(block, path)

        write_whole(file, write)

    def _most_seconds(self, block: int) -> float:
        """Seconds after which a peer without a new block is left."""
        names = [tensor.name for tensor in self._checkpoint.block_tensors[block]]
        numbers = self._checkpoint.bytes_of(names, torch.float32) // torch.float32.itemsize
        return max(STALL_S, _PASSES * 2 * numbers * self._how.positions / LEAST_FLOPS)

    def _most_bytes(self, block: int) -> int:
        names = [tensor.name for tensor in self._checkpoint.block_tensors[block]]
        return 2 * self._checkpoint.bytes_of(names, self._checkpoint.dtype) + MAX_PART_BYTES

    def _ask(self, wish: CompressionWish, block: int = 0, offset: int = 0, payload: Payload = b"") -> CompressionState:
        how = self._how
        answer = self._asking.answer_of(
            self._peer.endpoint,
            lambda number: AskCompression(
                number,
                wish,
                self._checkpoint.fingerprint,
                self._start,
                self._end,
                how.bits,
                how.group,
                how.positions,
                max(how.lengths),
                self._digest,
                block,
                offset,
                payload,
            ),
            ANSWER_S,
        )
        if isinstance(answer, CompressionState):
            return answer
        if isinstance(answer, Failure):
            raise PeerBusy(answer.text) if answer.code == FailureCode.BUSY else PeerFailed(answer.text)
        raise PeerLost("the peer is gone, or does not answer")


class _Sample:
    """A sequence chosen at random, by which a peer's blocks are compared with the blocks in floats that are on this
    machine, if all are here. Raises WeightsError, NotFinite.

    inputs: the hidden states before block `start`.
    """

    def __init__(self, checkpoint: Checkpoint, start: int, end: int, inputs: Path, how: Compression) -> None:
        self._checkpoint, self._how = checkpoint, how
        blocks = checkpoint.block_tensors[start:end]
        self._is_here = checkpoint.store.are_here(tensor.name for block in blocks for tensor in block)
        # The errors of a last sequence of few positions differ by chance.
        index = secrets.randbelow(how.lengths.count(how.lengths[0]))
        begin = sum(how.lengths[:index])
        self._at = slice(begin, begin + how.lengths[index])
        self._outputs = read_states(inputs, how, checkpoint.hidden_size)[self._at].float()

    def check_block(self, block: int, file: Path) -> None:
        tensors = read_block_file(self._checkpoint, block, file, self._how)
        if self._is_here:
            rounded = rounded_in(tensors, self._how)
            self._outputs = check_block(self._checkpoint, block, rounded, self._outputs, self._how)

    def check_states(self, file: Path) -> None:
        states = read_states(file, self._how, self._checkpoint.hidden_size)
        for some in states.split(POSITIONS):
            check_finite(some)
        off = states[self._at].float() - self._outputs
        if self._is_here and not float(off.norm()) <= MOST_DIFFERENCE * float(self._outputs.norm()):
            raise WeightsError("the hidden states are not the outputs of the compressed blocks")
