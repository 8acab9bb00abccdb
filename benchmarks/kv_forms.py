"""Each format of KV caches on a model: bytes, speed, and the error of answers, in Markdown.

    python -m benchmarks.kv_forms CHECKPOINT [--text FILE] [--behind 512 8192] [--speed 8192 32768] [--threads 2]
                                             [--save FILE]
    python -m benchmarks.kv_forms --families gpt_neox falcon bloom qwen3 gemma2 gpt_oss [--behind 512 8192]

Quality: a text runs as a prompt in passes of 512 positions, except for its last 256 positions, which run in decode
steps of 16. The next-token distributions of these steps are compared with the distributions of the same steps with
float32 KV caches. --behind: lengths of the prompt. Speed: the median time of decode steps through all blocks, with the
formats in turns, after as many positions of noise as --speed gives. --save writes the text of the longest comparison,
for other programs: `llama-perplexity -f` with `-ctk`, `-ctv`.

With --families, the benchmark measures only the quality, on small models of these families (3 blocks, 4 heads of 64
numbers, a token is a byte). It first trains the models on the rest of the text, some minutes each. "Bits per byte"
measures how well a model predicts the compared positions; an untrained model has 8.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from splitnet.blocks.backbone import load_whole, share_blocks
from splitnet.blocks.kv_cache import SequenceCache
from splitnet.blocks.kv_form import KINDS
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from tests.unit.random_models import random_config

ROOT = Path(__file__).parent.parent
COMPARED, PASS, STEP = 256, 512, 16
FILLED_AT_ONCE = 2048
HEAD = 64
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": {},  # each head has separate keys and values
    "falcon": {"multi_query": True, "new_decoder_architecture": False, "alibi": False},  # one head of keys and values
    "bloom": {},  # ALiBi slopes
    "qwen3": {},  # groups of heads, keys are normed
    "gemma2": {"query_pre_attn_scalar": HEAD, "sliding_window": 512},  # alternating windows, capped scores
    # Alternating windows, sinks, experts.
    "gpt_oss": {"sliding_window": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
}
STEPS = 610  # of training: 4 texts of 256 positions each, in the last 10 steps a text of 2048


def with_form(span: Span, kv: str) -> Span:
    """A span with the same blocks and the same weights in memory, whose KV caches have another format."""
    backbone = share_blocks(span._backbone, span._container, span.start, span.end)
    own = {"weights": span.weights, "windows": span._windows, "packs": span._packs, "whole": span}
    return Span(backbone, span._container, span.start, span.end, **own, kv=kv)


def trained(
    family: str,
    folder: Path,
    text: torch.Tensor,
    positions: int,
    *,
    heads: int = 4,
    blocks: int = 3,
    steps_in_all: int = STEPS,
) -> None:
    """Trains a small model of the family on `text`, for this many positions, and saves it in `folder`."""
    torch.manual_seed(0)
    sizes = {"max_position_embeddings": positions, "num_attention_heads": heads, "num_key_value_heads": 2}
    own = {"head_dim": HEAD} if family in ("qwen3", "gemma2", "gpt_oss") else {}
    config = random_config(
        family, blocks=blocks, hidden=heads * HEAD, vocab=256, **(sizes | own | FAMILIES.get(family, {}))
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rate = 8e-3 / heads
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps_in_all, pct_start=0.1)
    began = time.perf_counter()
    for steps, texts, most in ((steps_in_all - 10, 4, 256), (10, 1, 2048)):
        length = min(most, positions)
        for step in range(steps):
            starts = torch.randint(len(text) - length, (texts,)).tolist()
            ids = torch.stack([text[start : start + length] for start in starts])
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 99 or step + 1 == steps:
                told = f"{family}: step {step + 1} of {steps}, {float(loss.detach()) / math.log(2):.2f} bits per byte"
                print(f"{told}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    model.eval().save_pretrained(folder)


def compare(spans: dict[str, Span], model: Any, ids: torch.Tensor, before: str) -> None:
    """Prints the distance of each format's answers from those of the first format."""
    expected = log_probabilities(spans[KINDS[0]], model, ids)
    told = -float(expected[:-1].gather(1, ids[1 - COMPARED :, None]).mean()) / math.log(2)
    for kv in KINDS[1:]:
        found = log_probabilities(spans[kv], model, ids)
        divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
        top1 = float((expected.argmax(-1) == found.argmax(-1)).float().mean())
        print(f"| {before}{len(ids)} | {kv} | {divergence:.1e} | {top1:.4f} | {told:.2f} |", flush=True)


