"""Files of evidence: a piece of a hop's work that anybody can check who has the model.

A file begins with `SNE1` and the length of its header (4 bytes, little-endian). The header is a msgpack array of the
fields of `_Header`, in order. The bytes of `_Header.sizes` follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from splitnet.audit.piece import Piece, StepRange
from splitnet.errors import ProtocolError
from splitnet.security.identity import PublicKey
from splitnet.wire.fields import (
    MessageLayout,
    blob,
    flag,
    matching,
    packb,
    records,
    row,
    several,
    text,
    uint,
    unpack_array,
    wire_field,
)
from splitnet.wire.messages import (
    EVERY_BLOCK,
    FINGERPRINT,
    KEY_BYTES,
    MAX_BLOCKS,
    MAX_INPUT_BYTES,
    MAX_POSITIONS,
    MAX_RECEIPT,
    MAX_ROW_ID,
    SESSION_BYTES,
    SIGNATURE_BYTES,
    BlockInput,
    Receipt,
)

MAGIC = b"SNE1"
MAX_BYTES = 1 << 30  # of a file
_MOST_RANGES = 1 << 16
_INPUT = row(
    BlockInput, text(32), *map(uint, (EVERY_BLOCK, MAX_ROW_ID, MAX_POSITIONS, MAX_POSITIONS, MAX_INPUT_BYTES, 255))
)


@dataclass(frozen=True, slots=True)
class _Header:
    model: str = wire_field(matching(FINGERPRINT))
    key: bytes = wire_field(blob(KEY_BYTES))
    start: int = wire_field(uint(MAX_BLOCKS))
    end: int = wire_field(uint(MAX_BLOCKS))
    session: bytes = wire_field(blob(SESSION_BYTES))
    row: int = wire_field(uint(MAX_ROW_ID))
    length: int = wire_field(uint(MAX_RECEIPT))  # of the receipt
    sent_codec: int = wire_field(uint(255))
    weights: str = wire_field(text(64))
    adapted: bool = wire_field(flag)
    signature: bytes = wire_field(blob(SIGNATURE_BYTES))
    ranges: tuple[StepRange, ...] = wire_field(records(StepRange, (MAX_RECEIPT,) * 3, most=_MOST_RANGES))
    codec: int = wire_field(uint(255))
    positions: tuple[int, ...] = wire_field(several(uint(MAX_RECEIPT), most=MAX_RECEIPT))
    inputs: tuple[tuple[BlockInput, ...], ...] = wire_field(several(several(_INPUT, most=512), most=_MOST_RANGES))
    sizes: tuple[int, ...] = wire_field(several(uint(MAX_BYTES), least=3, most=_MOST_RANGES))
    """Bytes of the digests of the receipt, of `Piece.received` and `Piece.sent`, of the values of block inputs of each
    range, and of the parts of the adapter."""


_LAYOUT = MessageLayout(_Header)


def write_piece(piece: Piece) -> bytes:
    """The file of a piece."""
    receipt = piece.receipt
    blobs = [bytes(receipt.payload), piece.received, piece.sent, *(data for _, data in piece.inputs), *piece.adapter]
    header = _Header(
        piece.model,
        piece.key.raw,
        *piece.blocks,
        receipt.session,
        receipt.row,
        receipt.length,
        receipt.codec,
        receipt.weights,
        receipt.adapted,
        receipt.signature,
        piece.ranges,
        piece.codec,
        piece.positions,
        tuple(given for given, _ in piece.inputs),
        tuple(map(len, blobs)),
    )
    packed = packb(_LAYOUT.write_fields(header))
    return b"".join((MAGIC, len(packed).to_bytes(4, "little"), packed, *blobs))


def read_piece(data: bytes) -> Piece:
    """The piece in a file, not checked further. Raises ProtocolError: the file is malformed."""
    size = int.from_bytes(data[4:8], "little")
    if data[:4] != MAGIC or len(data) > MAX_BYTES or size > len(data) - 8:
        raise ProtocolError("this is no file of evidence")
    bounds = {"most_items": MAX_RECEIPT, "most_text": 128, "most_bytes": 64}
    fields: dict[str, Any] = _LAYOUT.read_fields(unpack_array(data[8 : 8 + size], **bounds))
    head = _Header(**fields)
    offsets = list(accumulate(head.sizes, initial=8 + size))
    if offsets[-1] != len(data):
        raise ProtocolError("the file of evidence has another length than it says")
    digests, received, sent, *rest = (data[begin:end] for begin, end in pairwise(offsets))
    following = 0
    for each in head.ranges:
        if each.start != following or not each.length:
            raise ProtocolError("the steps of the evidence do not follow each other")
        following += each.length
    if not following or following > head.length or len(rest) < len(head.inputs):
        raise ProtocolError("the evidence has other positions than its receipt")
    if len(head.inputs) not in (0, len(head.ranges)) or not head.start < head.end:
        raise ProtocolError("the evidence has other block inputs than steps, or no blocks")
    if not head.positions or any(low >= high for low, high in pairwise((-1, *head.positions, following))):
        raise ProtocolError("the outputs of the evidence are not in the order of its positions")
    ids = head.session, 0, 0, head.row, head.length, head.sent_codec
    receipt = Receipt(*ids, head.weights, head.adapted, head.signature, digests)
    key, count = PublicKey(head.key), len(head.inputs)
    inputs = tuple(zip(head.inputs, rest[:count], strict=True))
    known = head.ranges, head.codec, received, head.positions, sent, tuple(rest[count:]), inputs
    return Piece(head.model, key, (head.start, head.end), receipt, *known)
