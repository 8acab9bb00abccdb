"""How single nodes of the DHT answer, without joining it: what stands in the way, how far, and by which clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from splitnet.net.dht_node import Hivemind, NodeLoop, have_hivemind, import_hivemind

CONNECT_TIMEOUT_S: Final = 4.0
ANSWER_TIMEOUT_S: Final = 3.0
_REAP_TIMEOUT_S = 2.0
_OTHER_KEY = "remote key matches "

NO_HIVEMIND: Final = "hivemind is not installed"
"""A fault of this side."""


@dataclass(frozen=True, slots=True)
class NodeAnswer:
    """What came of asking the node at an address.

    Attributes:
        address: multiaddr, as others join with it.
        fault: why it does not answer, in the words of the network; empty if it answers.
        other_id: the id that the node there has, if it is not the one that the address names.
        rtt_ms: round trip.
        ahead_s: how many seconds its clock is ahead of the one here, to half a round trip.
    """

    address: str
    fault: str = ""
    other_id: str = ""
    rtt_ms: float = 0.0
    ahead_s: float = 0.0


def ask_nodes(addresses: Sequence[str], *, clock: Callable[[], float] = time.time) -> list[NodeAnswer]:
    """Asks the nodes at some multiaddrs, all at once; takes a few seconds if one is silent.

    Args:
        clock: Unix time in seconds, to compare theirs with.
    """
    if not have_hivemind():
        return [NodeAnswer(address, NO_HIVEMIND) for address in addresses]
    with asyncio.Runner(loop_factory=NodeLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, NodeLoop)
        try:
            return runner.run(_ask_all(addresses, clock))
        finally:
            loop.run_until_complete(loop.reap_children(_REAP_TIMEOUT_S))


def allowed_skew_s() -> float:
    """By how many seconds clocks may differ when one node joins another."""
    return import_hivemind().max_skew_s


async def _ask_all(addresses: Sequence[str], clock: Callable[[], float]) -> list[NodeAnswer]:
    hivemind = import_hivemind()
    return await asyncio.gather(*(_ask(hivemind, address, clock) for address in addresses))


async def _ask(hivemind: Hivemind, address: str, clock: Callable[[], float]) -> NodeAnswer:
    where, _, name = address.rpartition("/p2p/")
    p2p: Any = None
    try:
        # libp2p dials all addresses that it has ever heard of a node, so each address has a child process of its own.
        p2p = await hivemind.P2P.create(no_listen=True, dht_mode="client", nat_port_map=False)
        peer = hivemind.PeerID.from_base58(name)
        await asyncio.wait_for(p2p._client.connect(peer, [hivemind.Multiaddr(where)]), CONNECT_TIMEOUT_S)
        stub: Any = hivemind.stub(p2p, peer)
        request = hivemind.messages.PingRequest(peer=hivemind.messages.NodeInfo(), validate=False)
        asked_at, began = clock(), time.perf_counter()
        answer: Any = await stub.rpc_ping(request, timeout=ANSWER_TIMEOUT_S)
        rtt_s = time.perf_counter() - began
    except TimeoutError:
        return NodeAnswer(address, "no answer in time")
    except Exception as error:  # of libp2p's child process and of hivemind, which have no common base
        fault = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip(" *")
        return NodeAnswer(address, fault, fault.partition(_OTHER_KEY)[2].strip())
    finally:
        if p2p is not None:
            await p2p.shutdown()
    return NodeAnswer(address, rtt_ms=rtt_s * 1000, ahead_s=answer.dht_time - asked_at - rtt_s / 2)
