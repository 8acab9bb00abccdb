"""The audits of a client: the choice of peers, findings, and files of evidence."""

from __future__ import annotations

import logging
import shlex
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from math import inf
from pathlib import Path

from scheduler.liveness import BAN_S
from splitnet.audit.evidence import write_piece
from splitnet.audit.other_peers import OtherPeers
from splitnet.audit.piece import Piece
from splitnet.audit.program import AuditProgram
from splitnet.audit.session_audit import SessionAudit
from splitnet.blocks.model_sizes import expert_share
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import PeerLied
from splitnet.paths import cache_folder, keep_file
from splitnet.session.failover import RouteHop
from splitnet.session.inference import Session
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.swarm import Swarm
from splitnet.wire.endpoints import is_loopback

log = logging.getLogger(__name__)

STRANGERS_RATE = 0.01
"""Part of the work of strangers that is computed again, if the caller gives no rate. VeriLLM (arXiv:2509.24257) costs
about as much."""

MOST_DOUBLED = 12  # times that the time for which a peer is left is doubled, to 34 h

SUFFIX = ".evidence"


def auditor_for(checkpoint: Checkpoint, swarm: Swarm, options: ConnectionOptions) -> Auditor | None:
    """The auditor that the options ask for; None: no audits. Raises KeyFileError: the list of auditors is unusable."""
    known = options.swarm_key is not None or options.trusted_peers is not None
    if options.audit == 0 or (options.audit is None and options.auditors is None and known):
        return None
    examiner: AuditProgram | OtherPeers
    if options.auditors is None and weights_are_here(checkpoint):
        examiner = AuditProgram(checkpoint.source)
    else:
        examiner = OtherPeers(swarm, options, routed=expert_share(checkpoint.config) < 1)
    auditor = Auditor(swarm, options.audit, examiner)
    swarm.at_close(auditor.close)
    return auditor


def weights_are_here(checkpoint: Checkpoint) -> bool:
    return Path(checkpoint.source).exists()


def evidence_folder(model: str) -> Path:
    """The folder of files of evidence about peers of a model."""
    return cache_folder() / "audits" / model[:16]


def named_peers(model: str) -> dict[str, Path]:
    """The files of evidence about peers of a model, by the peer's key."""
    return {file.name.removesuffix(SUFFIX): file for file in sorted(evidence_folder(model).glob(f"*{SUFFIX}"))}


