"""The gain of drafts over long links: several drafters answer in turns; the first drafter is the baseline.

Three daemons with a third of the blocks each and a client are four hosts of an emulated network (see docs/netlab.md).
With --local-blocks the client runs some blocks itself, and a peer whose blocks are all local is idle. All answers are
greedy.

    sudo .venv/bin/python -m benchmarks.speculation CHECKPOINT [--arms off auto eagle=FOLDER known=0.8]
        [--texts repeating ordinary] [--delay 20 60] [--weights float32 int4] [--json FILE]

An arm is a value of --speculate, or `known=P`, or `known=P/MS`: a drafter that knows the answer of the baseline, makes
every guess right with the probability P, and takes MS ms for a guess. The speed of such an arm is compared with the
prediction of `scheduler.speculation` for the measured acceptance and pace. Use answers of 256 tokens for this
comparison, because windows are cut at the end of a text.

Columns: "times as fast": speed relative to the baseline, median of the rounds (range). "per trip": new tokens per round
trip. "right": share of right guesses among the compared guesses, at each of the first places of a window. "bytes":
bytes per new token over all links: those that the client sends and receives, and messages of one position between
peers. "links": the tokens/s that the delays of the four links alone would allow with as many tokens per trip, one trip
after the other. "links + compute": the same with the compute time of the baseline's median step added to each trip.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.netlab import Lab, LabError
from benchmarks.netlab.peers import LabPeers, even_spans
from scheduler.speculation import LENGTHS, DraftGuess, Pace, Window, best_window, tokens_per_ms
from splitnet.blocks.backbone import load_whole
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.drafts.draft_stats import DraftStats
from splitnet.drafts.drafter import Guess
from splitnet.drafts.speculator import EAGLE, NAMES, OFF, Drafts, Speculator
from splitnet.hf.causal_lm import RemoteCausalLM, attach
from splitnet.session.driver import SessionTraffic
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.tools.bench.backends import Clock, gaps_s

PEERS = ("first", "middle", "last")
LINKS = len(PEERS) + 1
DATA = Path(__file__).parent / "data"
TEXTS = {"repeating": DATA / "repeating_prompts.json", "ordinary": DATA / "ordinary_prompts.json"}
EXACT = ("float32", "float16")
"""Weight formats in which the number of positions in a pass changes only the order of sums in products."""
KNOWN = "known="
WAYS = ("bytes_sent", "bytes_received")
PLACES = 6  # the number of places of a window that the table shows
HEADER = (
    "| text | arm | tokens/s | times as fast | per trip | right | drafted | bytes | links | links + compute | same |"
)


class Known:
    """Guesses right with a known probability, and takes `cost_ms` for each guess. answer: the true tokens."""

    priors = (0.5,)
    taps = ()

    def __init__(self, arm: str, answer: Sequence[int], seed: int) -> None:
        share, _, cost_ms = arm.removeprefix(KNOWN).partition("/")
        self.arm = arm
        self._share, self._cost_s = float(share), float(cost_ms or 0) / 1000
        self._answer = answer
        self._seed = seed
        self._length = 0  # tokens of the answer so far

    def begin_text(self, tokens: Sequence[int], features: torch.Tensor | None = None) -> None:
        self._length = 0

    def observe_token(self, token: int, features: torch.Tensor | None = None) -> None:
        self._length += 1

    def draft_tokens(self, pending: Sequence[int]) -> Iterator[Guess]:
        for place in itertools.count(self._length + len(pending)):
            if self._cost_s:
                time.sleep(self._cost_s)
            true = self._answer[place] if place < len(self._answer) else 0
            right = random.Random(f"{self._seed} {place}").random() < self._share
            yield Guess(true if right else true + 1, 0)


class Watched(Speculator):
    """A speculator that also accepts `Known` drafters. latest: the statistics of the last text's drafter."""

    latest: DraftStats | None = None

    def drafts_by(self, speculate: Any) -> Drafts:
        if isinstance(speculate, Known):
            drafts = Drafts(speculate, self._stats_of(speculate.arm, speculate.priors))
        else:
            drafts = super().drafts_by(speculate)
        self.latest = drafts.stats
        self.latest.drafted, self.latest.round_trips, self.latest.by_place = 0, 0, {}
        return drafts


