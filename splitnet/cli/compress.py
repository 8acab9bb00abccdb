"""`splitnet compress`: writes a model whose blocks have few bits."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from splitnet.cli.arguments import Model, connects
from splitnet.cli.generate import connection_to
from splitnet.cli.stage_progress import StageProgress
from splitnet.errors import SplitnetError
from splitnet.session.options import ConnectionOptions

LENGTH = 512
MIN_POSITIONS = 2048
"""Fewer positions leave most second moments of a layer to the damping."""


@connects(only=("initial_peers", "key_file", "swarm_key", "trusted_peers", "invite", "model_id", "tokenizer"))
def compress(
    model: Model,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Write the checkpoint here.", show_default=False)],
    bits: Annotated[
        float,
        typer.Option(
            min=2, max=8, help="Bits of a weight, besides its group's scale: a whole number, or the mean of each block."
        ),
    ] = 4,
    group: Annotated[int, typer.Option(help="Inputs that share a scale: 16, 32, 64 or 128.")] = 32,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text like the one that the model will read. By default the documentation of Python.",
            show_default=False,
        ),
    ] = None,
    positions: Annotated[
        int, typer.Option(min=MIN_POSITIONS, max=1 << 20, help="Tokens of the text that are used, at most.")
    ] = 65536,
    length: Annotated[
        int | None,
        typer.Option(
            min=16,
            help=f"Tokens of one sequence of the text. By default {LENGTH}, or as many as the model was made for.",
            show_default=False,
        ),
    ] = None,
    *,
    connecting: ConnectionOptions,
) -> None:
    """Compress the blocks of a model, one block in memory at a time, by what passes through them.

    With --join, the peers of a swarm compress their own blocks, if their owners allow it (`splitnet peer
    --compress-for`). The result is a checkpoint in the format of compressed-tensors, for splitnet, transformers and
    vLLM. After an interruption the same command continues.
    """
    from splitnet.checkpoint.transfer.fetching import PeerQuestions
    from splitnet.compress.blocks import compress_blocks
    from splitnet.compress.checkpoint_folder import compress_checkpoint
    from splitnet.compress.over_peers import compress_over_peers
    from splitnet.compress.rounding import GROUPS, Compression, sequence_lengths

    if group not in GROUPS:
        raise SplitnetError(f"groups of {group} inputs are not published: use --group {', '.join(map(str, GROUPS))}")
    connection = connection_to(model, connecting)
    checkpoint = connection.checkpoint()
    longest = min(positions, checkpoint.max_positions or positions)
    if length is not None and length > longest:
        raise SplitnetError(f"--length {length} exceeds the text or the positions of {checkpoint.name}: give {longest}")
    length = length or min(LENGTH, longest)
    ids = _tokens(checkpoint.tokenizer(), text, positions)
    how = Compression(bits, group, sequence_lengths(len(ids), length))
    with StageProgress() as progress, ExitStack() as stack:

        def report(block: int) -> None:
            progress.update("compressing blocks", block, checkpoint.num_blocks)

        if connecting.initial_peers or connecting.invite:
            swarm = stack.enter_context(connection.swarm(checkpoint))
            asking = stack.enter_context(PeerQuestions(swarm.identity))
            find = partial(swarm.peers, fresh=True)
            compress = partial(compress_over_peers, checkpoint, asking, find, how=how, progress=report)
        else:
            if connecting.model_id:
                connection.facts_of(checkpoint)  # raises if the files here are of another model
            blocks = checkpoint.num_blocks
            compress = partial(compress_blocks, checkpoint, 0, blocks, how=how, progress=report)
        left = compress_checkpoint(checkpoint, ids, output, how, compress)
    if left:
        told = f"{len(left)} matrices stay in floats because groups of {group} do not divide their inputs"
        typer.echo(f"{told}, such as {left[0]}: a smaller --group may divide them")
    typer.echo(f"wrote {output}: start peers with `{shlex.join(['splitnet', 'peer', str(output)])}`")


def _tokens(tokenizer: Any, text: Path | None, most: int) -> list[int]:
    """The first tokens of a text file, or of the documentation of Python."""
    if text is None:
        from pydoc_data.topics import topics

        given = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            given = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SplitnetError(f"the text {text} cannot be read ({error}): give a text file in UTF-8") from None
    ids: list[int] = tokenizer(given, add_special_tokens=False).input_ids[:most]
    if len(ids) < MIN_POSITIONS:
        raise SplitnetError(f"the text has {len(ids)} tokens, too few to compress by: give at least {MIN_POSITIONS}")
    return ids
