"""Linear layers that hold their weight in another format than the type that blocks compute in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from splitnet.quant.choose import WeightChoice, WeightFormat
from splitnet.quant.forms import FloatForm, WeightForm
from splitnet.quant.grouped import hold_stored
from splitnet.quant.packed_tensor import PackedTensor, StoredMatrix

PLAIN_LINEAR = frozenset({"FalconLinear"})
"""Families' own classes that compute the same as torch's linear layer: their weights may be held in other formats."""

ROUTERS = frozenset({"router", "gate", "dt_proj", "kv_b_proj"})
"""Names of modules that keep their weights. Routers choose experts: they are small, and a different choice of experts
changes results more than a rounded weight. `dt_proj`: see `splitnet.checkpoint.families.UNCALLED_LAYERS`. `kv_b_proj`
is also small, and where latents are stored, the products use single columns of its weight."""


class QuantizedLinear(nn.Module):
    """A frozen linear layer. It has no weight until its weight is set; then it converts the weight and keeps only the
    result.

    So a model of such layers is never held in floats as a whole while it is loaded. Gradients flow to the layer's
    input; a backward pass makes floats of the weight for them, in small pieces where the format allows that.

    Args:
        form: the format into which the weight is converted; None: `held` is already set.
        transposed: the weight is set as `[inputs, outputs]`.
        dtype: type of the bias.
        codes_on: the device for which a weight in codes keeps its codes; None: such a weight is converted, too.
    """

    held: WeightForm

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: WeightFormat | None,
        *,
        transposed: bool,
        bias: bool,
        dtype: torch.dtype,
        codes_on: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._form, self._transposed, self._dtype, self._codes_on = form, transposed, dtype, codes_on
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        # float32 for every dtype of blocks, because the conversion starts from the stored values.
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta"), requires_grad=False)
        given = torch.empty(out_features, dtype=dtype, device="meta") if bias else None
        self.bias = None if given is None else nn.Parameter(given, requires_grad=False)

    @classmethod
    def holding(cls, layer: Any, held: WeightForm, codes_on: torch.device | None) -> Self:
        """A replacement of a linear layer (or of one of this class) whose weight is `held`."""
        outputs, inputs = sizes_of(layer) or (layer.out_features, layer.in_features)
        transposed, dtype = isinstance(layer, Conv1D), layer.weight.dtype
        bias = layer.bias is not None
        made = cls(inputs, outputs, None, transposed=transposed, bias=bias, dtype=dtype, codes_on=codes_on)
        made.bias = layer.bias
        made._set_form(held, layer.weight.device)
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, Tensor) and not value.is_meta:
            self._hold(value.detach())
        else:
            super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., inputs]` -> `[..., outputs]`, in the type of `input`."""
        rows = input.reshape(-1, self.in_features)
        if not len(rows):
            product = rows.new_zeros(0, self.out_features)
        elif torch.is_grad_enabled() and rows.requires_grad:
            product: Any = _LinearProduct.apply(rows, self.held)
        else:
            product = self.held.multiply(rows)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*input.shape[:-1], self.out_features)

    def _hold(self, weight: Tensor) -> None:
        matrices = matrices_of(weight, transposed=self._transposed)
        if matrices is not None and self._codes_on is not None:
            self._set_form(hold_stored(matrices, self._codes_on), weight.device)
            return
        if isinstance(weight, PackedTensor):
            weight = weight.to_floats()
        rows = (weight.T if self._transposed else weight).to(torch.float32).contiguous()
        # A weight with values outside the range of the format, or with NaN, stays in float32.
        made = self._form and self._form.of(rows)
        self._set_form(made or FloatForm(rows.clone(), exact=True), weight.device)

    def _set_form(self, held: WeightForm, device: torch.device) -> None:
        self.held = held
        shape = self.weight.shape
        del self.weight
        # For code that only inspects the weight, such as some families' initialisation, which must treat it as
        # initialised.
        absent: Any = torch.empty(shape, dtype=self._dtype, device="meta")
        absent._is_hf_initialized = True
        self.__dict__["weight"] = absent
        # Tells transformers the device and the type of the model's parameters.
        self.parameter_like = nn.Parameter(torch.empty(0, dtype=self._dtype, device=device), requires_grad=False)


class _LinearProduct(torch.autograd.Function):
    """Rows times a held weight. For the backward pass only the held weight is kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, held: WeightForm) -> Tensor:
        ctx.held = held
        return held.multiply(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return ctx.held.multiply_back(gradient), None


def holdable_layers(
    block: nn.Module, weights: WeightChoice
) -> Iterator[tuple[str, nn.Module, int, int, WeightFormat | None]]:
    """The linear layers of a block that may hold their weight in another format, without routers and layers that share
    their weight: path, layer, outputs, inputs, form."""
    shared = Counter(id(parameter) for _, parameter in block.named_parameters(remove_duplicate=False))
    for path, layer in block.named_modules():
        sizes = sizes_of(layer)
        if sizes is not None and not is_router(path) and shared[id(layer.weight)] == 1:
            yield path, layer, *sizes, weights.form_for(*sizes)


def hold_weights(block: nn.Module, weights: WeightChoice) -> None:
    """Replaces a block's layers, which have no weights yet, by layers that hold theirs in another format."""
    for path, layer, outputs, inputs, form in list(holdable_layers(block, weights)):
        if form is None:
            continue
        codes_on = weights.device if weights.as_stored else None
        own = {"transposed": isinstance(layer, Conv1D), "bias": layer.bias is not None, "codes_on": codes_on}
        block.set_submodule(path, QuantizedLinear(inputs, outputs, form, dtype=weights.dtype, **own))


def is_router(path: str) -> bool:
    """Whether the module at this path keeps its weights, as routers do."""
    return not ROUTERS.isdisjoint(path.split("."))


def matrices_of(weight: Tensor, *, transposed: bool) -> Sequence[StoredMatrix] | None:
    """The matrices of a weight in codes; None if it has no codes, or its codes do not lie along its inputs."""
    if not isinstance(weight, PackedTensor) or weight.stacked or weight.transposed != transposed:
        return None
    return weight.experts[0]


def sizes_of(layer: nn.Module) -> tuple[int, int] | None:
    """Outputs and inputs of a layer that only multiplies and adds; None for other modules."""
    if type(layer) is nn.Linear or type(layer).__name__ in PLAIN_LINEAR:
        linear: Any = layer
        return linear.out_features, linear.in_features
    if type(layer) is Conv1D:
        conv: Any = layer
        return conv.nf, conv.nx
    return None
