"""A client's own parameters in blocks: changes of linear layers, and a prefix of keys and values.

The name of a tensor is the number of the tensor's block in the whole model, followed by the tensor's path in the block:

    12.self_attn.q_proj.lora_A    [rank, inputs]
    12.self_attn.q_proj.lora_B    [outputs, rank], times the scaling
    12.mlp.down_proj.scale_in     [inputs], factors of the input
    12.self_attn.k_proj.scale_out [outputs], factors of the output
    12.prefix_keys                [kv heads, virtual positions, head size]
    12.prefix_values              [kv heads, virtual positions, head size]

`splitnet.hf.peft_adapters` reads the tensors from the modules that PEFT adds to a model.

Low-rank adaptation: Hu et al., "LoRA", arXiv:2106.09685. Factors: Liu et al., "(IA)3", arXiv:2205.05638. Prefix: Li and
Liang, "Prefix-Tuning", arXiv:2101.00190, and Liu et al., "P-Tuning v2", arXiv:2110.07602.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from splitnet.checkpoint.families import UNCALLED_LAYERS
from splitnet.errors import AdapterError
from splitnet.quant.linear import QuantizedLinear

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
MAX_PREFIX = 4096
MAX_RANK = 1024
# Bytes of an adapter's tensors, or of their gradients, in one message. A larger tensor is sent alone.
MAX_GROUP_BYTES = 16 * 1024 * 1024

LORA_A, LORA_B = ".lora_A", ".lora_B"
SCALE_IN, SCALE_OUT = ".scale_in", ".scale_out"
PREFIX_KEYS, PREFIX_VALUES = "prefix_keys", "prefix_values"
_OF_LAYER = r"[A-Za-z0-9_.]{1,200}\.(?:lora_[AB]|scale_in|scale_out)"
_NAME = re.compile(rf"(0|[1-9][0-9]{{0,5}})\.(prefix_keys|prefix_values|{_OF_LAYER})")


class LowRank(NamedTuple):
    """A product that is added to the output of a linear layer: `x @ a.T @ b.T`."""

    a: Tensor
    b: Tensor


class Scales(NamedTuple):
    """Factors of the input and the output of a linear layer."""

    before: Tensor | None
    after: Tensor | None


class Prefix(NamedTuple):
    """Keys and values before the first position of every sequence: `[1, kv heads, positions, head size]`."""

    keys: Tensor
    values: Tensor


class AdapterTensors:
    """The parameters of some blocks, by name. Raises AdapterError for a name or shape that no adapter has."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.low_ranks: dict[tuple[int, str], LowRank] = {}  # by block and path of the layer in it
        self.scales: dict[tuple[int, str], Scales] = {}  # by block and path of the layer in it
        self.prefixes: dict[int, Prefix] = {}  # by block
        factors = 0
        for name, tensor in self.tensors.items():
            match = _NAME.fullmatch(name)
            if match is None or tensor.dtype not in DTYPES:
                raise AdapterError(f"{name!r} of {tensor.dtype} is not a parameter of an adapter")
            block, rest = int(match[1]), match[2]
            if rest == PREFIX_KEYS:
                self.prefixes[block] = _prefix(block, tensor, self._partner(f"{block}.{PREFIX_VALUES}"))
            elif rest.endswith(LORA_A):
                path = rest.removesuffix(LORA_A)
                self.low_ranks[block, path] = _low_rank(name, tensor, self._partner(f"{block}.{path}{LORA_B}"))
            elif rest.endswith((SCALE_IN, SCALE_OUT)):
                if tensor.ndim != 1:
                    raise AdapterError(f"{name} is {list(tensor.shape)}: factors are one number per input or output")
                factors += 1
                path = rest.rpartition(".")[0]
                both = (self.tensors.get(f"{block}.{path}{end}") for end in (SCALE_IN, SCALE_OUT))
                self.scales[block, path] = Scales(*both)
        if twice := self.low_ranks.keys() & self.scales.keys():
            raise AdapterError(f"the layer {min(twice)} has both low ranks and factors: it can have only one of them")
        if 2 * (len(self.prefixes) + len(self.low_ranks)) + factors != len(self.tensors):
            raise AdapterError("the adapter has a tensor without its partner")
        lengths = {prefix.keys.shape[2] for prefix in self.prefixes.values()}
        if len(lengths) > 1:
            raise AdapterError("the prefixes of an adapter differ in length")
        self.prefix_length = lengths.pop() if lengths else 0

    def outside(self, start: int, end: int) -> bool:
        """Whether the adapter has tensors of other blocks than `[start, end)`."""
        return len(self.of_blocks(start, end)) < len(self.tensors)

    def of_blocks(self, start: int, end: int) -> dict[str, Tensor]:
        """The tensors of blocks `[start, end)`."""
        return {name: tensor for name, tensor in self.tensors.items() if start <= block_of(name) < end}

    def traced(self) -> AdapterTensors:
        """A copy of the adapter whose tensors record gradients."""
        return AdapterTensors({name: tensor.detach().clone().requires_grad_() for name, tensor in self.tensors.items()})

    def _partner(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise AdapterError(f"the adapter lacks {name}")
        return self.tensors[name]


def block_of(name: str) -> int:
    """The block that a tensor of an adapter belongs to."""
    return int(name.partition(".")[0])


def write_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Encodes tensors in the safetensors format; `read_tensors` decodes them."""
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def read_tensors(payload: bytes | memoryview) -> dict[str, Tensor]:
    """Decodes tensors of `write_tensors`. Raises AdapterError if the bytes are not in the safetensors format."""
    try:
        return safetensors.torch.load(bytes(payload))
    except Exception as error:  # the library raises exceptions of many types
        raise AdapterError(f"the bytes are not in the safetensors format: {error}") from None


def write_groups(tensors: Mapping[str, Tensor]) -> list[bytes]:
    """Encodes tensors as payloads of messages; a payload with more than one tensor has at most `MAX_GROUP_BYTES`."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > MAX_GROUP_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return [write_tensors(group) for group in groups]


def counted_down(payloads: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yields each payload of data that are sent in several messages, with the number of payloads that follow."""
    for index, payload in enumerate(payloads):
        yield len(payloads) - index - 1, payload


class _Applied(threading.local):
    slices: Sequence[tuple[slice, AdapterTensors]] = ()
    positions: int = 0


_applied = _Applied()


def applying(adapters: Sequence[AdapterTensors | None], counts: Sequence[int]) -> AbstractContextManager[None]:
    """Applies each sequence's adapter to its positions while this thread runs layers with `LayerHooks`: the sequences
    are packed in one tensor, and `counts` are their numbers of positions."""
    slices: list[tuple[slice, AdapterTensors]] = []
    offset = 0
    for adapter, count in zip(adapters, counts, strict=True):
        begin, offset = offset, offset + count
        if adapter is None:
            continue
        if slices and slices[-1][1] is adapter and slices[-1][0].stop == begin:
            begin = slices.pop()[0].start
        slices.append((slice(begin, offset), adapter))
    # Most passes have no adapter, and must not pay for the hooks.
    return _with_slices(slices, offset) if slices else nullcontext()


@contextmanager
def _with_slices(slices: Sequence[tuple[slice, AdapterTensors]], positions: int) -> Iterator[None]:
    _applied.slices, _applied.positions = slices, positions
    try:
        yield
    finally:
        _applied.slices, _applied.positions = (), 0


class LayerHooks:
    """Forward hooks that apply the adapters of the running pass to one linear layer."""

    def __init__(self, block: int, path: str) -> None:
        self._at = block, path

    def register_hooks(self, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(self._before)
        layer.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """`args[0]`: `[1, positions, inputs]`."""
        changes: list[tuple[slice, Callable[[Tensor], Tensor]]] = []
        for positions, adapter in _applied.slices:
            scales = adapter.scales.get(self._at)
            if scales is not None and scales.before is not None:
                changes.append((positions, partial(_scaled, scales.before)))
        return (self._changed(args[0], args[0], changes), *args[1:]) if changes else None

    def _after(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """`args[0]`: `[1, positions, inputs]`; `output`: `[1, positions, outputs]`."""
        changes: list[tuple[slice, Callable[[Tensor], Tensor]]] = []
        for positions, adapter in _applied.slices:
            if (low_rank := adapter.low_ranks.get(self._at)) is not None:
                changes.append((positions, partial(_with_product, low_rank, args[0][:, positions])))
            elif (scales := adapter.scales.get(self._at)) is not None and scales.after is not None:
                changes.append((positions, partial(_scaled, scales.after)))
        return self._changed(args[0], output, changes) if changes else None

    def _changed(
        self, given: Tensor, values: Tensor, changes: Sequence[tuple[slice, Callable[[Tensor], Tensor]]]
    ) -> Tensor:
        if given.shape[:2] != (1, _applied.positions):
            raise AdapterError(f"{self._at[1]} does not run on every position, so an adapter cannot change it")
        pieces: list[Tensor] = []
        done = 0
        for positions, change in changes:
            pieces += [values[:, done : positions.start], change(values[:, positions])]
            done = positions.stop
        return torch.cat((*pieces, values[:, done:]), dim=1)


def _with_product(low_rank: LowRank, given: Tensor, output: Tensor) -> Tensor:
    a, b = low_rank
    # The product is computed in the adapter's own precision, as in PEFT.
    return output + (given.to(a.dtype) @ a.T @ b.T).to(output.dtype)


def _scaled(factors: Tensor, values: Tensor) -> Tensor:
    return (values * factors).to(values.dtype)  # the product has the wider precision of the two


def linear_layers(block: nn.Module) -> dict[str, tuple[int, int]]:
    """The paths within a block of the layers that LoRA can be added to, each with its numbers of inputs and outputs."""
    sizes: dict[str, tuple[int, int]] = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | QuantizedLinear):
            sizes[path] = module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            layer: Any = module
            sizes[path] = layer.nx, layer.nf
    return sizes


class SpanAdapters:
    """Fits adapters to the blocks of a span; `first` is the number of its first block. Views of the span share this
    object."""

    def __init__(self, blocks: nn.ModuleList, first: int) -> None:
        self._blocks, self._first = blocks, first
        self._adapted: set[tuple[int, str]] = set()
        self.kv_shapes: dict[int, list[tuple[int, int]]] = {}  # by block: heads and head size of keys, and of values

    def fit_adapter(self, adapter: AdapterTensors, start: int, end: int) -> None:
        """Prepares the blocks `[start, end)` for an adapter. Raises AdapterError as documented at
        `Span.fit_adapter`."""
        for block, path in [*adapter.low_ranks, *adapter.scales]:
            module = self._blocks[self._index(block, start, end)]
            sizes = linear_layers(module).get(path)
            if sizes is None:
                raise AdapterError(f"block {block} has no linear layer {path!r}")
            if path.rpartition(".")[2] in UNCALLED_LAYERS:
                raise AdapterError(
                    f"an adapter cannot change {path} of block {block}, as the family's code uses only its weight: "
                    "leave it out of target_modules"
                )
            if not _fits(adapter, (block, path), sizes):
                raise AdapterError(f"{path} of block {block} maps {sizes[0]} values to {sizes[1]}, unlike the adapter")
            if (block, path) not in self._adapted:
                self._adapted.add((block, path))
                LayerHooks(block, path).register_hooks(module.get_submodule(path))
        for block, prefix in adapter.prefixes.items():
            shapes = self.kv_shapes.get(self._index(block, start, end))
            if [(tensor.shape[1], tensor.shape[3]) for tensor in prefix] != shapes:
                raise AdapterError(f"keys and values of block {block} have (heads, size) {shapes}, unlike the prefix")

    def prefix_of(self, adapter: AdapterTensors | None, start: int, end: int) -> dict[int, Prefix]:
        """The prefix of a row in the blocks `[start, end)`, by index of the block in the span."""
        if adapter is None or not adapter.prefix_length:
            return {}
        return {block - self._first: prefix for block, prefix in adapter.prefixes.items() if start <= block < end}

    def _index(self, block: int, start: int, end: int) -> int:
        if not start <= block < end:
            raise AdapterError(f"block {block} is not among the blocks {start}..{end - 1}")
        return block - self._first


def _fits(adapter: AdapterTensors, at: tuple[int, str], sizes: tuple[int, int]) -> bool:
    """Whether an adapter's tensors for a layer fit the layer's `(inputs, outputs)`."""
    if (low_rank := adapter.low_ranks.get(at)) is not None:
        return (low_rank.a.shape[1], low_rank.b.shape[0]) == sizes
    return all(one is None or len(one) == size for one, size in zip(adapter.scales[at], sizes, strict=True))


def _low_rank(name: str, a: Tensor, b: Tensor) -> LowRank:
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not 1 <= a.shape[0] <= MAX_RANK or a.dtype != b.dtype:
        shapes = f"{list(a.shape)} {a.dtype} and its partner {list(b.shape)} {b.dtype}"
        raise AdapterError(f"{name} is {shapes}: not a low-rank pair")
    return LowRank(a, b)


def _prefix(block: int, keys: Tensor, values: Tensor) -> Prefix:
    if keys.ndim != 3 or values.ndim != 3 or keys.shape[:2] != values.shape[:2]:
        raise AdapterError(f"the prefix of block {block} is not [kv heads, positions, head size]")
    if not 1 <= keys.shape[1] <= MAX_PREFIX:
        raise AdapterError(f"a prefix has 1 to {MAX_PREFIX} positions, got {keys.shape[1]}")
    return Prefix(keys[None], values[None])
