"""The dashboard: a static page, and the stream of its data."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from importlib import resources
from operator import itemgetter
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from scheduler.liveness import LOST_S
from splitnet.directory.record import PeerRecord
from splitnet.errors import SplitnetError
from splitnet.limits import FairAccount
from splitnet.serve.admission import ApiClient
from splitnet.serve.gateway import Gateway
from splitnet.serve.progress import AnswerProgress
from splitnet.serve.responses import EventStream, framed
from splitnet.swarm.plan import blocks_text
from splitnet.swarm.swarm import Overview, Swarm, short_key, token_joules, token_ms
from splitnet.transport.prober import PingReply
from splitnet.version import __version__
from splitnet.wire.endpoints import Endpoint, LinkState

ASKED_PEERS = 128  # Maximum number of pinged peers, as each takes a socket; only the records of others are known
PAUSE_S = 10.0  # After a longer pause between two calls of `refresh`, changes are not logged: their time is unknown


class PeerState(Enum):
    """The state of a peer as far as the client knows."""

    HERE = "here"
    UNKNOWN = "unknown"  # the peer was not pinged, or has not had time to answer
    GONE = "gone"
    REFUSES = "refuses"  # the peer does not accept this client's key


@dataclass(frozen=True, slots=True)
class SeenPeer:
    """The last known state of a peer. since: clock time in s at which the state began. answer: the last answer."""

    record: PeerRecord
    state: PeerState
    since: float
    answer: PingReply | None


@dataclass(slots=True)
class _PeerQuery:
    future: Future[PingReply] | None = None
    first_unanswered_at: float = 0.0
    asked_at: float = 0.0
    answer: PingReply | None = None


class Presence:
    """Pings peers, and notes in the swarm's event log which peers join, leave or fail. For one thread at a time."""

    def __init__(self, swarm: Swarm, clock: Callable[[], float] = time.monotonic) -> None:
        self._swarm = swarm
        self._clock = clock
        self._asked: dict[Endpoint, _PeerQuery] = {}
        self._seen: dict[str, SeenPeer] = {}
        self._looked_at = float("-inf")

    def refresh(self, records: Sequence[PeerRecord], working: Collection[str] = ()) -> list[SeenPeer]:
        """The known states of the peers of these records; pings peers again without waiting for answers.

        working: keys of the peers on routes of running answers. The sessions watch and replace these peers, so these
        peers do not count as gone when an answer to a ping is late.
        """
        now = self._clock()
        if now - self._looked_at > PAUSE_S:
            self._asked, self._seen = {}, {}
        told = bool(self._seen)
        self._looked_at = now
        # Keys are random, so a choice by key does not depend on blocks, and is the same in each call.
        asked = sorted(records, key=lambda record: record.key.text)[:ASKED_PEERS]
        endpoints = {record.key.text: record.endpoint for record in asked}
        self._asked = {endpoint: self._asked.get(endpoint) or _PeerQuery() for endpoint in endpoints.values()}
        before, self._seen = self._seen, {}
        for record in records:
            key = record.key.text
            endpoint = endpoints.get(key)
            state, answer = PeerState.UNKNOWN, None
            if endpoint is not None:
                state, answer = self._query_peer(endpoint, now, works=key in working)
            known = before.get(key)
            since = known.since if known is not None and known.state is state else now
            self._seen[key] = SeenPeer(record, state, since, answer)
        if told:
            self._note_changes(before)
        return list(self._seen.values())

    def _query_peer(self, endpoint: Endpoint, now: float, *, works: bool) -> tuple[PeerState, PingReply | None]:
        """The state and last answer of a peer; pings the peer again if it has answered, or has been silent."""
        asked = self._asked[endpoint]
        if asked.future is not None and asked.future.done():
            asked.answer, asked.future = asked.future.result(), None
        link = self._swarm.links.link_state(endpoint)
        if link is LinkState.REFUSED:
            return PeerState.REFUSES, asked.answer
        is_due = now - asked.asked_at >= LOST_S
        if link is LinkState.DOWN:
            if is_due:  # an unused link is closed, and only a ping finds out whether the peer is back
                self._swarm.ping(endpoint)
                asked.asked_at = now
            asked.future = None
            return PeerState.GONE, asked.answer
        if asked.future is None or works:
            asked.first_unanswered_at = now
        silent = now - asked.first_unanswered_at >= LOST_S
        if asked.future is None or is_due:
            asked.future, asked.asked_at = self._swarm.ping(endpoint), now
        if silent:
            return PeerState.GONE, asked.answer
        return PeerState.UNKNOWN if asked.answer is None else PeerState.HERE, asked.answer

    def _note_changes(self, before: dict[str, SeenPeer]) -> None:
        note = self._swarm.events.note
        for key, seen in self._seen.items():
            was, record = before.get(key), seen.record
            serving = _name(record)
            blocks = f"blocks {blocks_text(record.start, record.end)}"
            if was is None:
                note("joined", f"{serving} has joined and serves {blocks}")
                continue
            if (was.record.start, was.record.end) != (record.start, record.end):
                note("moved", f"{serving} now serves {blocks}")
            if seen.state is PeerState.GONE and was.state is not PeerState.GONE:
                note("gone", f"{serving} does not answer any more: {blocks} have lost a peer")
            elif was.state is PeerState.GONE and seen.state is PeerState.HERE:
                note("back", f"{serving} answers again and serves {blocks}")
        for key, was in before.items():
            if key not in self._seen and was.state is not PeerState.GONE:
                note("left", f"{_name(was.record)} has left")


