"""Drafts with the layer for multi-token prediction (MTP) that some checkpoints have after their blocks.

DeepSeek-V3 (arXiv:2412.19437), section 2.2: the embedding of a token and the hidden state of the previous position are
normalised and projected to one hidden state. From this state and those of earlier positions, a block of the model's
kind computes a state whose logits are of the token after the next. Embeddings and head are the model's.

The families were compared with transformers (`MtpModel`), vLLM (`*_mtp.py`) and SGLang (`*_nextn.py`, `*_mtp.py`). For
some families vLLM replaces the embedding at the first position by zeros; the others and this module do not. Two
families have several layers, of which the first drafts all tokens, as in vLLM.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from splitnet.blocks.backbone import hold_codes
from splitnet.blocks.block_sizes import block_sizes, check_file_bytes, weights_of
from splitnet.blocks.client_part import ClientPart
from splitnet.blocks.kv_cache import SequenceCache
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import BlockTensor, Checkpoint, check_no_unexpected
from splitnet.errors import UnsupportedModel


class Names(NamedTuple):
    """Names of tensors, without `.weight`. {container}: name of the list of blocks; {next}: the number of blocks;
    {index}: index of a block in the layer; {last}: index of the layer's last block."""

    block: str  # prefix of the names of a block's tensors
    embedding_norm: str
    hidden_norm: str
    projection: str
    norm: str  # of the block's output; empty: the model's final norm


