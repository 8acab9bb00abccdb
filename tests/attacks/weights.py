"""Peers that send false weights to a starting peer of the tests.

Each function attacks for some seconds, and returns the number of false answers. It raises AssertionError if the memory
or the files of the starting peer grow as long as the attack runs.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from itertools import count

import psutil

from splitnet.checkpoint.checkpoint import open_store
from splitnet.checkpoint.transfer.fetching import Fetcher, PeerQuestions
from splitnet.checkpoint.transfer.manifest import PIECE_BYTES, Manifest, Pieces, Tensor, digest
from splitnet.checkpoint.transfer.manifest_search import find_manifest
from splitnet.checkpoint.transfer.weight_pieces import make_folder
from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.record import PeerRecord
from splitnet.security.identity import Identity
from splitnet.transport.transport import Transport
from splitnet.wire.endpoints import Destination, Endpoint
from splitnet.wire.messages import (
    MAX_PART_BYTES,
    AskWeights,
    Failure,
    FailureCode,
    Message,
    Payload,
    WeightsKind,
    WeightsPart,
    decode,
    encode,
)
from tests.attacks.directory import fake_record

MOST_MIB = 128
"""Allowed growth of the starting peer's process. Sockets and allocators take most of it; none of it grows with time."""
LIE_BYTES = 1 << 20
UNDER_WAY = 16
"""Maximum number of false answers that are sent and not yet received, so that the attacker's own memory stays small."""

Answer = Callable[["Liar", Destination, AskWeights], None]


class Liar:
    """Listens on this machine, and answers questions about weights with a given function. A context manager."""

    def __init__(self, answer: Answer) -> None:
        self.identity = Identity.generate()
        self.lies = 0
        self._answer = answer
        self.transport = Transport(self.identity, on_message=self._heard, listen="tcp://127.0.0.1:0", max_backlog=None)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(f"tcp://127.0.0.1:{self.transport.port}", self.identity.public)

    def __enter__(self) -> Liar:
        self.transport.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.transport.close()

    def say(self, destination: Destination, message: Message) -> None:
        self.lies += 1
        self.transport.send(destination, encode(message))

    def _heard(self, source: Destination, frames: Sequence[Payload]) -> None:
        message = decode(frames)
        if isinstance(message, AskWeights):
            self._answer(self, source, message)


class Known(SwarmDirectory):
    """A directory of fixed records."""

    def __init__(self, *records: PeerRecord) -> None:
        self._records = records

    def store_record(self, record: PeerRecord, packed: bytes, depth: int = 0) -> bool:
        raise NotImplementedError

    def records(self, model: str, depth: int = 0) -> list[PeerRecord]:
        if model:
            return [record for record in self._records if record.model == model]
        return list({record.model: record for record in self._records}.values())

    def close(self) -> None:
        pass


def unasked_answers(*, seconds: float) -> int:
    """Refuses a question, then sends answers without a question. The starting peer reads none, because it reads
    files."""
    asked, heard = threading.Event(), count()
    askers: list[Destination] = []

    def refuse(liar: Liar, source: Destination, question: AskWeights) -> None:
        askers.append(source)
        liar.say(source, Failure(b"", 0, question.number, FailureCode.WRONG_MODEL, "no"))
        asked.set()

    with Liar(refuse) as liar, PeerQuestions(Identity.generate()) as asking:
        number = asking.ask_peer(liar.endpoint, WeightsKind.MANIFEST, bytes(32))
        assert asked.wait(30)
        hear = asking._links.on_answer
        assert hear is not None

        def listen(source: Endpoint, message: Message) -> None:
            next(heard)
            hear(source, message)
            room.release()

        room = threading.Semaphore(UNDER_WAY)
        asking._links.on_answer = listen
        grown = growth()
        until, payload = time.monotonic() + seconds, bytes(LIE_BYTES)
        while time.monotonic() < until:
            for told in (number, number + 1, 0):
                if room.acquire(timeout=1.0):
                    liar.say(askers[0], WeightsPart(told, 256 << 20, payload))
        assert asking.answers.qsize() == 1, "one answer to one question"
        assert grown() < MOST_MIB
        return next(heard)


def pieces_everywhere(*, seconds: float) -> int:
    """Sends a manifest that names one piece very often; the starting peer fetches the one tensor that it needs.

    `SPLITNET_CACHE` must be set: the starting peer's folder is created there.
    """
    data = os.urandom(PIECE_BYTES)
    names = {digest(data): data}
    lies, round_, until = 0, 0, time.monotonic() + seconds
    while lies == 0 or time.monotonic() < until:
        round_ += 1
        many = 1 << 18  # 256 GiB according to a manifest of 8 MiB
        filler = Tensor("filler", "U8", (many * PIECE_BYTES,), Pieces(many * PIECE_BYTES, digest(data) * many))
        needed = Tensor("needed", "U8", (PIECE_BYTES,), Pieces(PIECE_BYTES, digest(data)))
        manifest = Manifest(json.dumps({"model_type": "llama", "round": round_}), (filler, needed))
        packed, bits = manifest.pack(), b"\xff" * (many // 8 + 1)

        def answer(liar: Liar, source: Destination, question: AskWeights) -> None:
            if question.kind == WeightsKind.PIECE:
                told = names[question.name]
            else:
                told = packed if question.kind == WeightsKind.MANIFEST else bits  # noqa: B023
            part = told[question.offset : question.offset + MAX_PART_BYTES]
            liar.say(source, WeightsPart(question.number, len(told), part))

        with Liar(answer) as liar, PeerQuestions(Identity.generate()) as asking:
            record = fake_record(liar.identity, manifest.fingerprint, model_name="nice", address=liar.endpoint.address)
            grown = growth()
            found = find_manifest(Known(record), asking, "nice")
            assert found is not None
            path = make_folder(found[0], (), lambda path: None)
            folder = open_store(path).folder
            assert folder is not None
            folder.fetch = Fetcher(folder, lambda: [liar.endpoint], Identity.generate()).fetch
            folder.supply(["needed"])
            on_disk = sum(512 * file.stat().st_blocks for file in path.iterdir())
            assert on_disk < 2 * PIECE_BYTES + 2 * len(packed), f"{on_disk >> 20} MiB on the disk"
            assert folder.fetched == PIECE_BYTES
            assert grown() < MOST_MIB
            lies += liar.lies
    return lies


def growth() -> Callable[[], float]:
    """Returns a function that returns by how many MiB this process has grown since this call."""
    process = psutil.Process()
    before = process.memory_info().rss
    return lambda: (process.memory_info().rss - before) / 2**20
