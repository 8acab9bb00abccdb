"""Liars among daemons: how many tokens a client has received when it names them; prints Markdown.

    python -m benchmarks.liars [CHECKPOINT] [--runs 5] [--tokens 64] [--kinds "noise 5 %" ...]

CHECKPOINT is the demo model unless it is given; its weights are converted to bfloat16. An honest peer serves each third
of the blocks, a second one the last third; each is a process with one thread that computes in float32. For each kind of
lie, a liar beside them publishes the best speed. Each run has a new client, with an empty cache folder, that audits
only peers that are new to it. The program that computes audits runs on from run to run, as that of a client that has
examined other peers before; the first row has a program that starts with each run. Answers are greedy, and must equal
those of the honest peers alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.codec_quality import VARIED_TEXT
from benchmarks.lying_peer import FIRST, KINDS, MOVED, other_weights
from splitnet.audit.comparison import Verdict
from splitnet.audit.piece import Piece
from splitnet.audit.program import AuditProgram
from splitnet.blocks.backbone import load_whole
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.demo import demo_checkpoint
from splitnet.hf.causal_lm import attach
from splitnet.quant.native import processor
from splitnet.swarm.swarm import ModelFacts, Swarm

ONCE = 1e-9  # a rate at which only peers that are new to the client are examined
PROMPT = 72  # tokens; more than two stored pages
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "speculate": None}


@dataclass
class Daemon:
    """A process with a peer."""

    process: psutil.Popen
    address: str
    name: str
    endpoint: str

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system


@contextmanager
def daemon(folder: Path, model: Path, other: Path, kind: str, blocks: str, join: str) -> Iterator[Daemon]:
    file = Path(tempfile.mkdtemp(dir=folder)) / "address"
    words = [sys.executable, "-m", "benchmarks.lying_peer", model, other, kind, blocks, file, join]
    env = os.environ | {"OMP_NUM_THREADS": "1", "SPLITNET_CACHE": str(file.parent), "HF_HUB_OFFLINE": "1"}
    with file.with_suffix(".log").open("w") as log:
        process = psutil.Popen(list(map(str, words)), env=env, stdout=log, stderr=log)
    try:
        while not file.exists():
            if process.poll() is not None:
                raise SystemExit(file.with_suffix(".log").read_text())
            time.sleep(0.05)
        yield Daemon(process, *file.read_text().split("\n"))
    finally:
        process.terminate()
        with suppress(psutil.TimeoutExpired, psutil.NoSuchProcess):
            process.wait(10)
        with suppress(psutil.NoSuchProcess):
            process.kill()


class Watched(Swarm):
    """A client that records which peers it leaves, after which tokens and seconds."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.tokens, self.began, self.left = 0, 0.0, dict[str, tuple[int, float]]()

    def ban(self, key: str, **how: Any) -> None:
        self.left.setdefault(key, (self.tokens, time.perf_counter() - self.began))
        super().ban(key, **how)

    def count(self, ids: Tensor, _: Any, **__: Any) -> Tensor:
        self.tokens = ids.shape[1] - PROMPT
        return torch.zeros(len(ids), dtype=torch.bool)


@contextmanager
def client(model: Path, join: str, cache: Path, **options: Any) -> Iterator[tuple[Watched, Any]]:
    os.environ["SPLITNET_CACHE"] = str(cache)
    checkpoint = Checkpoint.open(model)
    with closing(Watched(ModelFacts.of(checkpoint), [join])) as swarm:
        yield swarm, attach(checkpoint, swarm, codec="none", **options)


def generate(swarm: Watched, model: Any, ids: Tensor, tokens: int) -> Tensor:
    swarm.tokens, swarm.began = 0, time.perf_counter()
    how = {**GREEDY, "max_new_tokens": tokens, "stopping_criteria": [swarm.count]}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **how)


def as_folder(given: str | None, folder: Path) -> Path:
    """The model with weights in bfloat16, as safetensors."""
    checkpoint = Checkpoint.open(given or demo_checkpoint())
    load_whole(checkpoint, torch.float32).to(torch.bfloat16).save_pretrained(folder)
    return folder