@dataclass
class Answer:
    """An answer of one arm. by_place: compared guesses at each place of a window, and right ones."""

    text: str
    arm: str
    tokens: list[int]
    seconds: float  # from the first token to the last
    step_ms: float  # median between tokens
    moved_bytes: int  # over all links, after the first token
    same: bool  # whether the answer equals the baseline's
    round_trips: int
    drafted: int = 0
    by_place: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    # The pace at the end of the answer, see `Pace`; the first entry is for one position.
    latency_ms: list[float] = field(default_factory=list[float])
    slowest_hop_ms: list[float] = field(default_factory=list[float])
    drafting_ms: tuple[float, float] = 0.0, 0.0

    @property
    def new(self) -> int:
        """Tokens after the first one, which comes with the prompt."""
        return len(self.tokens) - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="hub id, folder or GGUF file")
    parser.add_argument("--arms", nargs="+", default=[OFF, "auto"], help="drafters; the first is the baseline")
    parser.add_argument("--texts", nargs="+", default=[*TEXTS], help="names of texts, or JSON files of prompts by name")
    parser.add_argument("--only", nargs="+", default=[""], help="only texts whose name contains one of these")
    parser.add_argument("--limit", type=int, help="maximum number of texts")
    parser.add_argument("--delay", type=float, nargs="+", default=[20.0], help="ms one way between any two hosts")
    parser.add_argument("--rate", type=float, default=100.0, help="Mbit/s of every host's link, 0: no limit")
    parser.add_argument("--weights", nargs="+", default=["float32"], help="formats of the daemons and of local blocks")
    parser.add_argument("--codec", default="auto")
    parser.add_argument("--local-blocks", default=None, help="blocks that the client runs, such as 0:10")
    parser.add_argument("--tokens", type=int, default=64, help="maximum tokens of an answer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write all answers to")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(arguments.checkpoint)
    spans = even_spans(checkpoint.num_blocks, PEERS)
    written: list[dict[str, Any]] = []
    same = True
    for weights, delay_ms in itertools.product(arguments.weights, arguments.delay):
        options = ("--threads", "1", "--weights", weights)
        try:
            with (
                Lab(["client", *PEERS], delay_ms=delay_ms, rate_mbit=arguments.rate) as lab,
                LabPeers(lab, arguments.checkpoint, spans, options) as peers,
                lab.inside("client"),
                Swarm(ModelFacts.of(checkpoint), list(peers.addresses.values())) as swarm,
            ):
                how = {"codec": arguments.codec, "local_blocks": arguments.local_blocks, "local_weights": weights}
                model = attach(checkpoint, swarm, **how)
                print(f"\n### {weights}, {delay_ms:g} ms one way, {arguments.rate:g} Mbit/s", flush=True)
                answers = measure(model, checkpoint, arguments)
        except LabError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        same &= show(answers, arguments.arms, delay_ms) or weights not in EXACT
        written += ({"weights": weights, "delay_ms": delay_ms, **asdict(answer)} for answer in answers)
        if arguments.json:
            arguments.json.write_text(json.dumps(written))
    if not same:
        print("error: a text differs from the baseline's, with weights that must give equal texts", file=sys.stderr)
    return int(not same)


