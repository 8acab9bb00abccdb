"""The cost of audits at a rate of 0.01, against no audits, on the daemons of `benchmarks.liars`; prints Markdown.

    python -m benchmarks.audit_cost [CHECKPOINT] [--answers 8]

Two clients generate greedy answers of 128 tokens in turns, after an answer each, in which the audits examine all peers.
Medians. Peers keep receipts for both clients. Then the CPU time and the memory of the program that computes audits, for
those first examinations, and their number that the rate gives in an answer.
"""

from __future__ import annotations

import argparse
import logging
import signal
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from benchmarks.liars import GREEDY, PROMPT, Daemon, Watched, as_folder, client, honest_daemons, prompts
from splitnet.audit.session_audit import COMPUTED
from splitnet.quant.native import processor

RATE, HOPS, TOKENS = 0.01, 3, 128
COLUMNS = ("tokens/s", "client, CPU ms per token", "peers, CPU ms per token", "bytes per token")


def answer(swarm: Watched, model: Any, ids: torch.Tensor, peers: list[Daemon]) -> tuple[float, ...]:
    """The figures of `COLUMNS` of an answer."""
    peers_s, began_s, began = sum(each.cpu_s() for each in peers), time.process_time(), time.perf_counter()
    how = {**GREEDY, "max_new_tokens": TOKENS, "return_dict_in_generate": True}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    took, own_s = time.perf_counter() - began, time.process_time() - began_s
    peers_s = sum(each.cpu_s() for each in peers) - peers_s
    cache: Any = output.past_key_values
    moved = cache.session.traffic.bytes_sent + cache.session.traffic.bytes_received
    cache.close()
    return TOKENS / took, 1000 * own_s / TOKENS, 1000 * peers_s / TOKENS, moved / TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--answers", type=int, default=8)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the daemons end with this process
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="splitnet-audits-") as name, ExitStack() as stack:
        folder = Path(name)
        texts, model = prompts(arguments.checkpoint), as_folder(arguments.checkpoint, folder / "model")
        peers = stack.enter_context(honest_daemons(folder, model))
        clients = {
            rate: stack.enter_context(client(model, peers[0].address, folder / f"rate{rate}", audit=rate))
            for rate in (0.0, RATE)
        }
        for each in clients.values():
            answer(*each, texts[:1], peers)
        [program] = [each for each in psutil.Process().children() if "splitnet.audit.program" in each.cmdline()]
        used_s, memory = sum(program.cpu_times()[:2]), program.memory_full_info()
        taken: dict[float, list[tuple[float, ...]]] = {rate: [] for rate in clients}
        for index in range(1, arguments.answers + 1):
            for rate in sorted(clients, reverse=bool(index % 2)):
                taken[rate].append(answer(*clients[rate], texts[index : index + 1], peers))
        medians = {rate: [median(column) for column in zip(*rows, strict=True)] for rate, rows in taken.items()}
        print(f"{processor()}; {arguments.answers} answers of each client\n\n| audits | " + " | ".join(COLUMNS) + " |")
        print("|---" * (len(COLUMNS) + 1) + "|")
        for rate, row in medians.items():
            print(f"| {rate:g} | " + " | ".join(f"{each:,.2f}" for each in row) + " |")
        pairs = zip(*taken.values(), strict=True)
        ratios = zip(*([one / other for one, other in zip(*pair[::-1], strict=True)] for pair in pairs), strict=True)
        print("| median of the ratios of pairs | " + " | ".join(f"{median(each):.3f}" for each in ratios) + " |\n")
        expected = sum(RATE * HOPS / (COMPUTED * length) for length in range(PROMPT + 1, PROMPT + TOKENS))
        print(
            f"The program took {used_s:.1f} s of CPU for {HOPS} examinations and its start, and {memory.rss >> 20} MiB "
            f"({memory.uss >> 20} MiB of its own). An answer has {expected:.4f} examinations at this rate."
        )


if __name__ == "__main__":
    main()
