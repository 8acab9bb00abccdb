"""Compares a batch of embeddings with the prefill of one prompt, in tokens/s through the same peers; prints Markdown.

    python -m benchmarks.embeddings CHECKPOINT [--texts 64] [--tokens 128] [--prompt 2048] [--weights auto] [--rounds 5]

Two daemons of one thread each have half of the blocks each, on this machine. The gateway is asked in turns for
embeddings of `--texts` texts of `--tokens` random tokens, and for one token after a prompt of `--prompt` random tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.serve_load import Peer, client_of, gateway, peer
from splitnet.checkpoint.checkpoint import Checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="of each text")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--weights", default="auto", help="weight format of the peers and of the head")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.streams = 2
    checkpoint = Checkpoint.open(arguments.checkpoint)
    half = checkpoint.num_blocks // 2
    vocabulary = checkpoint.config.get_text_config().vocab_size
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        peers: list[Peer] = []
        for span in ((0, half), (half, checkpoint.num_blocks)):
            peers.append(running.enter_context(peer(Path(folder), arguments, span, peers)))
        url = running.enter_context(gateway(Path(folder), arguments, peers[0].address_file.read_text().strip()))
        asyncio.run(measure(url, vocabulary, arguments))
    return 0


async def measure(url: str, vocabulary: int, arguments: argparse.Namespace) -> None:
    client = client_of(url)
    (model,) = [model.id async for model in client.models.list()]
    speeds: dict[str, list[float]] = {"prefill": [], "embeddings": []}
    for _ in range(arguments.rounds + 1):
        prompt = random.choices(range(vocabulary), k=arguments.prompt)
        texts = [random.choices(range(vocabulary), k=arguments.tokens) for _ in range(arguments.texts)]
        began = time.perf_counter()
        await client.completions.create(model=model, prompt=prompt, max_tokens=1)
        speeds["prefill"].append(len(prompt) / (time.perf_counter() - began))
        began = time.perf_counter()
        reply = await client.embeddings.create(model=model, input=texts)
        speeds["embeddings"].append(reply.usage.total_tokens / (time.perf_counter() - began))
    print("| | tokens/s, median (range) | times the prefill |\n|---|---|---|")
    base = statistics.median(speeds["prefill"][1:])  # the first round warms up
    for name, each in speeds.items():
        seen = each[1:]
        median = statistics.median(seen)
        print(f"| {name} | {median:.0f} ({min(seen):.0f}-{max(seen):.0f}) | {median / base:.2f} |")


if __name__ == "__main__":
    sys.exit(main())
