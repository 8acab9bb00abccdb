"""`splitnet audit`: checks a file of evidence against a peer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitnet.cli.arguments import Model
from splitnet.errors import SplitnetError


def audit(
    model: Model,
    evidence: Annotated[Path, typer.Argument(metavar="FILE", help="File of evidence.", show_default=False)],
) -> None:
    """Check evidence that a peer has not computed its blocks. The check asks no other machine, and the giver of the
    file need not be trusted.

    A client that audits peers (--audit) keeps evidence against a peer that it has named. The file holds the peer's
    inputs, its outputs, and its signature of both. This command computes the blocks again from the files of the
    model, so they must be on this machine. It ends with an error if the file shows no lie.
    """
    from splitnet.audit.evidence import MAX_BYTES, read_piece
    from splitnet.audit.examine import examine
    from splitnet.checkpoint.checkpoint import Checkpoint

    try:
        with evidence.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SplitnetError(f"{evidence} cannot be read ({error.strerror}): give a file of evidence") from None
    piece = read_piece(data)
    if not piece.can_be_proven:
        raise SplitnetError(
            "the receipt does not cover all that the outputs depend on (an adapter, images, or stored pages), or "
            "outputs were picked, so the file proves nothing"
        )
    verdict = examine(Checkpoint.open(model), piece)
    (start, end), weights = piece.blocks, piece.receipt.weights
    what = f"blocks {start}..{end - 1} with {weights} weights at {len(piece.positions)} positions"
    if verdict.honest:
        raise SplitnetError(f"the file shows no lie: the peer {piece.key} has computed {what}")
    typer.echo(f"The peer {piece.key}")
    typer.echo(f"has signed outputs that are not those of {what}:")
    typer.echo(f"they differ {verdict.margin:.3g} times as much as honest outputs may (by {verdict.reason}).")
