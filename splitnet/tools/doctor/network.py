"""The way to a swarm: the nodes to join through, their clocks, what is served, and whether all of it is."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from scheduler.facts import missing_blocks
from splitnet.directory.hivemind_node import NO_HIVEMIND, NodeAnswer
from splitnet.directory.mdns import LocalNetwork, what_was_found
from splitnet.directory.record import PeerRecord, facts_of
from splitnet.errors import LanError
from splitnet.tools.doctor.finding import Finding, failed, passed, warned
from splitnet.tools.doctor.machine import SHOWN_DIGITS

if TYPE_CHECKING:
    from splitnet.checkpoint.checkpoint import Checkpoint

_SILENCE = (
    "it does not answer: check that the machine is on, and that no firewall or router drops connections to this port"
)
_CAUSES = {
    NO_HIVEMIND: "such an address needs hivemind, which is not installed here: join through a peer, with "
    "--join tcp://HOST:PORT?key=... as it prints",
    "connection refused": "nothing listens there: check that the peer runs, and copy the address that it prints",
    "no answer in time": _SILENCE,
    "i/o timeout": _SILENCE,
    "no good addresses": "its host name has no address: check the name",
    "no route to host": "no route leads there: check the network of both machines",
    "network is unreachable": "no route leads there: check the network of this machine",
}
_OTHER_CAUSE = "copy the whole address that the peer prints, and check the network"


def local_network(checkpoint: Checkpoint) -> tuple[Finding, list[str]]:
    """Looks for a swarm of the model on the local network, and gives the addresses to join it with."""
    try:
        with LocalNetwork(checkpoint.fingerprint if checkpoint.knows_manifest else "") as lan:
            nodes = lan.search()
    except LanError as error:
        return warned("lan", f"no swarm can be looked for on this network ({error}): give --join"), []
    if not nodes:
        return warned(
            "lan",
            f"no swarm for {checkpoint.name} on this network, or multicast is filtered there: start a peer with "
            f"`{shlex.join(['splitnet', 'peer', checkpoint.source])}`, or give --join",
        ), []
    return passed("lan", what_was_found(nodes)), [address for node in nodes for address in node.addresses]


def join_addresses(answers: Sequence[NodeAnswer], *, others_answer: bool = False) -> Iterator[Finding]:
    """Whether the nodes to join through answer, with the keys that their addresses name.

    Args:
        others_answer: there is another way to join.
    """
    # One is enough to join, so while another answers, one that does not is no more than a waste of time.
    wrong = warned if others_answer or any(not answer.fault for answer in answers) else failed
    for answer in answers:
        if not answer.fault:
            yield passed("join", f"{answer.address} answers in {answer.rtt_ms:.1f} ms")
        elif answer.other_id:
            yield wrong(
                "join",
                f"{answer.address}: what answers there has another key, {answer.other_id}: if the peer was started "
                "anew, copy the address that it prints now; otherwise do not trust it",
            )
        else:
            advice = next((words for cause, words in _CAUSES.items() if cause in answer.fault), None)
            yield wrong("join", f"{answer.address}: {advice or f'{answer.fault}; {_OTHER_CAUSE}'}")


def clock(answers: Sequence[NodeAnswer], allowed_s: float) -> Finding:
    """Whether this machine's clock agrees with those of nodes that answer.

    Args:
        answers: of at least one node that answers.
        allowed_s: by how many seconds clocks may differ.
    """
    ahead_s = {answer.address: answer.ahead_s for answer in answers if not answer.fault}
    usual_s = median(ahead_s.values())
    if abs(usual_s) > allowed_s:
        direction = "behind" if usual_s > 0 else "ahead of"
        return failed(
            "clock",
            f"the clock of this machine is {abs(usual_s):.0f} s {direction} the swarm's, and {allowed_s:.0f} s are "
            "allowed: set it, for instance with `timedatectl set-ntp true`",
        )
    for address, seconds in ahead_s.items():
        if abs(seconds) > allowed_s:
            return warned(
                "clock",
                f"the clock of {address} is {abs(seconds):.0f} s {'ahead' if seconds > 0 else 'behind'}, others agree "
                "with this machine's: have it set, for instance with `timedatectl set-ntp true`",
            )
    return passed("clock", f"within {abs(usual_s):.2f} s of the swarm's, {allowed_s:.0f} s are allowed")


def served_marks(models: Mapping[str, str], checkpoint: Checkpoint | None) -> list[str]:
    """The fingerprints of the models in a swarm that are the user's, or are called so if not all of it is here.

    Args:
        models, checkpoint: as for `served_model`.
    """
    if checkpoint is None:
        return list(models)
    if checkpoint.knows_manifest:
        return [checkpoint.fingerprint] * (checkpoint.fingerprint in models)
    return [mark for mark, name in models.items() if name == checkpoint.name]


def served_model(models: Mapping[str, str], checkpoint: Checkpoint | None) -> Finding:
    """Whether the swarm serves the model.

    Args:
        models: name by fingerprint of those that it serves.
        checkpoint: of the user; None: any model will do.
    """
    names = ", ".join(sorted(set(models.values())))
    if not models:
        return failed("swarm", "no peer serves a model here: start one with `splitnet peer MODEL --join ADDR`")
    if checkpoint is None:
        return passed("swarm", f"serves {names}")
    if served_marks(models, checkpoint):
        same = "with the same weights" if checkpoint.knows_manifest else "by its name: not all of it is here to compare"
        return passed("swarm", f"serves {checkpoint.name}, {same}")
    revisions = [mark[:SHOWN_DIGITS] for mark, name in models.items() if name == checkpoint.name]
    if revisions and checkpoint.knows_manifest:
        return failed(
            "swarm",
            f"serves another revision of {checkpoint.name}: its fingerprint is {' or '.join(revisions)}, yours is "
            f"{checkpoint.fingerprint[:SHOWN_DIGITS]}: use the same files on all machines",
        )
    return failed(
        "swarm", f"serves {names}, not your {checkpoint.name}: use that model, or the address of a swarm of yours"
    )


def coverage(name: str, count: int, silent: Sequence[PeerRecord], others: Sequence[PeerRecord]) -> Finding:
    """Whether every block of a model is served by a peer that answers.

    Args:
        name: of the model, which has `count` blocks.
        silent: records of peers that do not answer; others: of those that do, and may be counted on.
    """
    holes = missing_blocks([facts_of(record) for record in others if record.serves], count)
    if not holes:
        return passed("coverage", f"all {count} blocks of {name} are served by peers that answer")
    blocks = ", ".join(f"{start}..{end - 1}" for start, end in holes)
    fix = f"start a peer with --blocks {holes[0][0]}:{holes[0][1]}"
    if any(record.start < end and start < record.end for record in silent for start, end in holes):
        return failed(
            "coverage",
            f"blocks {blocks} of {name} are served only by peers that do not answer: {fix}, or see to the peers above",
        )
    return failed("coverage", f"blocks {blocks} of {name} are served by nobody: {fix}")
