"""The client part of a model without anything else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from splitnet.blocks.client_part import ClientPart


def model_ends(embed: Any, norm: Any, head: Any, *, hidden_size: int, num_blocks: int, vocabulary: int) -> ClientPart:
    """embed, norm, head: see `ClientPart`."""
    config = SimpleNamespace(hidden_size=hidden_size, num_hidden_layers=num_blocks, vocab_size=vocabulary)
    model = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: config),
        get_input_embeddings=lambda: embed,
        get_output_embeddings=lambda: head,
    )
    return ClientPart(model, SimpleNamespace(norm=norm), "norm")
