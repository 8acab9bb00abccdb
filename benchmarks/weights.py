"""What each kind of weights costs in memory, time and quality, for a span of all blocks; prints Markdown.

    python benchmarks/weights.py CHECKPOINT [--kinds float32 float16 int8] [--rounds 5] [--steps 16] [--tokens 1024]
    python benchmarks/weights.py --random-1b

All kinds are in memory together and are timed in turns, so that a disturbance of the machine meets all of them; times
are medians over the rounds. "Of bandwidth" is the time that the machine needs to read so many bytes (a sum over a long
vector, timed in the same rounds) as a part of the time of a token: what decoding could reach at best is 100%.

Quality is that of the next-token distributions over a text, against those with float32 weights. A model with random
weights (--random-1b: the shape of TinyLlama 1.1B) has none.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from codec_quality import VARIED_TEXT
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig

from splitnet.model.checkpoint import Checkpoint
from splitnet.model.shell import load_shell
from splitnet.model.span import Part, Span
from splitnet.model.weights import KINDS

MIB = 2**20
CONTEXT = 64
"""Positions that a decode step attends to."""
PREFILL = 512
THREADS = (1, 2)
READ_BYTES = 2**29


@dataclass
class Times:
    """Of one kind, by number of threads, one entry per round."""

    decode_ms: dict[int, list[float]] = field(default_factory=lambda: {threads: [] for threads in THREADS})
    prefill_ms: dict[int, list[float]] = field(default_factory=lambda: {threads: [] for threads in THREADS})


@dataclass(frozen=True)
class Quality:
    """Against float32: mean divergence in nats, share of positions with the same most likely token; and perplexity."""

    divergence: float
    top1: float
    perplexity: float


class Blocks(nn.Module):
    """A span in the place of a model's blocks."""

    def __init__(self, span: Span) -> None:
        super().__init__()
        self.span = span

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = [self.span.forward(row, [Part(self.span.new_row(), 0, len(row))]) for row in hidden]
        return torch.stack(rows).to(hidden.dtype)


def load(checkpoint: Checkpoint, kind: str) -> Span:
    """All blocks; they compute in float32, but for weights that are bfloat16."""
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    return Span.load(checkpoint, 0, checkpoint.num_blocks, dtype=dtype, weights=kind)


def decode_ms(span: Span, hidden: torch.Tensor, steps: int) -> float:
    """Ms per token of one session after `CONTEXT` positions."""
    row = span.new_row(CONTEXT + steps)
    span.forward(hidden[:CONTEXT], [Part(row, 0, CONTEXT)])
    began = time.perf_counter()
    for index in range(steps):
        span.forward(hidden[index : index + 1], [Part(row, CONTEXT + index, 1)])
    return (time.perf_counter() - began) * 1000 / steps


def prefill_ms(span: Span, hidden: torch.Tensor) -> float:
    """Ms of one pass of `PREFILL` positions."""
    began = time.perf_counter()
    span.forward(hidden[:PREFILL], [Part(span.new_row(PREFILL), 0, PREFILL)])
    return (time.perf_counter() - began) * 1000


def read_ms(vector: torch.Tensor) -> float:
    """Ms to read a vector once."""
    began = time.perf_counter()
    vector.sum()
    return (time.perf_counter() - began) * 1000


def log_probabilities(checkpoint: Checkpoint, span: Span, ids: torch.Tensor) -> torch.Tensor:
    """`[positions, vocabulary]`, of the next tokens."""
    shell: Any = load_shell(checkpoint, Blocks(span), dtype="float32")
    with torch.inference_mode():
        return shell(ids, use_cache=False).logits[0].float().log_softmax(-1)


def quality_of(found: torch.Tensor, exact: torch.Tensor, ids: torch.Tensor) -> Quality:
    pairs = list(zip(exact.split(128), found.split(128), strict=True))
    divergences = torch.cat([(exact.exp() * (exact - other)).sum(-1) for exact, other in pairs])
    agreements = torch.cat([exact.argmax(-1) == other.argmax(-1) for exact, other in pairs])
    perplexity = (-found[:-1].gather(-1, ids[0, 1:, None]).mean()).exp()
    return Quality(divergences.mean().item(), agreements.float().mean().item(), perplexity.item())


def qualities(checkpoint: Checkpoint, kinds: Sequence[str], tokens: int) -> dict[str, Quality]:
    """Of each kind, on the first tokens of the text."""
    text = VARIED_TEXT.read_text(encoding="utf-8")
    ids = checkpoint.tokenizer()(text, return_tensors="pt").input_ids[:, :tokens]
    exact = log_probabilities(checkpoint, load(checkpoint, "float32"), ids)
    return {kind: quality_of(log_probabilities(checkpoint, load(checkpoint, kind), ids), exact, ids) for kind in kinds}


