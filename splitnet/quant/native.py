"""Products of few rows with held weights, by the compiled kernels of `native/`, where they exist.

Wheels contain the kernels; from source, pip compiles them if it finds a C compiler and Python's headers. Without them
torch's own kernels are used, which read integer weights at about half the speed. There is a path for each kind of
instructions (`native/paths.h`); the best path for this CPU is used, or the one that the environment variable
`SPLITNET_KERNELS` names. Kernels run on torch's own threads (`docs/decisions/0023-wheels.md`).

The best prefetch of weights is measured once on each machine, because a hint that is right for one maker's processors
can halve the speed of another's.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitnet.errors import KernelsError
from splitnet.paths import KnownFigures, cache_folder
from splitnet.quant.device import linked_with_torch

PATH_VARIABLE = "SPLITNET_KERNELS"  # names the path, the prefetch, or both: `avx2`, `nta+4096`, `avx2,none`
PLAIN_PATH = "plain"  # loops for any CPU
_FLOATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""The names of the kernels, in the order of `enum kind` in `native/products.h`."""
BLOCK = 4  # outputs of floats that kernels compute together, as in `native/products.h`
# Functions of an OpenMP, as `Pool` in `native/threads.h`.
_POOL = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def _load() -> tuple[Any, str]:
    """The kernels, on torch's threads if these are found; or None, and the reason."""
    try:
        loaded = import_module("splitnet.quant._kernels")
    except ModuleNotFoundError:
        return None, "not compiled"
    except ImportError as error:
        return None, f"compiled, but not loaded ({error})"
    if not hasattr(loaded, "listed"):
        return None, f"compiled, but from older sources ({loaded.__file__})"
    try:
        torchs = linked_with_torch()
        loaded.use_threads(*(ctypes.cast(getattr(torchs, name), ctypes.c_void_p).value for name in _POOL))
    except AttributeError:
        pass  # this torch was built without OpenMP: kernels use one thread
    return loaded, ""


_kernels, load_error = _load()  # `load_error`: why the kernels are missing; empty if they are loaded


def use_path(name: str) -> None:
    """Makes kernels use this path. Weights that are held for another path may be multiplied by plain loops.

    Raises KernelsError if the kernels are missing, there is no such path, or this CPU lacks its instructions.
    """
    if _kernels is None:
        raise KernelsError(f"{PATH_VARIABLE} names {name!r}, but splitnet's kernels are {load_error}: leave it out")
    paths, here = dict(_kernels.paths()), ", ".join(paths_here())
    if name not in paths:
        raise KernelsError(f"{PATH_VARIABLE} names {name!r}, and there are no such kernels: use one of {here}")
    if not paths[name]:
        raise KernelsError(f"{PATH_VARIABLE} names {name!r}, which this CPU has no instructions for: use one of {here}")
    _kernels.use(name)


_HINTS = ("none", "t0", "t1", "nta")  # in the order of `enum hint` in `native/products.h`, named as on x86


@dataclass(frozen=True)
class Prefetch:
    """How kernels prefetch weights before they read them."""

    hint: str  # "none", "t0" (into the first cache), "t1" (into the second), "nta" (into the first, not to stay)
    ahead: int = 8192  # bytes ahead of the reads, for weights that are stored in the order of reading

    def __str__(self) -> str:
        return self.hint if self.hint == "none" else f"{self.hint}+{self.ahead}"


PREFETCHES = (Prefetch("t1"), Prefetch("t0"), Prefetch("nta"), Prefetch("t1", 2048), Prefetch("none"))
"""The prefetches that are tried. The first is used unless another is significantly faster."""

_FASTER, _UNDISTURBED, _ROUNDS = 0.95, 0.9, 3
_TRIED_BYTES = 48 * 2**20  # more than the second-level cache, and than most third-level caches
_PIECE_BYTES = 3 * 2**20
_TRIED_INPUTS = 2048
_prefetch: Prefetch | None = None
_choosing = threading.RLock()


