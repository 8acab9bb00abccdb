"""Says whether a hop has computed its blocks."""

from __future__ import annotations

import torch

from splitnet.audit.comparison import Verdict, judge
from splitnet.audit.piece import Piece, WeightsUsed
from splitnet.audit.recompute import compute_again
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import ProtocolError, WrongSwarm


def examine(checkpoint: Checkpoint, piece: Piece) -> Verdict:
    """Checks the receipt of a piece, computes the piece again, and compares.

    Raises ProtocolError: the receipt does not belong to the piece, which then proves nothing; WrongSwarm: the piece is
    of another model; SplitnetError: the blocks cannot be computed here.
    """
    if checkpoint.fingerprint != piece.model:
        raise WrongSwarm(f"the piece is of the model {piece.model[:12]}, and {checkpoint.name} is another one")
    start, end = piece.blocks
    if end > checkpoint.num_blocks:
        raise ProtocolError(f"the model has {checkpoint.num_blocks} blocks, and the piece is of blocks {start}:{end}")
    piece.check()
    given, sent = piece.hidden(checkpoint.hidden_size)
    used = WeightsUsed.parse(piece.receipt.weights)
    with torch.inference_mode():
        expected = compute_again(checkpoint, piece, given, used)
        exact = compute_again(checkpoint, piece, given, used._replace(dtype="float32"))
        at = torch.tensor(piece.positions)
        return judge(given[at], sent, expected[at], exact[at])
