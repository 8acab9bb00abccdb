"""Files of evidence: what a hop has signed can be checked, and forged evidence is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitnet.audit.evidence import read_piece, write_piece
from splitnet.audit.piece import Piece, StepRange
from splitnet.errors import KeyFileError, ProtocolError
from splitnet.security.identity import Identity
from splitnet.wire.messages import Chunk, Receipt
from splitnet.wire.receipts import DIGEST, UNKNOWN, records_of, signed_bytes

HOP, OTHER = Identity.generate(), Identity.generate()
MODEL, BLOCKS, LENGTH, SIZE = "ab" * 32, (2, 4), 12, 8
RECEIVED, SENT = (bytes((start + at) % 256 for at in range(LENGTH * SIZE)) for start in (1, 7))


def signed(adapted: bool = False, unknown: int = 0) -> Receipt:
    """A receipt of all positions; the hop has read the first `unknown` ones from stored pages."""
    records = records_of([Chunk(1, 0, LENGTH, 0)], RECEIVED, SENT, 0, all_sent=True)
    halves = [records[at : at + DIGEST] for at in range(0, len(records), DIGEST)]
    received = [UNKNOWN] * unknown + halves[0::2][unknown:]
    payload = b"".join((*received, *halves[1::2]))
    receipt = Receipt(bytes(16), 0, 0, 1, LENGTH, 0, "int8/float32", adapted, bytes(64), payload)
    return replace(receipt, signature=HOP.sign(signed_bytes(MODEL, BLOCKS, receipt)))


def piece_of(receipt: Receipt, positions: range = range(LENGTH)) -> Piece:
    sent = b"".join(SENT[at * SIZE : (at + 1) * SIZE] for at in positions)
    ranges = StepRange(0, 5, 0), StepRange(5, LENGTH - 5, 0)
    return Piece(MODEL, HOP.public, BLOCKS, receipt, ranges, 0, RECEIVED, tuple(positions), sent)


PIECE = piece_of(signed())
FILE = write_piece(PIECE)


def test_a_file_holds_the_piece() -> None:
    piece = read_piece(FILE)
    assert write_piece(piece) == FILE and piece.can_be_proven
    piece.check()


def of_receipt(**changes: object) -> Piece:
    return replace(PIECE, receipt=replace(PIECE.receipt, **changes))  # pyright: ignore[reportArgumentType]


FORGED: dict[str, Callable[[], Piece]] = {
    "other inputs": lambda: replace(PIECE, received=RECEIVED[::-1]),
    "other outputs": lambda: replace(PIECE, sent=SENT[::-1]),
    "outputs of other positions": lambda: replace(piece_of(PIECE.receipt, range(8)), positions=tuple(range(1, 9))),
    "another rope length": lambda: replace(PIECE, ranges=(StepRange(0, LENGTH, 64),)),
    "another model": lambda: replace(PIECE, model="cd" * 32),
    "other blocks": lambda: replace(PIECE, blocks=(2, 5)),
    "another key": lambda: replace(PIECE, key=OTHER.public),
    "another session": lambda: of_receipt(session=b"x" * 16),
    "another row": lambda: of_receipt(row=2),
    "other weights": lambda: of_receipt(weights="float32"),
    "no adapter": lambda: piece_of(replace(signed(adapted=True), adapted=False)),
    "another codec": lambda: of_receipt(codec=1),
    "other digests": lambda: of_receipt(payload=PIECE.receipt.payload[::-1]),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_evidence_is_refused(kind: str) -> None:
    with pytest.raises(ProtocolError, match="receipt"):
        read_piece(write_piece(FORGED[kind]())).check()


def test_a_piece_whose_receipt_does_not_cover_all_proves_nothing() -> None:
    assert not piece_of(signed(adapted=True)).can_be_proven
    assert not piece_of(signed(unknown=3)).can_be_proven
    assert not piece_of(signed(), range(0, LENGTH, 2)).can_be_proven
    assert piece_of(signed(), range(3, LENGTH)).can_be_proven


@given(st.data())
def test_damaged_files_are_refused_or_read(data: st.DataObject) -> None:
    changed = bytearray(FILE)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(changed) - 1))
        changed[where : where + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
        if not changed:
            break
    try:
        piece = read_piece(bytes(changed))
        piece.check()
    except (ProtocolError, KeyFileError):
        return
    assert (piece.model, piece.key, piece.blocks, piece.receipt) == (MODEL, HOP.public, BLOCKS, PIECE.receipt)