class Auditor:
    """Examines the work of peers for all sessions of a client. Peers with evidence are not used. Thread-safe.

    Args:
        rate: part of the work that is computed again. None: `STRANGERS_RATE`, for peers on other machines.
        examiner: computes pieces again.
    """

    def __init__(
        self,
        swarm: Swarm,
        rate: float | None,
        examiner: AuditProgram | OtherPeers,
    ) -> None:
        self.rate = STRANGERS_RATE if rate is None else rate
        self.most_positions = examiner.MOST_POSITIONS
        self.counts: Counter[str] = Counter()  # of audits, audited_positions, lies and disagreements
        self._swarm, self._examiner = swarm, examiner
        self._here_too = rate is not None
        self._lock = threading.Lock()
        # Examined hops: name, blocks, weights, and whether the row began with stored pages.
        self._known: set[tuple[str, tuple[int, int], str, bool]] = set()
        self._left: Counter[str] = Counter()  # by name, how often a peer was left
        self._worker: ThreadPoolExecutor | None = None
        self._closed = False
        for name in named_peers(swarm.facts.fingerprint):
            swarm.ban(name, seconds=inf)

    def watch(self, session: Session) -> None:
        """Examines hops of a session from now on."""
        facts = self._swarm.facts
        session.audit = SessionAudit(session, self, facts.fingerprint, facts.num_blocks, facts.hidden_size)

    def audits(self, hop: RouteHop) -> bool:
        """Whether a peer is examined at all."""
        return self._here_too or not is_loopback(hop.endpoint.address)

    def is_new(self, hop: RouteHop, stored: bool) -> bool:
        """Whether a hop with its blocks and weights was not examined yet; with `stored` behind stored pages."""
        return (hop.name, hop.blocks, hop.weights, stored) not in self._known and self.audits(hop)

    def enqueue(self, job: Callable[[], None]) -> Future[None]:
        """Runs a job after all earlier jobs, in the thread of audits. A closed auditor cancels it."""
        with self._lock:
            if self._closed:
                (ended := Future[None]()).cancel()
                return ended
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, thread_name_prefix="audits")
            return self._worker.submit(job)

    def judge(self, hop: RouteHop, stored: bool, piece: Piece) -> PeerLied | None:
        """Computes a piece again. Returns the error that names the hop if it has lied. Raises SplitnetError: the piece
        cannot be computed here."""
        verdict = self._examiner.examine(piece)
        self.counts["audits"] += 1
        self.counts["audited_positions"] += piece.length
        told = hop.endpoint.address, *hop.blocks, piece.length, verdict.margin
        log.info("examined %s, blocks [%d, %d), %d positions: %.3g of what honest outputs may differ", *told)
        if verdict.honest:
            self._known.add((hop.name, hop.blocks, hop.weights, stored))
            return None
        if piece.reads_pages:  # perhaps computed, in an earlier session, from false outputs of another peer
            text = f"the peer at {hop.endpoint.address} has false stored pages: it lies, or a peer before it has lied"
            return self.leave(text, hop)
        evidence, right = "", "those of two other peers"
        if isinstance(self._examiner, AuditProgram):
            right = "the right ones"
        if isinstance(self._examiner, AuditProgram) and piece.can_be_proven:
            file = evidence_folder(self._swarm.facts.fingerprint) / f"{hop.name}{SUFFIX}"
            keep_file(file, write_piece(piece), "evidence against a peer")
            evidence = f"; {shlex.join(('splitnet', 'audit', self._swarm.facts.source, str(file)))} shows it"
        start, end = hop.blocks
        return self._name(
            hop.name,
            f"the peer at {hop.endpoint.address} has not computed blocks {start}..{end - 1} with {hop.weights} "
            f"weights: its outputs differ from {right} {verdict.margin:.3g} times as much as honest outputs may "
            f"(by {verdict.reason}){evidence}",
        )

    def disagree(self, before: RouteHop, hop: RouteHop) -> PeerLied:
        """Two neighbours have signed different things about what one sent the other; `before` is `hop` if the client
        sent it. Liars can disagree with any peer, so neither is named. Returns the error of the answer."""
        self.counts["disagreements"] += 1
        if before is hop:
            return self._name(hop.name, f"the peer at {hop.endpoint.address} says that it was sent something else")
        addresses = f"the peers at {before.endpoint.address} and {hop.endpoint.address}"
        return self.leave(f"{addresses} disagree about what one sent the other, so one of them lies", before, hop)

    def leave(self, text: str, *hops: RouteHop) -> PeerLied:
        """Leaves peers of which one may have lied, each time twice as long. Returns the error of the answer."""
        for hop in hops:
            with self._lock:
                self._left[hop.name] += 1
            self._swarm.ban(hop.name, seconds=BAN_S * 2 ** min(self._left[hop.name], MOST_DOUBLED))
        self._swarm.prefix_index.distrust()  # hops may have stored pages of false outputs
        log.warning("%s", text)
        return PeerLied(f"{text}: ask again")

    def close(self) -> None:
        """Ends all audits, after all sessions were closed."""
        with self._lock:
            worker, self._closed = self._worker, True
        self._examiner.close()  # an examination under way fails
        if worker is not None:
            worker.shutdown(cancel_futures=True)

    def _name(self, name: str, text: str) -> PeerLied:
        self.counts["lies"] += 1
        self._swarm.ban(name, seconds=inf)
        self._swarm.prefix_index.distrust()  # hops may have stored pages of false outputs
        self._swarm.events.note("lied", text)
        log.warning("%s", text, extra={"peer": name})
        return PeerLied(f"{text}; the peer is not used any more: ask again")
