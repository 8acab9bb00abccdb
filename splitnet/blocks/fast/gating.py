"""How a block chooses and gates its experts, as compiled steps have it: found by trying it on some values."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from math import inf
from typing import Any, Self

import torch
from torch import nn

from splitnet.blocks.fast.torch_step import is_mlp
from splitnet.quant.experts import QuantizedExperts
from splitnet.quant.linear import QuantizedLinear

_GATING_TRIALS = 64
_CORRECTION = "e_score_correction_bias"


@dataclass(frozen=True, eq=False)
class Choice:
    """How a router chooses.

    Attributes:
        weight: `[experts, hidden]`.
        bias: `[experts]`, of the logits.
        correction: `[experts]`, added to scores to choose by.
        chosen: experts of a position.
        groups, kept: experts are chosen in `kept` of the groups with the best ones.
        judges: how many of a group, the best one or two, tell how good it is.
        sigmoid: what makes scores of logits, else softmax.
        normalised: the shares add up to `factor`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    correction: torch.Tensor | None
    chosen: int
    groups: int
    kept: int
    sigmoid: bool = False
    normalised: bool = False
    factor: float = 1.0
    judges: int = 2

    def shares(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of each expert for `[positions, hidden]`: `[positions, experts]`, 0 where it is not chosen."""
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
    """What an expert makes of its gate and its up, within `limit`: `(up + shift) * gate * sigmoid(alpha * gate)`."""

    alpha: float
    limit: float
    interleaved: bool
    shift: float

    def opened(self, inner: torch.Tensor) -> torch.Tensor:
        """`[rows, 2 * inner]` -> `[rows, inner]`."""
        gate, up = (inner[:, ::2], inner[:, 1::2]) if self.interleaved else inner.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + self.shift) * gate * torch.sigmoid(self.alpha * gate)


@dataclass(frozen=True, eq=False)
class KnownExperts:
    """What stands in the place of an MLP.

    Attributes:
        held: the experts; their two weights have one layout each.
        shared: an MLP that all positions run through, too.
        opener: a layer with one output, of whose sigmoid that of `shared` is multiplied.
    """

    held: Any
    choice: Choice
    gating: Gating
    shared: nn.Module | None
    opener: Any

    @classmethod
    def of(cls, mlp: Any) -> Self | None:
        """For a family's own module; None: compiled steps do not know it."""
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


def _choice_of(mlp: nn.Module, router: Any) -> Choice | None:
    named = [*mlp.named_parameters(), *mlp.named_buffers()]
    corrections = [tensor.flatten() for name, tensor in named if name.endswith(_CORRECTION)]
    weights = [parameter for parameter in router.parameters() if parameter.ndim == 2 and len(parameter) > 1]
    groups, kept = getattr(router, "num_group", None) or 1, getattr(router, "topk_group", None) or 1
    if len(weights) != 1 or len(corrections) > 1 or not isinstance(router.top_k, int):
        return None
    if len(weights[0]) % groups or (groups > 1 and len(weights[0]) // groups < 2):
        return None
    weight, bias = weights[0].detach(), getattr(router, "bias", None)
    choice = Choice(weight, bias, corrections[0] if corrections else None, router.top_k, groups, kept)
    hidden = _noise(weight.shape[1])
    hidden *= 2 / (hidden @ weight.float().T).std()  # so that neither softmax nor sigmoid has the same for all
    given = [hidden, *corrections] if hasattr(mlp, _CORRECTION) else [hidden]
    try:
        _, shares, indices = deepcopy(router).float()(*given)
        found = torch.zeros(_GATING_TRIALS, len(weight), dtype=torch.float32).scatter(1, indices, shares.float())
    except (TypeError, ValueError, RuntimeError):  # what it takes or gives is something else
        return None
    ways = ({"judges": 2}, {"judges": 1}, {"groups": 1, "kept": 1})  # some name groups and do not heed them
    for sigmoid, normalised, way in product((False, True), (False, True), ways):
        likely = replace(choice, sigmoid=sigmoid, normalised=normalised, **way)
        likely = replace(likely, factor=float(found.sum() / likely.shares(hidden).sum()))
        if torch.allclose(likely.shares(hidden), found, rtol=1e-3, atol=1e-5):
            return likely
    return None


def _noise(width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_GATING_TRIALS, width, generator=generator, dtype=torch.float32)


def _gating_of(experts: Any) -> Gating | None:
    if not experts.has_gate or getattr(experts, "has_post_expert_norm", False) or set(experts.held) != _HELD:
        return None
    inner = _noise(experts.held["gate_up_proj"].outputs) * 20
    found = experts._apply_gate(inner)
    alpha, limit = float(getattr(experts, "alpha", 1)), float(getattr(experts, "limit", inf))
    likely = (Gating(alpha, limit, *kind) for kind in product((False, True), (0.0, 1.0)))
    return next((gating for gating in likely if _same_shares(gating.opened(inner), found)), None)


_HELD = {"gate_up_proj", "down_proj"}


def _same_shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)
