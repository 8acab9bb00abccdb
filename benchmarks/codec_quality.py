"""The cost of each codec in quality, bytes and time, on the boundary activations of a real model; prints Markdown.

    python -m benchmarks.codec_quality CHECKPOINT [--text FILE] [--cuts 10 20] [--cuts 5 25] [--tokens 1024]

The model runs whole; at each cut the codec under test encodes and decodes the activations, as between two
peers. Each result is compared with the same model without codecs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from splitnet.blocks.backbone import load_whole
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.wire.codecs import CODECS, Codec

VARIED_TEXT = Path(__file__).parent / "data" / "varied_text.txt"


@dataclass(frozen=True)
class Quality:
    """The distance of a model with codecs at its cuts from the exact model, over all positions of a text."""

    divergence: float
    """Mean Kullback-Leibler divergence of the next-token distribution from the exact one, in nats."""
    top1: float
    """Share of positions at which the most likely next token is that of the exact model."""
    perplexity: float


class Comparison:
    """A model on one text, and its exact output."""

    def __init__(self, checkpoint: Path | str, text: str, tokens: int) -> None:
        opened = Checkpoint.open(checkpoint)
        self.model = load_whole(opened, torch.float32)
        ids = opened.tokenizer()(text, return_tensors="pt").input_ids
        if ids.shape[1] < 2:
            raise ValueError("the text must have at least two tokens")
        self.ids = ids[:, :tokens]
        self.exact = self._log_probabilities()

    @property
    def blocks(self) -> Any:
        return self.model.get_decoder().layers

    @property
    def exact_perplexity(self) -> float:
        return self._perplexity(self.exact)

    def quality(self, codec: Codec, cuts: Sequence[int]) -> Quality:
        """Run the model with `codec` before the blocks numbered in `cuts`."""
        with self._codec_at(cuts, codec):
            found = self._log_probabilities()
        pairs = list(zip(self.exact.split(128), found.split(128), strict=True))
        divergences = torch.cat([(exact.exp() * (exact - other)).sum(-1) for exact, other in pairs])
        agreements = torch.cat([exact.argmax(-1) == other.argmax(-1) for exact, other in pairs])
        return Quality(divergences.mean().item(), agreements.float().mean().item(), self._perplexity(found))

    def boundary(self, cut: int) -> torch.Tensor:
        """Return the exact activations before block `cut`, `[positions, hidden]`."""
        kept: list[torch.Tensor] = []

        def keep(rows: torch.Tensor) -> torch.Tensor:
            kept.append(rows)
            return rows

        with self._hooked([cut], keep):
            self._log_probabilities()
        return kept[0]

    @torch.no_grad()
    def _log_probabilities(self) -> torch.Tensor:
        return self.model(self.ids, use_cache=False).logits[0].float().log_softmax(-1)

    def _perplexity(self, log_probabilities: torch.Tensor) -> float:
        return (-log_probabilities[:-1].gather(-1, self.ids[0, 1:, None]).mean()).exp().item()

    def _codec_at(self, cuts: Sequence[int], codec: Codec) -> Any:
        return self._hooked(cuts, lambda rows: codec.decode(codec.encode(rows), *rows.shape))

    @contextmanager
    def _hooked(self, cuts: Sequence[int], change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        def hook(_module: object, _inputs: object, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = change(hidden[0])[None]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handles = [self.blocks[cut - 1].register_forward_hook(hook) for cut in cuts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def microseconds(call: Callable[[], object], seconds: float = 0.2) -> float:
    """Return the median time of a call, in microseconds, over calls that fill `seconds`."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e6


def timings(codec: Codec, rows: torch.Tensor) -> tuple[float, float]:
    """Return the microseconds to encode and to decode `rows`."""
    payload = codec.encode(rows)
    return microseconds(lambda: codec.encode(rows)), microseconds(lambda: codec.decode(payload, *rows.shape))


def print_quality(comparison: Comparison, cuts: Sequence[int]) -> None:
    exact = comparison.exact_perplexity
    print(f"\nCuts before blocks {' and '.join(map(str, cuts))}; exact perplexity {exact:.4f}.\n")
    print("| codec | KL to exact (nats) | top-1 agreement | perplexity | change |")
    print("|---|---|---|---|---|")
    for codec in CODECS.values():
        found = comparison.quality(codec, cuts)
        change = found.perplexity / exact - 1
        print(f"| {codec.name} | {found.divergence:.1e} | {found.top1:.4f} | {found.perplexity:.4f} | {change:+.3%} |")


def print_costs(rows: torch.Tensor) -> None:
    positions, hidden = rows.shape
    print(f"\nHidden size {hidden}, one thread, median times in microseconds.\n")
    print(
        f"| codec | bytes per token | bytes per value | encode 1 | decode 1 | encode {positions} | decode {positions} |"
    )
    print("|---|---|---|---|---|---|---|")
    for codec in CODECS.values():
        size = codec.bytes_per_position(hidden)
        times = [*timings(codec, rows[-1:].clone()), *timings(codec, rows)]
        print(f"| {codec.name} | {size} | {size / hidden:.3f} | " + " | ".join(f"{each:.0f}" for each in times) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hugging Face id of the model")
    parser.add_argument(
        "--text", type=Path, default=VARIED_TEXT, help="a text file (default: the one beside this script)"
    )
    parser.add_argument("--cuts", type=int, nargs="+", action="append", help="blocks to cut before; may be repeated")
    parser.add_argument("--tokens", type=int, default=1024, help="how many tokens of the text to use")
    arguments = parser.parse_args()

    comparison = Comparison(arguments.checkpoint, arguments.text.read_text(encoding="utf-8"), arguments.tokens)
    count = len(comparison.blocks)
    placements = arguments.cuts or [[count // 3, 2 * count // 3], [count // 6, 5 * count // 6]]
    if any(not 1 <= cut < count for cuts in placements for cut in cuts):
        parser.error(f"cuts must lie between 1 and {count - 1}: the model has {count} blocks")
    print(f"{arguments.checkpoint}: {count} blocks, {comparison.ids.shape[1]} tokens of {arguments.text.name}.")
    for cuts in placements:
        print_quality(comparison, cuts)
    rows = comparison.boundary(placements[0][-1])[:512].clone()
    torch.set_num_threads(1)
    print_costs(rows)


if __name__ == "__main__":
    main()
