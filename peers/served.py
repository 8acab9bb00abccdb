"""The part of a model that a peer serves, and the checks of messages and pages against it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from peers.prefixes import STATES, Page
from peers.sessions import HopSession, SessionTooLong
from splitnet.errors import ProtocolError
from splitnet.security.identity import PublicKey
from splitnet.wire.block_inputs import check_block_inputs, check_groups, check_inputs, unpack_inputs
from splitnet.wire.codecs import check_size, codec_by_code
from splitnet.wire.endpoints import Endpoint, Relay, is_address
from splitnet.wire.messages import MAX_POSITIONS, FailureCode, Forward, Open, Step
from splitnet.wire.sent_log import PAGE, page_ends

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class ServedBlocks:
    """The part of a model that this peer serves."""

    model: str  # fingerprint
    start: int
    end: int
    num_blocks: int
    hidden_size: int
    max_positions: int | None
    weights: str = ""  # weight format, see `WeightChoice.description`
    # Types and shapes of the tensors of a page, by their names; see `Span.page_layout`.
    page: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict[str, Any])
    axes: int = 1  # see `Span.rotary_axes`
    joins: bool = False  # see `Span.joins_positions`
    per_layer: int = 0  # see `Span.per_layer_size`

    def refusal(self, message: Open) -> tuple[FailureCode, str] | None:
        """Why this peer cannot serve an `Open` at all."""
        if message.model != self.model:
            return FailureCode.WRONG_MODEL, "this peer serves other weights"
        if not self.start <= message.start < message.end <= self.end:
            text = f"this peer serves blocks {self.start}..{self.end - 1}, not {message.start}..{message.end - 1}"
            return FailureCode.WRONG_BLOCKS, text
        try:
            codec_by_code(message.codec)
            codec_by_code(message.tap_codec)
            if any(not low < high <= message.end for low, high in pairwise((message.start, *message.taps))):
                raise ProtocolError(
                    "the boundaries of the wanted hidden states are not in this session's span, or not in rising order"
                )
            next_hop_of(message)
            if message.previous:
                PublicKey(message.previous)
        except Exception as error:  # an unknown codec, a key that is not a point of the curve, a malformed address
            return FailureCode.BAD_MESSAGE, str(error)
        return None

    def check_step(self, session: HopSession, message: Step) -> int:
        """Checks the header of a step; returns the step's positions. Raises ProtocolError."""
        rows = set[int]()
        total = longest = 0
        for row, start, length, keep in message.parts:
            if not length or keep > length:
                raise ProtocolError("a part of the step is empty, or keeps more positions than it has")
            rows.add(row)
            total += length
            longest = max(longest, start + length)
        if not total:
            raise ProtocolError("a step has no parts")
        if len(rows) != len(message.parts):
            raise ProtocolError("a step names a row twice")
        if message.labels and len(message.labels) != sum(map(page_ends, message.parts)):
            raise ProtocolError("a step does not label each of its pages")
        self.check_payload(session, message)
        if self.max_positions is not None and longest > self.max_positions:
            raise SessionTooLong(f"position {longest} is beyond the model's context of {self.max_positions}")
        size = total + len(message.forks or ())
        # Twice the reservation may wait: an answered step may still be in its pass, and a step of an older epoch still
        # finishes.
        if size > session.reservation or session.waiting_size + size > 2 * session.reservation:
            raise SessionTooLong(f"the session has reserved {session.reservation} positions")
        return total

    def check_payload(self, session: HopSession, message: Step | Forward) -> None:
        """Checks the size of activations, and the headers of block inputs. Raises ProtocolError, CodecError."""
        check_size(message.codec, message.activations, message.positions, self.hidden_size)
        if self.per_layer and isinstance(message, Forward):
            raise ProtocolError(
                "blocks of this model have a second input for every token, which passes over whole sequences do not "
                "carry: use steps with a cache, under torch.no_grad()"
            )
        if message.inputs or self.per_layer:
            check_inputs(message.inputs, message.parts)
            reads: dict[str, Any] = {"axes": self.axes, "joins": self.joins, "per_layer": self.per_layer}
            blocks = range(session.start, session.end)
            check_block_inputs(message.inputs, self.hidden_size, blocks, parts=message.parts, **reads)
            check_groups(message)

    def check_page(self, page: Page, start: int, end: int, codec: int, *, first: bool) -> None:
        """Checks that a page has exactly the tensors and outputs of blocks `[start, end)`.

        A missing tensor would expose another session's data, because memory is not cleared. first: the page begins its
        text. Raises ProtocolError: the page differs.
        """
        tensors = page.tensors
        wanted = {name for name in self.page if (block := _block_of(name)) is None or start <= block < end}
        states = {name for name in wanted if name.startswith(STATES)}
        sinks = {name for name in wanted if ".first_" in name}
        due = wanted - states - sinks | (sinks if first else set[str]())
        given = {name for name in tensors if not name.startswith(STATES)}
        if given != due or tensors.keys() - given not in (set[str](), states):
            raise ProtocolError("a page belongs to other blocks")
        for name, tensor in tensors.items():
            dtype, shape = self.page[name]
            if name not in states and shape[2] == 1:  # one position
                shape = (*shape[:2], PAGE, *shape[3:])
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                raise ProtocolError("a page has other types or shapes than these blocks leave")
        size = 0 if end == self.num_blocks else PAGE * codec_by_code(codec).bytes_per_position(self.hidden_size)
        if size and len(page.output) > size:
            unpack_inputs(page.output[size:], PAGE)
        elif len(page.output) != size:
            raise ProtocolError("a page has other outputs than these blocks give")
        if not 0 <= page.rope_length <= MAX_POSITIONS:
            raise ProtocolError("a page has other outputs than these blocks give")


def next_hop_of(message: Open) -> Endpoint | None:
    """The next hop in an `Open`. Raises ProtocolError or KeyFileError: it is malformed."""
    if not message.next_key:
        return None
    return endpoint_of(message.next_key, message.next_address, message.next_relays, "the next hop")


def endpoint_of(key: bytes, address: str, relays: tuple[Relay, ...], what: str) -> Endpoint:
    """A peer that a client names; `what` is its name in errors. Raises ProtocolError or KeyFileError: it is
    malformed."""
    if not all(map(is_address, (address, *(relay.address for relay in relays)))):
        raise ProtocolError(f"{what}'s address is not tcp://IP:PORT: peers do not look up host names")
    for relay in relays:
        PublicKey(relay.key)
    return Endpoint(address, PublicKey(key), relays)


def renumbered(page: Mapping[str, Value], first: int) -> dict[str, Value]:
    """The tensors of a page with `first` added to the block number in each name: a row counts blocks from the start of
    the span, a page from the start of the model."""
    return {_renumbered(name, first): each for name, each in page.items()}


@lru_cache(1 << 13)
def _renumbered(name: str, first: int) -> str:
    return re.sub(r"\d+(?=\.)", lambda number: str(int(number[0]) + first), name, count=1)


@lru_cache(1 << 13)
def _block_of(name: str) -> int | None:
    number = re.search(r"\d+(?=\.)", name)
    return int(number[0]) if number is not None else None
