"""Describes blocks for compiled steps: finds their parts by the names that families give to the same parts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from itertools import product
from math import inf
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from splitnet.blocks.attention import PACKED
from splitnet.blocks.fast.torch_step import is_mlp
from splitnet.quant.experts import QuantizedExperts
from splitnet.quant.linear import QuantizedLinear

_TRIALS = 8
_SCALES = (1.0, 1e-2)  # scales of the inputs for trials of norms; the second scale shows the epsilon of the variance


class UnknownPart(Exception):
    """A part of a block that compiled steps do not support; the message names it."""


class NormKind(IntEnum):
    """The same values as `enum norm` in `native/step.h`."""

    RMS, LAYER = 1, 2


@dataclass(frozen=True, eq=False)
class Norm:
    """The factors and summands of a norm, applied to normalised numbers."""

    kind: NormKind
    weight: Tensor  # `[width]`, or `[heads, size]` if each head has separate weights; the bias has the same shape
    bias: Tensor | None
    epsilon: float  # added to the variance

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """Finds the factors of a family's own norm by a trial. Raises UnknownPart if the module computes something
        else."""
        own: Any = deepcopy(module).float()
        named = [(name.rpartition(".")[2], each.detach()) for name, each in own.named_parameters()]
        weights, biases = ([each for name, each in named if name == wanted] for wanted in ("weight", "bias"))
        weight = torch.ones(own.normalized_shape, dtype=torch.float32) if not weights else _stacked(weights)
        bias = _stacked(biases) if biases else None
        epsilon = float(getattr(own, "variance_epsilon", getattr(own, "eps", 1e-5)))
        noise = torch.Generator().manual_seed(0)
        # Heads are a dimension before or after positions, depending on the family: the trial has one position.
        shape = (_TRIALS, *weight.shape) if weight.ndim == 1 else (_TRIALS, len(weight), 1, weight.shape[1])
        if weight.ndim == 2 and not hasattr(own, "norms"):
            shape = (_TRIALS, 1, *weight.shape)
        given = [scale * (torch.randn(shape, generator=noise, dtype=torch.float32) + 0.5) for scale in _SCALES]
        found = [own(each) for each in given]
        for kind, offset in product(NormKind, (0.0, 1.0)):
            likely = cls(kind, weight + offset, bias, epsilon)
            rows = [each.view(_TRIALS, *weight.shape) for each in given]
            if all(_same(likely._normed(row), each.view_as(row)) for row, each in zip(rows, found, strict=True)):
                return likely
        raise UnknownPart(type(module).__name__)

    def _normed(self, rows: Tensor) -> Tensor:
        if self.kind == NormKind.LAYER:
            rows = rows - rows.mean(-1, keepdim=True)
        rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weight
        return rows if self.bias is None else rows + self.bias


class ActivationKind(IntEnum):
    """The same values as `enum activation` in `native/step.h`."""

    SILU, GELU, GELU_TANH, GELU_QUICK, RELU, RELU_SQUARED, XIELU = range(7)


@dataclass(frozen=True)
class Activation:
    """An activation that compiled steps support; `shape`: four numbers of xIELU."""

    kind: ActivationKind
    shape: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    @classmethod
    def of(cls, module: Any) -> Self:
        """Finds the activation of a family's own module by a trial; raises UnknownPart if it computes something
        else."""
        own: Any = deepcopy(module).float()
        x = torch.linspace(-8, 8, 1001, dtype=torch.float32)
        with torch.no_grad():
            found = own(x)
            for kind, function in _ACTIVATIONS.items():
                if _same(function(x), found):
                    return cls(kind)
            if hasattr(own, "alpha_p"):
                beta, most = float(own.beta), float(own.eps)
                up, down = float(functional.softplus(own.alpha_p)), float(functional.softplus(own.alpha_n)) + beta
                negative = (torch.expm1(x.clamp(max=most)) - x) * down
                if _same(torch.where(x > 0, up * x.square(), negative) + beta * x, found):
                    return cls(ActivationKind.XIELU, (up, down, beta, most))
        raise UnknownPart(type(module).__name__)


_ACTIVATIONS: Mapping[ActivationKind, Callable[[Tensor], Tensor]] = {
    ActivationKind.SILU: functional.silu,
    ActivationKind.GELU: functional.gelu,
    ActivationKind.GELU_TANH: partial(functional.gelu, approximate="tanh"),
    ActivationKind.GELU_QUICK: lambda x: x * torch.sigmoid(1.702 * x),
    ActivationKind.RELU: functional.relu,
    ActivationKind.RELU_SQUARED: lambda x: functional.relu(x).square(),
}


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors)


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "ffn", "block_sparse_moe")
_QUERY, _KEY, _VALUE = ("q_proj",), ("k_proj",), ("v_proj",)
_ALL_THREE = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
_OUT = ("o_proj", "dense", "out_proj", "c_proj")
_LATENT = "kv_a_proj_with_mqa"
_QUERY_NORM = ("q_norm", "q_layernorm", "query_layernorm")
_KEY_NORM = ("k_norm", "k_layernorm", "key_layernorm")
_GATE, _GATE_AND_UP = ("gate_proj",), ("gate_up_proj",)
_UP = ("up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h")
_DOWN = ("down_proj", "fc2", "fc_out", "c_proj", "dense_4h_to_h")
_ACTIVATION = ("act_fn", "activation_fn", "act", "gelu_impl")

# Names of the norms of attention's input and output, and of the MLP's input and output; a block has exactly the names
# of one line.
_NORMS: tuple[tuple[str | None, str | None, str | None, str | None], ...] = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("attention_layernorm", None, "feedforward_layernorm", None),
    ("ln_1", None, "ln_2", None),
    ("norm_1", None, "norm_2", None),
    ("self_attn_layer_norm", None, "final_layer_norm", None),
    ("ln_attn", None, "ln_mlp", None),
    ("input_layernorm", None, None, None),
    ("ln_1", None, None, None),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
)
_AFTER_TURNING = "query_layernorm"  # a query norm with this name comes after the rotary embedding
# A layer with this name has queries, keys and values interleaved by stored head; other layers have all queries first.
_BY_HEAD = "query_key_value"
# Whether a block omits the rotary embedding, for families without an attribute `use_rope`.
_DO_NOT_TURN: Mapping[str, Callable[[Any], bool]] = {
    "Cohere2Attention": lambda attention: attention.sliding_window is None,
    "Exaone4Attention": lambda attention: attention.sliding_window is not None and not attention.is_sliding,
}
# Required values of attributes of blocks, where the attributes exist; other values change the order of operations.
_NEEDED: Mapping[str, Any] = {"do_layer_norm_before": True, "apply_residual_connection_post_layernorm": False}
# Only this class caps its logits; Gemma 3 reads the cap from its config, too, but does not use it.
_CAPPED = "Gemma2Attention"
# The bias of a family's module for the logits of two positions: `[heads, 1, 2]`.
_ALIBI: Mapping[str, Callable[[Any, int], Tensor]] = {
    "BloomAttention": lambda own, heads: own.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32),
    "FalconAttention": lambda own, heads: own.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32),
    "MptAttention": lambda own, heads: own.build_mpt_alibi_tensor(heads, 2),
}


@dataclass(frozen=True, eq=False)
class BlockDescription:
    """A block with the usual parts."""

    before: Norm | None  # the norm of the input of attention; `after`: the norm of attention's output
    after: Norm | None
    between: Norm | None  # the norm of the input of the MLP; `behind`: the norm of the MLP's output
    behind: Norm | None
    parallel: bool  # whether the MLP has the same input as attention; otherwise its input is the output of attention
    residual: float  # factor of the outputs of attention and MLP
    attention: Attention
    mlp: Mlp | None  # None for a block with experts alone
    experts: KnownExperts | None

    @classmethod
    def of(cls, block: Any) -> Self:
        """Describes a family's own block. Raises UnknownPart if compiled steps do not support a part of it, or its
        parts do not fit together; unknown blocks may raise any other exception."""
        for name, value in _NEEDED.items():
            if getattr(block, name, value) != value:
                raise UnknownPart(name)
        parts = _Parts(block)
        attention, feed_forward = Attention.of(parts.take_part(_ATTENTION)), parts.find_part(_MLP)
        experts = None if feed_forward is None else KnownExperts.of(feed_forward)
        if experts is not None:
            mlp = None if experts.shared is None else Mlp.all_of(experts.shared)
        else:
            mlp = Mlp.of(parts) if feed_forward is None else Mlp.all_of(feed_forward)
        names = next((names for names in _NORMS if set(names) - {None} == set(parts.rest)), None)
        if names is None or list(block.parameters(recurse=False)) or list(block.buffers(recurse=False)):
            raise UnknownPart(", ".join(parts.rest) or "parameters of the block itself")
        before, after, between, behind = (None if name is None else Norm.of(parts.rest[name]) for name in names)
        alone = names[1:] == (None, None, None)
        parallel = alone or names[0] == "ln_attn" or bool(getattr(block, "use_parallel_residual", False))
        residual = float(getattr(block, "residual_multiplier", 1))
        described = cls(before, after, between, behind, parallel, residual, attention, mlp, experts)
        if not described._fits_together():
            raise UnknownPart("sizes")
        return described

    @property
    def width(self) -> int:
        """The size of hidden states."""
        return self.attention.out.out_features

    @property
    def layers(self) -> list[Any]:
        """Query, key, value, out, gate, up, down, and the opener of a shared expert; None for a missing layer."""
        own = self.attention
        inner = (None, None, None) if self.mlp is None else (self.mlp.gate, self.mlp.up, self.mlp.down)
        opener = None if self.experts is None else self.experts.opener
        return [own.query, own.key, own.value, own.out, *inner, opener]

    def _fits_together(self) -> bool:
        query, key, value, out, gate, up, down, opener = self.layers
        latents = self.attention.latents
        first = query if latents is None or latents.lowered is None else latents.lowered
        inputs = {layer.in_features for layer in (first, key, value, gate, up, opener) if layer is not None}
        outputs = {layer.out_features for layer in (out, down) if layer is not None}
        norms = (self.before, self.after, self.between, self.behind)
        widths = {norm.weight.numel() for norm in norms if norm is not None}
        return inputs | outputs | widths == {self.width} and self.attention.fits_together()


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention of a block."""

    query: Any  # a linear layer; so are `out`, `key` and `value`
    out: Any
    heads: int  # number of heads of queries; `stored`: number of heads of stored keys and values
    stored: int
    size: int  # numbers per head of queries and keys; `value_size`: numbers per head of values
    value_size: int
    scale: float
    index: int  # index of the block in the KV caches
    key: Any = None  # None if `query` computes queries, keys and values; `value` likewise
    value: Any = None
    # If `query` computes all three: the places of the heads of queries, keys and values in the output of `query`.
    places: list[int] | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    late: bool = False  # whether the norms of queries and keys come after the rotary embedding
    cap: float = 0.0  # soft limit of logits; `clip`: limit of the numbers of heads; 0: no limit
    clip: float = 0.0
    sinks: Tensor | None = None
    slopes: Tensor | None = None  # bias per position for the logits of a head
    turns: bool = True  # whether the rotary embedding is applied
    kind: str | None = None  # kind of the block, for families with one rotary embedding per kind
    latents: Latents | None = None  # the latents from which keys and values are computed

    @classmethod
    def of(cls, module: Any) -> Self:
        """Describes a family's own module; raises UnknownPart if it has a part that compiled steps do not support."""
        if hasattr(module, _LATENT):
            return cls._with_latents(module)
        size = int(getattr(module, "head_dim", None) or module.head_size)
        by_head = hasattr(module, _BY_HEAD) or getattr(module, "multi_query", None) is False
        parts = _Parts(module)
        late = _AFTER_TURNING in parts.rest
        norms = (parts.find_part(names) for names in (_QUERY_NORM, _KEY_NORM))
        query_norm, key_norm = (None if norm is None else Norm.of(norm) for norm in norms)
        out, query = parts.take_part(_OUT), parts.find_part(_ALL_THREE)
        heads, key, value, places = out.in_features // size, None, None, None
        if query is None:
            query, key, value = (parts.take_part(names) for names in (_QUERY, _KEY, _VALUE))
            stored = key.out_features // size
        else:
            places = _places(module, heads, (query.out_features // size - heads) // 2, by_head=by_head)
            stored = (len(places) - heads) // 2
        own = {name for name, _ in module.named_parameters(recurse=False)}
        if parts.rest or own - {"sinks"}:
            raise UnknownPart(", ".join([*parts.rest, *own]))
        scale = float(_first(module, "scaling", "inv_norm_factor", "softmax_scale") or size**-0.5)
        slopes = _slopes(module, heads)
        return cls(
            *(query, out, heads, stored, size, size, scale, module.layer_idx),
            *(key, value, places, query_norm, key_norm, late),
            cap=float((type(module).__name__ == _CAPPED and module.attn_logit_softcapping) or 0),
            clip=float(_first(module, "clip_qkv") or _first(getattr(module, "config", None), "clip_qkv") or 0),
            sinks=getattr(module, "sinks", None),
            slopes=slopes,
            turns=slopes is None and _turns(module),
            kind=_first(module, "layer_type", "attention_type"),
        )

    @classmethod
    def _with_latents(cls, module: Any) -> Self:
        parts = _Parts(module)
        latents, query, out = Latents.of(parts, module), parts.take_part((*_QUERY, "q_b_proj")), parts.take_part(_OUT)
        if parts.rest or list(module.parameters(recurse=False)):
            raise UnknownPart(", ".join(parts.rest) or "parameters of attention itself")
        size, value_size = int(module.qk_nope_head_dim + module.qk_rope_head_dim), int(module.v_head_dim)
        heads = out.in_features // value_size
        own = (1 if latents.kept else heads, size, value_size, float(module.scaling), module.layer_idx)
        return cls(query, out, heads, *own, latents=latents)

    @property
    def kept(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and head size, of the stored keys and of the stored values."""
        if self.latents is not None and self.latents.kept:
            return (1, self.latents.rank), (1, self.latents.turned)
        return (self.stored, self.size), (self.stored, self.value_size)

    @property
    def latent_layers(self) -> list[Any]:
        """The layers of `latents`; None for a missing layer."""
        latents = self.latents
        return [None] * 3 if latents is None else [latents.lowered, latents.layer, latents.expand]

    @property
    def joined(self) -> bool:
        """Whether a norm of queries or keys normalises all heads together."""
        weight = None if self.query_norm is None else self.query_norm.weight
        return weight is not None and weight.ndim == 1 and weight.numel() > self.size

    def fits_together(self) -> bool:
        if self.latents is not None:
            return self.latents.fits_together(self)
        taken = self.heads + 2 * self.stored if self.places is None else max(self.places) + 1
        given = [layer.out_features // self.size for layer in (self.query, self.key, self.value) if layer is not None]
        return (
            self.heads % self.stored == 0
            and sum(given) == taken
            and given[1:] in ([], [self.stored, self.stored])
            and self.out.in_features == self.heads * self.size
            and self._fits(self.query_norm, self.heads)
            and self._fits(self.key_norm, self.stored)
            and all(each is None or each.numel() == self.heads for each in (self.sinks, self.slopes))
        )

    def _fits(self, norm: Norm | None, many: int) -> bool:
        shapes = {(many * self.size,)} if self.joined else {(self.size,), (many, self.size)}
        return norm is None or tuple(norm.weight.shape) in shapes


@dataclass(frozen=True, eq=False)
class Latents:
    """A few numbers from which keys and values of all heads are computed (DeepSeek-AI, "DeepSeek-V2",
    arXiv:2405.04434)."""

    lowered: Any  # a layer whose normed output is the input of `query`, or None
    lowered_norm: Norm | None
    # A layer. The first part of its output is the input of `norm`, which gives the latents; the rest is the rotated
    # part of keys, which all heads share.
    layer: Any
    norm: Norm
    expand: Any  # a layer that computes the rest of the key and the value of each head from latents
    kept: bool  # whether latents and the rotated part of keys are stored in place of keys and values

    @classmethod
    def of(cls, parts: _Parts, module: Any) -> Self:
        """Takes the parts of a family's own module; raises UnknownPart if one is missing, or computes something
        else."""
        lowered, lowered_norm = parts.find_part(("q_a_proj",)), parts.find_part(("q_a_layernorm",))
        return cls(
            lowered,
            None if lowered is None else Norm.of(lowered_norm),
            parts.take_part((_LATENT,)),
            Norm.of(parts.take_part(("kv_a_layernorm",))),
            parts.take_part(("kv_b_proj",)),
            kept=module.config._attn_implementation != PACKED,
        )

    @property
    def rank(self) -> int:
        """The number of latents per position."""
        return self.norm.weight.numel()

    @property
    def turned(self) -> int:
        """How many numbers at the end of a key are rotated."""
        return self.layer.out_features - self.rank

    def fits_together(self, attention: Attention) -> bool:
        query, heads, plain = attention.query, attention.heads, attention.size - self.turned
        lowered = query.in_features if self.lowered is None else self.lowered.out_features
        return (
            plain > 0
            and self.turned > 0
            and query.out_features == heads * attention.size
            and query.in_features == lowered
            and (self.lowered_norm is None or self.lowered_norm.weight.numel() == lowered)
            and (self.expand.in_features, self.expand.out_features)
            == (self.rank, heads * (plain + attention.value_size))
            and attention.out.in_features == heads * attention.value_size
        )


@dataclass(frozen=True, eq=False)
class Mlp:
    """An MLP for all positions: `down(activation(gate) * up)`, or without a gate `down(activation(up))`."""

    gate: Any  # a layer; if `up` is None, this layer also computes the outputs of `up`, after the gate's; None: no gate
    up: Any
    down: Any
    activation: Activation

    @classmethod
    def all_of(cls, module: Any) -> Self:
        """Describes a family's own module that has no other parts. Raises as `of`."""
        parts = _Parts(module)
        mlp = cls.of(parts)
        if parts.rest:
            raise UnknownPart(", ".join(parts.rest))
        return mlp

    @classmethod
    def of(cls, parts: _Parts) -> Self:
        """Takes the parts of an MLP; raises UnknownPart if one is missing, or they do not fit together."""
        joined = parts.find_part(_GATE_AND_UP)
        gate = joined if joined is not None else parts.find_part(_GATE)
        up = parts.take_part(_UP) if joined is None else None
        down, activation = parts.take_part(_DOWN), Activation.of(parts.take_part(_ACTIVATION))
        inner = {layer.out_features for layer in (gate, up) if layer is not None}
        if inner != {down.in_features * (2 if up is None else 1)}:
            raise UnknownPart("sizes of an MLP")
        return cls(gate, up, down, activation)


_GATING_TRIALS = 64
_CORRECTION = "e_score_correction_bias"


@dataclass(frozen=True, eq=False)
class RouterRule:
    """How a router chooses experts."""

    weight: Tensor  # `[experts, hidden]`
    bias: Tensor | None  # `[experts]`, of the logits
    correction: Tensor | None  # `[experts]`, added to scores for the choice alone
    chosen: int  # experts per position
    groups: int  # experts are chosen from the `kept` best groups
    kept: int
    sigmoid: bool = False  # whether scores are sigmoids of logits; otherwise scores are the softmax of the logits
    normalised: bool = False  # whether shares add up to `factor`
    factor: float = 1.0
    judges: int = 2  # how many of a group's best scores, one or two, are summed to rank the group

    def shares(self, hidden: Tensor) -> Tensor:
        """The share of each expert for `[positions, hidden]`: `[positions, experts]`, 0 for experts that are not
        chosen."""
        logits = nn.functional.linear(hidden, self.weight.float(), None if self.bias is None else self.bias.float())
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
        ranks = scores if self.correction is None else scores + self.correction.float()
        if self.kept < self.groups:
            ranks = ranks.unflatten(-1, (self.groups, -1))
            worst = ranks.topk(self.judges).values.sum(-1).topk(self.groups - self.kept, largest=False).indices
            ranks = ranks.scatter(1, worst[..., None].expand(-1, -1, ranks.shape[-1]), -inf).flatten(1)
        indices = ranks.topk(self.chosen).indices
        shares = torch.zeros_like(scores).scatter(1, indices, scores.gather(1, indices))
        return shares * self.factor / (shares.sum(-1, keepdim=True) if self.normalised else 1)


@dataclass(frozen=True)
class Gating:
    """How an expert combines gate and up, both limited by `limit`: `(up + shift) * gate * sigmoid(alpha * gate)`."""

    alpha: float
    limit: float
    interleaved: bool
    shift: float

    def opened(self, inner: Tensor) -> Tensor:
        """`[rows, 2 * inner]` -> `[rows, inner]`."""
        gate, up = (inner[:, ::2], inner[:, 1::2]) if self.interleaved else inner.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + self.shift) * gate * torch.sigmoid(self.alpha * gate)


@dataclass(frozen=True, eq=False)
class KnownExperts:
    """Experts in place of an MLP."""

    held: Any  # the module of the experts; each of its two weights has one layout
    choice: RouterRule
    gating: Gating
    shared: nn.Module | None  # an MLP for all positions, besides the experts
    opener: Any  # a layer with one output, whose sigmoid scales the output of `shared`; or None

    @classmethod
    def of(cls, mlp: Any) -> Self | None:
        """Describes a family's own module; None: compiled steps do not support it."""
        parts = list(mlp.children())
        held = [part for part in parts if isinstance(part, QuantizedExperts)]
        routers = [part for part in parts if hasattr(part, "top_k") and part not in held]
        shared = [part for part in parts if is_mlp(part)]
        openers = [part for part in parts if isinstance(part, (nn.Linear, QuantizedLinear))]
        if len(parts) != len(held + routers + shared + openers) or max(len(shared), len(openers)) > 1:
            return None
        if len(held) != 1 or len(routers) != 1 or list(mlp.parameters(recurse=False)):
            return None
        choice, gating = _choice_of(mlp, routers[0]), _gating_of(held[0])
        if choice is None or gating is None or len(choice.weight) != held[0].held["down_proj"].experts:
            return None
        return cls(held[0], choice, gating, *(shared or [None]), *(openers or [None]))


def _choice_of(mlp: nn.Module, router: Any) -> RouterRule | None:
    named = [*mlp.named_parameters(), *mlp.named_buffers()]
    corrections = [tensor.flatten() for name, tensor in named if name.endswith(_CORRECTION)]
    weights = [parameter for parameter in router.parameters() if parameter.ndim == 2 and len(parameter) > 1]
    groups, kept = getattr(router, "num_group", None) or 1, getattr(router, "topk_group", None) or 1
    if len(weights) != 1 or len(corrections) > 1 or not isinstance(router.top_k, int):
        return None
    if len(weights[0]) % groups or (groups > 1 and len(weights[0]) // groups < 2):
        return None
    weight, bias = weights[0].detach(), getattr(router, "bias", None)
    choice = RouterRule(weight, bias, corrections[0] if corrections else None, router.top_k, groups, kept)
    hidden = _noise(weight.shape[1])
    hidden *= 2 / (hidden @ weight.float().T).std()  # so that scores differ enough to distinguish softmax from sigmoid
    given = [hidden, *corrections] if hasattr(mlp, _CORRECTION) else [hidden]
    try:
        _, shares, indices = deepcopy(router).float()(*given)
        found = torch.zeros(_GATING_TRIALS, len(weight), dtype=torch.float32).scatter(1, indices, shares.float())
    except (TypeError, ValueError, RuntimeError):  # its arguments or results are different
        return None
    ways = ({"judges": 2}, {"judges": 1}, {"groups": 1, "kept": 1})  # some routers have groups but ignore them
    for sigmoid, normalised, way in product((False, True), (False, True), ways):
        likely = replace(choice, sigmoid=sigmoid, normalised=normalised, **way)
        likely = replace(likely, factor=float(found.sum() / likely.shares(hidden).sum()))
        if torch.allclose(likely.shares(hidden), found, rtol=1e-3, atol=1e-5):
            return likely
    return None


def _noise(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_GATING_TRIALS, width, generator=generator, dtype=torch.float32)


def _gating_of(experts: Any) -> Gating | None:
    weights = {"gate_up_proj", "down_proj"}
    if not experts.has_gate or getattr(experts, "has_post_expert_norm", False) or set(experts.held) != weights:
        return None
    inner = _noise(experts.held["gate_up_proj"].outputs) * 20
    found = experts._apply_gate(inner)
    alpha, limit = float(getattr(experts, "alpha", 1)), float(getattr(experts, "limit", inf))
    for kind in product((False, True), (0.0, 1.0)):
        likely = Gating(alpha, limit, *kind)
        opened = likely.opened(inner)
        if opened.shape == found.shape and torch.allclose(opened, found, rtol=1e-3, atol=1e-4):
            return likely
    return None


class TransposedLinear:
    """A linear layer with a weight `[inputs, outputs]`. The weight keeps its shape, but its memory gets the order
    `[outputs, inputs]`."""

    def __init__(self, layer: Conv1D) -> None:
        self.in_features, self.out_features = layer.weight.shape
        if not layer.weight.t().is_contiguous():
            layer.weight.data = layer.weight.data.t().contiguous().t()
        self.weight, self.bias = layer.weight.detach().t(), layer.bias


_NOTHING = (nn.Dropout, nn.Identity)  # modules without effect in a span


class _Parts:
    """The children of a module; `find_part` and `take_part` remove them one by one."""

    def __init__(self, module: Any) -> None:
        named = [(name, each) for name, each in module.named_children() if not isinstance(each, _NOTHING)]
        self.rest: dict[str, Any] = {
            name: TransposedLinear(each) if type(each) is Conv1D else each for name, each in named
        }

    def find_part(self, names: Iterable[str]) -> Any:
        """Removes and returns the child that has one of these names; None: there is none."""
        return next((self.rest.pop(name) for name in names if name in self.rest), None)

    def take_part(self, names: Iterable[str]) -> Any:
        """As `find_part`; raises UnknownPart if there is none."""
        found = self.find_part(names)
        if found is None:
            raise UnknownPart(f"no {' or '.join(names)}")
        return found


def _first(module: Any, *names: str) -> Any:
    return next((found for name in names if (found := getattr(module, name, None)) is not None), None)


def _turns(attention: Any) -> bool:
    leaves_out = _DO_NOT_TURN.get(type(attention).__name__)
    return bool(getattr(attention, "use_rope", True)) if leaves_out is None else not leaves_out(attention)


def _slopes(attention: Any, heads: int) -> Tensor | None:
    alibi = _ALIBI.get(type(attention).__name__)
    if alibi is None or not getattr(getattr(attention, "config", None), "alibi", True):
        return None
    added = alibi(sys.modules[type(attention).__module__], heads).float().view(heads, 2)
    slopes = added[:, 1] - added[:, 0]
    return slopes * attention.inv_norm_factor if type(attention).__name__ == "FalconAttention" else slopes


def _places(attention: Any, heads: int, stored: int, *, by_head: bool) -> list[int]:
    """The places of the queries, the keys and the values in the output of one layer."""
    if hasattr(attention, "mp_num"):  # CodeGen: queries, values and keys, in `mp_num` groups
        own = heads // attention.mp_num
        return [head // own * 3 * own + part * own + head % own for part in (0, 2, 1) for head in range(heads)]
    if not by_head:
        return list(range(heads + 2 * stored))
    group, turns = heads // stored, range(stored)
    queries = [turn * (group + 2) + query for turn in turns for query in range(group)]
    return queries + [turn * (group + 2) + group + part for part in (0, 1) for turn in turns]
