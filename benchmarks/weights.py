"""The cost of each format of weights in memory, time and quality, for a span of all blocks; prints Markdown.

    python -m benchmarks.weights CHECKPOINT [--kinds float32 float16 int8] [--threads 1 2] [--rounds 5] [--steps 16]
                                 [--tokens 1024]
    python -m benchmarks.weights --random-1b
    python -m benchmarks.weights --random-half-b [--blocks 4] [--kinds bfloat16 int4/bfloat16 Q4_K/bfloat16]

All formats are in memory together and are timed in turns, so that a disturbance of the machine affects all of them. The
table has the median and the fastest time of all tokens. "Of bandwidth" is the time that the machine needs to read the
same number of bytes (a sum over a long vector, the fastest of the same rounds) as a share of the fastest token's time:
decoding can reach at most 100%, unless the weights stay in a cache. On a shared machine, --cpu-time counts the
computation of one thread without its waits for a processor; caches and memory are still shared. "Of bfloat16" is the
speed of a prefill relative to the speed with bfloat16 weights in the same round, the median of all rounds.

Besides the values of --weights, a format may be a layout of checkpoints (from benchmarks/grouped.py, such as Q4_K
or MXFP4), with random codes.

Quality compares the next-token distributions over a text with the distributions of float32 weights. For a model
with random weights (--random-1b: the shape of TinyLlama 1.1B; --random-half-b: the shape of Qwen2 0.5B) there is no
quality to measure.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.codec_quality import VARIED_TEXT
from benchmarks.grouped import LAYOUTS, random_matrix
from benchmarks.random_shapes import SHAPES, random_model
from splitnet.blocks.client_part import load_client_part
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.quant.choose import KINDS
from splitnet.quant.grouped import hold_stored
from splitnet.quant.linear import QuantizedLinear
from splitnet.quant.packed_tensor import CodeLayout

MIB = 2**20
CONTEXT = 64
"""Positions that a decode step attends to."""
PREFILL = 512
READ_BYTES = 2**29


@dataclass
class Times:
    """Times of one format with one number of threads: one per token, and one per pass of `PREFILL` positions."""

    decode_ms: list[float] = field(default_factory=list)
    prefill_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Quality:
    """Compared with float32: mean divergence in nats, share of positions with the same likeliest token; and
    perplexity.
    """

    divergence: float
    top1: float
    perplexity: float


class Blocks(nn.Module):
    """A span in place of a model's blocks."""

    def __init__(self, span: Span) -> None:
        super().__init__()
        self.span = span

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = [self.span.forward(row, [RowChunk(self.span.new_row(), 0, len(row))]) for row in hidden]
        return torch.stack(rows).to(hidden.dtype)


def load(checkpoint: Checkpoint, kind: str) -> Span:
    """A span of all blocks. Blocks compute in the type after a slash in `kind`; without a slash, in bfloat16 for
    bfloat16 weights and in float32 for others."""
    weights, _, dtype = kind.partition("/")
    dtype = dtype or ("bfloat16" if weights == "bfloat16" else "float32")
    if weights in KINDS:
        return Span.load(checkpoint, 0, checkpoint.num_blocks, dtype=dtype, weights=weights)
    span = Span.load(checkpoint, 0, checkpoint.num_blocks, dtype=dtype)
    hold_random_codes(span, LAYOUTS[weights])
    held = span.view(0, checkpoint.num_blocks)  # counts the bytes and describes the steps of the new weights
    span._lean = None
    return held


def hold_random_codes(span: Span, layout: CodeLayout) -> None:
    """Replaces the weights of all linear layers of a span by random codes."""
    backbone: Any = span._backbone
    for path, layer in list(backbone.named_modules()):
        if isinstance(layer, nn.Linear):
            held = hold_stored([random_matrix(layout, layer.out_features, layer.in_features)], span.device)
            backbone.set_submodule(path, QuantizedLinear.holding(layer, held, span.device))


Measured = dict[str, dict[int, Times]]
"""Times by format, then by number of threads."""


