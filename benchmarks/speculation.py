"""What drafts are worth over long links: tokens/s with and without, on texts that repeat their prompts and on others.

Three daemons with a third of the blocks each and a client are four hosts of an emulated network (see docs/netlab.md).
With --local-blocks the client runs some blocks itself; peers whose blocks it has all have nothing to do then. Every
prompt is answered with and without drafts in turns, greedily. With weights in floats the answers must be equal.

    sudo .venv/bin/python -m benchmarks.speculation CHECKPOINT [--delay 20] [--rate 100] [--weights float16]
                                                    [--local-blocks 0:10]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.netlab import Lab, LabError
from benchmarks.netlab.peers import LabPeers, even_spans
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.hf.causal_lm import RemoteCausalLM, attach
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.tools.bench.backends import Clock

PEERS = ("first", "middle", "last")
REPEATING = Path(__file__).parent / "data" / "repeating_prompts.json"
OTHERS = {
    "a story": "Write a story about a fox who learns to read.",
    "an explanation": "Explain how rainbows form.",
    "a letter": "Write a letter to a friend about your first week in a new town.",
}
EXACT = ("float32", "float16")
"""Weights whose products do not depend on how many positions share a pass, but for the order of sums."""

ARMS = {"off": None, "drafts": "prompt-lookup"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="hub id or folder of a checkpoint")
    parser.add_argument("--delay", type=float, default=20.0, help="ms one way between any two hosts")
    parser.add_argument("--rate", type=float, default=100.0, help="Mbit/s of every host's link, 0: no limit")
    parser.add_argument("--weights", default="float32", help="of the daemons and of the client's own blocks")
    parser.add_argument("--codec", default="auto")
    parser.add_argument("--local-blocks", default=None, help="blocks that the client runs, as 0:10")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--texts", nargs="+", help="only those whose name has one of these in it")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(arguments.checkpoint)
    spans = even_spans(checkpoint.num_blocks, PEERS)
    options = ("--threads", "1", "--weights", arguments.weights)
    try:
        with (
            Lab(["client", *PEERS], delay_ms=arguments.delay, rate_mbit=arguments.rate) as lab,
            LabPeers(lab, arguments.checkpoint, spans, options) as peers,
            lab.inside("client"),
            Swarm(ModelFacts.of(checkpoint), list(peers.addresses.values())) as swarm,
        ):
            model = attach(
                checkpoint,
                swarm,
                codec=arguments.codec,
                local_blocks=arguments.local_blocks,
                local_weights=arguments.weights,
            )
            measure(model, checkpoint, arguments)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(model: RemoteCausalLM, checkpoint: Checkpoint, arguments: argparse.Namespace) -> None:
    """Answers all prompts with both arms in turns."""
    tokenizer = checkpoint.tokenizer()
    prompts = {name: tokenizer(text).input_ids for name, text in json.loads(REPEATING.read_text()).items()}
    for name, text in OTHERS.items():
        chat = [{"role": "user", "content": text}]
        prompts[name] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    print("| text | tokens | off, tokens/s | drafts, tokens/s | times as fast (range) | steps | same text |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, prompt in prompts.items():
        if arguments.texts and not any(part in name for part in arguments.texts):
            continue
        ids = torch.tensor([prompt])
        speeds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        steps: dict[str, int] = {}
        texts: set[tuple[int, ...]] = set()
        for index in range(arguments.rounds + 1):
            for arm, speculate in ARMS.items():
                text, speed, steps[arm] = answer(model, ids, speculate, arguments.tokens)
                texts.add(text)
                if index:  # the first warms up
                    speeds[arm].append(speed)
        same = len(texts) == 1
        assert same or arguments.weights not in EXACT, f"{name}: with drafts the text is another one"
        off, drafts = statistics.median(speeds["off"]), statistics.median(speeds["drafts"])
        ratios = [with_ / without for with_, without in zip(speeds["drafts"], speeds["off"], strict=True)]
        print(
            f"| {name} | {len(next(iter(texts)))} | {off:.2f} | {drafts:.2f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {steps['drafts']} "
            f"| {'yes' if same else 'no'} |",
            flush=True,
        )


def answer(
    model: RemoteCausalLM, ids: torch.Tensor, speculate: str | None, tokens: int
) -> tuple[tuple[int, ...], float, int]:
    """The new tokens, how many came per second after the first, and in how many steps they were computed."""
    clock = Clock()
    with model.session() as cache:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
            speculate=speculate,
        )
        ended = time.perf_counter()
        assert cache.session is not None
        steps = cache.session.traffic.steps
    new = tuple(output[0, ids.shape[1] :].tolist())
    return new, (len(new) - 1) / (ended - clock.times[0]), steps


if __name__ == "__main__":
    sys.exit(main())
