"""What the dashboard shows, as JSON."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from splitnet.client.overview import Overview, short_key, token_joules, token_ms
from splitnet.client.swarm import Swarm
from splitnet.serve.admission import Admission
from splitnet.serve.generation import Generations
from splitnet.serve.presence import Seen, State
from splitnet.serve.progress import Progress
from splitnet.version import __version__

RATE_S = 5
"""Rates are means of so many seconds."""

SHOWN_S = 60.0
"""For so long an answer that has ended is still told of."""


def snapshot(
    name: str, generations: Generations, admission: Admission, seen: Sequence[Seen], problem: str | None
) -> Any:
    """The swarm and the answers as they are now.

    Args:
        name: of the model, in requests.
        seen: the peers.
        problem: why they may not be known.
    """
    model, log = generations.model, generations.progress
    there = [each.record for each in seen if each.state not in (State.GONE, State.REFUSES)]
    overview = Overview.of(model.swarm, there, model.local_spans)
    per_second = log.tokens_per_second()
    rates = [sum(per_second[end - RATE_S : end]) / RATE_S for end in range(len(per_second), RATE_S - 1, -RATE_S)][::-1]
    now = log.clock()
    return {
        "at": time.time(),
        "version": __version__,
        "model": name,
        "num_blocks": overview.facts.num_blocks,
        "problem": problem,
        "holes": [
            {"start": start, "end": end, "advice": advice}
            for (start, end), advice in zip(overview.missing, overview.advice(), strict=True)
        ],
        "local_spans": model.local_spans,
        "peers": [_peer(model.swarm, each, now) for each in _in_order(seen)],
        "requests": {"running": admission.running, "waiting": admission.waiting},
        "tokens_per_s": rates[-1],
        "history": rates,
        "answers": [_answer(each, now) for each in log.answers() if each.ended is None or now - each.ended < SHOWN_S],
    }


def _in_order(seen: Iterable[Seen]) -> list[Seen]:
    return sorted(seen, key=lambda each: (each.record.start, each.record.end, each.record.key.text))


def _peer(swarm: Swarm, seen: Seen, now: float) -> dict[str, Any]:
    """What a peer says is untrusted text; its key and its numbers were checked with its record."""
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
        "way": swarm.links.way(record.endpoint).value,
        "version": record.version,
    }


def _answer(progress: Progress, now: float) -> dict[str, Any]:
    first, until = progress.first_token, now if progress.ended is None else progress.ended
    seconds = until - first if first is not None else 0.0
    return {
        "id": progress.answer,
        "ended": progress.ended is not None,
        "began_s": now - progress.began,
        "first_token_s": None if first is None else first - progress.began,
        "tokens": progress.tokens,
        "tokens_per_s": (progress.tokens - 1) / seconds if seconds > 0 else None,
        "routes": [asdict(route) for route in progress.routes()],
    }
