"""How fast a device should be of which only two numbers are known: how fast it reads memory, how fast it multiplies."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.swarm import PASS_SIZES, Speed


@dataclass(frozen=True, slots=True)
class BlockWork:
    """What a pass through one block of a model has to do.

    dense_bytes: weights that every pass reads. expert_bytes: weights of all experts, of which a position uses the part
    `expert_share`. cache_bytes: keys and values of a session; a pass reads those of as many sessions as it has
    positions, but at most of `sessions`. flops: floating-point operations per position.
    """

    dense_bytes: float
    flops: float
    expert_bytes: float = 0.0
    expert_share: float = 1.0
    cache_bytes: float = 0.0
    sessions: int = 1

    def bytes_read(self, positions: int) -> float:
        """By a pass of so many positions; at worst each of them uses other experts."""
        used = min(1.0, positions * self.expert_share)
        return self.dense_bytes + used * self.expert_bytes + min(positions, self.sessions) * self.cache_bytes


def roofline(work: BlockWork, *, bytes_per_ms: float, flops_per_ms: float) -> Speed:
    """The speed of a device that does nothing but read and multiply, both at the same time.

    That is the roofline model (Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for
    multicore architectures", 2009): a pass takes as long as the slower of the two. It is a bound, so give it what the
    device achieves, not what its data sheet promises.

    bytes_per_ms: of memory that is read. flops_per_ms: in the type of the weights.

    Raises ValueError if one of the two is not positive.
    """
    if bytes_per_ms <= 0 or flops_per_ms <= 0:
        raise ValueError("a device reads and multiplies at more than nothing")
    return Speed(
        tuple(max(work.bytes_read(size) / bytes_per_ms, size * work.flops / flops_per_ms) for size in PASS_SIZES)
    )