def compare_families(families: Sequence[str], text: bytes, behind: Sequence[int]) -> None:
    """Trains each family, and prints the errors of its answers with each format."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    ids, rest = data[: max(behind)], data[max(behind) :]
    print("| family | positions | form | KL (nats) | top-1 | bits per byte |\n|---|---|---|---|---|---|", flush=True)
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            trained(family, Path(folder), rest, max(behind))
            checkpoint = Checkpoint.open(folder)
            exact = Span.load(checkpoint, 0, checkpoint.num_blocks, dtype="float32", weights="auto")
            spans, model = {kv: with_form(exact, kv) for kv in KINDS}, load_whole(checkpoint, torch.float32)
            for positions in behind:
                compare(spans, model, ids[:positions], f"{family} | ")


class _Seen(Exception):
    """Raised when the first block is reached."""


@torch.inference_mode()
def before_blocks(blocks: nn.ModuleList, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The input of the first block, `[positions, hidden]`."""
    seen: list[torch.Tensor] = []

    def see(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(given[0] if given else named["hidden_states"])
        raise _Seen

    with blocks[0].register_forward_pre_hook(see, with_kwargs=True), suppress(_Seen):
        model(input_ids=ids[None], use_cache=False)
    return seen[0][0]


@torch.inference_mode()
def log_probabilities(span: Span, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log probabilities of the last `COMPARED` positions, `[positions, words]`."""
    blocks: Any = model.base_model.get_submodule(span._container)
    hidden = before_blocks(blocks, model, ids)
    row, outputs = span.new_row(len(ids)), list[torch.Tensor]()
    while row.length < len(ids):
        begin, until = row.length, len(ids) - COMPARED
        end = min(begin + PASS, until) if begin < until else min(begin + STEP, len(ids))
        output = span.forward(hidden[begin:end], [RowChunk(row, begin, end - begin)])
        if begin >= until:
            outputs.append(output)
    own = torch.cat(outputs)[None]
    with blocks[-1].register_forward_hook(lambda _, __, given: (own, *given[1:]) if type(given) is tuple else own):
        return model(input_ids=ids[None, -COMPARED:], use_cache=False).logits[0].float().log_softmax(-1)


@torch.inference_mode()
def filled_row(span: Span, positions: int, room: int) -> SequenceCache:
    """A row with this many positions of noise."""
    row = span.new_row(room)
    span.forward(torch.zeros(1, span.hidden_size), [RowChunk(row, 0, 1)])
    shapes = row.shapes()
    row.crop(0)
    noise = torch.Generator().manual_seed(0)
    for block, ((heads, size), (value_heads, value_size)) in shapes.items():
        for start in range(0, positions, FILLED_AT_ONCE):
            count = min(FILLED_AT_ONCE, positions - start)
            keys = torch.randn(1, heads, count, size, generator=noise, dtype=span.dtype)
            values = torch.randn(1, value_heads, count, value_size, generator=noise, dtype=span.dtype)
            row.store(block, start, keys, values)
    row.advance(positions)
    return row


def milliseconds(spans: dict[str, Span], positions: int, steps: int) -> dict[str, float]:
    """Median ms of decode steps, with formats in turns."""
    rows = {kv: filled_row(span, positions, positions + steps) for kv, span in spans.items()}
    times: dict[str, list[float]] = {kv: [] for kv in spans}
    for index in range(steps):
        for kv, span in spans.items():
            given = torch.randn(1, span.hidden_size, generator=torch.Generator().manual_seed(index))
            began = time.perf_counter()
            span.forward(given, [RowChunk(rows[kv], positions + index, 1)])
            times[kv].append(1000 * (time.perf_counter() - began))
    return {kv: statistics.median(each[2:]) for kv, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=[])
    parser.add_argument("--text", type=Path, nargs="+", default=sorted((ROOT / "docs").glob("*.md")))
    parser.add_argument("--behind", type=int, nargs="*", default=[512, 8192])
    parser.add_argument("--speed", type=int, nargs="*", default=[8192, 32768])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if bool(arguments.checkpoint) == bool(arguments.families):
        parser.error("give a checkpoint, or families with --families")
    if arguments.families and (arguments.save or not arguments.behind):
        parser.error("--families compares only quality: give positions with --behind, and omit --save")
    text = "\n".join(file.read_text(encoding="utf-8") for file in arguments.text)
    if arguments.families:
        compare_families(arguments.families, text.encode(), arguments.behind)
        return
    checkpoint = Checkpoint.open(arguments.checkpoint)
    exact = Span.load(checkpoint, 0, checkpoint.num_blocks, dtype="float32", weights="auto")
    spans = {kv: with_form(exact, kv) for kv in KINDS}
    plain = spans[KINDS[0]].kv_bytes_per_position
    print("| form | bytes per position | of float32 | further KiB of a row |\n|---|---|---|---|")
    for kv, span in spans.items():
        size = span.kv_bytes_per_position
        print(f"| {kv} | {size} | 1 / {plain / size:.2f} | {span.row_bytes / 1024:.0f} |", flush=True)
    if arguments.behind:
        model, tokenizer = load_whole(checkpoint, torch.float32), checkpoint.tokenizer()
        ids = tokenizer(text, return_tensors="pt").input_ids[0, : max(arguments.behind)]
        if arguments.save:
            arguments.save.write_text(tokenizer.decode(ids), encoding="utf-8")
        print("\n| positions | form | KL (nats) | top-1 | bits per token |\n|---|---|---|---|---|")
        for positions in arguments.behind:
            compare(spans, model, ids[:positions], "")
        del model
    if arguments.speed:
        print("\n| positions | form | ms per token | tokens/s | times float32 |\n|---|---|---|---|---|")
    for positions in arguments.speed:
        medians = milliseconds(spans, positions, arguments.steps)
        for kv, ms in medians.items():
            times = medians[KINDS[0]] / ms
            print(f"| {positions} | {kv} | {ms:.1f} | {1000 / ms:.1f} | {times:.2f} |", flush=True)


if __name__ == "__main__":
    main()