def _name(record: PeerRecord) -> str:
    return f"{short_key(record.key.text)} at {record.address.removeprefix('tcp://')}"


RATE_S = 5  # Seconds over which rates are averaged
SHOWN_S = 60.0  # How long an ended answer is shown


def snapshot(gateway: Gateway, seen: Sequence[SeenPeer], problem: str | None) -> Any:
    """The swarm of the first model, and the answers of all models. problem: why peers may be unknown, if so."""
    model, loaded = gateway.served.generations.model, gateway.loaded
    logs, admissions = [each.generations.progress for each in loaded], [each.admission for each in loaded]
    answers = [(log.clock(), each) for log in logs for each in log.answers()]
    there = [each.record for each in seen if each.state not in (PeerState.GONE, PeerState.REFUSES)]
    overview = Overview.of(model.swarm, there, model.local_spans)
    per_second = [sum(tokens) for tokens in zip(*(log.tokens_per_second() for log in logs), strict=True)]
    rates = [sum(per_second[end - RATE_S : end]) / RATE_S for end in range(len(per_second), RATE_S - 1, -RATE_S)][::-1]
    now, counts = logs[0].clock(), model.speculator.counts
    return {
        "at": time.time(),
        "version": __version__,
        "model": gateway.served.name,
        "num_blocks": overview.facts.num_blocks,
        "problem": problem,
        "holes": [
            {"start": start, "end": end, "advice": advice}
            for (start, end), advice in zip(overview.missing, overview.advice(), strict=True)
        ],
        "local_spans": model.local_spans,
        "peers": sorted((_peer(model.swarm, each, now) for each in seen), key=itemgetter("start", "end", "key")),
        "requests": {name: sum(getattr(each, name) for each in admissions) for name in ("running", "waiting")},
        "tokens_per_s": rates[-1],
        "tokens_per_round_trip": counts.tokens / counts.round_trips if counts.round_trips else None,
        "history": rates,
        "answers": [_answer(each, now) for now, each in answers if each.ended is None or now - each.ended < SHOWN_S],
    }


def _peer(swarm: Swarm, seen: SeenPeer, now: float) -> dict[str, Any]:
    """A peer for the page. The peer's texts are untrusted; key and numbers were checked together with the record."""
    record, answer = seen.record, seen.answer
    return {
        "key": record.key.text,
        "short": short_key(record.key.text),
        "state": seen.state.value,
        "state_s": now - seen.since,
        "serves": record.serves,
        "address": record.address.removeprefix("tcp://"),
        "start": record.start,
        "end": record.end,
        "moving_to": record.moving_to,
        "device": record.device,
        "weights": record.dtype,
        "token_ms": token_ms(record),
        "token_joules": token_joules(record),
        "queue_ms": record.queue_ms if answer is None else answer.queue_ms,
        "sessions": record.sessions,
        "kv_free": record.kv_free_positions if answer is None else answer.kv_free_positions,
        "delay_ms": swarm.links.prober.rtt_ms(record.endpoint) / 2 or None,
        "way": swarm.links.tunnels.path_kind(record.endpoint).value,
        "version": record.version,
    }


def _answer(progress: AnswerProgress, now: float) -> dict[str, Any]:
    first, until = progress.first_token, now if progress.ended is None else progress.ended
    seconds = until - first if first is not None else 0.0
    return {
        "id": progress.answer,
        "ended": progress.ended is not None,
        "began_s": now - progress.began,
        "prompt": progress.prompt,
        "read": progress.prompt_done(),
        "first_token_s": None if first is None else first - progress.began,
        "tokens": progress.tokens,
        "tokens_per_s": (progress.tokens - 1) / seconds if seconds > 0 else None,
        "routes": [asdict(route) for route in progress.routes()],
    }


POINTS = 300  # Maximum number of points of a loss curve
_SUMMED = ("tokens", "seconds", "sent_bytes", "received_bytes", "joules")


