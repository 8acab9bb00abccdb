"""The speed of a span's decode steps and prefill on a GPU, by the format of its weights; prints Markdown.

    python -m benchmarks.gpu MODEL [--device auto] [--blocks 0:8] [--kinds bfloat16 int8 int4]

A decode step computes one position of one session. "share of bandwidth" compares the rate at which a step reads the
weights, each once, with the rate of a copy within the device's memory. "graph"
is the largest number of sessions for which a step is replayed from a CUDA graph. Times come from events on the device,
or from the clock after the device has finished; each figure is a median. The benchmark needs a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch

from splitnet.blocks.chosen_device import find_device
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.arguments import parse_blocks
from splitnet.errors import SplitnetError
from splitnet.quant.device import Stopwatch, give_back_memory, seconds_after_work

COPIED_BYTES = 2**28
COPIES, PREFILLS, WARM_UP = 20, 5, 8
HEADER = "| kind | ms/token | bytes | share of bandwidth | prefill tokens/s | graph |"


def milliseconds(device: torch.device, work: Callable[[], object]) -> float:
    """The time that `work` takes on the device, in ms."""
    seconds_after_work(device)
    watch = Stopwatch(device)
    work()
    watch.stop()
    return watch.seconds * 1000


def bytes_per_ms(device: torch.device) -> float:
    """The number of bytes that a copy within the device's memory reads and writes per ms."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [milliseconds(device, lambda: target.copy_(source)) for _ in range(COPIES)]
    return 2 * COPIED_BYTES / statistics.median(times[1:])


def measured(span: Span, positions: int, steps: int, bandwidth: float) -> str:
    """The cells of a table row that follow the weight format."""
    prompt, token = torch.randn(positions, span.hidden_size), torch.randn(1, span.hidden_size)
    prefills = []
    for _ in range(PREFILLS):
        row = span.new_row()
        prefills.append(milliseconds(span.device, lambda row=row: span.forward(prompt, [RowChunk(row, 0, positions)])))
    row = span.new_row()
    decodes = [
        milliseconds(span.device, lambda at=at: span.forward(token, [RowChunk(row, at, 1)]))
        for at in range(WARM_UP + steps)
    ]
    step = statistics.median(decodes[WARM_UP:])
    share = span.weight_bytes / step / bandwidth
    prefill = positions / statistics.median(prefills[1:]) * 1000
    graph = f"up to {span.replayed_positions}" if span.replayed_positions else "no"
    return f"{step:.3f} | {span.weight_bytes:,} | {share:.0%} | {prefill:,.0f} | {graph} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder, hub id or GGUF file")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--blocks", default=None, metavar="START:END", help="default: all blocks")
    parser.add_argument("--kinds", nargs="+", default=["bfloat16", "int8", "int4"])
    parser.add_argument("--positions", type=int, default=512, help="of a prompt")
    parser.add_argument("--steps", type=int, default=64)
    arguments = parser.parse_args()
    try:
        choice = find_device(arguments.device)
    except SplitnetError as error:
        sys.exit(f"error: {error}")
    if choice.device == "cpu":
        sys.exit(f"error: there is no GPU to measure: {choice.why}; benchmarks/weights.py measures CPUs")
    device = torch.device(choice.device)
    checkpoint = Checkpoint.open(arguments.model)
    start, end = parse_blocks(arguments.blocks) if arguments.blocks else (0, checkpoint.num_blocks)
    bandwidth = bytes_per_ms(device)
    print(f"{checkpoint.name}, blocks {start}..{end - 1} on {choice}, torch {torch.__version__};")
    print(f"copies reach {bandwidth / 1e6:,.0f} GB/s.\n\n{HEADER}\n|---|---|---|---|---|---|", flush=True)
    for kind in arguments.kinds:
        try:
            span = Span.load(checkpoint, start, end, device=device, weights=kind, dtype="bfloat16")
            print(f"| {kind} | {measured(span, arguments.positions, arguments.steps, bandwidth)}", flush=True)
            del span
        except SplitnetError as error:
            print(f"| {kind} | {error} | | | | |", flush=True)
        give_back_memory()


if __name__ == "__main__":
    main()
