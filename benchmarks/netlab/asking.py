"""A client in a host of a lab that asks questions at given times, and records the time of each token."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Hop = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Question:
    """A request. number: unique. at_s: seconds after the start. prompt, output: numbers of tokens."""

    number: int
    at_s: float
    prompt: int
    output: int


@dataclass(slots=True)
class Answer:
    """The result of a question. Times in seconds count from the start.

    routes: each route with the time of its first use; hops have the address of the peer. causes: the causes of changes
    of the route. predicted_ms: the predicted time per token on the first route.
    """

    number: int
    asked_s: float
    times_s: list[float] = field(default_factory=list[float])
    routes: list[tuple[float, list[Hop]]] = field(default_factory=list[tuple[float, list[Hop]]])
    causes: list[str] = field(default_factory=list[str])
    compute_ms: float = 0.0
    predicted_ms: float = 0.0
    facts: dict[str, tuple[float, float, float]] = field(default_factory=dict[str, tuple[float, float, float]])
    """The client's facts about each peer at the first token: queue_ms, batch, ms per block of one position."""
    links: list[tuple[str, str, float]] = field(default_factory=list[tuple[str, str, float]])
    """The client's facts about all links: from, to, one-way delay in ms; "" is the client."""
    lookups_ms: list[float] = field(default_factory=list[float])
    """Times of the directory look-ups before the first token, in any thread."""
    error: str = ""


def ask(
    folder: str,
    join: Sequence[str],
    questions: Sequence[Question],
    patience_s: float,
    replans: bool,
    begins: Any,
    told: Any,
) -> None:
    """Joins, sends ("ready", None), waits for the start time in `begins`, and sends ("answer", Answer) for each
    question.

    While a question runs, the client sends ("route", (number, hops)) whenever the session has another route.

    Args:
        patience_s: how long sessions wait for a route.
        replans: whether sessions look for better routes.
    """
    import torch

    from splitnet.checkpoint.checkpoint import Checkpoint
    from splitnet.hf.causal_lm import attach
    from splitnet.session.driver import Routes
    from splitnet.swarm.swarm import ModelFacts, Swarm

    torch.set_num_threads(1)
    if not replans:
        Routes.better_route = lambda self, *arguments: None  # pyright: ignore[reportAttributeAccessIssue]
    checkpoint = Checkpoint.open(folder)
    swarm = Swarm(ModelFacts.of(checkpoint), join)
    model = attach(checkpoint, swarm, recovery_timeout_s=patience_s)
    directory: Any = swarm._known.directory
    look, lookups = directory.peers, list[tuple[float, float]]()

    def timed_look(*arguments: Any) -> Any:
        looked = time.perf_counter()
        try:
            return look(*arguments)
        finally:
            lookups.append((looked, time.perf_counter()))

    directory.peers = timed_look
    # A first answer, so that all code has run once and links are measured.
    _answer(model, Question(-1, 0.0, 16, 4), time.perf_counter(), lambda hops: None)
    told.put(("ready", None))
    began = begins.get()

    def run(question: Question) -> None:
        time.sleep(max(0.0, began + question.at_s - time.perf_counter()))
        answer = _answer(model, question, began, lambda hops: told.put(("route", (question.number, hops))))
        ends = began + (answer.times_s[0] if answer.times_s else answer.asked_s)
        answer.lookups_ms = [(b - a) * 1000 for a, b in lookups if began + answer.asked_s <= a <= ends]
        told.put(("answer", answer))

    threads = [threading.Thread(target=run, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model.close()


def _answer(model: Any, question: Question, began: float, routed: Callable[[list[Hop]], None]) -> Answer:
    import torch

    from benchmarks.netlab.generation import generate
    from scheduler.facts import CLIENT
    from splitnet.errors import SplitnetError
    from splitnet.tools.bench.backends import Clock

    choices = random.Random(question.number)
    prompt = torch.tensor([[choices.randrange(model.config.vocab_size) for _ in range(question.prompt)]])
    answer = Answer(question.number, time.perf_counter() - began)

    def look(count: int) -> None:
        session = cache.session
        hops = [(hop.planned.record.address, *hop.blocks) for hop in session.hops]
        if not answer.routes or answer.routes[-1][1] != hops:
            answer.routes.append((time.perf_counter() - began, hops))
            routed(hops)
        if count == 1:
            answer.predicted_ms = model.swarm.planner.cost_ms(session.needs(), [hop.planned for hop in session.hops])
            records = model.swarm.peers()
            network = model.swarm.measurements.network(records)
            names = {CLIENT: ""} | {record.key.text: record.address for record in records}
            for peer in model.swarm.measurements.peers(records):
                answer.facts[names[peer.id]] = (peer.queue_ms, peer.batch, peer.speed.block_ms_at(1))
            answer.links = [
                (names[a], names[b], network.link(a, b).latency_ms) for a, b in itertools.permutations(names, 2)
            ]

    clock = Clock(look)
    try:
        with model.session(max_length=question.prompt + question.output) as cache:
            generate(model, prompt, question.output, clock)
            answer.causes = [str(each.cause) for each in cache.session.recoveries]
    except SplitnetError as error:
        answer.error = str(error)
    answer.times_s = [at - began for at in clock.times]
    return answer
