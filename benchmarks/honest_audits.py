"""Sessions with honest peers, each hop examined in each session: alarms, and the largest statistic; prints Markdown.

    python -m benchmarks.honest_audits [--seconds 480] [--families llama qwen3] [--codecs none bf16 int8]
                                      [--kernels avx2]

Three peers in this process serve a random model of six blocks, for each weight format and type that blocks compute in.
Clients forget after each session whom they have examined. Sessions take turns: greedy, sampled, two rows of different
lengths, beams, drafts, and prompts of 1 to 70 tokens. A margin is a statistic relative to its limit: 1 is an alarm.
Outputs with the very bytes that the auditor computes have none. With `--kernels`, the auditor is a program that uses
these kernels, so that fewer outputs are equal.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.tolerance import CLAIMS, weights_and_type
from splitnet.audit.auditor import Auditor
from splitnet.audit.comparison import Verdict
from splitnet.audit.examine import examine
from splitnet.audit.piece import Piece
from splitnet.audit.program import AuditProgram
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import PeerLied
from splitnet.quant.native import PATH_VARIABLE, processor
from tests.swarm.harness import SPANS, dht_node, local_swarm
from tests.unit.random_models import random_checkpoint

PLAIN: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"do_sample": True},
    {"rows": 2},
    {"num_beams": 3},
    {"speculate": "prompt-lookup"},
)
TOTAL = "all"
LENGTHS = (1, 9, 33, 70, 18)
ONCE = 1e-9  # a rate at which only peers that are new to the client are examined


def one_session(model: Any, number: int) -> None:
    ids = torch.randint(3, 300, (2, LENGTHS[number // len(WAYS) % len(LENGTHS)]))
    mask, way = torch.ones_like(ids), dict(WAYS[number % len(WAYS)])
    rows = way.pop("rows", 1)
    if rows > 1:
        mask[0, : ids.shape[1] // 2] = 0
    model.generate(ids[:rows], attention_mask=mask[:rows], **{**PLAIN, **way})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--families", nargs="+", default=["llama", "qwen3"])
    parser.add_argument("--codecs", nargs="+", default=["none", "bf16", "int8"])
    parser.add_argument("--kernels")
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    auditors: list[Auditor] = []
    found: dict[str, list[float]] = defaultdict(list)
    sessions, alarms = Counter[str](), Counter[str]()
    rows, program, compute = (TOTAL,), AuditProgram(""), AuditProgram.examine

    def here(own: Any, piece: Piece) -> Verdict:
        verdict = compute(program, piece) if arguments.kernels else examine(Checkpoint.open(own._source), piece)
        for row in rows:
            found[row].append(verdict.margin)
        return verdict

    start = Auditor.__init__

    def init(auditor: Auditor, *given: Any, **named: Any) -> None:
        start(auditor, *given, **named)
        auditors.append(auditor)

    AuditProgram.examine, Auditor.__init__ = here, init  # type: ignore[method-assign]
    share_s = arguments.seconds / len(arguments.families) / len(CLAIMS) / len(arguments.codecs)
    if arguments.kernels:
        os.environ[PATH_VARIABLE] = arguments.kernels  # of programs that this process starts
    with tempfile.TemporaryDirectory(prefix="splitnet-honest-") as name, dht_node() as node:
        os.environ["SPLITNET_CACHE"] = f"{name}/cache"
        for family in arguments.families:
            folder = random_checkpoint(family, Path(name, family))
            program = AuditProgram(str(folder))
            for claim in CLAIMS:
                weights, computes = weights_and_type(claim)
                with local_swarm(folder, SPANS, node=node, weights=weights, dtype=computes) as swarm:
                    for codec in arguments.codecs:
                        rows, until = (claim, f"codec {codec}", TOTAL), time.monotonic() + share_s
                        model = swarm.model(codec=codec, audit=ONCE)
                        auditor, counted = auditors[-1], Counter[str]()
                        while time.monotonic() < until:
                            auditor._known.clear()
                            try:
                                one_session(model, counted["sessions"])
                            except PeerLied as alarm:
                                print(rows, alarm)
                            counted["sessions"] += 1
                        for row in rows:
                            sessions[row] += counted["sessions"]
                            alarms[row] += auditor.counts["lies"] + auditor.counts["disagreements"]
            program.close()
    told = f"auditor with the kernels {arguments.kernels}" if arguments.kernels else "the same kernels"
    print(f"{processor()}; random models: {', '.join(arguments.families)}; {told}\n")
    print("| | sessions | examinations | with equal bytes | alarms | largest margin |\n|---|---|---|---|---|---|")
    for row, margins in sorted(found.items(), key=lambda item: (item[0] == TOTAL, item[0].startswith("codec"))):
        counts = f"{sessions[row]:,} | {len(margins):,} | {margins.count(0.0):,} | {alarms[row]} | {max(margins):.2f}"
        print(f"| {row} | {counts} |")


if __name__ == "__main__":
    main()
