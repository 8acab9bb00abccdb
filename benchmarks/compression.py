"""How much `splitnet compress` loses, beside rounding to nearest: small models that are trained here on bytes of
Python's documentation, or a model in floats.

    python -m benchmarks.compression --families llama,mixtral --bits 4,3
    python -m benchmarks.compression --families qwen3 --heads 10 --blocks 12 --steps 260
    python -m benchmarks.compression --model FOLDER --bits 4,3.5,3,2 --positions 12288

Each row: bits, KL in nats to the model in floats and share of the same first tokens, on text without calibration, for
rounding to nearest and for `compress`, their ratio, and the seconds of `compress`. --beside: checkpoints of the model
that other programs have compressed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.kv_forms import STEPS, trained
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.compress import blocks, experts
from splitnet.compress.blocks import compress_blocks
from splitnet.compress.checkpoint_folder import compress_checkpoint
from splitnet.compress.rounding import Compression, Feedback, round_to_nearest, sequence_lengths

LENGTH = 256
HELD_OUT = 4096  # tokens at the end of the text, which no model is trained or calibrated on


class _Nearest(Feedback):
    def __init__(self, moments: torch.Tensor) -> None: ...

    def round_weight(self, weight: torch.Tensor, bits: int, group: int) -> Any:
        return round_to_nearest(weight, bits, group)


@torch.inference_mode()
def scores(folder: Path, text: torch.Tensor) -> torch.Tensor:
    """Log probabilities, `[tokens, vocabulary]`."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.cat(
        [log_softmax(model(some[None], use_cache=False).logits[0].float(), -1) for some in text.split(LENGTH)]
    )


def compared(found: torch.Tensor, exact: torch.Tensor) -> list[str]:
    """KL in nats, and share of the same first tokens."""
    kl = float(kl_div(found, exact, reduction="batchmean", log_target=True))
    return [f"{kl:.3g}", f"{float((found.argmax(-1) == exact.argmax(-1)).float().mean()):.1%}"]


def measure(
    name: str,
    model: Path,
    ids: torch.Tensor,
    bits: list[float],
    group: int,
    positions: int,
    others: Sequence[Path] = (),
) -> None:
    held, calibration = ids[-HELD_OUT:], ids[: min(positions, len(ids) - HELD_OUT)].tolist()
    exact = scores(model, held)
    loss = cross_entropy(exact[:-1], held[1:])
    print(f"{name}: {float(loss) / 0.6931:.2f} bits per token", flush=True)
    for other in others:
        print(f"| {name} | {other.name} | {' | '.join(compared(scores(other, held), exact))} |", flush=True)
    checkpoint = Checkpoint.open(model)
    for few in bits:
        how, told = Compression(few, group, sequence_lengths(len(calibration), LENGTH)), list[str]()
        for feedback in (_Nearest, Feedback):
            blocks.Feedback = experts.Feedback = feedback
            with tempfile.TemporaryDirectory() as folder:
                began = time.monotonic()
                run = partial(compress_blocks, checkpoint, 0, checkpoint.num_blocks, how=how)
                compress_checkpoint(checkpoint, calibration, Path(folder), how, run)
                took = time.monotonic() - began
                found = scores(Path(folder), held)
            told += compared(found, exact)
        ratio = float(told[2]) / float(told[0])
        print(f"| {name} | {few:g}, {group} | {' | '.join(told)} | {ratio:.2f} | {took:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--beside", type=Path, nargs="*", default=[])
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--positions", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    sizes = {"heads": given.heads, "blocks": given.blocks, "steps_in_all": given.steps}
    text = "\n\n".join(topics[name] for name in sorted(topics))
    bits = [float(each) for each in given.bits.split(",")]
    if given.model is not None:
        ids = torch.tensor(AutoTokenizer.from_pretrained(given.model)(text, add_special_tokens=False).input_ids)
        measure(given.model.name, given.model, ids, bits, given.group, given.positions, given.beside)
    ids = torch.tensor(list(text.encode()))
    for family in filter(None, given.families.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            trained(family, Path(folder), ids[:-HELD_OUT], LENGTH, **sizes)
            measure(family, Path(folder), ids, bits, given.group, given.positions)


if __name__ == "__main__":
    main()
