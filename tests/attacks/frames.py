"""Sends mutated frames: messages of honest clients to a peer, with bytes changed, cut, joined and repeated."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence

import torch

from splitnet.blocks.adapters import write_tensors
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.swarm.swarm import ModelFacts
from splitnet.wire.codecs import CODECS
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import (
    Adapter,
    Announce,
    Chunk,
    Close,
    FetchKV,
    Fork,
    Forward,
    Gradient,
    LookUp,
    Message,
    Open,
    Ping,
    Replay,
    Step,
    encode,
)
from tests.attacks.transport import Client

PLAIN = CODECS["none"].code
LOOK = 2000
"""The number of messages between two pings; the peer must answer each ping."""
SESSIONS = [bytes([number]) * 16 for number in range(8)]


def said(facts: ModelFacts, blocks: tuple[int, int], session: bytes) -> list[Message]:
    """One message of every kind that a peer with these blocks accepts, for a session, in a valid order."""
    start, end = blocks
    hidden = 4 * facts.hidden_size

    def step(number: int, first: int, count: int, forks: tuple[Fork, ...] | None = None) -> Step:
        part = Chunk(1, first, count, 1)
        return Step(session, 1, number, (part,), forks, start, PLAIN, bytes(hidden * count))

    weights = {f"{start}.self_attn.q_proj.lora_A": torch.zeros(2, facts.hidden_size)}
    messages: list[Message] = [
        Ping(1),
        Open(session, 1, facts.fingerprint, start, end, 256, PLAIN, b"", b"", "", taps=(end,)),
        step(1, 0, 5),
        step(2, 5, 1),
        step(3, 6, 1, (Fork(2, 1),)),
        Replay(session, 1, 3, end),
        FetchKV(session, 1, 4, 1, 3),
        Adapter(session, 1, 1, 0, write_tensors(weights)),
        Forward(session, 1, 5, start, (4,), True, 0, PLAIN, PLAIN, bytes(4 * hidden), 0),
        Gradient(session, 1, 5, end, 0, False, PLAIN, bytes(4 * hidden)),
        Close(session),
        LookUp(1, facts.fingerprint, 2),
        Announce(2, 2, bytes(300)),
    ]
    return messages


def frames_of(messages: Sequence[Message]) -> list[list[bytes]]:
    return [[bytes(frame) for frame in encode(message)] for message in messages]


def mutated(recorded: Sequence[Sequence[bytes]], seed: int) -> Iterator[list[bytes]]:
    """Yields endless mutated frames, most of them invalid."""
    choices = random.Random(seed)
    while True:
        frames = list(choices.choice(recorded))
        for _ in range(choices.choice((0, 1, 1, 1, 2, 5))):
            at = choices.randrange(len(frames))
            frame = bytearray(frames[at])
            place = choices.randrange(len(frame) + 1)
            match choices.randrange(8):
                case 0 | 1 | 2 if frame:
                    frame[place % len(frame)] = choices.choice((0, 1, 127, 128, 255, choices.randrange(256)))
                case 3:
                    del frame[place:]
                case 4:
                    frame[place:place] = choices.randbytes(choices.choice((1, 4, 64)))
                case 5:
                    other = choices.choice(choices.choice(recorded))
                    frame[place:] = other[choices.randrange(len(other) + 1) :]
                case 6:
                    frames.insert(at, bytes(frame))
                case _ if len(frames) > 1:
                    del frames[at]
                    continue
                case _:
                    pass
            frames[at] = bytes(frame)
        yield frames


def flood(
    peer: Endpoint,
    facts: ModelFacts,
    *,
    seconds: float = 1e9,
    count: int = 1 << 60,
    blocks: tuple[int, int],
    seed: int = 0,
) -> int:
    """Sends mutated frames as fast as the peer answers. Returns how many.

    Raises:
        TimeoutError: the peer did not answer a ping.
    """
    ends, sent = time.monotonic() + seconds, 0
    messages = [message for session in SESSIONS for message in said(facts, blocks, session)]
    with Client(peer) as client:
        client.ping()
        for number, frames in enumerate(mutated(frames_of(messages), seed)):
            client.socket.send_multipart(frames)
            sent += len(frames)
            if number % LOOK == LOOK - 1:
                client.ping()
                if sent >= count or time.monotonic() > ends:
                    return sent
    return sent


def main() -> None:
    """Attacks the peers of a running swarm."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", help="folder or file of the checkpoint")
    parser.add_argument("address", help="address of the swarm, as for --join")
    parser.add_argument("--count", type=int, default=1_000_000, help="frames for each peer")
    arguments = parser.parse_args()
    from splitnet.checkpoint.checkpoint import Checkpoint

    facts = ModelFacts.of(Checkpoint.open(arguments.model))
    with DhtDirectory.start(initial_peers=[arguments.address]) as directory:
        for record in directory.peers(facts.fingerprint):
            began = time.monotonic()
            peer = Endpoint(record.address, record.key)
            sent = flood(peer, facts, count=arguments.count, blocks=(record.start, record.end))
            print(
                f"{sent} frames to {record.address} in {time.monotonic() - began:.0f} s; the peer answers.", flush=True
            )


if __name__ == "__main__":
    main()
