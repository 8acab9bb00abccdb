"""The coordinator of a joint tuning: receives the owners' gradients and averages them, see `rounds`."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer

from splitnet.cli.daemon import StopSignals
from splitnet.directory.announcer import announced
from splitnet.directory.record import ROUNDS
from splitnet.errors import ProtocolError, SplitnetError
from splitnet.security.identity import AuthorizedKeys
from splitnet.swarm.swarm import Swarm
from splitnet.tools.tune.folder import TuningFolder
from splitnet.tools.tune.methods import TrainingSettings
from splitnet.tools.tune.rounds import DELTA, FORGIVEN, RoundRules, Rounds, budget
from splitnet.transport.addresses import peer_address, public_address
from splitnet.transport.transport import Transport
from splitnet.wire.endpoints import Connection, Destination, Endpoint
from splitnet.wire.messages import (
    AskRound,
    Message,
    Payload,
    RoundNumbers,
    RoundState,
    RoundWish,
    decode,
    encode,
)

LOOK_S = 0.2
LINGER_S = 120.0  # Seconds that the coordinator stays after the last round, for owners that lack the parameters


def round_place(fingerprint: str, name: str) -> str:
    """The key under which the directory lists coordinators of a round, in place of a model's fingerprint."""
    return ROUNDS + hashlib.sha256(f"splitnet round\0{fingerprint}\0{name}".encode()).hexdigest()