def measure(spans: dict[str, Span], rounds: int, steps: int) -> tuple[dict[str, Times], dict[int, float]]:
    """Times of all kinds in turns, and the ms to read a MiB by number of threads."""
    times = {kind: Times() for kind in spans}
    reads: dict[int, list[float]] = {threads: [] for threads in THREADS}
    hidden = torch.randn(PREFILL, next(iter(spans.values())).hidden_size)
    vector = torch.ones(READ_BYTES // 4)
    for round_number in range(rounds + 1):  # the first is a warm-up
        for threads in THREADS:
            torch.set_num_threads(threads)
            read = read_ms(vector) / (READ_BYTES / MIB)
            if round_number:
                reads[threads].append(read)
            for kind, span in spans.items():
                decode, prefill = decode_ms(span, hidden, steps), prefill_ms(span, hidden)
                if round_number:
                    times[kind].decode_ms[threads].append(decode)
                    times[kind].prefill_ms[threads].append(prefill)
    return times, {threads: statistics.median(found) for threads, found in reads.items()}


def print_tables(spans: dict[str, Span], times: dict[str, Times], reads: dict[int, float]) -> None:
    gib_per_s = ", ".join(f"{1000 / read / 1024:.1f} with {threads}" for threads, read in reads.items())
    print(f"\nMemory is read at GiB/s by threads: {gib_per_s}.\n")
    heads = [
        *(f"decode ms/token, {threads} thread{'s' * (threads > 1)} (min-max)" for threads in THREADS),
        *(f"of bandwidth, {threads}" for threads in THREADS),
        *(f"prefill tokens/s, {threads}" for threads in THREADS),
    ]
    print(f"| weights | MiB | {' | '.join(heads)} |")
    print(f"|---|---|{'---|' * len(heads)}")
    for kind, span in spans.items():
        mib = span.weight_bytes / MIB
        found = times[kind].decode_ms
        medians = {threads: statistics.median(values) for threads, values in found.items()}
        cells = [f"{medians[threads]:.2f} ({min(found[threads]):.2f}-{max(found[threads]):.2f})" for threads in THREADS]
        cells += [f"{mib * reads[threads] / medians[threads]:.0%}" for threads in THREADS]
        cells += [f"{PREFILL * 1000 / statistics.median(times[kind].prefill_ms[threads]):.0f}" for threads in THREADS]
        print(f"| {kind} | {mib:.0f} | {' | '.join(cells)} |")


def print_quality(found: dict[str, Quality]) -> None:
    print("\n| weights | KL to float32 (nats) | top-1 agreement | perplexity |")
    print("|---|---|---|---|")
    for kind, quality in found.items():
        print(f"| {kind} | {quality.divergence:.1e} | {quality.top1:.4f} | {quality.perplexity:.4f} |")


@contextmanager
def random_1b() -> Iterator[Path]:
    """A checkpoint in the shape of TinyLlama 1.1B, in bfloat16; all of its blocks have the same random weights."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        dtype=torch.bfloat16,
    )
    hidden, middle, kv = config.hidden_size, config.intermediate_size, 2048 // 32 * 4
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }
    block = {f"{path}.weight": (torch.randn(shape) * shape[1] ** -0.5).bfloat16() for path, shape in shapes.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        block[f"{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weight_map: dict[str, str] = {}
        for index in range(config.num_hidden_layers):
            tensors = {f"model.layers.{index}.{rest}": tensor for rest, tensor in block.items()}
            shard = f"block-{index}.safetensors"
            save_file(tensors, folder / shard, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, shard))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        config.save_pretrained(folder)
        yield folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="folder or hub id of a checkpoint")
    parser.add_argument("--random-1b", action="store_true", help="a random model with 1.1 billion weights instead")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="decode steps per kind and round")
    parser.add_argument("--tokens", type=int, default=1024, help="how many tokens of the text to judge by; 0: none")
    arguments = parser.parse_args()
    if (arguments.checkpoint is None) == (not arguments.random_1b):
        parser.error("give a checkpoint or --random-1b")
    if arguments.random_1b:
        with random_1b() as folder:
            compare(folder, arguments, 0)
    else:
        compare(arguments.checkpoint, arguments, arguments.tokens)


def compare(model: Path | str, arguments: argparse.Namespace, tokens: int) -> None:
    checkpoint = Checkpoint.open(model)
    spans = {kind: load(checkpoint, kind) for kind in arguments.kinds}
    gc.collect()
    print(f"{checkpoint.num_blocks} blocks of hidden size {checkpoint.hidden_size}, {arguments.rounds} rounds.")
    print_tables(spans, *measure(spans, arguments.rounds, arguments.steps))
    spans.clear()
    if tokens:
        print_quality(qualities(checkpoint, arguments.kinds, tokens))


if __name__ == "__main__":
    main()
