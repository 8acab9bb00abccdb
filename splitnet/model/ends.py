"""What stands before and after the blocks of a causal model, without what its family's code does around it.

That code makes masks, positions and much else for blocks that are not there, which takes longer than what remains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from splitnet.model.shell import backbone_of, outline_in


class Ends:
    """Embeddings, final norm and head.

    Args:
        model: whose they are; they are looked up at every call, as adapters may be put on them.
        backbone: has the norm.
    """

    def __init__(self, model: PreTrainedModel, backbone: nn.Module) -> None:
        self._model: Any = model
        self._backbone: Any = backbone

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """`[batch, seq]` -> `[batch, seq, hidden]`."""
        return self._model.get_input_embeddings()(ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, hidden]` -> `[batch, seq, vocabulary]`."""
        return self._model.get_output_embeddings()(self._backbone.norm(hidden))


@torch.no_grad()
def ends_of(model: PreTrainedModel) -> Ends | None:
    """The ends of a shell; None if it does more than they do, besides its blocks.

    Found by trying, with blocks that give what they are given: some families scale embeddings or logits, or add
    something for each position.
    """
    backbone = backbone_of(model)
    if getattr(backbone, "norm", None) is None or model.get_output_embeddings() is None:
        return None
    ends = Ends(model, backbone)
    ids = torch.arange(1, 4, device=model.device)[None]
    stand_in = outline_in(model)[0]
    blocks, stand_in.blocks = stand_in.blocks, nn.Identity()
    try:
        expected = model(input_ids=ids, use_cache=False).logits
    finally:
        stand_in.blocks = blocks
    return ends if torch.equal(ends.logits(ends.embed(ids)), expected) else None
