"""The demand for each model of a swarm: gateways measure it and publish it in their own records, see `DEMAND`."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final

from scheduler.model_choice import LEAST_DEMAND, DecayingRate
from splitnet.directory.announcer import Announcer, record_of
from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.record import DEMAND, MAX_WANTED, MAX_WANTED_TOKENS, WANTED_NAME, PeerRecord, Wanted
from splitnet.security.identity import Identity, PublicKey

REQUEST_TOKENS: Final = 16  # tokens that a request counts for at least
MAX_GATEWAYS: Final = 256  # gateways whose records are read
_NOWHERE = "tcp://127.0.0.1:1"  # a placeholder, because no process connects to a gateway


class DemandPublisher:
    """Publishes a gateway's demand for each model, smoothed over a minute. Thread-safe; close it before the directory.

    identity: signs the record; of two gateways with one key only the later record counts. clock: returns seconds.
    """

    def __init__(
        self, directory: SwarmDirectory, identity: Identity, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._identity = clock, identity
        self._rates: dict[str, tuple[Any, DecayingRate]] = {}
        self._lock = threading.Lock()
        self._announcer = Announcer(directory, identity, self._demand_record)
        self._announcer.begin()
        self.close = self._announcer.close

    def asked(self, model: Any, tokens: int) -> None:
        """Counts a request of `tokens` tokens. model: `ModelFacts` of `splitnet.swarm`, or a checkpoint."""
        with self._lock:
            _, rate = self._rates.setdefault(model.fingerprint, (model, DecayingRate()))
            is_new = rate.rate_at(self._clock()) < LEAST_DEMAND
            rate.add_events(max(tokens, REQUEST_TOKENS), self._clock())
        if is_new:
            self._announcer.publish_soon()

    def _demand_record(self) -> PeerRecord | None:
        with self._lock:
            now = self._clock()
            self._rates = {name: one for name, one in self._rates.items() if one[1].rate_at(now) >= LEAST_DEMAND}
            most = sorted(self._rates.values(), key=lambda one: -one[1].rate_at(now))[:MAX_WANTED]
            wanted = tuple(
                Wanted(
                    bytes.fromhex(model.fingerprint),
                    model.name.encode()[:WANTED_NAME].decode(errors="ignore"),
                    model.num_blocks,
                    min(rate.rate_at(now), MAX_WANTED_TOKENS),
                )
                for model, rate in most
            )
        about = {"model": DEMAND, "model_name": "demand", "address": _NOWHERE, "demand": wanted}
        return record_of(self._identity, about) if wanted else None


def demand_of(directory: SwarmDirectory, allows: Callable[[PublicKey], bool] = lambda key: True) -> dict[str, Wanted]:
    """The demand for each model over all gateways, by fingerprint, the highest first.

    Keys are cheap to make, and claims are not checked. So a key counts for at most 1,000 tokens/s over all its models,
    and all keys without a proof of work together count for at most 1,000 tokens/s per model. allows: whether a key
    counts at all. Raises DirectoryError.
    """
    records = sorted((one for one in directory.peers(DEMAND) if allows(one.key)), key=lambda one: not one.is_proven)
    names: dict[str, Wanted] = {}
    claimed: defaultdict[tuple[str, bool], float] = defaultdict(float)  # by model, and whether the keys are proven
    for record in records[:MAX_GATEWAYS]:
        share = MAX_WANTED_TOKENS / max(MAX_WANTED_TOKENS, sum(one.tokens_per_s for one in record.demand))
        for one in filter(lambda one: one.num_blocks, record.demand):
            names.setdefault(one.model.hex(), one)
            claimed[one.model.hex(), record.is_proven] += one.tokens_per_s * share
    wanted = {name: claimed[name, True] + min(claimed[name, False], MAX_WANTED_TOKENS) for name in names}
    return {
        name: names[name]._replace(tokens_per_s=tokens)
        for name, tokens in sorted(wanted.items(), key=lambda item: -item[1])
        if tokens >= LEAST_DEMAND
    }
