"""EAGLE heads: one or a few blocks at the client, which draft from the hidden states that hops return.

EAGLE and EAGLE-2 (Li et al., arXiv:2401.15077, 2406.16858) take the last hidden state after the final norm and guess
the next one, which the model's head turns into tokens. EAGLE-3 (arXiv:2503.01840) takes hidden states of several depths
and has its own head, for a smaller vocabulary (as FR-Spec, arXiv:2502.14856).

Heads are read from folders and ids of the hub with safetensors: EAGLE-3 in the formats of `speculators` and of its
authors and SpecForge (LlamaForCausalLMEagle3), EAGLE-1 and EAGLE-2. Heads are written in the format of `speculators`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from splitnet.blocks.attention import attend_by_group
from splitnet.blocks.client_part import ClientPart
from splitnet.blocks.kv_cache import SequenceCache
from splitnet.checkpoint.families import check_values
from splitnet.checkpoint.safetensors import SINGLE_FILE, SafetensorsStore
from splitnet.errors import SplitnetError, replace_library_errors
from splitnet.quant.choose import AUTO, choose_weights
from splitnet.quant.linear import hold_weights

MOST_LAYERS = 8
MOST_TAPS = 8
_MOST_SIZE = 1 << 20  # largest dimension: the product of two dimensions fits in torch's sizes
_ROPES = ("default", "linear", "llama3", "yarn")  # RoPE types with frequencies that do not depend on the text's length
_SPECULATORS = "speculators_model_type"
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_LEFT_OUT = ("t2d", "rotary_emb.inv_freq", "verifier_norm.weight", "verifier_lm_head.weight", "embed_tokens.weight")
"""Tensors that are not needed: the inverse of d2t, tables, and tensors of the model."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The architecture of a head; the flags have the names of `speculators`.

    layer: sizes and rotary embedding of the layers. first: whether the head is EAGLE-1 or 2. extras: names of optional
    tensors: biases, norms of queries and keys, embeddings, a language model head.
    """

    layer: LlamaConfig
    taps: tuple[int, ...]
    draft_vocab_size: int
    first: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    extras: frozenset[str] = frozenset({"lm_head.weight"})


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Maps the index of a layer, queries `[..., heads, n, head size]`, and keys and values of the KV heads to the outputs
of attention, in the shape of the queries."""