def use_prefetch(prefetch: Prefetch) -> None:
    global _prefetch
    _prefetch = prefetch
    _kernels.prefetch(_HINTS.index(prefetch.hint), prefetch.ahead)


def prefetch_in_use() -> Prefetch | None:
    """The prefetch in use: the one that `SPLITNET_KERNELS` names, or the fastest. Measuring takes some 0.2 s per
    process, until two undisturbed measurements on this machine agree. None: the kernels are not compiled, or only plain
    loops are used."""
    if kernels_here() is not Kernels.FAST:
        return None
    with _choosing:
        if _prefetch is None:
            known = KnownFigures(cache_folder() / "speeds.json")
            key = f"prefetch {platform.node()}/{processor()} kernels-{version()} threads-{torch.get_num_threads()}"
            measured = known.find_figure(key)
            measured = measured if isinstance(measured, list) else []
            named = {str(each): each for each in PREFETCHES}
            if len(measured) == 2 and measured[0] == measured[1] and measured[0] in named:
                use_prefetch(named[measured[0]])
            else:
                use_prefetch(PREFETCHES[0])  # so that products of the measurement do not measure again
                found, undisturbed = fastest_prefetch()
                use_prefetch(found)
                if undisturbed:
                    known.keep_figure(key, [*measured[-1:], str(found)])
        return _prefetch


def fastest_prefetch() -> tuple[Prefetch, bool]:
    """The fastest of `PREFETCHES`, if two measurements find it faster than the first; and whether the measurement was
    undisturbed: this thread computed in nearly all of its time."""
    began, computed = time.perf_counter(), time.thread_time()
    seconds = time_prefetches(PREFETCHES)
    best = min(seconds, key=lambda each: seconds[each])
    if best != PREFETCHES[0]:
        seconds = time_prefetches((PREFETCHES[0], best))
    share = (time.thread_time() - computed) / (time.perf_counter() - began)
    return best if seconds[best] < _FASTER * seconds[PREFETCHES[0]] else PREFETCHES[0], share > _UNDISTURBED


def time_prefetches(prefetches: Sequence[Prefetch]) -> dict[Prefetch, float]:
    """Seconds for one row times weights, of 8 bits in tiles and of float16.

    Prefetches alternate, and the fastest product of each piece of the weights counts, so that other processes hardly
    matter.
    """
    weights = torch.full((_TRIED_BYTES,), 0x3C, dtype=torch.uint8)  # gives usual numbers in each type
    tile_bytes = 64 + 16 * _TRIED_INPUTS
    outputs = _PIECE_BYTES // tile_bytes * 16
    tiles = (0, 8, 0, _TRIED_INPUTS, _TRIED_INPUTS, outputs, 128, 2, 9, 64, 0, tile_bytes, 0)  # the fields of `Grouped`
    description = torch.frombuffer(bytearray(struct.pack("13qd3qd", *tiles, 1.0, 0, 0, 0, 1.0)), dtype=torch.int64)
    rows = torch.ones(1, _TRIED_INPUTS, dtype=torch.float32)
    products = torch.empty(1, outputs, dtype=torch.float32)
    pieces = weights.split(_PIECE_BYTES)
    taken = {each: [float("inf")] * len(pieces) for each in prefetches}
    before = _prefetch
    for _ in range(_ROUNDS):
        for each in prefetches:
            use_prefetch(each)
            for index, piece in enumerate(pieces):
                began = time.perf_counter()
                multiply_grouped(rows, description, piece, products)
                multiply_floats(rows, piece.view(torch.float16).view(-1, _TRIED_INPUTS))
                taken[each][index] = min(taken[each][index], time.perf_counter() - began)
    if before is not None:
        use_prefetch(before)
    return {each: sum(times) for each, times in taken.items()}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def version() -> str:
    """The path in use, and the time at which the kernels were compiled."""
    compiled_at = os.stat(_kernels.__file__).st_mtime_ns if _kernels is not None else 0
    return f"{path_in_use()}@{compiled_at}"


