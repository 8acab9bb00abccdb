"""Checks the speed of decoding on this processor in a minute: prints Markdown, and fails below its limits.

    python -m benchmarks.quick [--threads 1] [--rounds 24]

All variants run in turns in one process, so that neither the machine nor its load matters: blocks of a random model
with weights in each format, the same blocks in transformers' own code and float32, and sums over as many bytes as the
weights of a format have. The median of each variant counts. Limits: no format may be slower than transformers, or
slower than a format with more bytes. Where whole steps are compiled (AVX512), a step must read weights that exceed the
caches at 50 % of the bandwidth of the sums or more. Weights in a cache are limited by arithmetic, at a different speed
on each processor, and so are weights in 4 bits where the memory is fast: these must be no slower than 16 bits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.quant import native
from splitnet.quant.device import in_large_pages
from tests.unit.random_models import random_checkpoint

FORMS = ("float32", "float16", "int8", "int4")
SIZES: dict[str, int] = {
    "blocks": 4,
    "hidden": 1536,
    "intermediate_size": 4096,
    "vocab": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
CONTEXT = 32
SLOWEST = 1.0
"""Minimum speed of a format, as a multiple of the speed of transformers."""

LARGER = {"float32": "transformers", "float16": "float32", "int8": "float16", "int4": "float16"}
"""The variant that may not be faster than a format."""

SAME = 1.05
"""Maximum time of a format, as a multiple of the time of that variant; the rest is noise."""

LEAST_BANDWIDTH = 0.5
TRIES = 3
"""The number of tries: the benchmark fails only if a variant misses its limit in every try, because the machine may be
busy."""

READ_PARTS = 16


def held_bytes(span: Span) -> int:
    """Bytes of the weights that a step reads."""
    block_tensors = [*span._backbone.parameters(), *span._backbone.buffers()]
    return sum(tensor.nbytes for tensor in block_tensors if tensor.dim() >= 2)


def step_of(span: Span, hidden: torch.Tensor) -> Callable[[], object]:
    """Returns a function that decodes one position after a context."""
    row = span.new_row(len(hidden))
    span.forward(hidden[:CONTEXT], [RowChunk(row, 0, CONTEXT)])

    def step() -> None:
        span.forward(hidden[CONTEXT:], [RowChunk(row, CONTEXT, 1)])
        row.crop(CONTEXT)

    return step


def transformers_step(folder: Path, hidden: torch.Tensor) -> Callable[[], object]:
    """Returns a function that decodes one position after a context in transformers' own code."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
    cache = DynamicCache()
    model(inputs_embeds=hidden[None, :CONTEXT], cache=cache, use_cache=True)

    def step() -> None:
        model(inputs_embeds=hidden[None, CONTEXT:], cache=cache, use_cache=True)
        cache.crop(-1)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=24)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    prefetch = native.prefetch_in_use()
    print(f"{native.processor()}, {arguments.threads} threads; {native.path_in_use() or 'no kernels'}, {prefetch}\n")

    hidden = torch.randn(CONTEXT + 1, SIZES["hidden"], generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = random_checkpoint("llama", Path(name), **SIZES)
        checkpoint = Checkpoint.open(folder)
        for form in FORMS:
            span = Span.load(checkpoint, 0, checkpoint.num_blocks, dtype="float32", weights=form)
            ways[form], sizes[form] = step_of(span, hidden), held_bytes(span)
        ways["transformers"] = transformers_step(folder, hidden)
        vector = in_large_pages(1, max(sizes.values()))[0].view(torch.float32).fill_(1)
        for form, size in sizes.items():
            parts = vector[: size // 4].chunk(READ_PARTS)
            ways[f"read {form}"] = lambda parts=parts: [part.sum() for part in parts]
        faults = compare(ways, sizes, arguments.rounds)
        for _ in range(TRIES - 1):
            faults = faults and faults & compare(ways, sizes, arguments.rounds)
    if faults:
        sys.exit("\n".join(["", *sorted(faults)]))


def cache_bytes() -> int:
    """Bytes of the largest cache, as Linux reports them, or 64 MiB if Linux does not."""
    told = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in told if size.endswith("K")), default=64 << 20)


def compare(ways: dict[str, Callable[[], object]], sizes: dict[str, int], rounds: int) -> set[str]:
    """Prints the table. Returns messages about the variants that miss their limits."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, step in ways.items():
            began = time.perf_counter()
            step()
            taken[way].append(1000 * (time.perf_counter() - began))
    ms = {way: median(times) for way, times in taken.items()}
    faults: set[str] = set()
    print("| weights | MiB | ms per step | times as fast as transformers | of bandwidth |\n|---|---|---|---|---|")
    print(f"| transformers, float32 | {sizes['float32'] >> 20} | {ms['transformers']:.2f} | 1.00 | |")
    cache = cache_bytes()
    for form, size in sizes.items():
        fast, read = ms["transformers"] / ms[form], ms[f"read {form}"] / ms[form]
        print(f"| {form} | {size >> 20} | {ms[form]:.2f} | {fast:.2f} | {read:.0%} |", flush=True)
        if fast < SLOWEST:
            faults.add(f"{form} is slower than transformers")
        if ms[form] > SAME * ms[LARGER[form]]:
            faults.add(f"{form} is slower than {LARGER[form]}")
        if form != "int4" and size > cache and read < LEAST_BANDWIDTH and native.has_fast_kernels():
            faults.add(f"{form} reads at less than {LEAST_BANDWIDTH:.0%} of the bandwidth")
    return faults


if __name__ == "__main__":
    main()
