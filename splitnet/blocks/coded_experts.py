"""Experts that are brought into few bits while they are read, one at a time, as `--weights int8` and `int4` ask for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from splitnet.blocks.backbone import loaded_as, on_meta
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.store import LazyTensor
from splitnet.errors import WeightsError
from splitnet.quant.experts import weights_of_experts
from splitnet.quant.integers import INT4, INT8, integer_codes
from splitnet.quant.stored import Codes, Layout, PackedTensor, StoredMatrix

_KINDS: Mapping[str, Layout] = {"int4": INT4, "int8": INT8}


def layout_of_experts(kind: str, inputs: int) -> Layout | None:
    """What experts are held in with weights of a kind; None: as they are loaded."""
    layout = _KINDS.get(kind)
    return layout if layout is not None and inputs % max(1, layout.group) == 0 else None


def with_coded_experts(
    tensors: Mapping[str, Any],
    checkpoint: Checkpoint,
    model_class: type[PreTrainedModel],
    container: str,
    blocks: range,
    kind: str,
) -> dict[str, Any]:
    """Tensors of blocks, of which experts come in the codes that weights of this kind are held in.

    Args:
        tensors: by their names in a model of these blocks alone.
        kind: of `splitnet.quant.choose`; with others than integers, all stays as it is.
    """
    if kind not in _KINDS:
        return dict(tensors)
    whole = on_meta(model_class, checkpoint.config)
    experts = {path: transposed for path, _, transposed in weights_of_experts(whole)}
    given = {
        f"{container}.{index}.{tensor.rest}": f"{container}.{index - blocks.start}.{tensor.rest}"
        for index in blocks
        for tensor in checkpoint.block_tensors[index]
    }
    loaded = loaded_as(whole, given) if experts else {}
    coded = {given[name]: experts[path] for name, path in loaded.items() if path in experts}
    found = dict(tensors)
    for name, transposed in coded.items():
        inputs = found[name].shape[-2 if transposed else -1]
        layout = layout_of_experts(kind, inputs)
        if layout is not None:
            found[name] = _coded(name, found[name], transposed, layout)
    return found


def _coded(name: str, lazy: LazyTensor, transposed: bool, layout: Layout) -> LazyTensor:
    """A weight of one expert, or of all, of which `[...]` reads nothing before its codes are asked for.

    Args:
        name: in the checkpoint.
        lazy: what reads its numbers.
        transposed: whether it is `[..., inputs, outputs]`.
    """

    def read(expert: Any) -> Codes:
        weight = lazy[expert]
        numbers = weight.floats() if isinstance(weight, PackedTensor) else weight
        lies = (numbers.T if transposed else numbers).float().contiguous()
        codes = integer_codes(lies, layout)
        if codes is None:
            raise WeightsError(
                f"{name} has values that are no numbers, which fit no code: use --weights with a type of floats"
            )
        return codes

    def of(index: Any) -> torch.Tensor:
        if index is not ...:
            return lazy[index]
        stacked = len(lazy.shape) == 3
        outputs, inputs = lazy.shape[-2:]
        if transposed:
            outputs, inputs = inputs, outputs
        matrices = [
            [StoredMatrix(layout, (outputs, inputs), partial(read, expert))]
            for expert in (range(lazy.shape[0]) if stacked else [...])
        ]
        return PackedTensor.__new__(PackedTensor, matrices, stacked=stacked, transposed=transposed, dtype=torch.float32)

    return LazyTensor(lazy.shape, lazy.dtype, of)
