"""Compresses a whole checkpoint into a folder; an interrupted compression continues where it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from splitnet.blocks.client_part import load_client_part
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.compress.blocks import INPUTS, block_file, states_file, write_states
from splitnet.compress.published import write_checkpoint
from splitnet.compress.rounding import Compression
from splitnet.errors import SplitnetError, UnsupportedModel

_SETTINGS = "compression.json"
_LOCK = "compression.lock"


def compress_checkpoint(
    checkpoint: Checkpoint,
    ids: Sequence[int],
    folder: Path,
    how: Compression,
    compress: Callable[[Path], None],
) -> list[str]:
    """Writes a checkpoint whose blocks have few bits, in the format of compressed-tensors. Returns the names of the
    blocks' matrices that stay in floats because groups do not divide their inputs.

    Args:
        ids: the tokens of the text, `how.positions` of them.
        folder: where the checkpoint is written. If it has an interrupted compression with the same arguments, this
            compression continues.
        compress: compresses all blocks in a folder that has the hidden states before the first block, as
            `splitnet.compress.blocks.compress_blocks` does here and `splitnet.compress.over_peers` at peers.

    Raises:
        UnsupportedModel: the checkpoint is in few bits already, or its blocks have no layers that can be compressed.
        SplitnetError: the folder has something else, cannot be made, or another command writes into it; the model does
            not know a token.
        NotFinite: the text makes inf or NaN in the model.
    """
    if checkpoint.store.quantized and any(
        facts.layout for facts in checkpoint.store.tensor_facts(checkpoint.store.tensor_names).values()
    ):
        raise UnsupportedModel(f"{checkpoint.name} is in few bits already: give the model in floats")
    if max(ids) >= checkpoint.config.vocab_size:
        raise SplitnetError(f"the text has tokens that {checkpoint.name} does not know: give the model's own tokenizer")
    settings = {
        "model": checkpoint.fingerprint,
        "text": sha256(repr(list(ids)).encode()).hexdigest(),
        **asdict(how),
    }
    with _prepared_folder(folder, json.dumps(settings)):
        if not (folder / INPUTS).exists():
            write_states(folder / INPUTS, _embedded(checkpoint, ids, how))
        compress(folder)
        files = [block_file(folder, block) for block in range(checkpoint.num_blocks)]
        left = write_checkpoint(checkpoint, files, folder, how)
        states = (states_file(folder, block) for block in range(checkpoint.num_blocks))
        for file in (*states, *folder.glob("*.part"), folder / INPUTS, folder / _SETTINGS):
            file.unlink(missing_ok=True)
    return left


@contextmanager
def _prepared_folder(folder: Path, settings: str) -> Iterator[None]:
    lock = FileLock(folder / _LOCK, blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise SplitnetError(f"another command writes into {folder}: wait for it, or give another folder") from None
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise SplitnetError(f"the folder {folder} cannot be made ({error}): give another one") from None
    try:
        file = folder / _SETTINGS
        before = file.read_text(encoding="utf-8") if file.exists() else None
        if before != settings:
            if any(one.name != _LOCK for one in folder.iterdir()):
                raise SplitnetError(f"the folder {folder} has something else: give an empty one")
            file.write_text(settings, encoding="utf-8")
        yield
    finally:
        with suppress(OSError):  # Windows keeps an open file; there `FileLock` removes it
            (folder / _LOCK).unlink()
        lock.release()


class _Seen(nn.Module):
    """In place of the blocks: keeps its input."""

    def forward(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        return hidden


@torch.inference_mode()
def _embedded(checkpoint: Checkpoint, ids: Sequence[int], how: Compression) -> Iterator[Tensor]:
    """The hidden states before the first block, `[positions, hidden]` of each sequence."""
    seen = _Seen()
    model = load_client_part(checkpoint, seen, headless=True)
    for sequence in torch.tensor(ids).split(how.lengths):
        model.base_model(input_ids=sequence[None], use_cache=False)
        yield seen.hidden[0].float()
