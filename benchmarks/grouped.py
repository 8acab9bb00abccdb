"""The speed of products of a few rows with weights that are held as codes of checkpoints; prints Markdown.

    python -m benchmarks.grouped [--threads 1 2] [--rows 1 8] [--rounds 20] [--shape 4096 4096] [--layouts Q4_K MXFP4]
    python -m benchmarks.grouped --paths avx512 avx2 --shape 5632 2048

Each layout has enough different matrices to exceed every cache. "GB/s" counts the bytes of the held weights; "of
bandwidth" is relative to sums over parts of a long vector in the same rounds. Code paths run in turns. In each round
the fastest product and the fastest sum count; the result is the median of the rounds. Codes are random.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median

import torch
from gguf import GGMLQuantizationType

from splitnet.checkpoint.gguf.file import BLOCK_TYPES
from splitnet.errors import KernelsError
from splitnet.quant import native
from splitnet.quant.device import in_large_pages
from splitnet.quant.forms import INT4, INT8
from splitnet.quant.grouped import BlockQuantWeight, held_bytes, hold_stored
from splitnet.quant.packed_tensor import STEPS_GROUP, CodeLayout, Codes, ScaleFormat, StoredMatrix

IN_GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4")
LAYOUTS = {
    **{name: BLOCK_TYPES[GGMLQuantizationType[name]].layout for name in IN_GGUF},
    "NF4": CodeLayout(4, 64, ScaleFormat.FLOAT32, table="nf4"),
    "FP8 128 x 128": CodeLayout(8, 128, ScaleFormat.FLOAT32, table="e4m3"),
    "int4 by 128, zeros": CodeLayout(4, 128, ScaleFormat.FLOAT16, ScaleFormat.CODES),
    **{f"{bits} bits": CodeLayout(bits, 32, ScaleFormat.BFLOAT16, offset=1 << (bits - 1)) for bits in (2, 3, 4, 8)},
    "int4 (--weights)": INT4,
    "int8 (--weights)": INT8,
}
READ_BYTES, READ_PARTS = 2**28, 16


def random_matrix(layout: CodeLayout, outputs: int, inputs: int) -> StoredMatrix:
    groups = inputs // (layout.group or inputs)

    def numbers(kind: ScaleFormat) -> torch.Tensor | None:
        if kind is ScaleFormat.NONE:
            return None
        if kind in (ScaleFormat.STEPS, ScaleFormat.CODES):
            return torch.randint(0, 16, (outputs, groups), dtype=torch.uint8)
        if kind is ScaleFormat.E8M0:
            return torch.randint(118, 124, (outputs, groups), dtype=torch.uint8)
        dtypes = {
            ScaleFormat.FLOAT16: torch.float16,
            ScaleFormat.BFLOAT16: torch.bfloat16,
            ScaleFormat.FLOAT32: torch.float32,
        }
        return (torch.rand(outputs, groups) * 0.01).to(dtypes[kind])

    def units(kind: ScaleFormat) -> torch.Tensor | None:
        return (torch.rand(outputs, inputs // STEPS_GROUP) * 0.001).half() if kind is ScaleFormat.STEPS else None

    codes = torch.randint(
        0, (1 << layout.bits) - 1 - 128 * (layout.table == "e4m3"), (outputs, inputs), dtype=torch.uint8
    )
    scales = numbers(layout.scale)
    assert scales is not None
    found = Codes(codes, scales, numbers(layout.zero), units(layout.scale), units(layout.zero))
    return StoredMatrix(layout, (outputs, inputs), lambda: found)


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Case:
    path: str
    rows: int
    threads: int

    def __str__(self) -> str:
        rows, threads = f"{self.rows} row{'s' * (self.rows > 1)}", f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.path}, {rows}, {threads}"


def hold(layout: CodeLayout, arguments: argparse.Namespace) -> list[BlockQuantWeight]:
    """Matrices in the form for the code path in use."""
    outputs, inputs = arguments.shape
    count = max(2, -(-arguments.mib * 2**20 // held_bytes(layout, outputs, inputs)))
    first = hold_stored([random_matrix(layout, outputs, inputs)], torch.device("cpu"))
    assert isinstance(first, BlockQuantWeight)
    return [
        BlockQuantWeight(first.order, first.outputs, in_large_pages(*first.tiles.shape).copy_(first.tiles))
        for _ in range(count)
    ]


def time_layout(layout: CodeLayout, cases: Sequence[Case], arguments: argparse.Namespace) -> list[str]:
    """The cells of a row: GB/s and share of the bandwidth."""
    held: dict[bool, list[BlockQuantWeight]] = {}
    taken: dict[Case, list[float]] = {case: [] for case in cases}
    shares: dict[Case, list[float]] = {case: [] for case in cases}
    vector = torch.ones(READ_BYTES // 4)
    for _ in range(arguments.rounds):
        for case in cases:
            native.use_path(case.path)
            torch.set_num_threads(case.threads)
            forms = held.setdefault(native.multiplies_bfloat16(), []) or hold(layout, arguments)
            held[native.multiplies_bfloat16()] = forms
            given = torch.randn(case.rows, arguments.shape[1])
            read = min(seconds(part.sum) / part.nbytes for part in vector.chunk(READ_PARTS))
            each = [seconds(lambda form=form, given=given: form.multiply(given)) for form in forms]
            taken[case].append(min(each) / forms[0].tiles.nbytes)
            shares[case].append(read / taken[case][-1])
    return [f"{1e-9 / median(taken[case]):.1f} ({median(shares[case]):.0%})" for case in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 4096], help="outputs and inputs of each matrix")
    parser.add_argument("--mib", type=int, default=128, help="minimum size of all matrices of a layout together")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--paths", nargs="+", default=[native.path_in_use()])
    arguments = parser.parse_args()
    try:
        for path in arguments.paths:
            native.use_path(path)
    except KernelsError as error:
        parser.error(f"--paths: {error}")
    cases = [Case(*each) for each in product(arguments.paths, arguments.rows, arguments.threads)]
    print(f"| layout | bits held | of the layout's | {' | '.join(f'{case}: GB/s (of bandwidth)' for case in cases)} |")
    print("|---|---|---|" + "---|" * len(cases))
    for name in arguments.layouts:
        layout, (outputs, inputs) = LAYOUTS[name], arguments.shape
        held = held_bytes(layout, outputs, inputs)
        bits, part = 8 * held / (outputs * inputs), held / layout.nbytes(outputs, inputs)
        cells = " | ".join(time_layout(layout, cases, arguments))
        print(f"| {name} | {bits:.3f} | {part:.1%} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