class Stopwatch:
    """Measures times of spans.

    Args:
        clock: a function that returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def measure(
        self, spans: dict[str, Span], threads: Sequence[int], rounds: int, steps: int
    ) -> tuple[Measured, dict[int, list[float]]]:
        """Measures all formats in turns. Returns their times, and the ms to read a MiB by number of threads."""
        times: Measured = {kind: {count: Times() for count in threads} for kind in spans}
        reads: dict[int, list[float]] = {count: [] for count in threads}
        hidden = torch.randn(PREFILL, next(iter(spans.values())).hidden_size)
        vector = torch.ones(READ_BYTES // 4)
        torch.set_num_threads(threads[0])
        for span in spans.values():
            self._time(span, hidden, 1, Times())
        for _ in range(rounds):
            for count in threads:
                torch.set_num_threads(count)
                reads[count].append(self._ms(vector.sum) / (READ_BYTES / MIB))
                for kind, span in spans.items():
                    self._time(span, hidden, steps, times[kind][count])
        return times, reads

    def _time(self, span: Span, hidden: torch.Tensor, steps: int, times: Times) -> None:
        """Times `steps` tokens of one session after `CONTEXT` positions, and one pass of `PREFILL` positions."""
        row = span.new_row(CONTEXT + steps)
        span.forward(hidden[:CONTEXT], [RowChunk(row, 0, CONTEXT)])
        for index in range(steps):
            parts = [RowChunk(row, CONTEXT + index, 1)]
            times.decode_ms.append(self._ms(lambda parts=parts: span.forward(hidden[:1], parts)))
        parts = [RowChunk(span.new_row(PREFILL), 0, PREFILL)]
        times.prefill_ms.append(self._ms(lambda: span.forward(hidden[:PREFILL], parts)))

    def _ms(self, call: Callable[[], object]) -> float:
        began = self._clock()
        call()
        return (self._clock() - began) * 1000


def log_probabilities(checkpoint: Checkpoint, span: Span, ids: torch.Tensor) -> torch.Tensor:
    """Log probabilities of the next tokens, `[positions, vocabulary]`."""
    client_part: Any = load_client_part(checkpoint, Blocks(span), dtype="float32")
    with torch.inference_mode():
        return client_part(ids, use_cache=False).logits[0].float().log_softmax(-1)


def quality_of(found: torch.Tensor, exact: torch.Tensor, ids: torch.Tensor) -> Quality:
    pairs = list(zip(exact.split(128), found.split(128), strict=True))
    divergences = torch.cat([(exact.exp() * (exact - other)).sum(-1) for exact, other in pairs])
    agreements = torch.cat([exact.argmax(-1) == other.argmax(-1) for exact, other in pairs])
    perplexity = (-found[:-1].gather(-1, ids[0, 1:, None]).mean()).exp()
    return Quality(divergences.mean().item(), agreements.float().mean().item(), perplexity.item())


def qualities(checkpoint: Checkpoint, kinds: Sequence[str], tokens: int) -> dict[str, Quality]:
    """The quality of each format, on the first tokens of the text."""
    text = VARIED_TEXT.read_text(encoding="utf-8")
    ids = checkpoint.tokenizer()(text, return_tensors="pt").input_ids[:, :tokens]
    exact = log_probabilities(checkpoint, load(checkpoint, "float32"), ids)
    return {kind: quality_of(log_probabilities(checkpoint, load(checkpoint, kind), ids), exact, ids) for kind in kinds}


def print_tables(spans: dict[str, Span], times: Measured, reads: dict[int, list[float]]) -> None:
    for threads, read in reads.items():
        print(f"\n{threads} thread{'s' * (threads > 1)}; memory is read at {1000 / min(read) / 1024:.1f} GiB/s.\n")
        print(
            "| weights | MiB | decode ms/token, median | fastest | of bandwidth "
            "| prefill tokens/s | fastest | of bfloat16 |"
        )
        print("|---|---|---|---|---|---|---|---|")
        plain = times["bfloat16"][threads].prefill_ms if "bfloat16" in times else None
        for kind, span in spans.items():
            mib, found = span.weight_bytes / MIB, times[kind][threads]
            cells = [f"{statistics.median(found.decode_ms):.2f}", f"{min(found.decode_ms):.2f}"]
            cells.append(f"{mib * min(read) / min(found.decode_ms):.0%}")
            slow, fast = statistics.median(found.prefill_ms), min(found.prefill_ms)
            cells += [f"{PREFILL * 1000 / slow:.0f}", f"{PREFILL * 1000 / fast:.0f}"]
            shares = [one / other for one, other in zip(plain or (), found.prefill_ms, strict=plain is not None)]
            cells.append(f"{statistics.median(shares):.0%}" if shares else "")
            print(f"| {kind} | {mib:.0f} | {' | '.join(cells)} |", flush=True)


def print_quality(found: dict[str, Quality]) -> None:
    print("\n| weights | KL to float32 (nats) | top-1 agreement | perplexity |")
    print("|---|---|---|---|")
    for kind, quality in found.items():
        print(f"| {kind} | {quality.divergence:.1e} | {quality.top1:.4f} | {quality.perplexity:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="folder or hub id of a checkpoint")
    parser.add_argument("--random-1b", action="store_true", help="a random model with 1.1 billion weights instead")
    parser.add_argument("--random-half-b", action="store_true", help="a random model with 0.5 billion weights")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="int4/bfloat16: int4, computes in bfloat16")
    parser.add_argument("--blocks", type=int, help="number of blocks of a random model")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time; with --threads 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="decode steps per kind and round")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the text for the quality; 0: no quality")
    arguments = parser.parse_args()
    if [arguments.checkpoint is not None, arguments.random_1b, arguments.random_half_b].count(True) != 1:
        parser.error("give a checkpoint, --random-1b or --random-half-b")
    if arguments.cpu_time and arguments.threads != [1]:
        parser.error("--cpu-time counts one thread only: add --threads 1")
    if arguments.blocks is not None and arguments.checkpoint is not None:
        parser.error("--blocks is for random models: a checkpoint has its own")
    # The measurements do not run in the main thread, where the C library returns the memory of each pass to the system.
    # All run in one thread, because OpenMP has a team of threads for each computing thread, and teams with more threads
    # than cores are slow to start.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(run, arguments).result()


def run(arguments: argparse.Namespace) -> None:
    if arguments.checkpoint is not None:
        compare(arguments.checkpoint, arguments, arguments.tokens)
        return
    with random_model(SHAPES["1.1b" if arguments.random_1b else "0.5b"], arguments.blocks) as folder:
        compare(folder, arguments, 0)


def compare(model: Path | str, arguments: argparse.Namespace, tokens: int) -> None:
    checkpoint = Checkpoint.open(model)
    spans = {kind: load(checkpoint, kind) for kind in arguments.kinds}
    gc.collect()
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    which = "CPU time" if arguments.cpu_time else "wall time"
    blocks, hidden = checkpoint.num_blocks, checkpoint.hidden_size
    print(f"{blocks} blocks of hidden size {hidden}, {arguments.rounds} rounds, {which}.", flush=True)
    print_tables(spans, *Stopwatch(clock).measure(spans, arguments.threads, arguments.rounds, arguments.steps))
    spans.clear()
    if tokens:
        print_quality(qualities(checkpoint, arguments.kinds, tokens))


if __name__ == "__main__":
    main()