class Coordinator:
    """A joint tuning of the swarm's model. Its state is kept in a folder, for resuming.

    listen, public_host: as for a peer. authorized: file with the keys of owners; None: any owner. Raises AddressInUse,
    and DataError if the folder cannot be used, or holds another joint tuning.
    """

    def __init__(
        self,
        swarm: Swarm,
        name: str,
        rules: RoundRules,
        folder: TuningFolder,
        *,
        resume: bool,
        listen: str,
        public_host: str | None,
        authorized: Path | None,
    ) -> None:
        self._swarm, self._name, self._model, self._folder = swarm, name, swarm.facts.fingerprint, folder
        self._rounds, self._settings = Rounds(rules), b""
        self._own = swarm.identity.public.curve_raw
        self._lock, self._changed = threading.Lock(), threading.Event()
        self._saved: dict[str, Any] = {}
        self._connections: dict[bytes, Connection] = {}
        self._informed: set[bytes] = set()  # owners that have received the last parameters
        description = {"round": name, "model": self._model, **asdict(rules)}
        folder.check_settings(description, resume=resume)
        if saved := folder.load_checkpoint() if resume else None:
            tensors, facts = saved
            self._begin_rounds(facts["settings"].encode())
            self._rounds.number, self._rounds.releases = facts["number"], facts["releases"]
            self._rounds.parameters = tensors["parameters"].numpy()
            self._rounds.moments = tensors["moments"].numpy() if "moments" in tensors else None
        keys = AuthorizedKeys(authorized) if authorized else None
        self._transport = Transport(
            swarm.identity, on_message=self._receive_message, on_tick=self._advance, listen=listen, authorized=keys
        )
        folder.claim(description)
        address = public_address(listen, self._transport.port, public_host)
        self._endpoint = Endpoint(address, swarm.identity.public)

    def run(self) -> None:
        """Runs until the last round is over, or until a signal stops the coordinator (raises SystemExit)."""
        stop = StopSignals()
        self._transport.start()
        direct = f"{self._name}@{peer_address(self._endpoint)}"
        typer.echo(f"owners join with --join-round {self._name}, or with --join-round '{direct}'")
        over_at = 0.0
        about = {"model": round_place(self._model, self._name), "model_name": self._name}
        about["address"] = self._endpoint.address
        with closing(self._transport), announced(self._swarm.directory, self._swarm.identity, **about):
            try:
                while not over_at or (time.monotonic() < over_at + LINGER_S and not self._all_informed):
                    stop.raise_if_stopped()
                    self._changed.wait(LOOK_S)
                    self._changed.clear()
                    self._report_round()
                    if self._rounds.is_over and not over_at:
                        over_at = time.monotonic()
            finally:
                self._report_round()
        known = "each owner has the adapter" if self._all_informed else "some owners have not fetched it"
        typer.echo(f"{self._rounds.number} rounds are over; {known}")

    @property
    def _all_informed(self) -> bool:
        owners = list(self._rounds.owners.items())
        return all(key in self._informed for key, owner in owners if owner.missed < FORGIVEN)

    def _report_round(self) -> None:
        """Prints the messages of the rounds for the user, and saves the state."""
        with self._lock:
            rounds = self._rounds
            told, rounds.told = rounds.told, []
            there = {"parameters": rounds.parameters, "moments": rounds.moments}
            tensors = {name: torch.from_numpy(each) for name, each in there.items() if each is not None}
            facts = {"number": rounds.number, "releases": rounds.releases, "settings": self._settings.decode()}
        if facts != self._saved and rounds.parameters is not None:
            self._folder.save_checkpoint(tensors, facts)
            self._saved = facts
        for line in told:
            typer.echo(line)
        if told and (noise := rounds.rules.noise):
            spent = budget(noise, facts["releases"])
            typer.echo(f"privacy: epsilon {spent:.2f} at delta {DELTA:g} for each owner")

    def _receive_message(self, source: Destination, frames: Sequence[Payload]) -> None:
        with suppress(ProtocolError):
            message = decode(frames)
            assert isinstance(source, Connection)
            with self._lock:
                if isinstance(message, RoundNumbers) and message.attempt:
                    self._rounds.take_gradient(source.curve, message)
                elif isinstance(message, RoundNumbers) and source.curve == self._own:
                    if self._rounds.parameters is None:  # known parameters are never replaced
                        self._rounds.parameters = np.frombuffer(message.payload, "<f4").copy()
                elif isinstance(message, AskRound):
                    try:
                        self._answer_owner(source, message)
                    except SplitnetError as error:
                        self._send_numbers(source, self._state(refused=str(error)))
            self._advance()

    def _answer_owner(self, source: Connection, ask: AskRound) -> None:
        rounds, key = self._rounds, source.curve
        if (ask.name, ask.model) != (self._name, self._model):
            raise SplitnetError(f"this coordinator has another round ({self._name}) or another model: check both")
        if ask.wish == RoundWish.END:
            if key != self._own:
                raise SplitnetError("only the coordinator's key can end a round: give its --key-file")
            if not self._settings:
                raise SplitnetError("the rounds have not begun: stop the coordinator instead")
            rounds.rounds = rounds.number
        if key == self._own and ask.wish == RoundWish.JOIN and not self._settings:
            self._begin_rounds(bytes(ask.payload))
        if ask.wish not in (RoundWish.JOIN, RoundWish.READY) or not self._settings:
            return self._send_numbers(source, self._state())
        if ask.wish == RoundWish.JOIN or key not in rounds.owners:
            rounds.add_owner(key, ask.examples, time.monotonic())
            self._connections = {each: way for each, way in self._connections.items() if each in rounds.owners}
            self._informed &= rounds.owners.keys()
        before = self._connections.get(key)
        if before not in (None, source):
            self._send_numbers(
                before, self._state(refused="another process with this key has joined: give each its --key-file")
            )
        self._connections[key] = source
        current = ask.wish == RoundWish.READY and ask.number == rounds.number
        if current and rounds.is_over:
            self._informed.add(key)
        elif current:
            rounds.offer(key, ask.size)
        elif ask.wish == RoundWish.READY:
            rounds.tries(key)
        self._send_numbers(source, *([self._state()] if current else self._latest()))

    def _advance(self) -> None:
        """Sends requests for gradients and the latest parameters to owners; also called five times per second."""
        with self._lock:
            rounds, number = self._rounds, self._rounds.number
            waiting = [key for key, owner in rounds.owners.items() if owner.ready]
            for key, want in rounds.next_wants(time.monotonic()).items():
                self._send_numbers(self._connections[key], want)
            if rounds.number > number or (rounds.is_over and waiting):
                for key in waiting:
                    rounds.owners[key].ready = False
                    self._send_numbers(self._connections[key], *self._latest())
            if rounds.told:
                self._changed.set()

    def _begin_rounds(self, settings: bytes) -> None:
        """Begins the rounds with these settings. Raises SplitnetError if the settings are invalid."""
        try:
            given = json.loads(settings)
            names = {each.name for each in fields(TrainingSettings)}
            self._rounds.accept_settings(
                TrainingSettings(**{name: value for name, value in given.items() if name in names})
            )
        except (ValueError, TypeError, AttributeError):
            raise SplitnetError("these are not the settings of a round") from None
        self._settings = settings

    def _state(self, following: bool = False, refused: str = "") -> RoundState:
        rounds = self._rounds
        counts = rounds.number, rounds.rounds, rounds.present, rounds.ready, following
        return RoundState(*counts, refused, self._settings)

    def _latest(self) -> list[Message]:
        rounds = self._rounds
        if rounds.parameters is None:
            return [self._state()]
        return [self._state(following=True), RoundNumbers(rounds.number, 0, rounds.parameters.tobytes())]

    def _send_numbers(self, destination: Connection, *messages: Message) -> None:
        for message in messages:
            self._transport.send(destination, encode(message))
