"""An owner of examples in a joint tuning: sends gradients to the coordinator, and continues from the parameters that
the coordinator returns, see `rounds`.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from zmq.utils import z85

from splitnet.errors import DirectoryError, ProtocolError, SplitnetError
from splitnet.swarm.swarm import Swarm
from splitnet.tools.tune.coordinator import round_place
from splitnet.tools.tune.rounds import Numbers, sendable
from splitnet.tools.tune.run import TuningRun
from splitnet.transport.addresses import endpoint_of, peer_address
from splitnet.transport.transport import Transport
from splitnet.wire.endpoints import Destination, Endpoint, LinkState
from splitnet.wire.messages import (
    MAX_PAYLOAD_BYTES,
    AskRound,
    Message,
    Payload,
    RoundNumbers,
    RoundState,
    RoundWish,
    WantGradient,
    decode,
    encode,
)

LOOK_S = 0.2
ASK_AGAIN_S = 5.0  # A waiting owner asks again after this time, because the coordinator may have been restarted
SILENT_S = 120.0  # A coordinator that has been silent for this time counts as gone
WAITING_MESSAGES = 8  # Maximum number of unread messages, which may have 64 MiB each
SHOWN = 3  # Maximum number of coordinators with the same name that an error message lists


class RoundLink(AbstractContextManager["RoundLink"]):
    """The connection to the coordinator of a joint tuning of the swarm's model. The caller must close the connection.

    name: name of the joint tuning; or NAME@tcp://HOST:PORT?key=... with the coordinator's address, if several
    coordinators have this name. examples: number of this owner's examples. Raises SplitnetError if no coordinator, or
    several coordinators, have this name.
    """

    def __init__(self, swarm: Swarm, name: str, examples: int = 0) -> None:
        self.name, _, address = name.partition("@")
        self._model, self._identity, self._examples = swarm.facts.fingerprint, swarm.identity, examples
        self._endpoint = endpoint_of(address) if address else self._found(swarm)
        self._answers: queue.Queue[Message | SplitnetError] = queue.Queue(WAITING_MESSAGES)
        # Whether this owner starts the rounds and provides the settings and the initial parameters.
        self._starts = self._endpoint.key == self._identity.public
        self._beginning = np.zeros(0, np.float32)
        self._safe: tuple[str, ...] = ()  # how the last gradient was protected
        self.moved = 0, 0  # bytes of numbers sent and received
        self._transport = Transport(self._identity, on_message=self._receive_answer, on_link=self._link_changed)
        self._transport.start()

    def _found(self, swarm: Swarm) -> Endpoint:
        named = [record.endpoint for record in swarm.directory.peers(round_place(self._model, self.name))]
        own = [each for each in named if each.key == self._identity.public]
        found = own or [each for each in named if swarm.trusted is None or swarm.trusted.allows(each.key.curve_raw)]
        if named and not found:
            key = named[0].key.text
            raise DirectoryError(f"{key} coordinates {self.name}: list it in --trusted-peers if you trust it")
        if not found:
            raise DirectoryError(f"nobody coordinates a round {self.name} of this model: `splitnet round start` does")
        if len(found) > 1:
            ways = " or ".join(f"'{self.name}@{peer_address(each)}'" for each in found[:SHOWN])
            raise DirectoryError(f"{len(found)} coordinators call their round {self.name}: give {ways}")
        return found[0]

    def ask_round(
        self,
        wish: RoundWish,
        number: int = 0,
        payload: bytes = b"",
        *,
        gradient: Numbers | None = None,
        stopped: Sequence[int] = (),
        say: Callable[[str], None] = lambda _: None,
    ) -> tuple[RoundState, Numbers | None]:
        """Returns the state of the rounds, and the parameters, float32 `[n]`, or None if these are not known yet.

        With the wish JOIN, returns when the round has settings, and also parameters unless this owner provides them.
        With READY and a gradient, returns when the round is over; the gradient is sent when the coordinator requests
        it. Raises SplitnetError if the coordinator refuses or is gone, and Stopped once `stopped` is not empty.
        """
        size = 0 if gradient is None else gradient.size
        asked = AskRound(self.name, self._model, wish, number, self._examples, size, payload)
        state: RoundState | None = None
        parameters: Numbers | None = None
        heard = time.monotonic()
        ask_at, told, answered = heard, "", set[int]()
        while not stopped:
            if time.monotonic() >= ask_at:
                self._transport.send(self._endpoint, encode(asked))
                ask_at = time.monotonic() + ASK_AGAIN_S
            try:
                message = self._answers.get(timeout=LOOK_S)
            except queue.Empty:
                if time.monotonic() > heard + SILENT_S:
                    raise SplitnetError(
                        f"the coordinator of {self.name} has not answered for {SILENT_S:.0f} s: continue with "
                        "--resume when the coordinator is back"
                    ) from None
                continue
            heard = time.monotonic()
            match message:
                case SplitnetError():
                    raise message
                case RoundState() if message.refused:
                    raise SplitnetError(f"the coordinator of {self.name} refuses: {message.refused}")
                case RoundState():
                    begun = message.payload and (message.following or self._starts)
                    waits = (wish is RoundWish.JOIN and not begun) or (
                        wish is RoundWish.READY and message.number == number and number < message.rounds
                    )
                    state, parameters = None if waits else message, None
                    if waits and gradient is not None and not message.ready:  # the initial parameters were lost
                        self.send_parameters(self._beginning)
                    # On a slow link, the next message may take long; meanwhile it must not be requested again.
                    if not waits:
                        ask_at = heard + SILENT_S / 2
                    now = (
                        f"round {number + 1} of {message.rounds}: {message.ready} of {message.owners} owners are ready"
                    )
                    now = now if message.payload else "waiting for the owner who starts the rounds to join ..."
                    if waits and now != told:
                        told = now
                        say(now)
                case RoundNumbers() if state is not None and message.number == state.number:
                    if len(message.payload) % 4:
                        raise ProtocolError("the coordinator has sent no float32 numbers")
                    parameters = np.frombuffer(message.payload, "<f4")
                    if not np.isfinite(parameters).all():
                        raise ProtocolError("the coordinator has sent numbers that are not finite: end this round")
                    self.moved = self.moved[0], self.moved[1] + len(message.payload)
                case WantGradient() if message.attempt in answered:
                    pass  # not answered again: the same masks with another share would reveal the gradient
                case WantGradient() if gradient is not None and message.number == number:
                    answered.add(message.attempt)
                    safe = "masked" if message.members else "not masked", "with noise" if message.noise else "no noise"
                    if safe != self._safe:
                        self._safe = safe
                        say(f"gradients go to the coordinator: {', '.join(safe)}")
                    secret, public = z85.decode(self._identity.curve_secret), self._identity.public.curve_raw
                    payload = sendable(gradient, message, self.name, public, secret)
                    self.moved = self.moved[0] + len(payload), self.moved[1]
                    self._transport.send(self._endpoint, encode(RoundNumbers(number, message.attempt, payload)))
            if state is not None and (parameters is not None or not state.following):
                if wish in (RoundWish.JOIN, RoundWish.READY) and state.number >= state.rounds:
                    has_last = replace(asked, wish=RoundWish.READY, number=state.number)
                    self._transport.send(self._endpoint, encode(has_last))
                return state, parameters
        raise Stopped

    def send_parameters(self, parameters: Numbers) -> None:
        """Sends the initial parameters to the coordinator, if the coordinator has the same key as this owner."""
        self._beginning = parameters
        if self._starts:
            self._transport.send(self._endpoint, encode(RoundNumbers(0, 0, parameters.tobytes())))

    def _receive_answer(self, source: Destination, frames: Sequence[Payload]) -> None:
        with suppress(ProtocolError, queue.Full):
            self._answers.put_nowait(decode(frames))

    def _link_changed(self, endpoint: Endpoint, state: LinkState) -> None:
        if state.is_final:
            ends = "ends the handshake as if it has another key: copy its address anew"
            known = "does not let this key in: have it listed" if state is LinkState.REFUSED else ends
            with suppress(queue.Full):
                self._answers.put_nowait(SplitnetError(f"the coordinator at {endpoint.address} {known}"))

    def __exit__(self, *_: object) -> None:
        self._transport.close()


class Stopped(Exception):
    """Raised if the user has stopped this owner while it waits for the other owners."""


class JointRun(TuningRun):
    """A run whose steps use the mean gradient of all owners.

    say: called with the progress of the round. joined: the result of joining. Raises SplitnetError if the parameters
    do not fit in a message, or their number differs from that of the round.
    """

    def __init__(
        self,
        *given: Any,
        link: RoundLink,
        say: Callable[[str], None],
        joined: tuple[RoundState, Numbers | None],
        **named: Any,
    ) -> None:
        super().__init__(*given, **named)
        first = _numbers(self.trained.values())
        self._link, self._say = link, say
        # If the coordinator sent no parameters, rounds have not begun, and all owners begin with `first`.
        self._joined = joined[0], first if joined[1] is None else joined[1]
        if first.nbytes > MAX_PAYLOAD_BYTES:
            raise SplitnetError(f"{first.size:,} numbers are too many for owners that train together")
        link.send_parameters(first)
        self._adopt(*joined)

    @torch.no_grad()
    def _adopt(self, state: RoundState, parameters: Numbers | None) -> None:
        """Takes over the state and the parameters of the round."""
        if parameters is not None:
            sizes = [parameter.numel() for parameter in self.trained.values()]
            if sum(sizes) != parameters.size:
                raise SplitnetError(f"the round trains {parameters.size:,} numbers, this adapter {sum(sizes):,}")
            parts = torch.from_numpy(parameters.copy()).split(sizes)
            for parameter, part in zip(self.trained.values(), parts, strict=True):
                parameter.copy_(part.view_as(parameter))
        self.done = self.settings.steps if state.number >= state.rounds else state.number

    def _descend(self) -> None:
        gradient = _numbers(
            each.grad if each.grad is not None else torch.zeros_like(each) for each in self.trained.values()
        )
        how: dict[str, Any] = {"gradient": gradient, "stopped": self.stopped, "say": self._say}
        with suppress(Stopped):
            self._adopt(*self._link.ask_round(RoundWish.READY, self.done, **how))

    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        super().restore(tensors, facts)
        self._adopt(*self._joined)


def _numbers(tensors: Iterable[torch.Tensor]) -> Numbers:
    return torch.cat([tensor.detach().flatten().float().cpu() for tensor in tensors]).numpy()