def prompts(checkpoint: Checkpoint, arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Prompts `[1, seq]` by the name of the text; prompts of repeating texts do not use the chat template."""
    tokenizer, found = checkpoint.tokenizer(), dict[str, torch.Tensor]()
    for texts in arguments.texts:
        for name, prompt in json.loads(TEXTS.get(texts, Path(texts)).read_text()).items():
            if not any(part in name for part in arguments.only):
                continue
            found[name] = tokenizer(prompt, return_tensors="pt").input_ids
            if texts != "repeating":
                chat = [{"role": "user", "content": prompt}]
                options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
                found[name] = tokenizer.apply_chat_template(chat, **options)["input_ids"]
    limit = arguments.limit or len(found)
    return {name: found[name] for name in [*found][:: max(1, len(found) // limit)][:limit]}


def measure(model: RemoteCausalLM, checkpoint: Checkpoint, arguments: argparse.Namespace) -> list[Answer]:
    """Answers all prompts with all arms in turns; the baseline is always the first."""
    model.speculator = watched = Watched(model, checkpoint)
    sources: dict[str, Any] = {arm: arm for arm in arguments.arms}
    for arm in arguments.arms:
        if arm not in NAMES and not arm.startswith((EAGLE, KNOWN)):
            sources[arm] = load_whole(Checkpoint.open(arm), "auto")
    answers, true = list[Answer](), list[int]()
    for number, (name, prompt) in enumerate(prompts(checkpoint, arguments).items()):
        for turn in range(-1 if number == 0 else 0, arguments.rounds):  # -1: warm-up
            others = arguments.arms[1:] if turn % 2 else arguments.arms[:0:-1]
            for arm in (arguments.arms[0], *others):
                speculate = Known(arm, true, seed=number) if arm.startswith(KNOWN) else sources[arm]
                found = answered(model, watched, speculate, prompt, arguments.tokens)
                true = found["tokens"] if arm == arguments.arms[0] else true
                answers.append(Answer(text=name, arm=arm, same=found["tokens"] == true, **found))
            if turn < 0:
                answers = []
    return answers


def answered(
    model: RemoteCausalLM, watched: Watched, speculate: Any, prompt: torch.Tensor, most: int
) -> dict[str, Any]:
    """The measurements of one answer of at most this many tokens."""

    def note(count: int) -> None:
        if count == 1 and cache.session is not None:
            before.append(replace(cache.session.traffic))

    before, clock, watched.latest = list[SessionTraffic](), Clock(note), None
    mask, how = torch.ones_like(prompt), {"max_new_tokens": most, "do_sample": False, "speculate": speculate}
    with model.session() as cache:
        tokens = model.generate(prompt, attention_mask=mask, streamer=clock, **how)[0, prompt.shape[1] :].tolist()
        found = {"tokens": tokens, "seconds": time.perf_counter() - clock.times[0]}
        found["step_ms"], one, session = 1000 * statistics.median(gaps_s(clock.times)), watched.latest, cache.session
        assert session is not None
        traffic, first = session.traffic, before[0]
        between = sum(link.bytes_per_token for link in session.links() if "client" not in (link.sender, link.receiver))
        found["moved_bytes"] = between * (traffic.positions - first.positions)
        found["moved_bytes"] += sum(getattr(traffic, way) - getattr(first, way) for way in WAYS)
        if one is None:
            return {**found, "round_trips": len(tokens) - 1}
        found |= {"round_trips": one.round_trips, "drafted": one.drafted, "by_place": one.by_place}
        if one.knows_steps:
            pace, sizes = one._pace(session.predictions()), range(1, LENGTHS[-1] + 2)
            found["latency_ms"], found["slowest_hop_ms"] = (
                [of(size) for size in sizes] for of in (pace.latency_ms, pace.slowest_hop_ms)
            )
            found["drafting_ms"] = pace.first_draft_ms, pace.draft_ms
        return found


def show(answers: Sequence[Answer], arms: Sequence[str], delay_ms: float) -> bool:
    """Prints the tables; returns whether all texts equal those of the baseline."""
    texts, of = dict.fromkeys(answer.text for answer in answers), defaultdict[tuple[str, str], list[Answer]](list)
    for answer in answers:
        of[answer.text, answer.arm].append(answer)
        of["all", answer.arm].append(answer)
    print(f"\n{HEADER}\n|{'---|' * (HEADER.count('|') - 1)}")
    medians: dict[tuple[str, str], float] = {}
    for text, arm in itertools.product(texts, arms):
        own, base = of[text, arm], of[text, arms[0]]
        ratios = [one.new / one.seconds * other.seconds / other.new for one, other in zip(own, base, strict=True)]
        medians[text, arm] = statistics.median(ratios)
        print(_row(text, own, base, f"{medians[text, arm]:.2f} ({min(ratios):.2f}-{max(ratios):.2f})", delay_ms))
    for arm in arms:
        worst = min(texts, key=lambda text, arm=arm: medians[text, arm])
        median = statistics.median(medians[text, arm] for text in texts)
        times = f"{median:.2f}, {medians[worst, arm]:.2f} ({worst})"
        print(_row("all: median, worst", of["all", arm], of["all", arms[0]], times, delay_ms))
    known = [arm for arm in arms if arm.startswith(KNOWN)]
    if known:
        print("\n| arm | acceptance | predicted tokens/s | measured | measured / predicted | predicted windows |")
        print("|---|---|---|---|---|---|")
    for arm in known:
        own = of["all", arm]
        right, tried = (sum(values) for values in zip((0, 0), *_compared(own), strict=True))
        share = right / tried if tried else 0.0
        foretold = [_foretold(answer, share) for answer in own]
        new, seconds = sum(answer.new for answer in own), sum(answer.seconds for answer in own)
        speed = new / sum(answer.new / speed for answer, (speed, _) in zip(own, foretold, strict=True))
        windows = ", ".join(f"{window.length} x {window.in_flight}" for window in {window for _, window in foretold})
        figures = f"{share:.3f} | {speed:.2f} | {new / seconds:.2f} | {new / seconds / speed:.3f}"
        print(f"| {arm} | {figures} | {windows} |")
    sys.stdout.flush()
    return all(answer.same for answer in answers)


def _row(text: str, own: Sequence[Answer], base: Sequence[Answer], times: str, delay_ms: float) -> str:
    new, trips = sum(answer.new for answer in own), sum(answer.round_trips for answer in own)
    places = " ".join(f"{right / tried:.2f}" for right, tried in _compared(own)[:PLACES])
    links_ms, step_ms = LINKS * delay_ms, statistics.median(answer.step_ms for answer in base)
    cells = (
        text,
        own[0].arm,
        f"{new / sum(answer.seconds for answer in own):.2f}",
        times,
        f"{new / trips:.2f}",
        places or "-",
        f"{sum(answer.drafted for answer in own)}",
        f"{sum(answer.moved_bytes for answer in own) / new:.0f}",
        f"{1000 * new / trips / links_ms:.1f}" if links_ms else "-",
        f"{1000 * new / trips / step_ms:.1f}",
        "yes" if all(answer.same for answer in own) else "no",
    )
    return f"| {' | '.join(cells)} |"


def _compared(own: Sequence[Answer]) -> list[tuple[int, int]]:
    """The number of right guesses and the number of compared guesses, by place in the window."""
    places = sorted({place for answer in own for place in answer.by_place})
    counts = [[answer.by_place.get(place, (0, 0)) for answer in own] for place in places]
    return [(sum(right for _, right in each), sum(tried for tried, _ in each)) for each in counts]


def _foretold(answer: Answer, acceptance: float) -> tuple[float, Window]:
    """The predicted tokens/s, and the predicted window, for guesses with equal acceptance."""
    pace = Pace(lambda n: answer.latency_ms[n - 1], lambda n: answer.slowest_hop_ms[n - 1], *answer.drafting_ms)
    guess = DraftGuess(acceptance, acceptance)
    window = best_window(guess, pace)
    return 1000 * (tokens_per_ms(window, guess, pace) if window.length else 1 / pace.latency_ms(1)), window


if __name__ == "__main__":
    sys.exit(main())
