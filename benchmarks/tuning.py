"""Compares fine-tuning through peers with PEFT in one process: gradients, loss curves, speed, and bytes on the links.

Three daemons serve a third of the model each. Training through them and training in this process use the same adapters,
data and seeds.

    python -m benchmarks.tuning CHECKPOINT [--steps 20] [--rounds 3] [--parts gradients curves speed]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.demo import EXACT, LocalSwarm
from splitnet.hf.causal_lm import RemoteCausalLM, attach
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.tools.tune.methods import begin_prefix

TEXT = Path(__file__).parent / "data" / "varied_text.txt"
TASK = TaskType.CAUSAL_LM
PEERS = 3
ROWS = 16
COLUMNS = 64
LEARNING_RATE = 1e-3
PARTS = ["gradients", "curves", "speed"]

BEGINNING = "Write what follows in the way of the examples that you have seen, one after the other."
PREFIX = "prefix tuning"

METHODS: dict[str, Callable[[str], Any]] = {
    "prompt tuning": lambda folder: PromptTuningConfig(
        task_type=TASK,
        num_virtual_tokens=16,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=BEGINNING,
        tokenizer_name_or_path=folder,
    ),
    "p-tuning": lambda _: PromptEncoderConfig(task_type=TASK, num_virtual_tokens=16, encoder_hidden_size=128),
    PREFIX: lambda _: PrefixTuningConfig(task_type=TASK, num_virtual_tokens=16),
    "prefix tuning, projected": lambda _: PrefixTuningConfig(
        task_type=TASK, num_virtual_tokens=16, prefix_projection=True, encoder_hidden_size=128
    ),
    "LoRA": lambda _: LoraConfig(task_type=TASK, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a checkpoint")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    torch.set_num_threads(PEERS)
    checkpoint = Checkpoint.open(arguments.checkpoint)
    batches = batches_of(arguments.checkpoint)

    def local() -> Any:
        return AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32)

    with LocalSwarm(arguments.checkpoint, PEERS, EXACT) as peers:
        address = peers.wait()

        def remote(codec: str) -> RemoteCausalLM:
            return attach(checkpoint, Swarm(ModelFacts.of(checkpoint), [address]), codec=codec)

        models = {"none": remote("none"), "int8": remote("int8")}
        if "gradients" in arguments.parts:
            compare_gradients(local, models, batches[0], arguments.methods)
        if "curves" in arguments.parts:
            compare_curves(local, models["none"], batches, arguments.steps, arguments.methods, arguments.learning_rate)
        if "speed" in arguments.parts:
            compare_speed(local, models, batches, arguments.rounds, arguments.methods)
        for model in models.values():
            model.close()


def batches_of(folder: str) -> list[dict[str, torch.Tensor]]:
    """Batches of text, `[ROWS, COLUMNS]`."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text(), return_tensors="pt")["input_ids"][0]
    rows = ids[: len(ids) // COLUMNS * COLUMNS].view(-1, COLUMNS)
    chosen = [rows[torch.arange(first, first + ROWS) % len(rows)] for first in range(0, 8 * ROWS, ROWS)]
    return [{"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": batch} for batch in chosen]


def adapted(model: Any, method: str) -> Any:
    """The model with a new adapter, initialized as in `splitnet tune`, with the same values each time."""
    torch.manual_seed(0)
    wrapped: Any = get_peft_model(model, METHODS[method](model.name_or_path))
    if method == PREFIX:
        begin_prefix(wrapped, text_as_prefix(model.name_or_path))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # with zeros in B, the gradient of A would be zero
            torch.nn.init.normal_(parameter, std=0.02)
    return wrapped


@cache
def text_as_prefix(folder: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The keys and values of a text, for each block."""
    ids = AutoTokenizer.from_pretrained(folder)(BEGINNING, return_tensors="pt").input_ids
    with torch.no_grad():
        kept = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids, use_cache=True).past_key_values
    return [(layer.keys[0], layer.values[0]) for layer in kept.layers]


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss, as `splitnet tune` computes it."""
    return model(**batch, **({"logits_to_keep": 1} if getattr(model, "loss_in_parts", False) else {})).loss


def gradient_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss_of(model, batch).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad])


