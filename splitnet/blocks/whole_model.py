"""A whole model in this process, in plain transformers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from splitnet.blocks.backbone import load_cut
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.families import causal_class
from splitnet.errors import UnsupportedModel


@torch.inference_mode(False)  # what is loaded is used outside of it, too
def load_whole(checkpoint: Checkpoint, dtype: torch.dtype | str) -> Any:
    """Loads all of a checkpoint; what is in codes becomes numbers, without packages that transformers wants for it.

    Args:
        dtype: of the weights; "auto": as they are stored.

    Raises:
        OSError, ValueError: transformers cannot load it.
        UnsupportedModel: likewise, of a GGUF file or of quantized weights.
    """
    if not checkpoint.source.endswith(".gguf") and (checkpoint.multimodal or not checkpoint.store.quantized):
        try:
            return AutoModelForCausalLM.from_pretrained(checkpoint.source, dtype=dtype, trust_remote_code=False).eval()
        except ImportError as error:
            raise UnsupportedModel(f"{checkpoint.name} cannot be loaded by transformers alone: {error}") from error
    wanted = dtype if isinstance(dtype, torch.dtype) else checkpoint.dtype
    config = copy.deepcopy(checkpoint.config)
    names = {name: name for name in checkpoint.store.names}
    with checkpoint.store.load_tensors(names, wanted) as tensors:
        model = load_cut(causal_class(config), config, lambda model: None, tensors, wanted, None, names=names)
    model.generation_config = checkpoint.generation_config()
    return model.eval()
