"""A hop that answers its clients like a peer, and sends mutated answers between the correct ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import zmq

from splitnet.blocks.adapters import write_tensors
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import ProtocolError, SplitnetError
from splitnet.hf.causal_lm import attach
from splitnet.security.identity import Identity
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.wire.codecs import CODECS
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import (
    Adapter,
    AdapterGradient,
    AdapterLoaded,
    Close,
    Failure,
    FailureCode,
    FetchedKV,
    FetchKV,
    Forward,
    Gradient,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    Result,
    Step,
    Tapped,
    Timing,
    decode,
    encode,
)
from tests.attacks.frames import frames_of, mutated

PLAIN = CODECS["none"].code
BURST = 256
REST_MS = 2


class HostileHop:
    """Serves all blocks of a model, in a thread. A context manager.

    Args:
        facts: the model.
        is_wild: whether the hop also sends mutated answers.

    Attributes:
        sent: mutated frames that were sent to clients.
    """

    def __init__(self, facts: ModelFacts, *, seed: int = 0, is_wild: bool = True) -> None:
        self.identity = Identity.generate()
        self.sent = 0
        self._facts = facts
        self._is_wild = is_wild
        self._seed = seed
        self._wild: dict[bytes, Iterator[list[bytes]]] = {}
        """The next mutated frames, by routing id of the client."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_publickey = self.identity.curve_public
        self._socket.curve_secretkey = self.identity.curve_secret
        self._socket.curve_server = True
        self._socket.router_mandatory = True
        self._socket.linger = 0
        self._socket.bind("tcp://127.0.0.1:0")
        address = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(address, bytes)
        self.endpoint = Endpoint(address.rstrip(b"\0").decode(), self.identity.public)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> HostileHop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._socket.poll(REST_MS):
                self._hear()
            for client in list(self._wild):
                self._rave(client)

    def _hear(self) -> None:
        for _ in range(BURST):
            try:
                client, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                asked = decode(frames)
            except ProtocolError:
                continue
            for answer in answers_to(asked, self._facts):
                self._send(client, [bytes(frame) for frame in encode(answer)])
            if self._is_wild and isinstance(asked, Open | Step | Forward):
                number = getattr(asked, "number", 1)
                recorded = frames_of(said_back(asked.session, asked.epoch, number, self._facts))
                self._seed += 1
                self._wild[client] = mutated(recorded, self._seed)

    def _rave(self, client: bytes) -> None:
        for frames in islice(self._wild[client], BURST):
            if not self._send(client, frames):
                return
            self.sent += len(frames)

    def _send(self, client: bytes, frames: list[bytes]) -> bool:
        try:
            self._socket.send_multipart([client, *frames], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError:  # the client is gone
            self._wild.pop(client, None)
            return False
        return True


def answers_to(asked: Message, facts: ModelFacts) -> list[Message]:
    """The answers that a peer with all blocks would send to a message."""
    hidden = b"\x00\x00\x80\x3f" * facts.hidden_size
    match asked:
        case Ping():
            return [Pong(asked.nonce, 0.0, 1 << 20, holds=bool(asked.session))]
        case Open():
            return [Opened(asked.session, asked.epoch, True, 0, taps=bool(asked.taps))]
        case Step():
            kept = sum(part.keep for part in asked.parts)
            return [_result(asked.session, asked.epoch, asked.number, facts, hidden * kept)]
        case Forward():
            return [_result(asked.session, asked.epoch, asked.number, facts, hidden * asked.positions)]
        case Gradient():
            return [Gradient(asked.session, asked.epoch, asked.number, 0, asked.since, False, PLAIN, asked.payload)]
        case Adapter() if not asked.remaining:
            return [AdapterLoaded(asked.session, asked.epoch, asked.version)]
        case FetchKV():
            return [FetchedKV(asked.session, asked.epoch, asked.number, 0, b"")]
        case _:
            return []


def said_back(session: bytes, epoch: int, number: int, facts: ModelFacts) -> list[Message]:
    """One message of every kind that a client accepts, about a request of its session."""
    hidden = bytes(4 * facts.hidden_size)
    tensors = {"0.self_attn.q_proj.lora_A": torch.zeros(2, facts.hidden_size)}
    some = write_tensors(tensors)
    messages: list[Message] = [
        Pong(1, 1.0, 1 << 20, 1, 1, True, 1, (Timing(1, 1, 1),)),
        Opened(session, epoch, True, 0),
        Opened(session, epoch, False, 7, taps=True),
        _result(session, epoch, number, facts, hidden),
        _result(session, epoch, number + 1, facts, b""),
        Tapped(session, epoch, number, 1, PLAIN, hidden),
        Gradient(session, epoch, number, 0, number, False, PLAIN, hidden),
        AdapterLoaded(session, epoch, 1),
        AdapterGradient(session, epoch, number, 0, some),
        AdapterGradient(session, epoch, number, 3, some),
        FetchedKV(session, epoch, number, 1, some),
        Step(session, epoch, number, (), None, 0, PLAIN, hidden, facts.num_blocks),
        Forward(session, epoch, number, 0, (1,), True, 0, PLAIN, PLAIN, hidden, facts.num_blocks),
        Close(session),
        *(Failure(session, epoch, number, code, "a text") for code in FailureCode),
        *(Failure(b"", epoch, 0, code, "a text") for code in FailureCode),
    ]
    return messages


def _result(session: bytes, epoch: int, number: int, facts: ModelFacts, payload: bytes) -> Result:
    return Result(session, epoch, number, facts.num_blocks, PLAIN, (Timing(1, 1, 1),), payload)


def use(folder: Path, addresses: list[str], seconds: float, heard: Any, *, count: int = 1 << 60) -> None:
    """Runs a client that generates and trains. Errors that describe the hop's fault are allowed.

    Args:
        heard: a shared counter of the frames that reached the client's decoder.
        count: number of frames after which the client ends.
    """
    checkpoint = Checkpoint.open(folder)
    ids = torch.arange(9)[None] + 3
    until = time.monotonic() + seconds
    with Swarm(ModelFacts.of(checkpoint), addresses) as swarm:
        receive = swarm.links._receive_message

        def hear(source: Any, frames: Any) -> None:
            heard.value += len(frames)
            receive(source, frames)

        swarm.links._transport.on_message = hear
        while time.monotonic() < until and heard.value < count:
            model: Any = attach(checkpoint, swarm, codec="none", recovery_timeout_s=2.0)
            try:
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
                inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
                model(inputs_embeds=inputs, labels=ids).loss.backward()
            except SplitnetError:
                continue
