"""Liars among the daemons of `benchmarks.soak`, and what clients with audits make of them.

The last daemons are `benchmarks.lying_peer` with changing lies. Clients have the rates of audits in turn; the first two
clients live long, the others are replaced by new ones, which know nothing, after some answers. Each client has
a cache folder of its own. In turns, an answer is streamed in a session that the client keeps, or is a call of
`generate()`, which waits for audits of new peers and repeats an answer with which a peer has lied.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.lying_peer import HONEST
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import PeerLied, SplitnetError
from splitnet.hf.causal_lm import RemoteCausalLM, attach
from splitnet.swarm.swarm import ModelFacts, Swarm

LIE_S = 30.0  # mean time of a lie
FRESH_ANSWERS = 6  # after which a client that does not live long is replaced
LASTING = 2  # clients that live long
NO_LIE = "none"


class Lies:
    """What the liars have told, by their own logs."""

    def __init__(self, folder: Path, hosts: Sequence[str]) -> None:
        self._files = {host: folder / f"{host}.lies" for host in hosts}

    def programs(self) -> dict[str, list[str]]:
        words = [sys.executable, "-m", "benchmarks.lying_peer", "changing", str(LIE_S)]
        return {host: [*words, str(file)] for host, file in self._files.items()}

    def read(self) -> dict[str, list[tuple[float, str]]]:
        """By key, the times at which a liar has begun each lie or honest time."""
        found: dict[str, list[tuple[float, str]]] = defaultdict(list)
        for file in self._files.values():
            for line in file.read_text().splitlines() if file.exists() else ():
                at, key, kind = line.split(" ", 2)
                found[key].append((float(at), kind))
        return found


def told(spells: Sequence[tuple[float, str]], begin: float, end: float) -> set[str]:
    """The lies of a liar within some time."""
    ends = [at for at, _ in spells[1:]] + [math.inf]
    return {kind for (at, kind), until in zip(spells, ends, strict=True) if at < end and until > begin} - {HONEST}


class NamingSwarm(Swarm):
    """A client that notes when it names peers."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.named: dict[str, float] = {}

    def ban(self, key: str, **how: Any) -> None:
        if how.get("seconds") == math.inf:
            self.named.setdefault(key, time.time())
        super().ban(key, **how)


@dataclass
class Answer:
    """An answer, and the last session in which it was computed.

    streamed: whether in a kept session, whose answers do not wait for audits. outcome: right, wrong, named (a liar), or
    the class of the error. hops: names of all peers of the session. prefix: stored positions that were used.
    """

    streamed: bool
    began: float
    ended: float
    outcome: str
    hops: set[str]
    prefix: int
    session: bytes


@dataclass
class Client:
    """What a client has seen, also after it was replaced. counts: of its audits."""

    rate: float
    lasting: bool
    model: weakref.ref[RemoteCausalLM]
    counts: dict[str, int]
    swarm: NamingSwarm
    answers: list[Answer] = field(default_factory=list)
    examined: dict[tuple[bytes, str], float] = field(default_factory=dict)
    """When the work of a hop in a session was found right."""
    disagreed: list[tuple[str, str]] = field(default_factory=list)
    hops: set[str] = field(default_factory=set)
    session: Any = None
    began: float = 0.0

    def watch(self, session: Any) -> None:
        self.session, self.began = session, time.time()
        self.hops.clear()

    def look(self, ids: Tensor, _: Any, **__: Any) -> Tensor:
        """A stopping criterion, which notes the route."""
        if self.session is not None:
            self.hops.update(hop.name for hop in self.session.hops)
        return torch.zeros(len(ids), dtype=torch.bool)


