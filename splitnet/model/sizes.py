"""What a model takes, from its config alone: bytes of a block, of a cached position, of the client's part; arithmetic.

The model is built on the meta device, where tensors have shapes but no memory, so this is what transformers would
load, for every family, and no weight is read or downloaded.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from splitnet.errors import ModelNotFound, UnsupportedModel
from splitnet.model.attention import PACKED
from splitnet.model.backbone import backbone_class, causal_class, cut_to_blocks, find_container, parent_of
from splitnet.model.dtypes import as_dtype
from splitnet.model.families import check_can_be_cut, keeps_states, packs_sequences, sliding_windows, text_config_of
from splitnet.model.held_linear import saved_bytes
from splitnet.model.shards import Shards
from splitnet.model.span import Span
from splitnet.model.weights import Weights, choose_weights, name_of


@dataclass(frozen=True)
class ModelSizes:
    """Sizes in bytes, of a model that computes in `dtype`.

    Attributes:
        block_bytes: weights of the largest block, as they are held; its `expert_bytes` are those of experts, of which a
            position uses the part `expert_share`.
        kv_bytes: what one position leaves in one block: keys and values. Where blocks differ, on average.
        state_bytes: what a sequence takes in one block besides, however long it is; on average.
        shell_bytes: weights that a client holds: embeddings, final norm and head.
        head_bytes: weights of the head, which a client reads for every token.
        max_positions: that the model was made for; None if its config does not say.
        weights: what those of linear layers in blocks are held as; as `dtype` if not given.
        saved_bytes: how many more the weights of a block would take in `dtype`.
    """

    name: str
    dtype: str
    num_blocks: int
    hidden_size: int
    block_bytes: int
    expert_bytes: int
    expert_share: float
    kv_bytes: int
    shell_bytes: int
    head_bytes: int
    max_positions: int | None
    weights: str = ""
    saved_bytes: int = 0
    state_bytes: int = 0

    @property
    def held_as(self) -> str:
        """What weights of blocks are held as, for people."""
        return self.weights or self.dtype

    @property
    def flops_per_position(self) -> float:
        """Of one position in one block: a multiplication and an addition for every weight that it uses."""
        used = self.block_bytes + self.saved_bytes - (1 - self.expert_share) * self.expert_bytes
        itemsize = (as_dtype(self.dtype) or torch.float32).itemsize
        return 2 * used / itemsize

    @classmethod
    def of(cls, model: str | Path, dtype: str | None = None, weights: str | None = None) -> ModelSizes:
        """The sizes of a checkpoint folder (its config.json is enough) or of a hub id.

        Args:
            dtype: that blocks compute in; None: what goes with `weights`, else what the config names, or float32.
            weights: what those of linear layers are held as, see `splitnet.model.weights`; None: as `dtype`.

        Raises:
            ModelNotFound: neither exists.
            UnsupportedModel: the model cannot be cut into spans.
            WeightsError: weights cannot be held so.
        """
        shards = Shards.open(model, None)
        try:
            whole = AutoConfig.from_pretrained(shards.config())
        except OSError as error:
            raise ModelNotFound(f"the config of {model} cannot be read: download it again") from error
        except (ValueError, KeyError, AttributeError) as error:
            raise UnsupportedModel(
                f"transformers does not know the architecture of {model}: update transformers"
            ) from error
        config = text_config_of(whole)
        check_can_be_cut(config)
        stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        chosen = choose_weights(weights, dtype, stored, torch.device("cpu"))
        return cls.of_config(shards.name, config, chosen)

    @classmethod
    def of_config(cls, name: str, config: PreTrainedConfig, weights: Weights) -> ModelSizes:
        """The sizes of the text model that a config describes."""
        dtype = weights.dtype
        whole_class = causal_class(config)
        container = find_container(whole_class, config)
        with torch.device("meta"):
            whole: Any = nn.Module.to(whole_class(copy.deepcopy(config)), dtype)
        parent, list_name = parent_of(whole, container)
        blocks = list(getattr(parent, list_name))
        saved = [saved_bytes(block, weights) for block in blocks]
        held = [_bytes_of(block) - less for block, less in zip(blocks, saved, strict=True)]
        index = held.index(max(held))
        largest = blocks[index]
        experts = sum(
            parameter.nbytes
            for parameter_name, parameter in largest.named_parameters()
            if "experts" in parameter_name.split(".")
        )
        head = whole.get_output_embeddings()
        kv_bytes, state_bytes = _row_bytes(config, dtype)
        return cls(
            name=name,
            dtype=name_of(dtype),
            num_blocks=len(blocks),
            hidden_size=config.hidden_size,
            block_bytes=held[index],
            expert_bytes=experts,
            expert_share=_expert_share(config) if experts else 1.0,
            kv_bytes=kv_bytes,
            state_bytes=state_bytes,
            shell_bytes=_bytes_of(whole) - sum(_bytes_of(block) for block in blocks),
            head_bytes=_bytes_of(head) if head is not None else 0,
            max_positions=getattr(config, "max_position_embeddings", None),
            weights=weights.kind,
            saved_bytes=saved[index],
        )


def _bytes_of(module: nn.Module) -> int:
    """Bytes of all that a checkpoint holds of a module, where what is tied counts once."""
    tensors = module.state_dict(keep_vars=True).values()
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _expert_share(config: PreTrainedConfig) -> float:
    used = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    of = next((value for name in names if (value := getattr(config, name, None))), None)
    return min(1.0, used / of) if used and of else 1.0


def _row_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[int, int]:
    """What a sequence takes in a block, for each position and besides: a span probes that, as a peer's does."""
    config = copy.deepcopy(config)
    packs = packs_sequences(config)
    if packs:
        config._attn_implementation = PACKED
    blocks = config.num_hidden_layers if keeps_states(config) else 1
    model_class = backbone_class(config)
    container = find_container(model_class, config)
    with torch.device("meta"):
        backbone = model_class(config)
    probed = torch.bfloat16  # some kernels for experts take no other where no device is there to choose by
    nn.Module.to(backbone, probed)
    cut_to_blocks(backbone, container, 0, blocks)
    windows = sliding_windows(config)[:blocks]
    span = Span(backbone, container, 0, blocks, weights=Weights(name_of(probed), probed), windows=windows, packs=packs)
    found = span.kv_bytes_per_position, span.state_bytes
    position, state = (math.ceil(size * dtype.itemsize / (blocks * probed.itemsize)) for size in found)
    return position, state
