"""Rounds the weights of experts, each by the positions that choose it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.compress.rounding import Compression, Feedback, Rounded, SecondMoments
from splitnet.errors import UnsupportedModel
from splitnet.quant.experts import is_weight_of_experts

# Positions of all experts, as a share of the inputs, that count for each expert besides its own: the second moments of
# an expert with few positions say little about most directions of its inputs.
PRIOR = 0.25
_EXPERT = re.compile(r"experts\.(\d+)\.")


class BlockExperts:
    """The experts of a block, whose weights are separate tensors in the checkpoint.

    module: transformers' module. weights: by the name of the tensor, the part of the module's weight, `[outputs,
    inputs]`. Raises UnsupportedModel: the checkpoint has the weights in another form.
    """

    def __init__(self, checkpoint: Checkpoint, block: int, span: Span, how: Compression) -> None:
        unknown = UnsupportedModel(
            f"the experts of {checkpoint.name} cannot be compressed: their weights are not separate matrices in groups "
            f"of {how.group} inputs; use --weights int4 at peers"
        )
        found = [one for one in span.block_modules[0].modules() if _is_experts(one)]
        self.module: Any = found[0] if len(found) == 1 else None
        if self.module is None or self.module.is_transposed:
            raise unknown
        self._first = self.module.gate_up_proj if self.module.has_gate else self.module.up_proj
        self._last = self.module.down_proj
        self.weights: dict[str, Tensor] = {}
        self._names: defaultdict[tuple[int, bool], list[str]] = defaultdict(list)
        numbered = {
            tensor.name: int(found[1])
            for tensor in checkpoint.block_tensors[block]
            if tensor.name.endswith(".weight") and (found := _EXPERT.search(tensor.rest))
        }
        with checkpoint.store.load_tensors({name: name for name in numbered}, torch.float32) as tensors:
            for name, expert in numbered.items():
                stored = tensors[name][...].float()
                parts = [self._last[expert], *self._first[expert].split(len(stored))]
                view = next((part for part in parts if torch.equal(part, stored)), None)
                if view is None or not how.divides(stored.shape[1]):
                    raise unknown
                self.weights[name] = view
                self._names[expert, view.data_ptr() == self._last[expert].data_ptr()].append(name)
        held = sum(weight.numel() for weight in self.weights.values())
        if held != self._first.numel() + self._last.numel():
            raise unknown

    @property
    def parts(self) -> list[dict[str, Tensor]]:
        """The first weights of all experts, which read the same input, and the last ones, by their names."""
        found: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        for (_, last), names in self._names.items():
            found[last].update((name, self.weights[name]) for name in names)
        return list(found)

    def round_weights(
        self, calls: Sequence[tuple[Tensor, ...]], bits: Mapping[str, int], group: int
    ) -> Iterator[tuple[str, Rounded]]:
        """Rounds all weights, and puts the rounded weights into the module.

        calls: the arguments of each call of the module: hidden states, `[positions, hidden]`, and the numbers of the
            chosen experts, `[positions, chosen]`.
        """
        hidden, chosen = (torch.cat(items) for items in zip(*(call[:2] for call in calls), strict=True))
        prior = SecondMoments(hidden.shape[1])
        for rows in hidden.split(1024):
            prior.add(rows)
        share = PRIOR * hidden.shape[1] / len(hidden)
        own = self.module
        for expert in range(own.num_experts):
            rows = hidden[(chosen == expert).any(dim=1)].float()
            moments = SecondMoments(hidden.shape[1])
            moments.add(rows)
            yield from self._round(expert, False, moments.sum.add_(prior.sum, alpha=share), bits, group)
            inner = rows @ self._first[expert].T
            if own.has_bias:
                inner += (own.gate_up_proj_bias if own.has_gate else own.up_proj_bias)[expert]
            inner = own._apply_gate(inner) if own.has_gate else own.act_fn(inner)
            moments = SecondMoments(inner.shape[1])
            moments.add(inner)
            yield from self._round(expert, True, moments.sum, bits, group)

    def _round(
        self, expert: int, last: bool, moments: Tensor, bits: Mapping[str, int], group: int
    ) -> Iterator[tuple[str, Rounded]]:
        feedback = Feedback(moments)
        for name in self._names[expert, last]:
            rounded = feedback.round_weight(self.weights[name], bits[name], group)
            self.weights[name].copy_(rounded.to_floats())
            yield name, rounded


def has_experts(span: Span, group: int) -> bool:
    """Whether the block has a stack of matrices, as experts have."""
    return any(
        parameter.dim() == 3 and min(parameter.shape[1:]) >= group for parameter in span.block_modules[0].parameters()
    )


def _is_experts(module: nn.Module) -> bool:
    return any(is_weight_of_experts(module, name) for name, _ in module.named_parameters(recurse=False))
