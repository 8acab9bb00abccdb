"""How the speed depends on the number of hops, the length of the context, and the number of clients.

Daemons of one thread each share the blocks of a checkpoint evenly, on this machine; clients generate as in `splitnet
bench`. Codecs run in turns, round by round. Prints a table and draws a picture for each part.

    python -m benchmarks.growth CHECKPOINT [--part hops context clients] [--rounds 3] [--codecs none int8]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.demo import LocalSwarm
from splitnet.cli.stage_progress import StageProgress
from splitnet.hf.causal_lm import attach
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.tools.bench.backends import SwarmArm
from splitnet.tools.bench.report import (
    FIRST_TOKEN_MS,
    TOKEN_MS_P50,
    TOKEN_MS_P95,
    TOKENS_PER_S,
    Case,
    Measured,
    Spread,
    check_room,
    measure,
    number,
    with_range,
)

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
COLUMNS = {
    "tokens/s": TOKENS_PER_S,
    "ms per token": TOKEN_MS_P50,
    "95 %": TOKEN_MS_P95,
    "ms to the first token": FIRST_TOKEN_MS,
}


class Point(NamedTuple):
    """A case at its position on the axis."""

    at: int
    measured: Measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="hub id or folder of a checkpoint")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--hops", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--context", type=int, nargs="+", default=[128, 512, 2048, 8000])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--peers", type=int, default=3, help="daemons in the parts context and clients")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--codecs", nargs="+", default=["none", "int8"])
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder for the pictures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.part:
        axis, points = PARTS[name](arguments)
        print_table(axis, points)
        draw(axis, points, arguments.images / f"growth-{name}.png")


def by_hops(arguments: argparse.Namespace) -> tuple[str, list[Point]]:
    """One swarm after the other, because a machine has no room for all of them at the same time."""
    case = Case(arguments.tokens, decodes=True)
    return "hops", [Point(hops, each) for hops in arguments.hops for each in measured(arguments, hops, [case])]


def by_context(arguments: argparse.Namespace) -> tuple[str, list[Point]]:
    cases = [Case(arguments.tokens, decodes=True, context=context) for context in arguments.context]
    return "context", [Point(each.case.context, each) for each in measured(arguments, arguments.peers, cases)]


def by_clients(arguments: argparse.Namespace) -> tuple[str, list[Point]]:
    cases = [Case(arguments.tokens, decodes=True, clients=clients) for clients in arguments.clients]
    return "clients", [Point(each.case.clients, each) for each in measured(arguments, arguments.peers, cases)]


PARTS = {"hops": by_hops, "context": by_context, "clients": by_clients}


def measured(arguments: argparse.Namespace, peers: int, cases: Sequence[Case]) -> list[Measured]:
    """Runs cases through a swarm of this many peers, with each codec."""
    checkpoint = Checkpoint.open(arguments.checkpoint)
    check_room(cases, checkpoint.max_positions)
    with arms(checkpoint, peers, arguments.codecs) as by_codec, StageProgress() as progress:
        return measure(by_codec, cases, rounds=arguments.rounds, warm_up=1, progress=progress.update)


@contextmanager
def arms(checkpoint: Checkpoint, peers: int, codecs: Sequence[str]) -> Iterator[Mapping[str, SwarmArm]]:
    """A client for each codec, in one swarm."""
    with (
        LocalSwarm(checkpoint.source, peers) as daemons,
        Swarm(ModelFacts.of(checkpoint), [daemons.wait()]) as swarm,
    ):
        yield {codec: SwarmArm(attach(checkpoint, swarm, codec=codec), seed=0) for codec in codecs}


def print_table(axis: str, points: Sequence[Point]) -> None:
    """Prints a table in Markdown: medians over the rounds, and the range of the first column."""
    print(f"\n| {axis} | codec | {' | '.join(COLUMNS)} |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for point in points:
        for codec in point.measured.rounds:
            first, *rest = spreads(point, codec)
            cells = [with_range(first), *(number(spread.median) for spread in rest)]
            print(f"| {point.at:,} | {codec} | {' | '.join(cells)} |")
    print(flush=True)


def spreads(point: Point, codec: str) -> list[Spread]:
    """Spreads of all columns."""
    of_all = point.measured.spreads(codec)
    return [of_all[figure] for figure in COLUMNS.values()]


def draw(axis: str, points: Sequence[Point], path: Path) -> None:
    """Writes a PNG: tokens per second, and ms per token, each as its median with its range."""
    from matplotlib.figure import Figure  # without pyplot there is no window, and no global state

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = {TOKENS_PER_S: "tokens/s of all clients", TOKEN_MS_P50: "ms per token, median"}
    for axes, (name, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for codec in points[0].measured.rounds:
            seen = [point.measured.spreads(codec)[name] for point in points]
            below = [spread.median - spread.low for spread in seen]
            above = [spread.high - spread.median for spread in seen]
            places = [point.at for point in points]
            medians = [spread.median for spread in seen]
            axes.errorbar(places, medians, yerr=[below, above], marker="o", capsize=3, label=codec)
        if axis != "hops":
            axes.set_xscale("log", base=2)
        axes.set_xticks([point.at for point in points], [f"{point.at:,}" for point in points])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel(axis)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)


if __name__ == "__main__":
    main()
