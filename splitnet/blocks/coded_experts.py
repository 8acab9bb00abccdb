"""Experts that are brought into few bits while they are read, one at a time, as `--weights int8` and `int4` ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from splitnet.blocks.backbone import loaded_as, on_meta
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import WeightsError
from splitnet.quant.experts import weights_of_experts
from splitnet.quant.integers import INT4, INT8, integer_codes
from splitnet.quant.stored import Codes, Layout, StoredMatrix, StoredTensor

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
        if layout_of_experts(kind, inputs) is not None:
            found[name] = _CodedExperts(name, found[name], transposed, kind)
    return found


class _CodedExperts:
    """A weight of one expert, or of all, as transformers' loading expects it; `[...]` reads nothing yet.

    Args:
        name: in the checkpoint.
        lazy: what reads it.
        transposed: whether it is `[..., inputs, outputs]`.
        kind: "int8" or "int4".
    """

    def __init__(self, name: str, lazy: Any, transposed: bool, kind: str) -> None:
        self._name = name
        self._lazy = lazy
        self._transposed = transposed
        self._layout = _KINDS[kind]
        self.shape: torch.Size = lazy.shape
        self.dtype: torch.dtype = lazy.dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        if index is not ...:
            return self._lazy[index]
        stacked = len(self.shape) == 3
        outputs, inputs = self.shape[-2:]
        if self._transposed:
            outputs, inputs = inputs, outputs
        matrices = [
            [StoredMatrix(self._layout, (outputs, inputs), lambda expert=expert: self._read(expert))]
            for expert in (range(self.shape[0]) if stacked else [...])
        ]
        return StoredTensor.__new__(
            StoredTensor, matrices, stacked=stacked, transposed=self._transposed, dtype=torch.float32
        )

    def _read(self, expert: Any) -> Codes:
        weight = self._lazy[expert]
        numbers = weight.floats() if isinstance(weight, StoredTensor) else weight
        lies = (numbers.T if self._transposed else numbers).float().contiguous()
        codes = integer_codes(lies, self._layout)
        if codes is None:
            raise WeightsError(
                f"{self._name} has values that are no numbers, which fit no code: use --weights with a type of floats"
            )
        return codes