_BEHIND = Names(
    *("{container}.{next}.", "{container}.{next}.enorm", "{container}.{next}.hnorm"),
    *("{container}.{next}.eh_proj", "{container}.{next}.shared_head.norm"),
)
"""Names of DeepSeek, and of every GGUF file."""
_BESIDE = Names("mtp.layers.{index}.", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm")
"""Names of Qwen3-Next."""
_ERNIE = Names(
    *("model.mtp_block.0.", "model.mtp_emb_norm.0", "model.mtp_hidden_norm.0", "model.mtp_linear_proj.0", ""),
)
_MIMO = Names(
    *("model.mtp_layers.0.", "model.mtp_layers.0.token_layernorm", "model.mtp_layers.0.hidden_layernorm"),
    *("model.mtp_layers.0.input_proj", "model.mtp_layers.0.final_layernorm"),
)
_MIMO_2 = Names(
    *("model.mtp.layers.0.", "model.mtp.layers.0.enorm", "model.mtp.layers.0.hnorm", "model.mtp.layers.0.eh_proj"),
    "model.mtp.layers.0.final_layernorm",
)
_NEMOTRON = Names(
    *("mtp.layers.{index}.", "mtp.layers.0.enorm", "mtp.layers.0.hnorm", "mtp.layers.0.eh_proj"),
    "mtp.layers.{last}.final_layernorm",
)
_SHARED = re.compile(r"(^|\.)(embed_tokens|shared_head\.head)\.")
"""Tensors of the model that some checkpoints repeat in the layer."""


@dataclass(frozen=True, kw_only=True)
class MtpLayer:
    """The MTP layer of a family.

    attention, mlp: the kind of the layer's block, for configs that list kinds of blocks without this layer. renamed:
    part of the names of the layer's tensors -> part of the names in the model's blocks. hidden_first: in the input of
    the projection, hidden states come before embeddings. normed: the layer takes hidden states after the model's final
    norm.
    """

    names: Names = _BEHIND
    attention: str = "full_attention"
    mlp: str = "sparse"
    renamed: tuple[str, str] = ("", "")
    hidden_first: bool = False
    normed: bool = True


LAYERS: Mapping[str, MtpLayer] = {
    "deepseek_v3": MtpLayer(),
    "deepseek_v32": MtpLayer(attention="indexed_attention"),
    "ernie4_5_moe": MtpLayer(names=_ERNIE),  # with a final norm as in FastDeploy; vLLM and SGLang omit this norm
    "glm4_moe": MtpLayer(),
    "glm4_moe_lite": MtpLayer(),
    "glm_moe_dsa": MtpLayer(attention="indexed_attention"),
    "mellum": MtpLayer(names=_BESIDE),
    "mimo_v2_flash": MtpLayer(
        names=_MIMO_2,
        attention="sliding_attention",
        mlp="dense",
        renamed=("pre_mlp_layernorm.", "post_attention_layernorm."),
    ),
    "nemotron_h": MtpLayer(names=_NEMOTRON),
    # MiMo, which has the blocks of Qwen2; the layer is as in vLLM
    "qwen2": MtpLayer(names=_MIMO, hidden_first=True, normed=False),
    "qwen3_5_moe_text": MtpLayer(names=_BESIDE),
    "qwen3_5_text": MtpLayer(names=_BESIDE),
    "qwen3_next": MtpLayer(names=_BESIDE),
}
"""The MTP layer, by family."""


class _FoundHead(NamedTuple):
    """The layer of a checkpoint. whole: the checkpoint with the layer's blocks after the model's blocks. parts: field
    of `Names` -> name of the tensor."""

    layer: MtpLayer
    whole: Checkpoint
    start: int  # index of the layer's first block in `whole`
    parts: dict[str, str]


@torch.inference_mode(False)  # the tensors are used outside of inference mode, too
def mtp_head(checkpoint: Checkpoint, ends: ClientPart, weights: str | None = None) -> MtpHead | None:
    """Reads only the MTP layer of a checkpoint; None: the checkpoint has no such layer.

    Args:
        ends: embeddings, final norm and head of the client part of the same checkpoint.
        weights: format of the block's weights, see `Span.load`.

    Raises:
        UnsupportedModel: the layer cannot be used; the message has the reason.
        WeightsError, OutOfMemory: as `Span.load`.
        SplitnetError: tensors are not on this machine and cannot be fetched.
    """
    found = _find(checkpoint)
    if found is None:
        return None
    if not ends.compute_everything:
        raise _unusable(checkpoint, "the model changes embeddings or logits in a way that is not known here")
    return MtpHead(found, ends, weights)


def mtp_bytes(checkpoint: Checkpoint, dtype: torch.dtype | None = None, weights: str | None = None) -> int:
    """Bytes of memory that `mtp_head` needs; 0: the checkpoint has no MTP layer. dtype: of the client's part.

    Reads headers only. Raises as `mtp_head`.
    """
    found = _find(checkpoint)
    if found is None:
        return 0
    chosen = weights_of(found.whole, weights, dtype, "cpu")
    sizes = block_sizes(found.whole, chosen, range(found.start, found.whole.num_blocks))
    return sum(size.held for size in sizes) + checkpoint.bytes_of(found.parts.values(), chosen.dtype)


class MtpHead:
    """A `DraftHead` of an MTP layer. Threads may share it.

    The outputs come from the layer's final norm, as the inputs come from the model's final norm.
    """

    draft_vocabulary = None

    def __init__(self, found: _FoundHead, ends: ClientPart, weights: str | None) -> None:
        whole, model = found.whole, ends.model
        self.taps = (found.start,)
        self._ends = ends
        self._layer = found.layer
        self._lock = threading.Lock()
        options = {"device": model.device, "dtype": model.dtype, "weights": weights}
        self._span = Span.load(whole, found.start, whole.num_blocks, **options)
        self._parts, size = nn.ModuleDict(), whole.hidden_size
        with whole.store.load_tensors(found.parts, model.dtype) as tensors:
            for part, lazy in tensors.items():
                linear = part == "projection"
                layer: Any = nn.Linear(2 * size, size, False, device="meta") if linear else copy.deepcopy(ends.norm)
                layer.weight = nn.Parameter(lazy[...], requires_grad=False)
                self._parts[part] = layer
        self._has_norm = "norm" in found.parts
        hold_codes(self._parts, model.device)
        self._parts.to(model.device, model.dtype)

    @torch.inference_mode()
    def run(self, tokens: Tensor, features: Tensor, cache: SequenceCache, *, own: bool = False) -> Tensor:
        model = self._ends.model
        hidden = features.to(model.device, model.dtype)
        if self._layer.normed and not own:
            hidden = self._ends.norm(hidden)
        embedded = self._parts["embedding_norm"](self._ends.embed(tokens.to(model.device)))
        both = [embedded, self._parts["hidden_norm"](hidden)]
        given = self._parts["projection"](torch.cat(both[::-1] if self._layer.hidden_first else both, dim=-1))
        with self._lock:
            output = self._span.forward(given, [RowChunk(cache, cache.length, len(given))])
        norm = self._parts["norm"] if self._has_norm else self._ends.norm
        return norm(output)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return self._ends.head(hidden)


def _find(checkpoint: Checkpoint) -> _FoundHead | None:
    """Finds the layer; None: there is none. Reads headers only. Raises UnsupportedModel: the layer is unknown."""
    further, count = checkpoint.next_token_names, checkpoint.num_blocks
    if not further:
        return None
    layer = LAYERS.get(checkpoint.model_type)
    if layer is None:
        raise _unusable(checkpoint, "how the family uses them is not known here")
    config = copy.deepcopy(checkpoint.config)
    several = getattr(config, "mtp_layers_block_type", None)  # blocks of one layer
    kinds = several or (getattr(config, "mtp_layer_types", None) or [layer.attention])[:1]
    mlps = (getattr(config, "mtp_mlp_layer_types", None) or [layer.mlp])[:1]
    names = _BEHIND if f"{checkpoint.container}.{count}.eh_proj.weight" in further else layer.names
    words = {"container": checkpoint.container, "next": count, "last": len(kinds) - 1}
    parts = {
        part: f"{name.format(**words)}.weight" for part, name in zip(Names._fields[1:], names[1:], strict=True) if name
    }
    left = {name for name in further if not _SHARED.search(name)} - set(parts.values())
    blocks: list[list[BlockTensor]] = []
    for index in range(len(kinds)):
        prefix = names.block.format(index=index, **words)
        own = sorted(name for name in left if name.startswith(prefix))
        if not own or not further >= set(parts.values()):
            raise _unusable(checkpoint, "some of their tensors are missing")
        blocks.append([BlockTensor(name, name.removeprefix(prefix).replace(*layer.renamed)) for name in own])
        left.difference_update(own)
    numbers = {str(count)} if names is _BEHIND else {str(index) for index in range(len(kinds))}
    numbered = ((name, re.search(r"\.(\d+)\.", name)) for name in left)
    check_no_unexpected((name for name, match in numbered if match is None or match[1] in numbers), config.model_type)
    for key, more in (("layer_types", kinds), ("mlp_layer_types", mlps), ("indexer_types", ["full"])):
        if getattr(config, key, None) is not None:
            setattr(config, key, [*getattr(config, key)[:count], *more])
    config.num_hidden_layers = count + len(kinds)
    whole, size = checkpoint.with_more_blocks(config, blocks), checkpoint.hidden_size
    for name, facts in checkpoint.store.tensor_facts(parts.values()).items():
        if facts.shape != ((size, 2 * size) if name == parts["projection"] else (size,)):
            raise _unusable(checkpoint, f"{name} is {list(facts.shape)}")
    check_file_bytes(whole, count)
    return _FoundHead(layer, whole, count, parts)


def _unusable(checkpoint: Checkpoint, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{checkpoint.name} has layers for multi-token prediction which cannot be used, as {why}: use other drafts, "
        "such as --speculate prompt-lookup"
    )
