"""Receipts: signed lists of digests, by which a hop commits to its inputs and outputs.

For each position of a row a hop keeps a digest of its input and a digest of its output. A `Receipt` is the
signed list of them. A client that fetches the activations themselves checks them against the receipts of the hops on
both sides of a link, and computes a hop's blocks again (`splitnet/audit/`). The hop signs before it learns which blocks
and positions are computed again. The idea of commitments to activations is from TOPLOC (arXiv:2501.16007); these are
plain digests, because the activations themselves are at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from splitnet.wire.fields import packb
from splitnet.wire.messages import Chunk, Payload, Receipt
from splitnet.wire.sent_log import PAGE

DIGEST = 16  # bytes of a digest
UNKNOWN = bytes(DIGEST)  # for inputs of stored pages, and for outputs that the client does not want
RECORD = 2 * DIGEST  # bytes of a position: the digests of input and output


def digests_of(payload: Payload, positions: int, rope_length: int) -> list[bytes]:
    """BLAKE2b (RFC 7693, 16 bytes) of each of the encoded positions, for the `rope_length` of their step."""
    if not positions:
        return []
    view, size, person = memoryview(payload), len(payload) // positions, rope_length.to_bytes(16, "little")
    return [
        blake2b(view[at * size : (at + 1) * size], digest_size=DIGEST, person=person).digest()
        for at in range(positions)
    ]


def records_of(parts: Sequence[Chunk], received: Payload, sent: Payload, rope_length: int, *, all_sent: bool) -> bytes:
    """The records of a step's positions, concatenated. received: all encoded positions. sent: all encoded outputs, or
    without `all_sent` those that `parts` keep."""
    own = digests_of(received, sum(part.length for part in parts), rope_length)
    outputs = digests_of(sent, sum(part.length if all_sent else part.keep for part in parts), rope_length)
    if not all_sent:
        given = iter(outputs)
        kept = (index >= part.length - part.keep for part in parts for index in range(part.length))
        outputs = [next(given) if keep else UNKNOWN for keep in kept]
    return b"".join(part for pair in zip(own, outputs, strict=True) for part in pair)


def records_of_page(output: Payload, rope_length: int) -> bytes:
    """The records of a stored page, whose positions were not received. output: its encoded outputs; empty: unknown."""
    outputs = digests_of(output, PAGE, rope_length) if output else [UNKNOWN] * PAGE
    return b"".join(UNKNOWN + each for each in outputs)


def signed_bytes(model: str, blocks: tuple[int, int], receipt: Receipt) -> bytes:
    """What the signature of a receipt covers. model: fingerprint. blocks: `[start, end)` of the hop in the session."""
    facts = model, *blocks, receipt.session, receipt.row, receipt.length, receipt.codec
    said = packb([*facts, receipt.weights, receipt.adapted])
    return b"splitnet receipt 1\0" + said + blake2b(receipt.payload, digest_size=32).digest()
