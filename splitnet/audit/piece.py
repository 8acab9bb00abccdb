"""A piece of a hop's work: inputs and outputs for the first positions of a row, and the receipt of both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from splitnet.errors import ProtocolError
from splitnet.security.identity import PublicKey
from splitnet.wire.codecs import check_values, codec_by_code
from splitnet.wire.messages import BlockInput, Receipt
from splitnet.wire.receipts import DIGEST, UNKNOWN, digests_of, signed_bytes

_HELD_AS = re.compile(r"(?P<weights>[^/ ]+)(?:/(?P<dtype>[^ ]+))?(?: KV (?P<kv>\S+))?")


class WeightsUsed(NamedTuple):
    """What a hop holds its blocks as, see `Span.held_as`: the arguments of `Span.load`. weights: None: as stored."""

    weights: str | None
    dtype: str | None
    kv: str

    @classmethod
    def parse(cls, text: str) -> WeightsUsed:
        """Raises ProtocolError: this is no weight format."""
        found = _HELD_AS.fullmatch(text)
        if found is None:
            raise ProtocolError(f"{text[:40]!r} is no weight format")
        kind, dtype = found["weights"], found["dtype"]
        stored = kind.startswith("stored")
        weights = kind.partition("+")[2] or None if stored else kind
        return cls(weights, dtype or (None if stored else kind), found["kv"] or "auto")


class StepRange(NamedTuple):
    """Positions that came in one step: the first position, their number, and `Step.rope_length`."""

    start: int
    length: int
    rope_length: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What a hop was given and gave for the first positions of a row.

    Attributes:
        model: fingerprint.
        key: of the hop.
        blocks: `[start, end)` of the hop in the session.
        receipt: the hop's receipt of these positions, and perhaps of later ones.
        ranges: the steps of the positions, in order.
        codec, received: the encoded positions that the hop was given.
        positions, sent: positions whose encoded outputs are known, and these outputs, in the codec of the receipt.
        adapter: the client's tensors for the blocks, as in messages; empty: none.
        inputs: block inputs of each range, with their values; empty: none.
    """

    model: str
    key: PublicKey
    blocks: tuple[int, int]
    receipt: Receipt
    ranges: tuple[StepRange, ...]
    codec: int
    received: bytes
    positions: tuple[int, ...]
    sent: bytes
    adapter: tuple[bytes, ...] = ()
    inputs: tuple[tuple[tuple[BlockInput, ...], bytes], ...] = ()

    @property
    def length(self) -> int:
        return self.ranges[-1].start + self.ranges[-1].length

    @property
    def reads_pages(self) -> bool:
        """Whether the hop has read the keys and values of positions from stored pages."""
        return UNKNOWN in received_digests(self.receipt)

    @property
    def can_be_proven(self) -> bool:
        """Whether others can check the piece: the receipt covers all inputs of the computation, and nobody has picked
        the outputs."""
        covered = not self.receipt.adapted and not self.reads_pages
        return covered and self.positions[-1] - self.positions[0] < len(self.positions)

    def hidden(self, size: int) -> tuple[Tensor, Tensor]:
        """What the hop was given, `[length, hidden]`, and its known outputs, `[positions, hidden]`, float32. Raises
        ProtocolError: a size is wrong, or a value is not finite."""
        sent_codec, count = self.receipt.codec, len(self.positions)
        check_values(self.codec, self.received, self.length, size)
        check_values(sent_codec, self.sent, count, size)
        given = codec_by_code(self.codec).decode(self.received, self.length, size)
        return given, codec_by_code(sent_codec).decode(self.sent, count, size)

    def check(self) -> None:
        """Raises ProtocolError: the receipt is not signed by the hop, or is not of these inputs and outputs."""
        check_signature(self.model, self.key, self.blocks, self.receipt)
        given = row_digests(self.received, self.ranges)
        told = received_digests(self.receipt)[: self.length]
        if any(own not in (each, UNKNOWN) for own, each in zip(told, given, strict=True)):
            raise ProtocolError("the receipt is of other positions than the hop was given")
        ropes = [each.rope_length for each in self.ranges for _ in range(each.length)]
        told, size = sent_digests(self.receipt), len(self.sent) // max(1, len(self.positions))
        for index, position in enumerate(self.positions):
            encoded = self.sent[index * size : (index + 1) * size]
            if digests_of(encoded, 1, ropes[position]) != [told[position]]:
                raise ProtocolError("the receipt is of other outputs than the hop gave")


def check_signature(model: str, key: PublicKey, blocks: tuple[int, int], receipt: Receipt) -> None:
    """Raises ProtocolError: the receipt is not signed with this key for these blocks, or has another length."""
    if len(receipt.payload) != 2 * DIGEST * receipt.length:
        raise ProtocolError("the receipt has another number of digests than positions")
    if not key.verify(signed_bytes(model, blocks, receipt), receipt.signature):
        raise ProtocolError("the receipt is not signed by the hop")


def received_digests(receipt: Receipt) -> list[bytes]:
    """The digest of each position that a hop has received; `UNKNOWN`: the hop has read it from a stored page."""
    return _cut(bytes(receipt.payload[: DIGEST * receipt.length]))


def sent_digests(receipt: Receipt) -> list[bytes]:
    """The digest of each position that a hop has sent; `UNKNOWN`: it was not sent."""
    return _cut(bytes(receipt.payload[DIGEST * receipt.length :]))


def row_digests(payload: bytes, ranges: Sequence[StepRange]) -> list[bytes]:
    """The digest of each encoded position of a row."""
    size = len(payload) // max(1, sum(each.length for each in ranges))
    parts = (payload[each.start * size : (each.start + each.length) * size] for each in ranges)
    return [
        one for each, part in zip(ranges, parts, strict=True) for one in digests_of(part, each.length, each.rope_length)
    ]


def _cut(digests: bytes) -> list[bytes]:
    return [digests[at : at + DIGEST] for at in range(0, len(digests), DIGEST)]