def _attend(cache: SequenceCache, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Computes attention of new positions to the cache and to each other, and appends these positions to the cache."""
    count = keys.shape[1]
    every, all_values = cache.append(layer, keys[None], values[None])
    mask = None
    if count > 1:
        mask = torch.ones(1, 1, count, every.shape[2], dtype=torch.bool, device=keys.device).tril(cache.length)
    return attend_by_group(queries[None], every, all_values, mask, None)[0]


class _EagleLayer(nn.Module):
    """A block of the families Llama and Qwen3. The first block of EAGLE-3 takes embedding and features together, the
    first block of EAGLE-1 has no input norm."""

    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        sizes, self._index = shape.layer, index
        hidden, size, own = sizes.hidden_size, sizes.head_dim, f"layers.{index}."
        assert size is not None and sizes.num_key_value_heads is not None
        heads, kv_heads = sizes.num_attention_heads * size, sizes.num_key_value_heads * size
        joined = index == 0 and not shape.first
        inputs = 2 * hidden if joined else hidden

        def linear(name: str, outputs: int, given: int) -> nn.Linear:
            return nn.Linear(given, outputs, bias=f"{own}{name}.bias" in shape.extras)

        def norm(dimension: int) -> LlamaRMSNorm:
            return LlamaRMSNorm(dimension, eps=sizes.rms_norm_eps)

        projections = (("q_proj", heads, inputs), ("k_proj", kv_heads, inputs), ("v_proj", kv_heads, inputs))
        attention = (*projections, ("o_proj", hidden, heads))
        self.self_attn = nn.ModuleDict({name: linear(f"self_attn.{name}", *rest) for name, *rest in attention})
        for name in ("q_norm", "k_norm"):
            if f"{own}self_attn.{name}.weight" in shape.extras:
                self.self_attn[name] = norm(size)
        inner = sizes.intermediate_size
        parts = (("gate_proj", inner, hidden), ("up_proj", inner, hidden), ("down_proj", hidden, inner))
        self.mlp = nn.ModuleDict({name: linear(f"mlp.{name}", *rest) for name, *rest in parts})
        self.input_layernorm = norm(hidden) if index or joined else None
        self.hidden_norm = norm(hidden) if joined else None
        self.post_attention_layernorm = norm(hidden)
        self._head_size = size
        self._activation = ACT2FN[sizes.hidden_act]
        self._residual_is_normed = shape.norm_before_residual

    def forward(self, embedded: Tensor, hidden: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        residual = hidden
        if self.hidden_norm is not None and self.input_layernorm is not None:
            hidden = self.hidden_norm(hidden)
            residual = hidden if self._residual_is_normed else residual
            hidden = torch.cat((self.input_layernorm(embedded), hidden), dim=-1)
        elif self.input_layernorm is not None:
            hidden = self.input_layernorm(hidden)
        attention, mlp = self.self_attn, self.mlp
        queries, keys, values = (
            attention[name](hidden).unflatten(-1, (-1, self._head_size)) for name in ("q_proj", "k_proj", "v_proj")
        )
        if "q_norm" in attention:
            queries, keys = attention["q_norm"](queries), attention["k_norm"](keys)
        queries, keys = apply_rotary_pos_emb(queries, keys, *rotary, unsqueeze_dim=-2)
        mixed = attend(self._index, queries.transpose(-2, -3), keys.transpose(-2, -3), values.transpose(-2, -3))
        hidden = residual + attention["o_proj"](mixed.transpose(-2, -3).flatten(-2))
        inner = self.post_attention_layernorm(hidden)
        return hidden + mlp["down_proj"](self._activation(mlp["gate_proj"](inner)) * mlp["up_proj"](inner))


class EagleHead(nn.Module):
    """A `DraftHead` whose tensors have the names of `speculators`. It computes in float32."""

    draft_vocabulary: Tensor | None

    def __init__(self, shape: Shape, model: ClientPart, draft_vocabulary: Tensor | None = None) -> None:
        """draft_vocabulary: ids in rising order; None: all tokens, or set by `open`."""
        super().__init__()
        self.shape, self.model, self.taps = shape, model, shape.taps
        sizes, extras = shape.layer, shape.extras
        hidden, given = sizes.hidden_size, len(shape.taps) * model.hidden_size
        self.fc = nn.Linear(2 * hidden if shape.first else given, hidden, bias="fc.bias" in extras)
        self.layers = nn.ModuleList(_EagleLayer(shape, index) for index in range(sizes.num_hidden_layers))
        if not shape.first:
            self.norm = LlamaRMSNorm(hidden, eps=sizes.rms_norm_eps)
        if "lm_head.weight" in extras:
            self.lm_head = nn.Linear(hidden, shape.draft_vocab_size, bias=False)
        if "embed_tokens.weight" in extras:
            self.embed_tokens = nn.Embedding(model.vocabulary, hidden)
        if shape.norm_before_fc:
            self.input_norm = LlamaRMSNorm(given, eps=sizes.rms_norm_eps)
        if shape.fc_norm:
            norms = (LlamaRMSNorm(model.hidden_size, eps=sizes.rms_norm_eps) for _ in shape.taps)
            self.fc_norm = nn.ModuleList(norms)
        self.register_buffer("draft_vocabulary", draft_vocabulary, persistent=False)
        self._tables = torch.empty(0), torch.empty(0)

    @classmethod
    def from_source(cls, source: str | Path, model: ClientPart, *, trainable: bool = False) -> EagleHead:
        """Reads a head from a folder or, if there is no such folder, from the hub.

        trainable: weights are float32 parameters; otherwise they are held in 16 bits where kernels support that.

        Raises ModelNotFound: there is no such head; SplitnetError: the head is for another model, or not supported.
        """
        store = SafetensorsStore.open(source, None)
        places = store.tensor_locations()
        names = {name.replace("midlayer.", "layers.0.", 1): name for name in places}
        with replace_library_errors(
            lambda why: SplitnetError(f"the config of {source} is not the config of an EAGLE head ({why})")
        ):
            shape = _shape_of(json.loads(store.told_config()), names.keys(), model)
        with torch.device("meta"):
            head = cls(shape, model)
            if not trainable:
                hold_weights(head, choose_weights(AUTO, None, torch.float32, torch.device("cpu")))
        expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
        if "d2t" in names:
            expected["d2t"] = (shape.draft_vocab_size,)
        for name in sorted(expected.keys() | names.keys() - set(_LEFT_OUT)):
            place = places[names[name]] if name in names else None
            types = ("I64", "I32") if name == "d2t" else ("F32", "BF16", "F16")
            if place is None or place.shape != expected.get(name) or place.stored not in types:
                told = f"{list(place.shape)} numbers of the type {place.stored}" if place is not None else "nothing"
                wanted = f"{list(expected[name])} of {types[0]} or less" if name in expected else "nothing"
                _refuse(f"has {told} as {name}, where {wanted} is expected")
        with (
            ExitStack() as files,
            replace_library_errors(lambda why: SplitnetError(f"{source} is damaged: get it again ({why})")),
        ):
            paths = {file: store.find_file(file) for file in {places[names[name]].file for name in expected}}
            opened = {file: files.enter_context(safe_open(str(path), framework="pt")) for file, path in paths.items()}
            for name in expected:
                tensor = opened[places[names[name]].file].get_tensor(names[name])
                if name == "d2t":
                    head.draft_vocabulary = _ids_of(tensor, model.vocabulary)
                    continue
                kept = tensor.dtype if name == "embed_tokens.weight" else torch.float32
                head.load_state_dict({name: tensor.to(kept, copy=True)}, strict=False, assign=True)
        return head.requires_grad_(trainable)

    @torch.no_grad()
    def run(self, tokens: Tensor, features: Tensor, cache: SequenceCache, *, own: bool = False) -> Tensor:
        """Tokens `[n]` and features `[n, len(taps) * hidden]`, or with `own` outputs `[n, hidden]` -> `[n, hidden]`.

        Position t has the features of the model's position t and token t + 1, and is appended to the cache.
        """
        embedded, hidden = self.embed(tokens), self._numbers(features)
        if not own:
            hidden = self.embed_features(hidden)
        outputs = self(embedded, hidden, self.rotary(cache.length, len(hidden)), partial(_attend, cache))
        cache.advance(len(hidden))
        return outputs

    def embed(self, tokens: Tensor) -> Tensor:
        """`[..., n]` -> `[..., n, hidden]`."""
        own = "embed_tokens.weight" in self.shape.extras
        return self._numbers(self.embed_tokens(tokens) if own else self.model.embed(tokens))

    def embed_features(self, features: Tensor) -> Tensor:
        """The layers' input from the model's hidden states: `[..., n, len(taps) * hidden]` -> `[..., n, hidden]`."""
        if self.shape.first:
            return self._numbers(self.model.norm(features))
        if self.shape.norm_before_fc:
            features = self.input_norm(features)
        if self.shape.fc_norm:
            chunks = features.chunk(len(self.taps), dim=-1)
            features = torch.cat([norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], dim=-1)
        return self.fc(features)

    def forward(self, embedded: Tensor, hidden: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """The outputs `[..., n, hidden]` of positions. embedded: embeddings of the next tokens. hidden: output of
        `embed_features` or of the head. Both `[..., n, hidden]`."""
        if self.shape.first:
            hidden = self.fc(torch.cat((embedded, hidden), dim=-1))
        for layer in self.layers:
            hidden = layer(embedded, hidden, rotary, attend)
        return self.norm(hidden) if self.shape.norm_output else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., hidden]` -> `[..., draft vocabulary]`."""
        if not self.shape.first and not self.shape.norm_output:
            hidden = self.norm(hidden)
        if "lm_head.weight" in self.shape.extras:
            return self.lm_head(hidden)
        return self.model.head(hidden)

    def rotary(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions, `[count, head size]` each."""
        if len(self._tables[0]) < start + count:
            with torch.inference_mode(False):
                places = torch.arange(max(2 * (start + count), 1024))[None]
                found = LlamaRotaryEmbedding(self.shape.layer)(torch.empty(0), places)
            self._tables = self._numbers(found[0][0]), self._numbers(found[1][0])
        cosines, sines = self._tables
        return cosines[start : start + count], sines[start : start + count]

    def save(self, folder: Path, verifier: str | None, architectures: Sequence[str]) -> None:
        """Writes the head in bfloat16, in the format of `speculators`. verifier: hub id or path of the model; None:
        others cannot open the model. Raises SplitnetError: EAGLE-1 and 2, which the format lacks."""
        if self.shape.first:
            raise SplitnetError(
                "a head of EAGLE-1 or 2 cannot be written in the format of speculators: train a new head"
            )
        tensors = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in self.state_dict().items()}
        if (ids := self.draft_vocabulary) is not None:
            known = torch.zeros(self.model.vocabulary, dtype=torch.bool)
            known[ids.cpu()] = True
            tensors |= {"d2t": ids.cpu() - torch.arange(len(ids)), "t2d": known}
        queries_normed = any(name.endswith("q_norm.weight") for name in self.shape.extras)
        method = {"proposal_type": "greedy", "speculative_tokens": 5, "verifier_accept_k": 1, "accept_tolerance": 0.0}
        config = {
            "architectures": ["Eagle3Speculator"],
            _SPECULATORS: "eagle3",
            "speculators_version": "0.9.0",
            "speculators_config": {
                "algorithm": "eagle3",
                "proposal_methods": [method],
                "default_proposal_method": "greedy",
                "verifier": {"name_or_path": verifier, "architectures": list(architectures)},
            },
            "transformer_layer_config": self.shape.layer.to_dict()
            | {"model_type": "qwen3" if queries_normed else "llama"},
            "draft_vocab_size": self.shape.draft_vocab_size,
            "target_hidden_size": None,
            _LAYER_IDS: list(self.taps),
            **{flag: getattr(self.shape, flag) for flag in _FLAGS},
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE_FILE)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _numbers(self, hidden: Tensor) -> Tensor:
        layer: Any = self.layers[0]
        weight = layer.post_attention_layernorm.weight
        return hidden.to(weight.device, weight.dtype)


_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def _refuse(problem: str) -> NoReturn:
    raise SplitnetError(f"the head {problem}: give an EAGLE head of this model, or train one with tune --draft-head")


def _ids_of(offsets: Tensor, vocabulary: int) -> Tensor:
    ids = offsets.long() + torch.arange(len(offsets))
    if not bool(((ids >= 0) & (ids < vocabulary)).all()) or len(ids.unique()) < len(ids):
        _refuse(f"has a d2t with tokens that are repeated, or not among the model's {vocabulary}")
    return ids


def _shape_of(values: Mapping[str, Any], tensors: Set[str], model: ClientPart) -> Shape:
    """The architecture of a head from its config and its tensors' names. Raises SplitnetError: see
    `EagleHead.from_source`;
    other errors: a value has a wrong type."""
    check_values(values, "the config of the head")
    kind = values.get(_SPECULATORS)
    if kind not in (None, "eagle3"):
        _refuse(f"is a speculator of the kind {kind!r}, and only eagle3 is known")
    told = values["transformer_layer_config"] if kind else values
    if not isinstance(told, Mapping):
        _refuse("has a transformer_layer_config that is not an object with keys")
    nested = values.get("eagle_config")
    first = not kind and "layers.0.hidden_norm.weight" not in tensors
    flags = {name: bool(values.get(name)) for name in _FLAGS if not first}
    layer = _layer_of(told, model, own_embeddings=not first and "embed_tokens.weight" in tensors)
    taps: Any = values.get(_LAYER_IDS)
    if taps is None and not kind and isinstance(nested, Mapping):
        # SpecForge counts the layers whose outputs are taken, speculators and vLLM the layers whose inputs are taken.
        taps = [one + 1 for one in nested.get(_LAYER_IDS) or ()]
    blocks = model.num_blocks
    taps = (blocks,) if first else tuple(taps or (2, blocks // 2, blocks - 3))
    known = all(type(tap) is int and 0 <= tap <= blocks for tap in taps[: MOST_TAPS + 1])
    if not known or len(set(taps)) < len(taps) or len(taps) > MOST_TAPS:
        _refuse(
            f"takes hidden states after {list(taps)[: MOST_TAPS + 1]} blocks ({_LAYER_IDS}), the model has {blocks}"
        )
    draft = model.vocabulary
    if not first and values.get("draft_vocab_size") is not None:
        draft = _number(values, "draft_vocab_size", model.vocabulary)
    if draft != model.vocabulary and "d2t" not in tensors:
        _refuse(f"drafts {draft} of {model.vocabulary} tokens and has no d2t, which gives the tokens that are drafted")
    own = {"lm_head.weight", "embed_tokens.weight"} & tensors if not first else frozenset[str]()
    fits = model.head is not None and draft == model.vocabulary and layer.hidden_size == model.hidden_size
    if "lm_head.weight" not in own and not fits:
        _refuse("has no lm_head.weight, and the model's own head does not fit it")
    if first and model.norm is None:
        _refuse("is one of EAGLE-1 or 2, for which the final norm of this model is not known")
    extras = {name for name in tensors if name.endswith((".bias", ".q_norm.weight", ".k_norm.weight"))} | own
    return Shape(layer, taps, draft, first, **flags, extras=frozenset(extras))


def _layer_of(told: Mapping[str, Any], model: ClientPart, *, own_embeddings: bool) -> LlamaConfig:
    family, ropes = told.get("model_type", "llama"), told.get("rope_parameters") or told.get("rope_scaling") or {}
    if family not in ("llama", "qwen3"):
        _refuse(f"has layers of the family {family!r}, and llama and qwen3 are known")
    if not isinstance(ropes, Mapping):
        _refuse(f"has rotary embeddings that describe nothing, {ropes!r}")
    rope = {"rope_theta": told.get("rope_theta", 10000.0), "rope_type": ropes.get("type", "default"), **ropes}
    expected = {"rope_type": _ROPES, "partial_rotary_factor": (None, 1)}
    for name, known in expected.items():
        if rope.get(name) not in known:
            _refuse(f"has {name} {rope[name]!r} in its rotary embedding, which is not known")
    if told.get("hidden_act", "silu") not in ACT2FN:
        _refuse(f"has the hidden_act {told['hidden_act']!r}, which is not known")
    if "sliding_attention" in (told.get("layer_types") or ()):
        _refuse("has sliding_attention in its layer_types, which is not known")
    for name in ("quantization_config", "logit_scale", "parallel_drafting"):
        if told.get(name) not in (None, False, 1):
            _refuse(f"has {name} in its config, which is not known")
    hidden, heads = _number(told, "hidden_size"), _number(told, "num_attention_heads")
    size = _number(told, "head_dim") if told.get("head_dim") else hidden // heads
    kv_heads = _number(told, "num_key_value_heads", heads) if told.get("num_key_value_heads") else heads
    vocabulary = _number(told, "vocab_size")
    if vocabulary != model.vocabulary:
        _refuse(f"is for {vocabulary} tokens (vocab_size), and the model has {model.vocabulary}")
    if hidden != model.hidden_size and not own_embeddings:
        _refuse(f"has the hidden_size {hidden}, the model {model.hidden_size}, and no embeddings of its own")
    if hidden % heads or heads % kv_heads or size % 2 or not size:
        given = f"{heads} num_attention_heads and {kv_heads} num_key_value_heads of {size} numbers"
        _refuse(f"has {given} with the hidden_size {hidden}, which do not go together")
    others = (
        *("hidden_act", "rms_norm_eps", "max_position_embeddings"),
        *("attention_bias", "mlp_bias", "initializer_range"),
    )
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=_number(told, "intermediate_size"),
        num_hidden_layers=_number(told, "num_hidden_layers", MOST_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=size,
        vocab_size=vocabulary,
        rope_parameters=rope,
        **{name: told[name] for name in others if told.get(name) is not None},
    )
    try:
        LlamaRotaryEmbedding(config)(torch.empty(0), torch.zeros(1, 1))
    except Exception as error:
        raise ValueError(f"no rotary embedding can be made from {str(rope)[:500]}: {error}") from error
    return config


def _number(values: Mapping[str, Any], name: str, most: int = _MOST_SIZE) -> int:
    value = values.get(name)
    if type(value) is not int or not 1 <= value <= most:
        _refuse(f"has the {name} {value!r}, where a whole number from 1 to {most} is expected")
    return value
