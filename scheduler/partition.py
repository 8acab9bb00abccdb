"""How to cut a model over devices that are known beforehand: `splitnet plan`.

`scheduler/placement.py` is for a swarm that grows peer by peer. Here all devices are chosen for at once, so that each
can be told its blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from scheduler.cost import block_ms, occupied_ms, route_ms, transfer_ms
from scheduler.encoding import Encoding
from scheduler.network import CLIENT, Network
from scheduler.orders import EXACT_DEVICES, Chain, Problem, cheapest_order
from scheduler.swarm import Hop, Peer, Route, Speed

HOP_MS: Final = 0.9
"""What a hop adds to a step beside blocks, codecs and links: messages, threads, dispatch (docs/benchmarks.md)."""

_SMALL: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Device:
    """A device that could be a peer.

    max_blocks: for how many blocks it has memory, 0 for none. watts: drawn while it computes; 0: not known.
    """

    id: str
    max_blocks: int
    speed: Speed
    hop_ms: float = HOP_MS
    watts: float = 0.0

    def peer(self, start: int, end: int) -> Peer:
        """The device once it serves the blocks [start, end)."""
        return Peer(self.id, start, end, self.speed, queue_ms=self.hop_ms, watts=self.watts)


class DoesNotFit(Exception):
    """The devices have memory for too few blocks. missing: how many more they would have to hold."""

    def __init__(self, missing: int) -> None:
        super().__init__(f"the devices lack memory for {missing} blocks")
        self.missing = missing


def fastest_partition(
    devices: Sequence[Device],
    num_blocks: int,
    network: Network,
    *,
    encodings: Sequence[Encoding],
    everyone: bool = False,
    exact_devices: int = EXACT_DEVICES,
) -> Route:
    """The chain through which a single token goes soonest, from the client and back to it. Its cost is that time in ms.

    All devices or only some of them, whichever is faster. The optimum, if no more than `exact_devices` devices have
    memory for a block; else the result of a local search.

    everyone: all devices with memory for a block take part, even where fewer would be faster.

    Raises:
        DoesNotFit: the model is too big for all devices together.
        ValueError: two devices have the same id, or there are more devices than blocks and `everyone` is to take part.
    """
    _check(devices, num_blocks)
    problem = _problem(devices, num_blocks, network, encodings, 1)
    chain = cheapest_order(problem, everyone=everyone, exact_devices=exact_devices)
    if chain is None:
        raise ValueError("there are more devices than blocks, so that not all can take part")
    return _route(chain, devices, network, encodings, 1)


def widest_partition(
    devices: Sequence[Device],
    num_blocks: int,
    network: Network,
    *,
    encodings: Sequence[Encoding],
    positions: int = 1,
    exact_devices: int = EXACT_DEVICES,
) -> Route:
    """The chain whose slowest stage, a device or a link, is the fastest: many steps under way flow at its pace.

    Of chains that are equal in this the one through which a step goes soonest. The optimum, as in `fastest_partition`.

    positions: of a step, the tokens of sessions that share a pass.

    Raises:
        DoesNotFit: the model is too big for all devices together.
        ValueError: two devices have the same id.
    """
    _check(devices, num_blocks)
    problem = _problem(devices, num_blocks, network, encodings, positions)
    names = [*(device.id for device in devices), CLIENT]
    busy = np.array([[occupied_ms(network.link(a, b), positions, encodings) for b in names] for a in names])
    most = int(problem.capacity.max())
    stages = problem.hop[:, None] + np.arange(1, most + 1) * problem.block[:, None]
    paces = np.unique(np.concatenate([stages.ravel(), busy.ravel()]))

    def within(pace: float) -> Chain | None:
        """The fastest chain no stage of which takes longer than this."""
        at_pace = np.floor((pace - problem.hop + _SMALL) / np.maximum(problem.block, _SMALL)).clip(0, num_blocks)
        return cheapest_order(
            Problem(
                num_blocks,
                np.minimum(problem.capacity, at_pace.astype(np.int64)),
                problem.block,
                problem.hop,
                np.where(busy <= pace + _SMALL, problem.links, np.inf),
            ),
            exact_devices=exact_devices,
        )

    low, high = 0, len(paces) - 1  # the slowest stage of all allows every chain
    best = within(float(paces[high]))
    while low < high:
        middle = (low + high) // 2
        chain = within(float(paces[middle]))
        if chain is None:
            low = middle + 1
        else:
            best, high = chain, middle
    assert best is not None, "what fits has a chain"
    return _route(best, devices, network, encodings, positions)


def tokens_per_s(
    hops: Sequence[Hop],
    peers: Mapping[str, Peer],
    network: Network,
    *,
    encodings: Sequence[Encoding],
    sessions: int = 1,
    client_ms: float = 0.0,
) -> float:
    """Tokens per second of all sessions together, when each gets one token after the other and none ever stops.

    Sessions go round in groups that share each pass. A round lasts as long as the trip of a group, or as all groups
    take at the slowest stage, whichever is longer. The best number of groups counts, so this is what could be reached.

    client_ms: between the arrival of one token at a client and the sending of the next.
    """
    best = 0.0
    for groups in range(1, sessions + 1):
        positions = -(-sessions // groups)
        one, two = (
            route_ms(hops, peers, network, positions=positions, encodings=encodings, in_flight=steps)
            for steps in (1, 2)
        )
        round_ms = max(one + client_ms, groups * (two - one))
        best = max(best, sessions * 1000 / round_ms)
    return best


def first_token_ms(
    hops: Sequence[Hop],
    peers: Mapping[str, Peer],
    network: Network,
    *,
    encodings: Sequence[Encoding],
    prompt: int,
    step_positions: int,
    client_ms: float = 0.0,
) -> float:
    """Ms until the first token after a prompt of `prompt` positions, cut into steps that follow each other closely.

    step_positions: of a step at most; here all steps are equally long.
    """
    steps = -(-prompt // step_positions)
    positions = -(-prompt // steps)
    return client_ms + route_ms(hops, peers, network, positions=positions, encodings=encodings, in_flight=steps)


def _check(devices: Sequence[Device], num_blocks: int) -> None:
    if len({device.id for device in devices}) != len(devices):
        raise ValueError("the ids of the devices differ")
    room = sum(device.max_blocks for device in devices)
    if room < num_blocks:
        raise DoesNotFit(num_blocks - room)


def _problem(
    devices: Sequence[Device], num_blocks: int, network: Network, encodings: Sequence[Encoding], positions: int
) -> Problem:
    names = [*(device.id for device in devices), CLIENT]
    return Problem(
        num_blocks,
        np.array([device.max_blocks for device in devices], dtype=np.int64).clip(0, num_blocks),
        np.array([block_ms(device.peer(0, 1), positions) for device in devices]),
        np.array([device.hop_ms for device in devices]),
        np.array([[transfer_ms(network.link(a, b), positions, encodings) for b in names] for a in names]),
    )


def _route(
    chain: Chain, devices: Sequence[Device], network: Network, encodings: Sequence[Encoding], positions: int
) -> Route:
    ends = np.cumsum([0, *chain.blocks]).tolist()
    hops = tuple(
        Hop(devices[device].id, start, end) for device, (start, end) in zip(chain.devices, pairwise(ends), strict=True)
    )
    peers = {device.id: device.peer(0, 1) for device in devices}
    return Route(hops, route_ms(hops, peers, network, positions=positions, encodings=encodings))
