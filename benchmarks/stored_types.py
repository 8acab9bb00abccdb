"""A GGUF file in several types of weights, held as stored: bytes, speed and quality; prints Markdown.

    python -m benchmarks.stored_types MODEL.gguf [--types Q8_0 Q6_K Q5_K Q4_K Q4_0] [--threads 1 2] [--rounds 5]
                                      [--steps 16] [--tokens 1024]

The file is rewritten in each type (`benchmarks/requantise.py`); the file as given comes first. All versions are in
memory together and are timed in turns, with the columns of `benchmarks/weights.py`. Two columns compare the next-token
distributions over a text: "KL as held" with the distributions of the exact numbers of the same version, which shows the
loss by the form in memory; "KL to the source" with the distributions of the given file, which shows the loss by the
type.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import gguf
import torch

from benchmarks.codec_quality import VARIED_TEXT
from benchmarks.requantise import requantise
from benchmarks.weights import MIB, Stopwatch, log_probabilities, print_tables, quality_of
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file with a tokenizer")
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="decode steps per type and round")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the text for the quality")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = {"as it is": arguments.model}
        for name in arguments.types:
            files[name] = Path(folder) / f"{name}.gguf"
            requantise(arguments.model, files[name], gguf.GGMLQuantizationType[name])
        compare(files, arguments)


def compare(files: dict[str, Path], arguments: argparse.Namespace) -> None:
    checkpoints = {name: Checkpoint.open(file) for name, file in files.items()}
    spans = {name: Span.load(one, 0, one.num_blocks) for name, one in checkpoints.items()}
    stopwatch = Stopwatch(time.perf_counter)
    print_tables(spans, *stopwatch.measure(spans, arguments.threads, arguments.rounds, arguments.steps))
    source = checkpoints["as it is"]
    text = VARIED_TEXT.read_text(encoding="utf-8")
    ids = source.tokenizer()(text, return_tensors="pt").input_ids[:, : arguments.tokens]
    exact: torch.Tensor | None = None
    print(
        "\n| weights | blocks in the file, MiB | held, MiB | KL as held (nats) | KL to the source | top-1 agreement |"
    )
    print("|---|---|---|---|---|---|")
    for name, checkpoint in checkpoints.items():
        numbers = log_probabilities(checkpoint, Span.load(checkpoint, 0, checkpoint.num_blocks, weights="float32"), ids)
        exact = numbers if exact is None else exact
        held = log_probabilities(checkpoint, spans[name], ids)
        stored = sum(fact.nbytes for fact in checkpoint.store.tensor_facts(names_of_blocks(checkpoint)).values())
        lost, kind = quality_of(held, numbers, ids), quality_of(numbers, exact, ids)
        cells = [name, f"{stored / MIB:.1f}", f"{spans[name].weight_bytes / MIB:.1f}", f"{lost.divergence:.1e}"]
        print(f"| {' | '.join([*cells, f'{kind.divergence:.1e}', f'{kind.top1:.4f}'])} |", flush=True)


def names_of_blocks(checkpoint: Checkpoint) -> list[str]:
    return [tensor.name for tensors in checkpoint.block_tensors for tensor in tensors]


if __name__ == "__main__":
    main()
