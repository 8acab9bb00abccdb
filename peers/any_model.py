"""The choice of a model by demand, for a peer that may serve any model; the rules are in `scheduler.model_choice`.

A peer that will change to another model first announces itself to the other model's peers as arriving, and decides
again a moment later, so that no more peers arrive at the same time than the model needs. Then the peer moves in the
same way as to other blocks of its own model.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from huggingface_hub import try_to_load_from_cache

from peers.joined_swarm import Found, find_model
from peers.peer_options import PeerOptions, Report
from peers.relocation import answering, choose_blocks, expected_block_ms, expected_speed, fitting_blocks, position_bytes
from scheduler.facts import Peer
from scheduler.model_choice import ModelOffer, better_model, first_model
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.transfer.fetching import Fetcher
from splitnet.checkpoint.transfer.manifest_search import names_of
from splitnet.directory.demand import demand_of
from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.record import PeerRecord, Wanted, expected_facts_of, facts_of
from splitnet.errors import ModelNotFound, SplitnetError
from splitnet.limits import keep_latest
from splitnet.paths import is_on_hub
from splitnet.security.identity import AuthorizedKeys, Identity

log = logging.getLogger(__name__)

LOOK_S: Final = 10.0  # interval between two decisions about other models
HOLD_S: Final = 3.0  # time from the announcement of a change until the decision that makes it
ASKED_S: Final = 180.0  # a model counts as unused if there was no demand for it for this time
RETRY_S: Final = 300.0  # time until a model that could not be opened is tried again
MAX_CONSIDERED: Final = 8  # maximum number of models that are compared in one decision: those with the highest demand
MAX_REMEMBERED: Final = 256  # maximum number of models whose last demand or failure is remembered


@dataclass(frozen=True)
class ChosenModel:
    """A model that the peer can serve, with the blocks that it would serve."""

    checkpoint: Checkpoint
    fetcher: Fetcher | None
    max_blocks: int
    offered: ModelOffer

    @property
    def span(self) -> tuple[int, int]:
        return self.offered.own.start, self.offered.own.end

    def arriving(self, own: PeerRecord) -> PeerRecord:
        """The record with which the peer announces its arrival at the model. own: the peer's present record."""
        (start, end), now = self.span, time.time()
        there = {"model": self.checkpoint.fingerprint, "model_name": self.checkpoint.name, "start": start, "end": end}
        there |= {"num_blocks": self.checkpoint.num_blocks, "max_blocks": self.max_blocks, "moving_to": (start, end)}
        there |= {"block_ms": self.offered.own.speed.block_ms, "sessions": 0, "kv_free_positions": 0, "serves": False}
        there |= {"kv_capacity": 0, "past_ms": ()}
        return replace(own, **there, placed_at=now, issued_at=now)


