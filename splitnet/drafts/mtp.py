"""Drafts with the layer for multi-token prediction (MTP) that some checkpoints have behind their blocks.

DeepSeek-V3 (arXiv:2412.19437), section 2.2: the embedding of a token and the hidden state of the position before it,
each normalised, are projected to one hidden state, and a block of the model's own kind makes of it, and of those at
earlier positions, one whose logits are of the token after the next. Embeddings and head are the model's.

What families do was compared with transformers (`MtpModel`), vLLM (`*_mtp.py`) and SGLang (`*_nextn.py`, `*_mtp.py`).
vLLM puts zeros in the place of the embedding at the first position of some families, as the others do not; so here. Of
several layers, which two families have, the first is used for all drafted tokens, as by vLLM; with one layer all do so.
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
from splitnet.blocks.client_part import Ends
from splitnet.blocks.kv_cache import SequenceCache
from splitnet.blocks.span import Chunk, Span
from splitnet.checkpoint.checkpoint import BlockTensor, Checkpoint, check_no_unexpected
from splitnet.errors import UnsupportedModel


class Names(NamedTuple):
    """Of tensors, but for `.weight`. {container}: of the list of blocks; {next}: the number behind that of the last
    block; {index}: of a block in the layer; {last}: of the last one in it."""

    block: str  # what the names of the tensors of a block begin with
    embedding_norm: str
    hidden_norm: str
    projection: str
    norm: str  # of what the block gives; empty: the model's own final norm


_BEHIND = Names(
    *("{container}.{next}.", "{container}.{next}.enorm", "{container}.{next}.hnorm"),
    *("{container}.{next}.eh_proj", "{container}.{next}.shared_head.norm"),
)
"""As DeepSeek has it, and every GGUF file."""
_BESIDE = Names("mtp.layers.{index}.", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm")
"""As Qwen3-Next has it."""
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
"""What some checkpoints repeat in the layer: it is the model's own."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The MTP layer of a family.

    attention, mlp: the kind of its block, where a config tells blocks apart and does not say it of the layer itself.
    renamed: part of the names of its tensors -> of those in the model's own blocks. hidden_first: hidden states stand
    before embeddings in what is projected. normed: it takes hidden states that are behind the model's final norm.
    """

    names: Names = _BEHIND
    attention: str = "full_attention"
    mlp: str = "sparse"
    renamed: tuple[str, str] = ("", "")
    hidden_first: bool = False
    normed: bool = True


LAYERS: Mapping[str, Layer] = {
    "deepseek_v3": Layer(),
    "deepseek_v32": Layer(attention="indexed_attention"),
    "ernie4_5_moe": Layer(names=_ERNIE),  # its end as in FastDeploy; vLLM and SGLang have no norm there
    "glm4_moe": Layer(),
    "glm4_moe_lite": Layer(),
    "glm_moe_dsa": Layer(attention="indexed_attention"),
    "mellum": Layer(names=_BESIDE),
    "mimo_v2_flash": Layer(
        names=_MIMO_2,
        attention="sliding_attention",
        mlp="dense",
        renamed=("pre_mlp_layernorm.", "post_attention_layernorm."),
    ),
    "nemotron_h": Layer(names=_NEMOTRON),
    "qwen2": Layer(names=_MIMO, hidden_first=True, normed=False),  # MiMo, which is a Qwen2 otherwise; as in vLLM
    "qwen3_5_moe_text": Layer(names=_BESIDE),
    "qwen3_5_text": Layer(names=_BESIDE),
    "qwen3_next": Layer(names=_BESIDE),
}
"""By family."""


class _Found(NamedTuple):
    """The layer in a checkpoint: `whole` has its blocks behind those of the model. parts: field of `Names` -> name."""

    layer: Layer
    whole: Checkpoint
    start: int  # of its blocks in `whole`
    parts: dict[str, str]


@torch.inference_mode(False)  # what is loaded is used outside of it, too
def mtp_head(checkpoint: Checkpoint, ends: Ends, weights: str | None = None) -> MtpHead | None:
    """The MTP layer of a checkpoint, and nothing else of it, is read; None: it has none.

    Args:
        ends: of the client's part of the same checkpoint.
        weights: what those of the block are held as, see `Span.load`.

    Raises:
        UnsupportedModel: it cannot be used, the message says why.
        WeightsError, OutOfMemory: as `Span.load`.
        SplitnetError: what is not on this machine cannot be had.
    """
    found = _find(checkpoint)
    if found is None:
        return None
    if not ends.are_all:
        raise _unusable(checkpoint, "the model does more to embeddings or logits than is known here")
    return MtpHead(found, ends, weights)


def mtp_bytes(checkpoint: Checkpoint, dtype: torch.dtype | None = None, weights: str | None = None) -> int:
    """Bytes that `mtp_head` takes with `dtype` as that of the client's part; 0: the checkpoint has no MTP layer.

    Reads headers only. Raises as `mtp_head`.
    """
    found = _find(checkpoint)
    if found is None:
        return 0
    chosen = weights_of(found.whole, weights, dtype, "cpu")
    sizes = block_sizes(found.whole, chosen, range(found.start, found.whole.num_blocks))
    return sum(size.held for size in sizes) + checkpoint.bytes_of(found.parts.values(), chosen.dtype)


class MtpHead:
    """A `DraftHead`: an MTP layer. Threads may share it.

    Its outputs are behind its own final norm, as the hidden states that it takes are behind that of the model.
    """

    draft_vocabulary = None

    def __init__(self, found: _Found, ends: Ends, weights: str | None) -> None:
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
            output = self._span.forward(given, [Chunk(cache, cache.length, len(given))])
        norm = self._parts["norm"] if self._has_norm else self._ends.norm
        return norm(output)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return self._ends.head(hidden)


def _find(checkpoint: Checkpoint) -> _Found | None:
    """Where the layer is; None: there is none. Reads headers only. Raises UnsupportedModel: it is not as expected."""
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
    whole, size = checkpoint.longer(config, blocks), checkpoint.hidden_size
    for name, facts in checkpoint.store.facts(parts.values()).items():
        if facts.shape != ((size, 2 * size) if name == parts["projection"] else (size,)):
            raise _unusable(checkpoint, f"{name} is {list(facts.shape)}")
    check_file_bytes(whole, count)
    return _Found(layer, whole, count, parts)


def _unusable(checkpoint: Checkpoint, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{checkpoint.name} has layers for multi-token prediction which cannot be used, as {why}: use other drafts, "
        "such as --speculate prompt-lookup"
    )