class TunedRun:
    """A run of `splitnet tune`, watched through the metrics file in its folder. For one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read = 0  # bytes
        self._lines: list[dict[str, Any]] = []

    def read_run(self) -> dict[str, Any]:
        """Losses of at most `POINTS` steps, all evaluations, and sums over all steps."""
        with suppress(OSError, ValueError), (self._folder / "metrics.jsonl").open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._read:  # the run continues from an earlier step
                self._read, self._lines = 0, []
            file.seek(self._read)
            for line in file:
                if line.endswith(b"\n"):
                    self._lines.append(json.loads(line))
                    self._read += len(line)
        steps = [line for line in self._lines if "loss" in line]
        sums = {name: sum(line.get(name, 0) for line in self._lines) for name in _SUMMED}
        last = steps[-RATE_S:]
        seconds, every = sum(line["seconds"] for line in last), max(1, -(-len(steps) // POINTS))
        return sums | {
            "name": self._folder.name,
            "losses": [[line["step"], line["loss"]] for line in steps[::-every][::-1]],
            "evaluations": [line for line in self._lines if "eval_loss" in line],
            "tokens_per_s": sum(line["tokens"] for line in last) / seconds if seconds else None,
        }


SNAPSHOT_S = 1.0
LOOKUP_S = 3.0  # Time between two look-ups in the directory, while a page is open
MAX_STREAMS = 32  # Maximum number of open pages of all clients together
TICK_S = 0.25  # Maximum delay of an event, and of the end of a stream when the server ends

MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    # A browser must not run or load anything from the texts of peers.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Dashboard:
    """Watches all answers, and the swarm of the first model, while a page is open; all pages show the same data.

    tuned: the folder of a run of `splitnet tune` whose progress is also shown; None: no run is shown.
    """

    def __init__(self, gateway: Gateway, tuned: Path | None = None) -> None:
        self._tuned = TunedRun(tuned) if tuned is not None else None
        self._gateway = gateway
        self._swarm = gateway.served.generations.model.swarm
        self._presence = Presence(self._swarm)
        self._records: list[PeerRecord] = []
        self._problem: str | None = None
        self._lookup: asyncio.Task[None] | None = None
        self._looked_up_at = float("-inf")
        self._shown: Any = None
        self._shown_at = float("-inf")
        self._showing = asyncio.Lock()
        self._streams = FairAccount(MAX_STREAMS)

    async def stream(self, client: ApiClient) -> AsyncGenerator[str]:
        """Server-sent events: snapshots and entries of the swarm's event log, beginning with all kept entries.

        When more than `MAX_STREAMS` are open, the oldest stream of the client with the most streams ends.
        """
        over = asyncio.Event()
        looks = self._streams.make_holding(client, over.set, 1)
        clock = asyncio.get_running_loop().time
        number, shown_at = -1, float("-inf")
        try:
            while True:
                if clock() - shown_at >= SNAPSHOT_S:
                    shown_at = clock()
                    yield framed({"type": "snapshot", **await self._snapshot()})
                events = self._swarm.events.since(max(number, 0))
                if events or number < 0:
                    yield framed({"type": "events", "events": [asdict(event) for event in events]})
                    number = events[-1].number if events else 0
                if self._gateway.served.generations.draining or over.is_set():
                    return
                await asyncio.sleep(TICK_S)
        finally:
            looks.release()

    async def _snapshot(self) -> Any:
        clock = asyncio.get_running_loop().time
        async with self._showing:
            if clock() - self._shown_at >= SNAPSHOT_S / 2:
                await self._look_up()
                self._shown = await run_in_threadpool(self._take_snapshot)
                self._shown_at = clock()
            return self._shown

    async def _look_up(self) -> None:
        """Looks up the records in the background; waits only after a pause, because a directory can be slow."""
        now = asyncio.get_running_loop().time()
        age_s = now - self._looked_up_at
        if (self._lookup is None or self._lookup.done()) and age_s >= LOOKUP_S:
            self._looked_up_at = now
            self._lookup = asyncio.create_task(self._read_records())
            if age_s > PAUSE_S:
                await asyncio.shield(self._lookup)  # other streams need the result even if this stream is cancelled

    async def _read_records(self) -> None:
        try:
            self._records = await run_in_threadpool(self._swarm.peers, fresh=True)
            self._problem = None
        except SplitnetError as error:  # no usable record is left, see `PeerCache.refresh`
            self._records, self._problem = [], str(error)

    def _take_snapshot(self) -> Any:
        working = set[str]().union(*(each.generations.progress.working_peers() for each in self._gateway.loaded))
        seen = self._presence.refresh(self._records, working)
        tuned = self._tuned.read_run() if self._tuned is not None else None
        return {**snapshot(self._gateway, seen, self._problem), "tuning": tuned}


def dashboard_router(dashboard: Dashboard) -> APIRouter:
    """The paths of the page, which need no key, and the path of its data, which needs one."""
    router = APIRouter(include_in_schema=False)
    files = {file.name: file.read_bytes() for file in (resources.files("splitnet.serve") / "page").iterdir()}

    @router.get("/")
    async def page() -> Response:
        return await part_of_page("dashboard.html")

    @router.get("/page/{name}")
    async def part_of_page(name: str) -> Response:
        media_type = MEDIA_TYPES.get(name[name.rfind(".") :])
        if name not in files or media_type is None:
            raise HTTPException(404)
        return Response(files[name], media_type=media_type, headers=HEADERS)

    @router.get("/dashboard/events")
    async def stream(request: Request) -> Response:
        events = dashboard.stream(request.state.client)
        return EventStream(events, events)

    return router