def paths_here() -> list[str]:
    """The paths whose instructions this CPU has, best first; empty if kernels are not compiled."""
    return [] if _kernels is None else [path for path, is_here in _kernels.paths() if is_here]


def path_in_use() -> str | None:
    """The name of the path in use; None: kernels are not compiled."""
    return None if _kernels is None else _kernels.in_use()


def have_threads() -> bool:
    """Whether the kernels compute with as many threads as torch; otherwise the kernels use one thread."""
    return _kernels is not None and _kernels.has_threads()


class Kernels(Enum):
    FAST = "compiled for CPUs such as this one"
    PLAIN = "compiled, but not for this CPU"
    NONE = "not compiled, or not loaded"


def kernels_here() -> Kernels:
    if _kernels is None:
        return Kernels.NONE
    return Kernels.PLAIN if path_in_use() == PLAIN_PATH else Kernels.FAST


def has_integer_kernels() -> bool:
    """Whether there are fast kernels for integers. On x86 torch's kernels are faster than the plain loops."""
    kernels = kernels_here()
    return kernels is Kernels.FAST or (kernels is Kernels.PLAIN and platform.machine() not in ("x86_64", "AMD64"))


def has_float_kernels() -> bool:
    """Whether there are kernels for floats, which have no plain loops."""
    return kernels_here() is Kernels.FAST


def has_fast_kernels() -> bool:
    """Whether there are compiled steps through whole blocks, which need AVX512 with VNNI."""
    return _kernels is not None and _kernels.has_steps()


def multiplies_bfloat16() -> bool:
    """Whether the path in use multiplies bfloat16 in pairs, which needs another order of E4M3 codes."""
    return _kernels is not None and _kernels.has_bfloat16()


def multiply_grouped(
    rows: Tensor,
    description: Tensor,
    tiles: Tensor,
    products: Tensor,
    experts: Tensor | None = None,
    held: int = 0,
    *,
    plainly: bool = False,
) -> None:
    """`[rows, inputs]` times weights in tiles, `[outputs, inputs]`; see `splitnet.quant.tiles`.

    For codes of integers, each row is rounded to 2^-15 of its largest value.

    Args:
        rows: float32; for codes of floats, with inputs in whole chunks.
        description: the weights' description, int64, as `Grouped` in `native/grouped.h`.
        products: float32 `[rows, outputs]`, which may be columns of a wider tensor; they are overwritten.
        experts: int64 `[rows]`: the expert whose weight multiplies the row; `tiles` has the weights of `held` experts.
        plainly: uses the plain loops, as CPUs without a path do.

    Raises IndexError for an unknown expert.
    """
    if _prefetch is None:
        prefetch_in_use()
    given = rows.contiguous()
    chosen = None if experts is None else experts.contiguous()
    places = description.data_ptr(), tiles.data_ptr(), given.data_ptr(), products.data_ptr()
    chosen_at = 0 if chosen is None else chosen.data_ptr()
    _kernels.grouped(*places, *given.shape, products.stride(0), chosen_at, held, torch.get_num_threads(), plainly)


def dequantise_grouped(description: Tensor, tiles: Tensor, floats: Tensor, indices: Tensor) -> None:
    """Sets `floats`, float32 `[len(indices), inputs]`, to the values of some outputs, int64, of weights in tiles.

    `description`: as in `multiply_grouped`. Raises IndexError if there is no such output.
    """
    chosen = indices.contiguous()
    places = (description.data_ptr(), tiles.data_ptr(), chosen.data_ptr(), len(floats), floats.data_ptr())
    _kernels.dequantised(*places, torch.get_num_threads())


def convert_grouped(description: Tensor, tiles: Tensor, numbers: Tensor) -> None:
    """Sets `numbers`, `[some outputs, inputs]`, to the values of the first outputs of weights in tiles.

    `numbers`: float32; or bfloat16 where there is a fast kernel for the weights and the CPU `multiplies_bfloat16`.
    """
    places = (description.data_ptr(), tiles.data_ptr(), len(numbers), numbers.data_ptr())
    _kernels.converted(*places, numbers.dtype == torch.bfloat16, torch.get_num_threads())


