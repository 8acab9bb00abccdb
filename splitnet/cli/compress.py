"""`splitnet compress`: writes a model whose blocks have few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from splitnet.cli.arguments import Model, resolve_model
from splitnet.cli.stage_progress import StageProgress
from splitnet.errors import SplitnetError

MIN_POSITIONS = 2048
"""Fewer positions leave most second moments of a layer to the damping."""


def compress(
    model: Model,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Write the checkpoint here.", show_default=False)],
    bits: Annotated[int, typer.Option(min=2, max=8, help="Bits of a weight, besides its group's scale.")] = 4,
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
        int, typer.Option(min=MIN_POSITIONS, help="Tokens of the text that are used, at most.")
    ] = 65536,
    length: Annotated[int, typer.Option(min=16, help="Tokens of one sequence of the text.")] = 512,
) -> None:
    """Compress the blocks of a model, one block in memory at a time, by what passes through them.

    The result is a checkpoint in the format of compressed-tensors, for splitnet, transformers and vLLM. After an
    interruption the same command continues.
    """
    from splitnet.checkpoint.checkpoint import Checkpoint
    from splitnet.compress.checkpoint_folder import compress_checkpoint
    from splitnet.compress.rounding import Compression

    if group not in (16, 32, 64, 128):
        raise SplitnetError(f"groups of {group} inputs are not published: use --group 16, 32, 64 or 128")
    checkpoint = Checkpoint.open(resolve_model(model))
    ids = _tokens(checkpoint.tokenizer(), text, positions // length * length)
    how = Compression(bits, group, tuple(min(length, len(ids) - begin) for begin in range(0, len(ids), length)))
    with StageProgress() as progress:
        compress_checkpoint(
            checkpoint,
            ids,
            output,
            how,
            lambda block: progress.update("compressing blocks", block, checkpoint.num_blocks),
        )
    typer.echo(f"wrote {output}: start peers with `splitnet peer {output}`")


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
