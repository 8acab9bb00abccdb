"""The sizes of a model before it is loaded: bytes of a block, of a cached position and of the client's part; FLOPs.

The model is built on the meta device, where tensors have no memory, so the sizes are the sizes that transformers would
load, and no weight is read or downloaded. Only for weights in codes are the headers of files read, for their bytes.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from splitnet.blocks.attention import PACKED
from splitnet.blocks.backbone import can_hold_codes, cut_to_blocks, find_container, on_meta, parent_of
from splitnet.blocks.block_sizes import block_sizes, codes_bytes, codes_within, size_of_block, weights_of
from splitnet.blocks.client_part import client_part_names
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint, open_store, read_config
from splitnet.checkpoint.families import (
    backbone_class,
    causal_class,
    keeps_states,
    max_positions,
    packs_sequences,
    sliding_windows,
)
from splitnet.quant.choose import STORED, WeightChoice, choose_weights, name_of
from splitnet.quant.packed_tensor import as_dtype, is_number_type


@dataclass(frozen=True)
class ModelSizes:
    """Sizes in bytes, of a model that computes in `dtype`."""

    name: str
    dtype: str
    num_blocks: int
    hidden_size: int
    block_bytes: int  # weights of the largest block, in the format in which it holds them
    expert_bytes: int  # weights of the block's experts; a position uses the share `expert_share` of them
    expert_share: float
    kv_bytes: int  # keys and values of one position in one block; the mean where blocks differ
    client_part_bytes: int  # weights that a client holds: embeddings, final norm and head
    head_bytes: int  # weights of the head, which a client reads for every token
    max_positions: int | None  # the longest sequence that the model was made for; None if its config does not say
    weights: str = ""  # weight format of linear layers in blocks; "" for `dtype`
    saved_bytes: int = 0  # bytes that the weights of a block would take in `dtype`, minus `block_bytes`
    saved_expert_bytes: int = 0  # the part of `saved_bytes` for the experts of the block
    file_bytes: int = 0  # bytes of the checkpoint; 0 if only its config was read
    state_bytes: int = 0  # bytes of a sequence in one block, independent of its length; the mean where blocks differ

    @property
    def held_as(self) -> str:
        """The weight format of blocks, for people."""
        if self.weights == STORED:
            bits = 8 * self._itemsize * self.block_bytes / (self.block_bytes + self.saved_bytes)
            return f"codes of {bits:.1f} bits"
        return self.weights or self.dtype

    @property
    def flops_per_position(self) -> float:
        """FLOPs of one position in one block: a multiplication and an addition for every weight that the position
        uses."""
        experts = self.expert_bytes + self.saved_expert_bytes
        used = self.block_bytes + self.saved_bytes - (1 - self.expert_share) * experts
        return 2 * used / self._itemsize

    @property
    def _itemsize(self) -> int:
        return (as_dtype(self.dtype) or torch.float32).itemsize

    @classmethod
    def of(cls, model: str | Path, dtype: str | None = None, weights: str | None = None) -> ModelSizes:
        """The sizes of a checkpoint folder (its config.json is enough if weights are plain), a file or a hub id.

        Args:
            dtype: the type that blocks compute in; None: the type that suits `weights`, else the config's type, or
                float32.
            weights: the weight format of linear layers, see `splitnet.quant.choose`; None: as `dtype`, or in the codes
                of the checkpoint.

        Raises:
            ModelNotFound: the model does not exist, or its weights are quantized and it has only a config.
            UnsupportedModel: the model cannot be cut into spans.
            WeightsError: weights cannot be held in this format.
        """
        store = open_store(model)
        whole, config = read_config(store)
        if not store.quantized:
            stored = config.dtype if is_number_type(config.dtype) else torch.float32

            def held_bytes(weights: WeightChoice) -> int:
                return cls.of_config(store.name, config, weights).block_bytes

            chosen = choose_weights(weights, dtype, stored, torch.device("cpu"), held_bytes)
            return cls.of_config(store.name, config, chosen)
        checkpoint = Checkpoint(store, config, multimodal=config is not whole)
        chosen = weights_of(checkpoint, weights, dtype, "cpu")
        return cls.of_config(store.name, config, chosen).in_codes_of(checkpoint, chosen)

    @classmethod
    def of_config(cls, name: str, config: PreTrainedConfig, weights: WeightChoice) -> ModelSizes:
        """The sizes of the text model that a config describes, with plain weights."""
        dtype = weights.dtype
        whole, container = _on_meta(config, dtype)
        parent, list_name = parent_of(whole, container)
        blocks = list(getattr(parent, list_name))
        size = max((size_of_block(block, weights, _bytes_of(block)) for block in blocks), key=_HELD)
        head = whole.get_output_embeddings()
        kv_bytes, state_bytes = _row_bytes(config, dtype)
        return cls(
            name=name,
            dtype=name_of(dtype),
            num_blocks=len(blocks),
            hidden_size=config.hidden_size,
            block_bytes=size.held,
            expert_bytes=size.experts,
            saved_expert_bytes=size.plain_experts - size.experts,
            expert_share=expert_share(config) if size.experts else 1.0,
            kv_bytes=kv_bytes,
            state_bytes=state_bytes,
            client_part_bytes=_bytes_of(whole) - sum(_bytes_of(block) for block in blocks),
            head_bytes=_bytes_of(head) if head is not None else 0,
            max_positions=max_positions(config),
            weights=weights.kind,
            saved_bytes=size.plain - size.held,
        )

    def in_codes_of(self, checkpoint: Checkpoint, weights: WeightChoice) -> ModelSizes:
        """The same sizes for a checkpoint that has weights in codes, of blocks and of the client's part."""
        blocks = block_sizes(checkpoint, weights, range(checkpoint.num_blocks))
        size = max(blocks, key=_HELD)
        whole, container = _on_meta(checkpoint.config, weights.dtype)
        parent, list_name = parent_of(whole, container)
        setattr(parent, list_name, nn.ModuleList())
        facts = checkpoint.store.tensor_facts(checkpoint.store.tensor_names)
        ends = {name: facts[stored] for name, stored in client_part_names(checkpoint, type(whole), container).items()}
        saved: dict[int, int] = {}  # by parameter, because some layers share a parameter
        for path, (one, *_) in codes_within(whole, ends).items():
            layer: Any = whole.get_submodule(path)
            if can_hold_codes(path, layer):
                saved[id(layer.weight)] = layer.weight.nbytes - codes_bytes(one)
        head: Any = whole.get_output_embeddings()
        return replace(
            self,
            block_bytes=size.held,
            saved_bytes=size.plain - size.held,
            client_part_bytes=self.client_part_bytes - sum(saved.values()),
            head_bytes=self.head_bytes - (saved.get(id(head.weight), 0) if head is not None else 0),
            weights=STORED if weights.as_stored and any(one.coded for one in blocks) else weights.kind,
            expert_bytes=size.experts or self.expert_bytes,
            saved_expert_bytes=size.plain_experts - size.experts,
            file_bytes=sum(one.nbytes for one in facts.values()),
        )