class ModelChoice:
    """Chooses a model for one peer, among the models that its options allow. Not thread-safe.

    go_on: called repeatedly during slow work; an error that `go_on` raises ends the work. authorized: the keys whose
    demand counts if strangers may not connect.
    """

    def __init__(
        self, options: PeerOptions, identity: Identity, go_on: Report, authorized: AuthorizedKeys | None = None
    ) -> None:
        self._options = replace(options, invited=False)
        self._allowed = options.any_model or ()
        self._identity = identity
        self._authorized = authorized
        self.go_on = go_on
        self._opened: dict[str, Found] = {}  # by fingerprint
        self._retry_at: dict[str, float] = {}  # by fingerprint, of models that could not be opened
        # By fingerprint: time of the last demand; for the peer's own model also of the last session.
        self._asked_at: dict[str, float] = {}
        self._leaving_for: PeerRecord | None = None  # the record that announces the arrival at another model
        self._look_at = -math.inf

    def choose_first(self, directory: SwarmDirectory) -> Found:
        """The model with the highest demand; if the swarm has no allowed model, the first allowed model that exists.
        Raises the errors of `join_swarm`, and ModelNotFound: there is no model."""
        demand, listed = self._demand(directory), directory.models()
        names = {model: one.name for model, one in demand.items()} | listed  # the names in records have priority
        found = {one.offered.id: one for one in self._destinations(directory, names, demand)}
        while found:
            chosen = found.pop(first_model([one.offered for one in found.values()]))
            try:
                chosen.checkpoint.get_blocks(*chosen.span)
                return self._opened[chosen.offered.id]
            except ModelNotFound as error:  # no peer offers the weights of the model
                log.warning("%s is not served here: %s", chosen.checkpoint.name, error)
        for model in self._allowed:
            try:
                return find_model(self._options, model, _open(model), directory, self._identity, self.go_on)
            except ModelNotFound as error:
                log.warning("%s", error)
        raise ModelNotFound("this swarm serves no model that this peer may and can serve: give MODEL, or --allow FILE")

    def serves(self, found: Found) -> None:
        """Records the model that the peer serves; the peer may return to this model later."""
        self._leaving_for = None
        keep_latest(self._opened, found[0].fingerprint, found, MAX_CONSIDERED + 1)

    def better_model_now(
        self, directory: SwarmDirectory, own: PeerRecord, others: Sequence[PeerRecord], *, size: float, in_use: bool
    ) -> ChosenModel | None:
        """The model to change to at once; call `serves` or `give_up` afterwards. None: the peer stays, or has announced
        a change (`is_leaving`). size: bytes of a position on links. in_use: whether sessions of the peer are in use."""
        now = time.monotonic()
        if in_use:
            self._asked_at[own.model] = now
        if now < self._look_at:
            return None
        self._look_at = now + LOOK_S
        demand = self._demand(directory)
        for model in reversed(demand):
            keep_latest(self._asked_at, model, now, MAX_REMEMBERED)
        here = ModelOffer(
            own.model,
            own.num_blocks,
            [facts_of(record, size) for record in others if record.serves],  # moving peers do not count
            facts_of(own, size),
            demand[own.model].tokens_per_s if own.model in demand else 0.0,
            in_use=now - self._asked_at.get(own.model, -math.inf) < ASKED_S,
        )
        found: list[ChosenModel] = []
        if not here.in_use or here.can_spare_own:
            listed = directory.models()
            names = {model: listed.get(model, one.name) for model, one in demand.items() if model != own.model}
            found = self._destinations(directory, names, demand)
        settled_s = time.time() - own.placed_at
        best = better_model(here, [one.offered for one in found], settled_s=settled_s, sessions=own.sessions)
        if best is None or (self._leaving_for is not None and self._leaving_for.model != best):
            self.stay(directory)
        if best is None:
            return None
        chosen = next(one for one in found if one.offered.id == best)
        if self._leaving_for is None:
            self._leaving_for = chosen.arriving(own)
            directory.announce(self._leaving_for, self._identity)
            self._look_at = time.monotonic() + HOLD_S
            return None
        return chosen

    @property
    def is_leaving(self) -> bool:
        """Whether the peer has announced a change and will decide again soon."""
        return self._leaving_for is not None

    def renew(self, directory: SwarmDirectory) -> None:
        """Renews the announcement of a change, because the download of blocks takes long. Any thread may call it."""
        if (record := self._leaving_for) is not None:
            directory.announce(replace(record, issued_at=time.time()), self._identity)

    def give_up(self, directory: SwarmDirectory, chosen: ChosenModel) -> None:
        """Withdraws the change to a model that cannot be served."""
        keep_latest(self._retry_at, chosen.offered.id, time.monotonic() + RETRY_S, MAX_REMEMBERED)
        self.stay(directory)

    def stay(self, directory: SwarmDirectory) -> None:
        """Withdraws the announcement of a change."""
        record, self._leaving_for = self._leaving_for, None
        if record is not None:
            with suppress(SplitnetError):  # the record expires anyway
                directory.withdraw(record, self._identity)

    def _demand(self, directory: SwarmDirectory) -> dict[str, Wanted]:
        authorized = self._authorized
        if authorized is None or authorized.lets_in_strangers:
            return demand_of(directory)
        return demand_of(directory, lambda key: authorized.allows(key.curve_raw))

    def _destinations(
        self, directory: SwarmDirectory, names: dict[str, str], demand: dict[str, Wanted]
    ) -> list[ChosenModel]:
        """The models among `names` (name by fingerprint) that the peer may and can serve."""
        found: list[ChosenModel] = []
        now = time.monotonic()
        considered = [model for model in names if self._sources(names[model]) and self._retry_at.get(model, 0.0) <= now]
        for model in considered[:MAX_CONSIDERED]:
            name = names[model]
            try:
                checkpoint, fetcher = self._open_one(directory, model, name)
                tokens = demand[model].tokens_per_s if model in demand else 0.0
                found.append(self._destination(directory, checkpoint, fetcher, tokens))
            except SplitnetError as error:
                log.info("%s is not served here: %s", name, error)
                keep_latest(self._retry_at, model, time.monotonic() + RETRY_S, MAX_REMEMBERED)
        return found

    def _sources(self, name: str) -> list[str]:
        """The folders, files or hub ids to open for a model name."""
        return [one for one in self._allowed if name in names_of(one)] if self._allowed else [name]

    def _open_one(self, directory: SwarmDirectory, model: str, name: str) -> Found:
        if model in self._opened:
            return self._opened[model]
        options = replace(self._options, model_id=model)
        # Without the owner's list, strangers choose the names. So models of the hub are opened only from the local
        # cache.
        cached = is_on_hub(name) and isinstance(try_to_load_from_cache(name, "config.json"), str)
        is_named = bool(self._allowed) or cached
        for source in self._sources(name):
            checkpoint = _open(source) if is_named else None
            if checkpoint is None or not checkpoint.is_whole or checkpoint.fingerprint == model:
                found = find_model(options, source, checkpoint, directory, self._identity, self.go_on)
                keep_latest(self._opened, model, found, MAX_CONSIDERED + 1)
                return found
        raise ModelNotFound("the local files of this name are those of another model")

    def _destination(
        self, directory: SwarmDirectory, checkpoint: Checkpoint, fetcher: Fetcher | None, tokens: float
    ) -> ChosenModel:
        options = self._options
        held = options.device, options.dtype, options.weights
        fitting = fitting_blocks(checkpoint, options.wish, *held)
        there = filter(self._counts, directory.peers(checkpoint.fingerprint))
        present = answering(list(there), self._identity)
        own_ms = expected_block_ms(checkpoint, *held)
        size = position_bytes(checkpoint)
        peers = [expected_facts_of(one, size) for one in present.records if one.serves or one.moving_to]
        start, end = choose_blocks(checkpoint, options.wish, fitting, present, own_ms)
        sending_ms = size / present.bytes_per_ms if present.bytes_per_ms else 0.0
        own = Peer(self._identity.public.text, start, end, expected_speed(own_ms, peers), sending_ms=sending_ms)
        offered = ModelOffer(checkpoint.fingerprint, checkpoint.num_blocks, peers, own, tokens)
        return ChosenModel(checkpoint, fetcher, fitting, offered)

    def _counts(self, record: PeerRecord) -> bool:
        """Whether the peer of a record counts in decisions. An arriving peer ignores other peers that have just
        announced their arrival, unless their keys are lower; so only some of the arriving peers give up."""
        mine = self._leaving_for
        if mine is None or record.serves or record.placed_at < mine.placed_at - HOLD_S:
            return True
        return record.key.text < mine.key.text


def _open(model: str) -> Checkpoint | None:
    try:
        checkpoint = Checkpoint.open(model)
        _ = checkpoint.is_whole
        return checkpoint
    except ModelNotFound:
        return None
