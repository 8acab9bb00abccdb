"""The screened head compared with the whole one: time, rows, and whether tokens and logits are the same.

    python -m benchmarks.head [--checkpoint FILE.gguf] [--states 2000] [--shapes 151936x896 262144x640]

For each head and number of wanted logits, a line with the time of a screened token as a share of the whole head's, that
of the copy alone, the rows that are computed exactly, the states that the bounds do not decide, and the states whose
token, logits or sample differ, which must be 0. Times are of processor time of one thread, of products in turns. The
states of a checkpoint are those of a text; random heads have normal weights, and random states. A screen sees `STATES`
other states first. With --random, the states of the checkpoint's head are random, too.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, TopKLogitsWarper

from splitnet.blocks.head import STATES
from splitnet.blocks.screen import Screen
from splitnet.quant.native import multiply_floats

COUNTS = (1, 20, 50)
PIECE = 512  # tokens of a text


def of_checkpoint(file: Path, states: int, text: Path) -> tuple[Tensor, Tensor]:
    """The head of a GGUF file as floats, and the inputs of the head for tokens of a text."""
    where = {"gguf_file": file.name}
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, **where, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(file.parent, **where)(text.read_text(), return_tensors="pt").input_ids[0]
    pieces = ids[: states + STATES].split(PIECE)
    found = torch.cat([model.model(piece[None]).last_hidden_state[0] for piece in pieces])
    return model.get_output_embeddings().weight.detach().clone(), found


def random_head(shape: str, states: int) -> tuple[Tensor, Tensor]:
    outputs, inputs = (int(size) for size in shape.split("x"))
    return torch.randn(outputs, inputs) * 0.02, torch.randn(states + STATES, inputs)


def measure(name: str, weight: Tensor, states: Tensor, counts: tuple[int, ...] = COUNTS) -> None:
    began = time.thread_time()
    screen = Screen.of(weight, states[:STATES].float().square().mean(0).sqrt())
    assert screen is not None, "a weight is not finite"
    made_s = time.thread_time() - began
    made = f"{screen.nbytes / 1e6:.0f} of {weight.nbytes / 1e6:.0f} MB, {made_s:.1f} s"
    for count in counts:
        whole_s = copy_s = screened_s = kept = 0.0
        undecided = different = 0
        warper = LogitsProcessorList([TopKLogitsWarper(count)])
        for seed, state in enumerate(states[STATES:]):
            times = [time.thread_time()]
            whole = multiply_floats(state[None], weight)[0]
            times.append(time.thread_time())
            estimates = screen.copy.multiply(state[None].float())[0]
            times.append(time.thread_time())
            best = screen.best_logits(state, estimates, count)
            times.append(time.thread_time())
            whole_s += times[1] - times[0]
            copy_s += times[2] - times[1]
            screened_s += times[3] - times[1] + (times[1] - times[0] if best is None else 0)
            if best is None:
                undecided += 1
                continue
            there = best > -math.inf
            kept += float(there.sum())
            texts = [_sample(warper, logits, seed) for logits in (whole, best)]
            same = torch.equal(best[there], whole[there]) and int(best.argmax()) == int(whole.argmax())
            different += not (same and all(torch.equal(*pair) for pair in zip(*texts, strict=True)))
        number = len(states) - STATES
        share, copy = screened_s / whole_s, copy_s / whole_s
        rows = kept / max(1, number - undecided)
        print(
            f"| {name} | {count} | {whole_s / number * 1e3:.2f} | {share:.2f} | {copy:.2f} | {rows:.0f} | "
            f"{undecided / number:.2%} | {different} of {number} | {made} |",
            flush=True,
        )


def _sample(warper: LogitsProcessorList, logits: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The scores and a token that `generate()` chooses."""
    unused: Any = torch.zeros(1, 1, dtype=torch.long)
    scores: Any = warper(unused, logits[None].float())
    generator = torch.Generator().manual_seed(seed)
    return scores, torch.multinomial(scores.softmax(-1), 1, generator=generator)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--text", type=Path, default=Path("benchmarks/data/varied_text.txt"))
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--states", type=int, default=400)
    parser.add_argument("--shapes", nargs="*", default=[])
    parser.add_argument("--counts", nargs="*", type=int, default=COUNTS)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, given.dtype)
    print("| head | wanted | whole, ms | screened / whole | copy / whole | rows | undecided | different | the copy |")
    print("|---|---|---|---|---|---|---|---|---|")
    heads = [(shape, *random_head(shape, given.states)) for shape in given.shapes]
    if given.checkpoint is not None:
        weight, states = of_checkpoint(given.checkpoint, STATES if given.random else given.states, given.text)
        if given.random:
            states = torch.cat((states[:STATES], torch.randn(given.states, weight.shape[1]) * states.std(0)))
        heads.append((given.checkpoint.stem, weight, states))
    for name, weight, states in heads:
        measure(name, weight.to(dtype), states.to(dtype), tuple(given.counts))


if __name__ == "__main__":
    main()