_HELD = attrgetter("held")


def _on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[Any, str]:
    """A whole causal model without memory, and the name of its list of blocks."""
    whole_class = causal_class(config)
    return nn.Module.to(on_meta(whole_class, config), dtype), find_container(whole_class, config)


def _bytes_of(module: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint holds of a module; tied tensors count once."""
    tensors = module.state_dict(keep_vars=True).values()
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def expert_share(config: PreTrainedConfig) -> float:
    """The part of its experts that a block uses for a token; 1: all, or the blocks have no experts."""
    used = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    of = next((value for name in names if (value := getattr(config, name, None))), None)
    return min(1.0, used / of) if used and of else 1.0


def _row_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a sequence in a block, per position and besides: measured with a span on the meta device, as a peer's
    span measures them."""
    config = copy.deepcopy(config)
    packs = packs_sequences(config)
    if packs:
        config._attn_implementation = PACKED
    blocks = config.num_hidden_layers if keeps_states(config) else 1
    model_class = backbone_class(config)
    container = find_container(model_class, config)
    backbone = on_meta(model_class, config)
    probed = torch.bfloat16  # without a device, some kernels for experts take no other type
    nn.Module.to(backbone, probed)
    cut_to_blocks(backbone, container, 0, blocks)
    windows = sliding_windows(config)[:blocks]
    span = Span(
        backbone, container, 0, blocks, weights=WeightChoice(name_of(probed), probed), windows=windows, packs=packs
    )
    found = span.kv_bytes_per_position, span.state_bytes
    position, state = (math.ceil(size * dtype.itemsize / (blocks * probed.itemsize)) for size in found)
    return position, state
