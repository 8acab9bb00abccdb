"""Says whether a hop has computed its blocks."""

from __future__ import annotations

import torch

from splitnet.audit.comparison import EQUAL, MIN_POSITIONS, Verdict, coarse_type, judge_all
from splitnet.audit.piece import Piece, WeightsUsed
from splitnet.audit.recompute import compute_again
from splitnet.blocks.model_sizes import expert_share
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import ProtocolError, SplitnetError, WrongSwarm
from splitnet.quant.choose import name_of
from splitnet.wire.codecs import codec_by_code

STEP = 16  # positions of a pass: more are not computed in compiled code, and int8 is then multiplied in bfloat16
_FEWER = ("int8", "int4")
OTHERS = dict.fromkeys(("bfloat16", "float16", "float32"), _FEWER) | {
    "int8": ("bfloat16", "int4"),
    "int4": ("bfloat16",),
}
"""Cheaper or similar weights that a liar may hold, by the claimed weights."""


def examine(checkpoint: Checkpoint, piece: Piece) -> Verdict:
    """Checks the receipt of a piece, computes the piece again, and compares; the verdict of the worst positions.

    Raises ProtocolError: the receipt does not belong to the piece, which then proves nothing; WrongSwarm: the piece is
    of another model; SplitnetError: the blocks cannot be computed here, or there are too few positions to tell.
    """
    if checkpoint.fingerprint != piece.model:
        raise WrongSwarm(f"the piece is of the model {piece.model[:12]}, and {checkpoint.name} is another one")
    start, end = piece.blocks
    if end > checkpoint.num_blocks:
        raise ProtocolError(f"the model has {checkpoint.num_blocks} blocks, and the piece is of blocks {start}:{end}")
    piece.check()
    count = len(piece.positions)
    if count < MIN_POSITIONS:
        raise SplitnetError(f"the outputs of {count} positions are too few to tell, {MIN_POSITIONS} are needed")
    given, sent = piece.hidden(checkpoint.hidden_size)
    used = WeightsUsed.parse(piece.receipt.weights)
    kind, exact = used.weights or "", used._replace(dtype="float32")
    half = coarse_type(piece.receipt.weights.partition(" ")[0])
    routed = expert_share(checkpoint.config) < 1
    at = torch.tensor(piece.positions)
    with torch.inference_mode():
        codec = codec_by_code(piece.receipt.codec)
        claimed = compute_again(checkpoint, piece, given, used, STEP)[at]
        if codec.encode(claimed) == piece.sent:  # the usual case for steps on processors with the same kernels
            return EQUAL
        expected = claimed if used == exact else compute_again(checkpoint, piece, given, exact, STEP)[at]
        coarse = None
        if half is not None:
            coarse = compute_again(checkpoint, piece, given, used._replace(dtype=name_of(half)), None)[at]
        others = {
            other: compute_again(checkpoint, piece, given, exact._replace(weights=other), STEP)[at]
            for other in OTHERS.get(kind, ())
        }
        return judge_all(given[at], sent, expected, coarse, others, codec, routed=routed)