def has_kernel_for(weight: Tensor) -> bool:
    """Whether `multiply_floats` takes this weight."""
    return has_float_kernels() and weight.device.type == "cpu" and weight.dtype in _FLOATS and weight.is_contiguous()


def multiply_floats(rows: Tensor, weight: Tensor) -> Tensor:
    """`[rows, inputs]` times float32, bfloat16 or float16 `[outputs, inputs]`, multiplied and summed in float32.

    The result of a row does not depend on the other rows.
    """
    if _prefetch is None:
        prefetch_in_use()
    given = rows.float().contiguous()
    # `new_empty` keeps the type, as torch's default differs while another thread loads a model.
    products = given.new_empty(len(given), len(weight))
    kernel = getattr(_kernels, _FLOATS[weight.dtype])
    places = (weight.data_ptr(), given.data_ptr(), products.data_ptr())
    kernel(*places, *given.shape, len(weight), torch.get_num_threads())
    return products.to(rows.dtype)


def multiply_listed(row: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """The products, `[len(indices)]`, of a row `[inputs]` with some outputs of a weight of `multiply_floats`.

    The same bits as in `multiply_floats` for outputs in its whole blocks of `BLOCK`. Raises IndexError for an output
    that the weight does not have.
    """
    given, chosen = row.float().contiguous(), indices.contiguous()
    products = given.new_empty(len(chosen))
    places = (weight.data_ptr(), given.data_ptr(), products.data_ptr(), list(_FLOATS).index(weight.dtype))
    _kernels.listed(*places, len(given), len(chosen), torch.get_num_threads(), chosen.data_ptr(), len(weight))
    return products.to(row.dtype)


def step(
    blocks: Tensor,
    count: int,
    hidden: Tensor,
    stores: Tensor,
    indices: Tensor,
    cosines: Tensor,
    sines: Tensor,
    order: int,
    stored_bytes: int,
    key_bits: int,
    value_bits: int,
) -> None:
    """Runs positions through blocks; overwrites `hidden`, float32 `[positions, hidden]`, with the output.

    Args:
        blocks: `count` blocks, as `Block` in `native/step.h`.
        stores: int64 `[count, positions, 6]`, in the format of `splitnet.blocks.kv_cache.SequenceCache.reserve`.
        indices: int64 `[positions]`, the index of each position in its stores.
        cosines, sines: float32 `[ropes, positions, half of the rotated numbers of a head]`.
        order: the places of the numbers of a pair, as `splitnet.blocks.rotary.PairLayout`.
        stored_bytes: bytes of a number that blocks compute with: 4, or 2 for bfloat16.
        key_bits, value_bits: bits of a number in the stores: 16 for float16, 8 or 4 for codes, 0 for the type of
            blocks.
    """
    if _prefetch is None:
        prefetch_in_use()
    tensors = (hidden, stores, indices, cosines, sines)
    at, stores_at, indices_at, cosines_at, sines_at = (tensor.data_ptr() for tensor in tensors)
    sizes = (cosines.shape[-1], order, stored_bytes, torch.get_num_threads(), key_bits, value_bits)
    _kernels.run_steps(blocks.data_ptr(), count, at, len(hidden), stores_at, indices_at, cosines_at, sines_at, *sizes)


def use_as_named(names: str) -> None:
    """Sets a path, a prefetch or both, as `SPLITNET_KERNELS` names them. Raises as `use_path`."""
    for name in names.split(","):
        found = re.fullmatch(rf"({'|'.join(_HINTS)})(?:\+([0-9]{{1,6}}))?", name.strip())
        if found is None:
            use_path(name.strip())
        elif kernels_here() is Kernels.NONE:
            raise KernelsError(f"{PATH_VARIABLE} names {name!r}, but splitnet's kernels are {load_error}: leave it out")
        else:
            use_prefetch(Prefetch(found[1], int(found[2])) if found[2] else Prefetch(found[1]))


if os.environ.get(PATH_VARIABLE):
    use_as_named(os.environ[PATH_VARIABLE])
