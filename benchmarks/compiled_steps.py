"""Compares decode steps in a family's own code with compiled steps, for families that have these; prints Markdown.

    python -m benchmarks.compiled_steps [--families cohere gemma2] [--weights int8] [--hidden 512] [--blocks 6]
                                        [--context 64]

Models are random. Both versions run in turns through the same blocks, with one thread, after --context positions. The
table has the times of the fastest and the median step. For latent attention, the sizes of heads and latents are those
of DeepSeek-V3. Difference: the largest difference between the outputs, as a share of the largest output.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from splitnet.blocks.fast.native_step import NativeStep
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.families import FAMILIES
from splitnet.quant.choose import INTEGERS
from tests.unit.blocks.test_describe import SIZES
from tests.unit.random_models import random_checkpoint

_LATENTS = {
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 256,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "n_group": 1,
    "topk_group": 1,
}


def load(family: str, folder: Path, arguments: argparse.Namespace) -> Span | None:
    """A span of all blocks of a random model; None: the family has no compiled steps with these weights."""
    sizes = SIZES.get(family, {})
    if "kv_lora_rank" in sizes:
        sizes = _LATENTS if arguments.weights in INTEGERS else {**_LATENTS, "first_k_dense_replace": arguments.blocks}
    random_checkpoint(family, folder, blocks=arguments.blocks, hidden=arguments.hidden, **sizes)
    checkpoint = Checkpoint.open(folder)
    span = Span.load(checkpoint, 0, checkpoint.num_blocks, dtype="float32", weights=arguments.weights)
    return span if isinstance(span._lean, NativeStep) else None


def measure(span: Span, context: int, rounds: int, steps: int) -> tuple[dict[str, list[float]], float]:
    """Milliseconds of each step, and the largest difference."""
    ways = {"own": None, "compiled": span._lean}
    times: dict[str, list[float]] = {way: [] for way in ways}
    outputs: dict[str, torch.Tensor] = {}
    hidden = torch.randn(context + steps, span.hidden_size, generator=torch.Generator().manual_seed(0))
    for _ in range(rounds):
        for way, step in ways.items():
            span._lean = step
            row = span.new_row(context + steps)
            span.forward(hidden[:context], [RowChunk(row, 0, context)])
            for index in range(context, context + steps):
                began = time.perf_counter()
                outputs[way] = span.forward(hidden[index : index + 1], [RowChunk(row, index, 1)])
                times[way].append((time.perf_counter() - began) * 1000)
    return times, float((outputs["own"] - outputs["compiled"]).abs().max() / outputs["own"].abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--families", nargs="+", default=[name for name, family in FAMILIES.items() if family.native_step]
    )
    parser.add_argument("--weights", default="float32", help="weight format")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--context", type=int, default=64, help="positions that a step attends to")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{arguments.blocks} blocks of hidden size {arguments.hidden}, weights as {arguments.weights}.\n")
    print("| family | own code ms/step | median | compiled | median | times as fast | difference |")
    print("|---|---|---|---|---|---|---|")
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            span = load(family, Path(folder), arguments)
            if span is None:
                print(f"| {family} | no compiled steps with such weights | | | | | |")
                continue
            times, difference = measure(span, arguments.context, arguments.rounds, arguments.steps)
        own, compiled = min(times["own"]), min(times["compiled"])
        medians = [f"{statistics.median(times[way]):.2f}" for way in ("own", "compiled")]
        cells = [f"{own:.2f}", medians[0], f"{compiled:.2f}", medians[1], f"{own / compiled:.2f}", f"{difference:.1e}"]
        print(f"| {family} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