class Audits:
    """The clients with audits. rates: of audits, for the clients in turn."""

    def __init__(self, lies: Lies, rates: Sequence[float], folder: Path) -> None:
        self._lies, self._rates, self._folder = lies, rates, folder
        self._clients: list[Client] = []
        self._lock = threading.Lock()

    def open(self, checkpoint: Checkpoint, addresses: Sequence[str], number: int, **options: Any) -> RemoteCausalLM:
        """The next client in place of a number. The first numbers live long."""
        swarm, rate = NamingSwarm(ModelFacts.of(checkpoint), addresses), self._rates[number % len(self._rates)]
        with self._lock:
            before = os.environ.get("SPLITNET_CACHE")
            os.environ["SPLITNET_CACHE"] = str(self._folder / str(len(self._clients)))
            try:
                model = attach(checkpoint, swarm, audit=rate, **options)
            finally:
                del os.environ["SPLITNET_CACHE"]
                os.environ.update({} if before is None else {"SPLITNET_CACHE": before})
            auditor: Any = model.auditor
            client = Client(rate, number < LASTING, weakref.ref(model), auditor.counts, swarm)
            self._clients.append(client)
        watch, judge, disagree = auditor.watch, auditor.judge, auditor.disagree

        def watched(session: Any) -> None:
            client.watch(session)
            watch(session)

        def judged(hop: Any, stored: bool, piece: Any) -> PeerLied | None:
            lie = judge(hop, stored, piece)
            if lie is None:
                client.examined[piece.receipt.session, hop.name] = time.time()
            return lie

        def disagreed(before: Any, hop: Any) -> PeerLied:
            client.disagreed.append((before.name, hop.name))
            return disagree(before, hop)

        auditor.watch, auditor.judge, auditor.disagree = watched, judged, disagreed
        return model

    def client(self, model: RemoteCausalLM) -> Client:
        return next(each for each in self._clients if each.model() is model)

    def is_old(self, model: RemoteCausalLM) -> bool:
        """Whether another client should follow."""
        client = self.client(model)
        return not client.lasting and len(client.answers) >= FRESH_ANSWERS

    def ask(self, model: RemoteCausalLM, streamed: bool, ask: Callable[..., bool]) -> None:
        """Notes how an answer ends. ask: whether it is right. Raises SplitnetError, if it names no liar."""
        client, began, outcome = self.client(model), time.time(), ""
        client.watch(None)
        try:
            right = ask(streamed=streamed, stopping_criteria=[client.look])
            outcome = "right" if right else "wrong"
        except PeerLied:
            outcome = "named"
        except SplitnetError as error:
            outcome = type(error).__name__
            raise
        finally:
            session = client.session
            prefix, name = (0, b"") if session is None else (session.prefix_hit, session.id)
            began = began if session is None else client.began
            client.answers.append(Answer(streamed, began, time.time(), outcome, set(client.hops), prefix, name))

    def report(self) -> list[str]:
        """Prints what clients have seen. Returns the faults: what must not happen with any rate of audits."""
        lies, faults = self._lies.read(), list[str]()
        kinds: dict[str, Counter[str]] = defaultdict(Counter)
        print(
            "| clients | number | answers | right | ended by an error | wrong, streamed | wrong, waited for | audits ",
            end="",
        )
        print("| liars met | named | answers with it, median (most) | s, median (most) |\n" + "|---" * 12 + "|")
        for lasting in (True, False):
            for rate in self._rates:
                group = [each for each in self._clients if (each.lasting, each.rate) == (lasting, rate)]
                outcomes: Counter[str] = Counter()
                met, named, answers, seconds = 0, 0, list[int](), list[float]()
                for client in group:
                    for answer in client.answers:
                        outcomes[answer.outcome] += 1
                        outcomes[f"{answer.outcome} {answer.streamed}"] += 1
                        label, fault = judged(client, answer, lies)
                        kinds[label][answer.outcome] += 1
                        faults += [fault] if fault else []
                    for key in client.swarm.named:
                        if key not in lies:
                            faults.append(f"a client has named the honest peer {key}: {reasons(client, key)}")
                    faults += [
                        f"the honest peers {one} and {other} disagreed"
                        for one, other in client.disagreed
                        if one not in lies and other not in lies
                    ]
                    for key, spells in lies.items():
                        until = client.swarm.named.get(key, math.inf)
                        used = [
                            each.began
                            for each in client.answers
                            if each.began < until and key in each.hops and told(spells, each.began, each.ended)
                        ]
                        met += bool(used) or until < math.inf
                        named += until < math.inf
                        if until < math.inf and used:
                            answers.append(len(used))
                            seconds.append(until - used[0])
                lost = sum(outcomes[each] for each in ("right", "wrong"))
                total = sum(len(client.answers) for client in group)
                print(
                    f"| {rate}, {'lasting' if lasting else 'new'} | {len(group)} | {total} | {outcomes['right']} ",
                    end="",
                )
                print(f"| {total - lost} | {outcomes['wrong True']} | {outcomes['wrong False']} ", end="")
                audits = sum(client.counts["audits"] for client in group)
                print(f"| {audits} | {met} | {named} | {middle(answers)} | {middle(seconds)} |")
        print("\n| lies in the route | answers | right | wrong | ended by an error |\n|---|---|---|---|---|")
        for label, counts in sorted(kinds.items(), key=lambda each: -each[1].total()):
            right, wrong, total = counts["right"], counts["wrong"], counts.total()
            print(f"| {label} | {total} | {right} | {wrong} | {total - right - wrong} |")
        return faults


def judged(client: Client, answer: Answer, lies: dict[str, list[tuple[float, str]]]) -> tuple[str, str]:
    """The lies in the route of an answer, and a fault: the answer is wrong in silence and should not be."""
    liars = {key: told(lies[key], answer.began, answer.ended) for key in answer.hops if key in lies}
    lying = {key: kinds for key, kinds in liars.items() if kinds}
    label = ", ".join(sorted(set().union(*lying.values()))) or NO_LIE
    if label == NO_LIE and answer.prefix:
        label = "none, with stored pages"
    if answer.outcome != "wrong":
        return label, ""
    if not lying and not answer.prefix:
        return label, "an answer without liars or stored pages is wrong"
    known = {key for (session, key), at in client.examined.items() if session != answer.session and at < answer.ended}
    changed = any(answer.began < at < answer.ended for key in lying for at, _ in lies[key])  # perhaps after its audit
    if not (answer.streamed or answer.prefix or changed or known & lying.keys()):
        return label, f"an answer that waited for audits is wrong, and no liar in it was known before: {label}"
    found = [key for key in lying if (answer.session, key) in client.examined]
    if len(found) == len(lying) == 1 and len(told(lies[found[0]], answer.began, answer.ended)) == 1:
        spells = lies[found[0]]
        if all(not answer.began < at < answer.ended for at, _ in spells):
            return label, f"a liar was examined in a wrong answer, and found honest: {label}"
    return label, ""


def reasons(client: Client, key: str) -> str:
    return "; ".join(event.text for event in client.swarm.events.since(0) if event.kind == "lied")


def middle(values: Sequence[float]) -> str:
    return f"{median(values):.0f} ({max(values):.0f})" if values else ""