def compare_gradients(
    local: Callable[[], Any], models: dict[str, Any], batch: dict[str, torch.Tensor], methods: Sequence[str]
) -> None:
    print("| method | trained | largest error, codec none | cosine, codec none | cosine, codec int8 |")
    print("|---|---|---|---|---|")
    for method in methods:
        expected = gradient_of(adapted(local(), method), batch)
        found: dict[str, torch.Tensor] = {}
        for codec, model in models.items():
            wrapped = adapted(model, method)
            found[codec] = gradient_of(wrapped, batch)
            free(wrapped, method)
        error = float((found["none"] - expected).abs().max() / expected.abs().max())
        cosines = [cosine(found[codec], expected) for codec in ("none", "int8")]
        print(f"| {method} | {len(expected):,} | {error:.1e} | {cosines[0]:.6f} | {cosines[1]:.6f} |", flush=True)
    print()


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.cosine_similarity(one.double(), other.double(), dim=0))


def curve(
    model: Any, batches: list[dict[str, torch.Tensor]], steps: int, learning_rate: float = LEARNING_RATE
) -> list[float]:
    """The losses of some steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses: list[float] = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batches[step % len(batches)])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compare_curves(
    local: Callable[[], Any],
    remote: Any,
    batches: list[dict[str, torch.Tensor]],
    steps: int,
    methods: Sequence[str],
    learning_rate: float,
) -> None:
    print(f"| method | loss at the start | after {steps} steps | largest difference to PEFT in one process |")
    print("|---|---|---|---|")
    for method in methods:
        expected = curve(adapted(local(), method), batches, steps, learning_rate)
        wrapped = adapted(remote, method)
        found = curve(wrapped, batches, steps, learning_rate)
        free(wrapped, method)
        difference = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        print(f"| {method} | {found[0]:.4f} | {found[-1]:.4f} | {difference:.1e} |", flush=True)
    print()


def compare_speed(
    local: Callable[[], Any],
    models: dict[str, Any],
    batches: list[dict[str, torch.Tensor]],
    rounds: int,
    methods: Sequence[str],
) -> None:
    print("| method | 1 process, tokens/s | 3 peers, codec none | ratio (range) | codec int8 | ratio (range) |")
    print("|---|---|---|---|---|---|")
    traffic: list[str] = []
    for method in methods:
        alone = adapted(local(), method)
        speeds: dict[str, list[float]] = {"alone": [], "none": [], "int8": []}
        for _ in range(rounds):
            speeds["alone"].append(tokens_per_s(alone, batches))
            for codec, model in models.items():
                wrapped = adapted(model, method)
                before = model.training_bytes
                speeds[codec].append(tokens_per_s(wrapped, batches))
                after = model.training_bytes
                if len(speeds[codec]) == rounds:
                    per_token = [(b - a) / (2 * ROWS * COLUMNS) for a, b in zip(before, after, strict=True)]
                    traffic.append(f"| {method} | {codec} | {per_token[0]:.0f} | {per_token[1]:.0f} |")
                free(wrapped, method)
        cells = [f"{statistics.median(speeds['alone']):.0f}"]
        for codec in models:
            ratios = [a / b for a, b in zip(speeds[codec], speeds["alone"], strict=True)]
            cells.append(f"{statistics.median(speeds[codec]):.0f}")
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
    print("\n| method | codec | bytes that the client sends per token | bytes that it receives |")
    print("|---|---|---|---|")
    print("\n".join(traffic))


def tokens_per_s(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Tokens per second of two training steps."""
    began = time.perf_counter()
    curve(model, batches, 2)
    return 2 * ROWS * COLUMNS / (time.perf_counter() - began)


def free(wrapped: Any, method: str) -> None:
    """Removes an adapter from a model, for the next use of the model."""
    if method == "LoRA":
        wrapped.unload()


if __name__ == "__main__":
    main()
