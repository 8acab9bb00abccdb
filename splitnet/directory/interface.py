"""What a directory of peers is, whoever keeps it: a DHT, or peers that are asked."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Final

from splitnet.directory.record import HELPERS, PeerRecord
from splitnet.errors import DirectoryError
from splitnet.security.identity import Identity, PublicKey
from splitnet.wire.messages import MAX_DEPTH

OWN_DEPTH: Final = MAX_DEPTH + 1
"""Of questions that this process has itself: whom it asks may ask on."""


class SwarmDirectory(ABC):
    """The records of peers. All methods may be called from any thread; they block, for 10 s at most.

    addresses: multiaddrs that others can join with; empty if this is no node of a DHT that listens.
    """

    addresses: list[str]

    @abstractmethod
    def store(self, record: PeerRecord, packed: bytes, depth: int = OWN_DEPTH) -> bool:
        """Publishes a valid record until it expires.

        Args:
            packed: the record, signed.
            depth: over how many peers it may go on; 0: it is only kept here.

        Returns:
            False: it was refused, as there is a later record of its key, no place for it, or a clock is wrong.

        Raises:
            DirectoryError: the directory does not answer.
        """

    @abstractmethod
    def records(self, model: str, depth: int = OWN_DEPTH) -> list[PeerRecord]:
        """The latest verified record of each peer of the model with this fingerprint, of those that left, too.

        Args:
            model: empty: one record of each model.
            depth: over how many peers the question may go on; 0: only what is kept here counts.

        Raises:
            DirectoryError: the directory does not answer, or nobody is found and who was joined through is silent.
        """

    @abstractmethod
    def close(self) -> None:
        """Leaves. May be called more than once."""

    def rest(self) -> None:  # noqa: B027 (most have nothing to end)
        """Says that nothing will be asked for a while: what costs bytes meanwhile ends until something is."""

    def moved(self) -> None:  # noqa: B027 (most notice by themselves)
        """The machine has another address: what was opened from the former one is dead. May take seconds."""

    def announce(self, record: PeerRecord, identity: Identity) -> bool:
        """Signs and publishes `record` until it expires; call it again before that. See `store`."""
        return self.store(record, record.pack(identity))

    def withdraw(self, record: PeerRecord, identity: Identity) -> bool:
        """Replaces the announced `record` by one that says that the peer has left, so that lookups miss it at once."""
        return self.announce(record.farewell(), identity)

    def peers(self, model: str) -> list[PeerRecord]:
        """Verified records of the peers that serve the model with this fingerprint, one of each. See `records`."""
        return [record for record in self.records(model) if not record.has_left]

    def models(self) -> dict[str, str]:
        """Name by fingerprint of the models in the swarm; a name is what some peer claims. See `records`."""
        return {record.model: record.model_name for record in self.records("") if record.model != HELPERS}

    def __enter__(self) -> SwarmDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JoinedDirectories(SwarmDirectory):
    """Several directories of one swarm as one: what one says counts, and one that answers is enough."""

    def __init__(self, directories: Sequence[SwarmDirectory]) -> None:
        self.directories = directories
        self.addresses = [address for directory in directories for address in directory.addresses]

    def store(self, record: PeerRecord, packed: bytes, depth: int = OWN_DEPTH) -> bool:
        answers = list[bool]()
        error: DirectoryError | None = None
        for directory in self.directories:
            try:
                answers.append(directory.store(record, packed, depth))
            except DirectoryError as silent:
                error = silent
        if error is not None and not answers:
            raise error
        return any(answers)

    def records(self, model: str, depth: int = OWN_DEPTH) -> list[PeerRecord]:
        answers = list[list[PeerRecord]]()
        error: DirectoryError | None = None
        for directory in self.directories:
            try:
                answers.append(directory.records(model, depth))
            except DirectoryError as silent:
                error = silent
        if error is not None and not answers:
            raise error
        return latest(model, answers)

    def rest(self) -> None:
        for directory in self.directories:
            directory.rest()

    def moved(self) -> None:
        for directory in self.directories:
            directory.moved()
        self.addresses = [address for directory in self.directories for address in directory.addresses]

    def close(self) -> None:
        for directory in self.directories:
            with suppress(DirectoryError):
                directory.close()


def latest(model: str, found: Iterable[Sequence[PeerRecord]]) -> list[PeerRecord]:
    """Of records from several places the latest one of each peer of a model, or of each model if `model` is empty.

    The first of each place come first: so a flood in one place stands behind those who were there before in others.
    """
    now = time.time()
    kept: dict[PublicKey | str, PeerRecord] = {}
    for row in zip_longest(*found):
        for record in filter(None, row):
            if not record.is_valid_at(now) or (record.model != model if model else record.has_left):
                continue
            name = record.key if model else record.model
            if name not in kept or record.issued_at > kept[name].issued_at:
                kept[name] = record
    return list(kept.values())
