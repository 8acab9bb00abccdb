"""What a peer serves, and which messages fit that."""

from __future__ import annotations

from dataclasses import dataclass

from peers.row_memory import SessionTooLong
from peers.session import Session
from splitnet.errors import ProtocolError
from splitnet.net.codecs import check_size, codec_by_code
from splitnet.net.endpoints import Endpoint, is_address
from splitnet.net.identity import PublicKey
from splitnet.net.messages import FailureCode, Open, Payload, Step


@dataclass(frozen=True, slots=True)
class ServedBlocks:
    """The part of a model that this peer serves."""

    model: str
    """Fingerprint of the weights."""
    start: int
    end: int
    num_blocks: int
    hidden_size: int
    max_positions: int | None
    weights: str = ""
    """What they are held as, see `Weights.text`."""

    def refusal(self, message: Open) -> tuple[FailureCode, str] | None:
        """Why an `Open` cannot be served by this peer at all."""
        if message.model != self.model:
            return FailureCode.WRONG_MODEL, "this peer serves other weights"
        if not self.start <= message.start < message.end <= self.end:
            return (
                FailureCode.WRONG_BLOCKS,
                f"this peer serves blocks {self.start}..{self.end - 1}, not {message.start}..{message.end - 1}",
            )
        try:
            codec_by_code(message.codec)
            next_hop_of(message)
            if message.previous:
                PublicKey(message.previous)
        except Exception as error:  # an unknown codec, a key that is no point of the curve, a malformed address
            return FailureCode.BAD_MESSAGE, str(error)
        return None

    def check(self, session: Session, message: Step) -> int:
        """Positions in the step, after everything that its header claims was checked against its session."""
        rows = set[int]()
        total = longest = 0
        for row, start, length, keep in message.parts:
            if not length or keep > length:
                raise ProtocolError("a part of the step is empty, or keeps more than it has")
            rows.add(row)
            total += length
            longest = max(longest, start + length)
        if not total:
            raise ProtocolError("a step has no parts")
        if len(rows) != len(message.parts):
            raise ProtocolError("a step names a row twice")
        self.check_payload(message.codec, message.payload, total)
        if self.max_positions is not None and longest > self.max_positions:
            raise SessionTooLong(f"position {longest} is beyond the model's context of {self.max_positions}")
        size = total + len(message.forks or ())
        # Twice in all, as steps that are answered may still be in their pass, and those of an older epoch are finished.
        if size > session.budget or session.waiting_size + size > 2 * session.budget:
            raise SessionTooLong(f"the session has reserved {session.budget} positions")
        return total

    def check_payload(self, codec: int, payload: Payload, positions: int) -> None:
        """Raises CodecError if there is no such codec, or the payload has not the size of so many positions."""
        check_size(codec, payload, positions, self.hidden_size)


def next_hop_of(message: Open) -> Endpoint | None:
    """The next hop that an `Open` names. Raises ProtocolError and KeyFileError if that is malformed."""
    if not message.next_key:
        return None
    key = PublicKey(message.next_key)
    _ = key.curve_raw
    if not all(map(is_address, (message.next_address, *(relay.address for relay in message.next_relays)))):
        raise ProtocolError("the next hop's address is not tcp://IP:PORT: names of others are not looked up")
    for relay in message.next_relays:
        PublicKey(relay.key)
    return Endpoint(message.next_address, key, message.next_relays)
