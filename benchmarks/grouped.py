"""How fast weights in the codes of checkpoints are read: products of a few rows; prints Markdown.

    python benchmarks/grouped.py [--threads 1 2] [--rows 1 8] [--rounds 20] [--size 4096] [--layouts Q4_K MXFP4]

Each layout has so many different matrices that they fit no cache. "GB/s" is of the bytes held, "of bandwidth" relative
to what sums over parts of a long vector read in the same rounds. The fastest of all counts. Codes are random.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from gguf import GGMLQuantizationType

from splitnet.model.gguf_layouts import BLOCK_TYPES
from splitnet.model.grouped_forms import GroupedForm, held_bytes, hold_stored
from splitnet.model.stored import STEPS_GROUP, Codes, Kind, Layout, StoredMatrix

IN_GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4")
LAYOUTS = {
    **{name: BLOCK_TYPES[GGMLQuantizationType[name]].layout for name in IN_GGUF},
    "NF4": Layout(4, 64, Kind.FLOAT32, table="nf4"),
    "FP8 128 x 128": Layout(8, 128, Kind.FLOAT32, table="e4m3"),
    "int4 by 128, zeros": Layout(4, 128, Kind.FLOAT16, Kind.CODES),
    "int4 (--weights)": Layout(4, 32, Kind.BFLOAT16, Kind.BFLOAT16, offset=8),
}
READ_BYTES, READ_PARTS = 2**28, 16


def random_matrix(layout: Layout, size: int) -> StoredMatrix:
    groups = size // (layout.group or size)

    def numbers(kind: Kind) -> torch.Tensor | None:
        if kind is Kind.NONE:
            return None
        if kind in (Kind.STEPS, Kind.CODES):
            return torch.randint(0, 16, (size, groups), dtype=torch.uint8)
        if kind is Kind.E8M0:
            return torch.randint(118, 124, (size, groups), dtype=torch.uint8)
        dtypes = {Kind.FLOAT16: torch.float16, Kind.BFLOAT16: torch.bfloat16, Kind.FLOAT32: torch.float32}
        return (torch.rand(size, groups) * 0.01).to(dtypes[kind])

    def units(kind: Kind) -> torch.Tensor | None:
        return (torch.rand(size, size // STEPS_GROUP) * 0.001).half() if kind is Kind.STEPS else None

    codes = torch.randint(0, (1 << layout.bits) - 1 - 128 * (layout.table == "e4m3"), (size, size), dtype=torch.uint8)
    scales = numbers(layout.scale)
    assert scales is not None
    found = Codes(codes, scales, numbers(layout.zero), units(layout.scale), units(layout.zero))
    return StoredMatrix(layout, (size, size), lambda: found)


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def time_layout(layout: Layout, arguments: argparse.Namespace) -> list[str]:
    """The cells of a row: GB/s and part of the bandwidth for each number of rows and threads."""
    count = max(2, -(-arguments.mib * 2**20 // held_bytes(layout, arguments.size, arguments.size)))
    matrix = random_matrix(layout, arguments.size)
    first = hold_stored([matrix], torch.device("cpu"))
    assert isinstance(first, GroupedForm)
    held = [GroupedForm(first.order, first.outputs, first.tiles.clone()) for _ in range(count)]
    cases = [(rows, threads) for rows in arguments.rows for threads in arguments.threads]
    fastest = dict.fromkeys(cases, float("inf"))
    read = dict.fromkeys(arguments.threads, float("inf"))
    vector = torch.ones(READ_BYTES // 4)
    for _ in range(arguments.rounds):
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for part in vector.chunk(READ_PARTS):
                read[threads] = min(read[threads], seconds(part.sum) / part.nbytes)
            for rows in arguments.rows:
                given = torch.randn(rows, arguments.size)
                for form in held:
                    taken = seconds(lambda form=form, given=given: form.multiply(given))
                    fastest[rows, threads] = min(fastest[rows, threads], taken)
    cells: list[str] = []
    for rows, threads in cases:
        each = fastest[rows, threads] / first.tiles.nbytes
        cells.append(f"{1e-9 / each:.1f} ({read[threads] / each:.0%})")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, default=4096, help="outputs and inputs of each matrix")
    parser.add_argument("--mib", type=int, default=128, help="of all matrices of a layout together, at least")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    cases = [
        f"{rows} row{'s' * (rows > 1)}, {threads} thread{'s' * (threads > 1)}"
        for rows in arguments.rows
        for threads in arguments.threads
    ]
    print(f"| layout | bits held | of the layout's | {' | '.join(f'{case}: GB/s (of bandwidth)' for case in cases)} |")
    print("|---|---|---|" + "---|" * len(cases))
    for name in arguments.layouts:
        layout, size = LAYOUTS[name], arguments.size
        held = held_bytes(layout, size, size)
        bits, part = 8 * held / size**2, held / layout.nbytes(size, size)
        print(f"| {name} | {bits:.3f} | {part:.1%} | {' | '.join(time_layout(layout, arguments))} |", flush=True)


if __name__ == "__main__":
    main()