def prompts(given: str | None) -> Tensor:
    """`[prompts, PROMPT]` tokens of a text."""
    ids = Checkpoint.open(given or demo_checkpoint()).tokenizer()(VARIED_TEXT.read_text(), return_tensors="pt")
    return ids.input_ids[0].unfold(0, PROMPT, 17)


@contextmanager
def honest_daemons(folder: Path, model: Path) -> Iterator[list[Daemon]]:
    with ExitStack() as stack:
        peers: list[Daemon] = []
        for blocks in ("0:10", "10:20", "20:30", "20:30"):
            join = peers[0].address if peers else ""
            peers.append(stack.enter_context(daemon(folder, model, model, "honest", blocks, join)))
        yield peers


@dataclass(frozen=True)
class Run:
    """named, replaced: whether the client has named, or left, the liar; then after `tokens` and `seconds`."""

    named: bool
    replaced: bool
    tokens: int
    seconds: float
    margin: float
    right: bool


def run(model: Path, join: str, cache: Path, liar: Daemon, kind: str, ids: Tensor, expected: Tensor) -> Run:
    with client(model, join, cache, audit=ONCE) as (swarm, remote):
        if kind == "other pages":  # of which the liar has none before a first answer
            generate(swarm, remote, ids, 1)
        margins.clear()
        answer = generate(swarm, remote, ids, expected.shape[1] - PROMPT)
        events = [event.text for event in swarm.events.since(0) if event.kind == "lied"]
        named = any(liar.endpoint in text and "so one of them lies" not in text for text in events)
        tokens, seconds = swarm.left.get(liar.name, (0, 0.0))
        return Run(named, liar.name in swarm.left, tokens, seconds, max(margins, default=0.0), answer.equal(expected))


def show(kind: str, runs: list[Run]) -> None:
    named, left = sum(each.named for each in runs), [each for each in runs if each.replaced]
    print(f"| {kind} | {named} of {len(runs)} | {len(left)} ", end="")
    if left:
        tokens, seconds = [each.tokens for each in left], [each.seconds for each in left]
        print(f"| {median(tokens):.0f} ({max(tokens)}) | {median(seconds):.1f} ({max(seconds):.1f}) ", end="")
    else:
        print("| | ", end="")
    least = min((each.margin for each in runs if each.named), default=0.0) or min(each.margin for each in runs)
    print(f"| {least:.3g} | {sum(each.right for each in runs)} |", flush=True)


margins: list[float] = []  # of the examinations of a run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", default=[FIRST, *KINDS])
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the daemons end with this process
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    compute, stop, kept = AuditProgram.examine, AuditProgram.close, list[AuditProgram | None]([None])

    def examined(program: AuditProgram, piece: Piece) -> Verdict:
        verdict = compute(kept[0] or program, piece)
        margins.append(verdict.margin)
        return verdict

    AuditProgram.examine = examined  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(prefix="splitnet-liars-") as name, ExitStack() as stack:
        folder = Path(name)
        texts, model = prompts(arguments.checkpoint), as_folder(arguments.checkpoint, folder / "model")
        honest = stack.enter_context(honest_daemons(folder, model))
        with client(model, honest[0].address, folder / "honest", audit=0.0) as each:
            cases = [(ids, generate(*each, ids, arguments.tokens)) for ids in texts[: arguments.runs].split(1)]
        program = AuditProgram(str(model))
        stack.callback(stop, program)
        print(f"{processor()}, {os.cpu_count()} cores; {len(cases)} runs of each kind, {arguments.tokens} tokens\n")
        print("| lie | named | left | tokens received by then, median (most) | s | least margin | right answers |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for number, kind in enumerate(arguments.kinds):
            weights, home = model, folder / str(number)
            if kind in MOVED or kind == "block left out":
                weights = other_weights(model, folder / f"weights{number}", kind)
            blocks = "0:10" if kind == "signs other than it was sent" else "10:20"
            kept[0] = None if kind == FIRST else program
            with daemon(folder, model, weights, kind, blocks, honest[0].address) as liar:
                each = enumerate(cases)
                runs = [run(model, honest[0].address, home / str(at), liar, kind, *case) for at, case in each]
            show(kind, runs)


if __name__ == "__main__":
    main()
