"""Plants faults in the product, one at a time, and reports whether the tests find each.

    .venv/bin/python -m benchmarks.mutations [--only TEXT] [--all [ARGUMENTS]] [--limit-s 600] [--check]

Each fault is plausible and silent: a limit that is off by one, a missing check, a reversed comparison, a missing
release, a wrong unit. The benchmark plants each fault in a copy of the checkout, and runs the related tests there until
one fails. With --all, it runs all tests of `make test` instead, or pytest with the given arguments. Prints a table: the
fault, whether the tests found it, the test that failed, and the seconds until then. Exits with 1 if a fault was not
found.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("scheduler", "splitnet", "peers")


class Fault(NamedTuple):
    """A fault: `new` replaces `old` in a file; tests: the files of related tests."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


SESSION = [
    Fault(
        "a hop that holds nothing counts as filled",
        "splitnet/session/failover.py",
        "            self.filled, self.adapter_version = False, 0",
        "            pass",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "an adapter is not loaded again",
        "splitnet/session/machine.py",
        "and hop.adapter_version != self.adapter_version:",
        "and not hop.adapter_version and self.epoch == 1:",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "a relay log is kept although hops reach each other",
        "splitnet/session/failover.py",
        "            self.relay_log = None  # the log would lack the outputs that the hop sends directly",
        "            pass",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "page labels do not depend on block inputs",
        "splitnet/wire/sent_log.py",
        "others = (repr(inputs).encode(), values) if inputs else ()",
        "others = ()",
        ("tests/unit/wire/test_block_inputs.py",),
    ),
    Fault(
        "hops drop block inputs",
        "splitnet/wire/block_inputs.py",
        "if each.block >= block]",
        "if each.block < 0]",
        ("tests/unit/wire/test_block_inputs.py",),
    ),
    Fault(
        "replays cut groups",
        "splitnet/wire/sent_log.py",
        "last = end_of_group(row.inputs.group_at, min(start + step, end), end)",
        "last = min(start + step, end)",
        ("tests/unit/wire/test_block_inputs.py",),
    ),
    Fault(
        "a prompt with images continues the cached positions",
        "splitnet/hf/image_text.py",
        "                cache.remote.reset()",
        "                pass",
        ("tests/swarm/test_images.py",),
    ),
    Fault(
        "requests in flight are not sent again",
        "splitnet/session/machine.py",
        "self._in_flight[number].send(self)",
        "pass",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "a step that overtakes a lost one is believed",
        "splitnet/session/machine.py",
        "if isinstance(request, StepRequest) and hop.endpoint == self.tail and self._came_too_soon(request):",
        "if False:",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "a step that a later step undid is sent again",
        "splitnet/session/machine.py",
        "for request in undone_by(step, under_way):",
        "for request in ():",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "the size of an answer is not checked",
        "splitnet/session/requests.py",
        "from splitnet.wire.codecs import are_finite, check_size, check_values",
        "from splitnet.wire.codecs import are_finite\n\ncheck_size = check_values = lambda *_: None",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "any hop may answer for the tail",
        "splitnet/session/requests.py",
        "case Result() if source == route.tail and message.end == route.blocks[1]:",
        "case Result() if message.end == route.blocks[1]:",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "a hop is not told that the session has ended",
        "splitnet/session/machine.py",
        "self._members[hop.endpoint] = hop.blocks",
        "pass",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "a silent hop is not noticed",
        "splitnet/session/machine.py",
        "times.append(self._liveness.wake_at(self._silence_s))",
        "pass",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "a peer that failed is asked again",
        "splitnet/session/failover.py",
        "self.excluded.add(name)",
        "pass",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "a batch is sent back before all its passes are repeated",
        "splitnet/session/requests.py",
        "            self.back.batch.sent = 0",
        "            pass",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "the sum of gradients is not waited for",
        "splitnet/session/requests.py",
        "for each in self.passes) and self.sums.is_complete",
        "for each in self.passes)",
        ("tests/unit/session/test_requests.py",),
    ),
    Fault(
        "a replay goes on past a relay",
        "splitnet/session/failover.py",
        "group = group[: direct + 1]",
        "pass",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "requests are kept after the end of the session",
        "splitnet/session/machine.py",
        "self._in_flight, self._setup = {}, None",
        "self._setup = None",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "messages of a replaced hop are accepted",
        "splitnet/session/machine.py",
        "return next((hop for hop in self.hops if hop.endpoint == endpoint and not hop.lost), None)",
        "return next((hop for hop in self.hops if hop.endpoint == endpoint), self.hops[0] if self.hops else None)",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "a single complaint is believed",
        "splitnet/session/blame.py",
        "if len(complaints) > 1:",
        "if complaints:",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "values that a hop pushes are never checked",
        "splitnet/session/blame.py",
        "if len(refusing) == 2:",
        "if False:",
        ("tests/unit/session/test_machine.py",),
    ),
    Fault(
        "the values in the answer to a pass are not checked",
        "splitnet/wire/codecs.py",
        "if not codec_by_code(code).is_finite(payload, hidden_size):",
        "if False:",
        ("tests/unit/session/test_requests.py",),
    ),
    Fault(
        "saved values may be not finite",
        "splitnet/tools/tune/folder.py",
        "if not bool(tensor.isfinite().all()):",
        "if False:",
        ("tests/unit/tools/test_run.py",),
    ),
    Fault(
        "a time-out of a handshake counts as another key",
        "splitnet/transport/transport.py",
        "(link.endpoint.hidden or took_s > _REFUSES_S)",
        "link.endpoint.hidden",
        ("tests/unit/transport/test_transport.py",),
    ),
    Fault(
        "only the tail is distrusted",
        "splitnet/session/machine.py",
        "if not request.makers:",
        "if True:",
        ("tests/swarm/test_lying_hops.py",),
    ),
]
SCHEDULER = [
    Fault(
        "a link's latency costs nothing",
        "scheduler/cost.py",
        "return link.latency_ms + occupied_ms(link, positions, encodings, prompt)",
        "return occupied_ms(link, positions, encodings, prompt)",
        (
            "tests/unit/scheduler/test_route.py",
            "tests/unit/scheduler/test_partition.py",
        ),
    ),
    Fault(
        "the first step waits for the slowest hop, too",
        "scheduler/cost.py",
        "return total + (in_flight - 1) * slowest",
        "return total + in_flight * slowest",
        (
            "tests/unit/scheduler/test_route.py",
            "tests/unit/scheduler/test_partition.py",
        ),
    ),
    Fault(
        "energy is in millijoules",
        "scheduler/cost.py",
        "context) - alone_ms) / 1000",
        "context) - alone_ms)",
        ("tests/unit/scheduler/test_route.py",),
    ),
    Fault(
        "a peer that is the lowest somewhere moves for throughput",
        "scheduler/peer_moves.py",
        "movers = np.flatnonzero(~view.lowest & (view.length > 0) & settled)",
        "movers = np.flatnonzero((view.length > 0) & settled)",
        ("tests/unit/scheduler/test_peer_moves.py",),
    ),
    Fault(
        "two peers move at the same time",
        "scheduler/peer_moves.py",
        "    if moving:\n        return None\n",
        "",
        ("tests/unit/scheduler/test_peer_moves.py",),
    ),
    Fault(
        "a peer moves again at once",
        "scheduler/peer_moves.py",
        ">= SETTLE_S for peer",
        "<= SETTLE_S for peer",
        ("tests/unit/scheduler/test_peer_moves.py",),
    ),
    Fault(
        "a greater weight costs more",
        "scheduler/fairness.py",
        "balance -= seconds * (BULK_COST if bulk else 1.0) / self._weight(key)",
        "balance -= seconds * (BULK_COST if bulk else 1.0) * self._weight(key)",
        (
            "tests/unit/scheduler/test_fairness.py",
            "tests/unit/peers/test_queue.py",
        ),
    ),
    Fault(
        "a key without work keeps its share",
        "scheduler/fairness.py",
        "            self._present.discard(key)\n",
        "",
        (
            "tests/unit/scheduler/test_fairness.py",
            "tests/unit/peers/test_queue.py",
        ),
    ),
    Fault(
        "the cost of a move counts once",
        "scheduler/replan.py",
        "* steps_left > MOVE_COUNTS * move_ms",
        "* steps_left > move_ms",
        (
            "tests/unit/scheduler/test_replan.py",
            "tests/unit/swarm/test_plan.py",
        ),
    ),
    Fault(
        "hops that stay are filled again",
        "scheduler/replan.py",
        "list(rest[: len(rest) - behind])",
        "list(rest)",
        (
            "tests/unit/scheduler/test_replan.py",
            "tests/unit/swarm/test_plan.py",
        ),
    ),
    Fault(
        "a block without a peer counts as a weak one",
        "scheduler/placement.py",
        "    levels[flow.throughput == 0] = -1.0\n",
        "",
        (
            "tests/unit/scheduler/test_placement.py",
            "tests/unit/scheduler/test_peer_moves.py",
        ),
    ),
    Fault(
        "the route search ignores queue waits",
        "scheduler/route.py",
        "switched += costs.queue[receivers] + run[receivers]",
        "switched += run[receivers]",
        ("tests/unit/scheduler/test_route.py",),
    ),
    Fault(
        "a route uses a peer twice",
        "scheduler/route.py",
        "            if peer in left_at:\n                return peer, left_at[peer]\n",
        "",
        ("tests/unit/scheduler/test_route.py",),
    ),
    Fault(
        "a prefill has a step too many",
        "scheduler/batching.py",
        "(math.ceil(positions / size) - 1)",
        "math.ceil(positions / size)",
        ("tests/unit/scheduler/test_prefill_chunks.py",),
    ),
    Fault(
        "sessions that fill no group are left out",
        "scheduler/partition.py",
        "positions = -(-sessions // groups)",
        "positions = sessions // groups",
        (
            "tests/unit/scheduler/test_partition.py",
            "tests/unit/tools/test_plan.py",
        ),
    ),
    Fault(
        "the route with the least energy may be too slow",
        "scheduler/route.py",
        "        if path_ms <= most_ms:",
        "        if path_ms >= most_ms:",
        ("tests/unit/scheduler/test_route.py",),
    ),
]
DIRECTORY = [
    Fault(
        "a record's signature is not checked",
        "splitnet/directory/record.py",
        'if not fields["key"].verify(_SIGNED_PREFIX + payload, signature):',
        "if not signature:",
        (
            "tests/unit/directory/test_record.py",
            "tests/unit/directory/test_directory.py",
        ),
    ),
    Fault(
        "a record from the future is valid",
        "splitnet/directory/record.py",
        "return self.expires_at > now and self.issued_at <= now + MAX_CLOCK_SKEW_S",
        "return self.expires_at > now",
        (
            "tests/unit/directory/test_record.py",
            "tests/unit/directory/test_directory.py",
        ),
    ),
    Fault(
        "a record is stored under another peer's key",
        "splitnet/directory/record.py",
        "return subkey == peer.key.text and record.key ==",
        "return record.key ==",
        (
            "tests/unit/directory/test_record.py",
            "tests/unit/directory/test_directory.py",
        ),
    ),
    Fault(
        "an old record is kept in force",
        "splitnet/directory/record.py",
        "if peer.expires_at != record.expiration_time or peer",
        "if peer.expires_at > record.expiration_time or peer",
        (
            "tests/unit/directory/test_record.py",
            "tests/unit/directory/test_directory.py",
        ),
    ),
    Fault(
        "an identity may store one record too many",
        "splitnet/directory/interface.py",
        "identity=RECORDS_PER_IDENTITY)",
        "identity=RECORDS_PER_IDENTITY + 1)",
        ("tests/unit/directory/test_record_places.py",),
    ),
    Fault(
        "the places of an identity are not released",
        "splitnet/directory/interface.py",
        "self.places.leave_place(key=key, identity=record.key)",
        "self.places.leave_place(key=key)",
        ("tests/unit/directory/test_record_places.py",),
    ),
    Fault(
        "a record without work takes the place of one with work",
        "splitnet/directory/interface.py",
        "held.is_proven and not record.is_proven",
        "not held.is_proven and record.is_proven",
        ("tests/unit/directory/test_record_places.py",),
    ),
    Fault(
        "an invalid record is kept",
        "splitnet/directory/interface.py",
        "return record.is_valid_at(now) and",
        "return record.expires_at >= 0 and",
        (
            "tests/unit/directory/test_ask.py",
            "tests/unit/peers/test_directory_service.py",
        ),
    ),
    Fault(
        "the earlier of two records is kept",
        "splitnet/directory/interface.py",
        "record.issued_at > kept[name].issued_at",
        "record.issued_at < kept[name].issued_at",
        (
            "tests/unit/directory/test_directory.py",
            "tests/unit/directory/test_ask.py",
        ),
    ),
    Fault(
        "an invalid record is passed on",
        "splitnet/directory/interface.py",
        "if not record.is_valid_at(now) or (",
        "if (",
        (
            "tests/unit/directory/test_directory.py",
            "tests/unit/directory/test_ask.py",
        ),
    ),
    Fault(
        "a peer that has left is still there",
        "splitnet/directory/ask.py",
        "                if not record.has_left:\n                    bits |= 1 << at",
        "                bits |= 1 << at",
        (
            "tests/unit/directory/test_ask_changes.py",
            "tests/unit/swarm/test_peer_cache_changes.py",
        ),
    ),
    Fault(
        "an older record counts as a change",
        "splitnet/directory/ask.py",
        "if later > _TICKS // 2:",
        "if later > _TICKS:",
        (
            "tests/unit/directory/test_ask_changes.py",
            "tests/unit/swarm/test_peer_cache_changes.py",
        ),
    ),
    Fault(
        "a change of exactly the smallest reported size is not reported",
        "splitnet/directory/ask.py",
        "return most if most >= MATERIAL_STEPS else",
        "return most if most > MATERIAL_STEPS else",
        (
            "tests/unit/directory/test_ask_changes.py",
            "tests/unit/swarm/test_peer_cache_changes.py",
        ),
    ),
    Fault(
        "a peer answers for another",
        "splitnet/directory/ask.py",
        "answer = question.answers.get(source) if question is not None else None",
        "answer = next(iter(question.answers.values()), None) if question is not None else None",
        (
            "tests/unit/directory/test_ask.py",
            "tests/unit/swarm/test_peer_cache_changes.py",
        ),
    ),
    Fault(
        "an answer of the directory exceeds its size limit",
        "splitnet/directory/ask.py",
        "if record.key in keys or size <= most]",
        "]",
        (
            "tests/unit/directory/test_ask.py",
            "tests/unit/swarm/test_peer_cache_changes.py",
        ),
    ),
    Fault(
        "a peer that asks on behalf of others waits as long as they do",
        "splitnet/directory/ask.py",
        "limit_s = DIRECTORY_ANSWER_S * depth / OWN_DEPTH",
        "limit_s = DIRECTORY_ANSWER_S",
        (
            "tests/unit/directory/test_ask.py",
            "tests/unit/peers/test_directory_service.py",
        ),
    ),
    Fault(
        "the earliest of the values from DHT nodes is taken",
        "splitnet/directory/hivemind_node.py",
        "record.issued_at > latest[subkey].issued_at",
        "record.issued_at < latest[subkey].issued_at",
        ("tests/unit/directory/test_directory.py",),
    ),
]
WEIGHTS = [
    Fault(
        "the fingerprint leaves out types",
        "splitnet/checkpoint/transfer/manifest.py",
        "[tensor.name, tensor.stored, list(tensor.shape), tensor.pieces.nbytes, digest",
        "[tensor.name, list(tensor.shape), tensor.pieces.nbytes, digest",
        ("tests/unit/checkpoint/test_manifest.py",),
    ),
    Fault(
        "a tensor that fills its last piece has one piece more",
        "splitnet/checkpoint/transfer/manifest.py",
        "return -(-nbytes // PIECE_BYTES)",
        "return nbytes // PIECE_BYTES + 1",
        ("tests/unit/checkpoint/test_manifest.py",),
    ),
    Fault(
        "a manifest names a tensor twice",
        "splitnet/checkpoint/transfer/manifest.py",
        "if names != sorted(set(names)):",
        "if names != sorted(names):",
        ("tests/unit/checkpoint/test_manifest.py",),
    ),
    Fault(
        "a source may be silent once more than allowed",
        "splitnet/checkpoint/transfer/fetching.py",
        "if state.strikes >= MAX_STRIKES:",
        "if state.strikes > MAX_STRIKES:",
        ("tests/unit/checkpoint/test_fetching.py",),
    ),
    Fault(
        "strikes are not reset after an answer",
        "splitnet/checkpoint/transfer/fetching.py",
        "state.last_answer_at, state.strikes = now, 0",
        "state.last_answer_at = now",
        ("tests/unit/checkpoint/test_fetching.py",),
    ),
    Fault(
        "pieces that have arrived count as in flight",
        "splitnet/checkpoint/transfer/fetching.py",
        "state.asked_bytes -= state.asked.pop(name)[1]",
        "state.asked.pop(name)",
        ("tests/unit/checkpoint/test_fetching.py",),
    ),
    Fault(
        "a busy source is asked again at once",
        "splitnet/checkpoint/transfer/fetching.py",
        "= now, now + BUSY_S",
        "= now, now",
        ("tests/unit/checkpoint/test_fetching.py",),
    ),
    Fault(
        "a file that has changed keeps its digests",
        "splitnet/checkpoint/transfer/hashing.py",
        '"changed": status.st_mtime_ns',
        '"changed": 0',
        ("tests/unit/checkpoint/test_manifest.py",),
    ),
    Fault(
        "a damaged piece is read",
        "splitnet/checkpoint/transfer/weight_pieces.py",
        "            if digest(data) == name:\n                return data",
        "            return data",
        (
            "tests/unit/checkpoint/test_manifest.py",
            "tests/unit/peers/test_weights.py",
            "tests/unit/blocks/test_span_packed_weights.py",
        ),
    ),
    Fault(
        "a damaged piece is not fetched again",
        "splitnet/checkpoint/transfer/weight_pieces.py",
        "if not (self._written[slot] and digest(self._read_slot(slot)) == self.name_of(slot)):",
        "if not self._written[slot]:",
        (
            "tests/unit/checkpoint/test_manifest.py",
            "tests/unit/peers/test_weights.py",
            "tests/unit/blocks/test_span_packed_weights.py",
        ),
    ),
    Fault(
        "a corrupt piece is kept",
        "splitnet/checkpoint/transfer/fetching.py",
        "if len(data) != self._missing[name] or digest(data) != name:",
        "if len(data) != self._missing[name]:",
        ("tests/swarm/test_weights_from_peers.py",),
    ),
    Fault(
        "any peer answers a question about weights",
        "splitnet/checkpoint/transfer/fetching.py",
        "if self._open.get(number) == source:",
        "if number in self._open:",
        ("tests/unit/wire/test_asking.py",),
    ),
    Fault(
        "weights are sent although sharing is off",
        "peers/weights.py",
        "data = self._piece(message.name) if self.shares() else None",
        "data = self._piece(message.name)",
        ("tests/unit/peers/test_weights.py",),
    ),
    Fault(
        "weights are sent faster while sessions are served",
        "peers/weights.py",
        "SERVING_SHARE if self.serving() and not is_page else 1.0",
        "1.0 if self.serving() and not is_page else SERVING_SHARE",
        ("tests/unit/peers/test_weights.py",),
    ),
    Fault(
        "the requests of a key are not limited",
        "peers/weights.py",
        "if len(own) >= WAITING_PER_KEY or sum",
        "if sum",
        ("tests/unit/peers/test_weights.py",),
    ),
]
SERVE = [
    Fault(
        "the beginning of an API key is enough",
        "splitnet/serve/request_gate.py",
        "if hmac.compare_digest(given, key)]",
        "if key.startswith(given)]",
        ("tests/unit/serve/test_requests.py",),
    ),
    Fault(
        "a greater weight holds less",
        "splitnet/limits.py",
        "totals[holder] / holder.weight",
        "totals[holder] * holder.weight",
        (
            "tests/unit/serve/test_requests.py",
            "tests/unit/serve/test_responses_streams.py",
        ),
    ),
    Fault(
        "a client that holds exactly its share must release some",
        "splitnet/limits.py",
        "if totals[grown] > self._each:",
        "if totals[grown] >= self._each:",
        (
            "tests/unit/serve/test_requests.py",
            "tests/unit/serve/test_responses_streams.py",
        ),
    ),
    Fault(
        "a request that ends while it is admitted keeps its place",
        "splitnet/serve/admission.py",
        "turn.exception() is None:\n                self._leave_place(client)\n",
        "turn.exception() is None:\n                self._places[client] -= 1\n",
        ("tests/unit/serve/test_requests.py",),
    ),
    Fault(
        "one client takes the spare places",
        "splitnet/serve/admission.py",
        "self._places[waits.holder] < self._most",
        "self._places[waits.holder] <= self._most",
        ("tests/unit/serve/test_requests.py",),
    ),
    Fault(
        "a session is found by another owner",
        "splitnet/serve/session_cache.py",
        "_shared(kept.tokens, wanted) if kept.owner == owner else 0",
        "_shared(kept.tokens, wanted)",
        ("tests/unit/serve/test_session_cache.py",),
    ),
    Fault(
        "the token that differs counts as shared",
        "splitnet/serve/session_cache.py",
        "return int(differs.argmax()) if",
        "return int(differs.argmax()) + 1 if",
        ("tests/unit/serve/test_session_cache.py",),
    ),
    Fault(
        "sessions are kept beyond their time",
        "splitnet/serve/session_cache.py",
        "if kept.since <= oldest or kept",
        "if kept.since > oldest + limits.seconds or kept",
        ("tests/unit/serve/test_session_cache.py",),
    ),
    Fault(
        "all answers to a prompt are the same",
        "splitnet/serve/answers/sampling.py",
        "np.array([self._sampling.seed, row], np.uint64)",
        "np.array([self._sampling.seed, 0], np.uint64)",
        (
            "tests/unit/serve/test_sampling.py",
            "tests/unit/serve/test_text.py",
        ),
    ),
    Fault(
        "the penalty for presence counts each time",
        "splitnet/serve/answers/sampling.py",
        "self._sampling.presence_penalty * (counts > 0)",
        "self._sampling.presence_penalty * counts",
        (
            "tests/unit/serve/test_sampling.py",
            "tests/unit/serve/test_text.py",
        ),
    ),
    Fault(
        "the first character of a stop string is sent",
        "splitnet/serve/answers/text.py",
        "range(min(len(text), longest), 0, -1)",
        "range(min(len(text), longest), 1, -1)",
        ("tests/unit/serve/test_text.py",),
    ),
    Fault(
        "an incomplete character is sent",
        "splitnet/serve/answers/text.py",
        "if not text or text.endswith(INCOMPLETE):",
        "if not text:",
        ("tests/unit/serve/test_text.py",),
    ),
    Fault(
        "a key's tokens come back in a second",
        "splitnet/limits.py",
        "(now - self.at) * per_minute / MINUTE_S",
        "(now - self.at) * per_minute",
        (
            "tests/unit/serve/test_requests.py",
            "tests/unit/peers/test_sessions.py",
            "tests/unit/peers/test_weights.py",
        ),
    ),
    Fault(
        "a stored response is found by another key",
        "splitnet/serve/apis/openai_responses.py",
        "if holder != owner or not text:",
        "if not text:",
        ("tests/unit/serve/test_openai_responses_client.py",),
    ),
    Fault(
        "pages of every site use the server",
        "splitnet/serve/request_gate.py",
        'raise ApiError(403, unknown, code="unknown_origin")',
        "pass",
        ("tests/unit/serve/test_request_gate_origins.py",),
    ),
    Fault(
        "a prefix that peers stored does not count as cached",
        "splitnet/serve/generation.py",
        "cached = cached or (cache.session.reused if cache.session is not None else 0)",
        "pass",
        ("tests/unit/serve/test_generation.py",),
    ),
    Fault(
        "requests whose client has gone are not counted",
        "splitnet/serve/metrics.py",
        "self._cancelled.inc()",
        "pass",
        ("tests/unit/serve/test_metrics.py",),
    ),
    Fault(
        "a stream is silent while the model reads",
        "splitnet/serve/responses.py",
        "yield alive.encode()",
        "pass",
        ("tests/unit/serve/test_responses.py",),
    ),
]
FAULTS = [*SESSION, *SCHEDULER, *DIRECTORY, *WEIGHTS, *SERVE]


def place_of(fault: Fault) -> Path | None:
    """The file that contains the old text once: the named one, or the only other such file; None if there is none."""
    named = ROOT / fault.file
    if named.is_file() and named.read_text().count(fault.old) == 1:
        return named
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py") if fault.old in file.read_text()]
    return files[0] if len(files) == 1 and files[0].read_text().count(fault.old) == 1 else None


def check(faults: Sequence[Fault]) -> dict[Fault, Path]:
    """The file of each fault. Ends the process if the table does not match the sources."""
    places = {fault: place_of(fault) for fault in faults}
    wrong = [f"{fault.what}: no single file has the old text exactly once" for fault in faults if not places[fault]]
    wrong += [f"{fault.what}: no {test}" for fault in faults for test in fault.tests if not (ROOT / test).is_file()]
    if wrong:
        raise SystemExit("correct the table of faults:\n" + "\n".join(wrong))
    return {fault: place for fault, place in places.items() if place is not None}


def copy_checkout(target: Path) -> None:
    """Copies all files that git does not ignore, and the compiled kernels."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    kernels = [str(file.relative_to(ROOT)) for file in (ROOT / "splitnet").rglob("_kernels*.so")]
    for name in {*listed.stdout.splitlines(), *kernels}:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@contextmanager
def planted(fault: Fault, file: Path) -> Iterator[None]:
    """Plants the fault in a file of the copy for the duration of the `with`."""
    sound = file.read_text()
    file.write_text(sound.replace(fault.old, fault.new))
    try:
        yield
    finally:
        file.write_text(sound)


def run_tests(folder: Path, arguments: Sequence[str], limit_s: float) -> tuple[str, str]:
    """Whether tests fail in a copy: "yes", "no", or a note about the time limit; and the end of their output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--durations=0", *arguments]
    environment = os.environ | {"PYTHONPATH": str(folder), "TESTS_WITHOUT_SHRINKING": "1"}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        told, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()
        return "not in time", ""
    if process.returncode not in (0, 1):
        raise SystemExit(f"the tests do not run:\n{told}")
    failed = [line for line in told.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return ("yes" if process.returncode else "no"), (failed[0].split(" - ")[0].split("::")[-1] if failed else "")


def main() -> int:
    parser = argparse.ArgumentParser(description="Plants faults and checks whether tests find them.")
    parser.add_argument("--only", default="", help="only faults whose description or file contains TEXT")
    parser.add_argument("--all", nargs="?", const="", metavar="ARGUMENTS", help="run `make test`, or pytest with these")
    parser.add_argument("--limit-s", type=float, default=600.0, help="time limit for the tests of one fault")
    parser.add_argument("--check", action="store_true", help="only check that the table matches the sources")
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if arguments.only in fault.what or arguments.only in fault.file]
    places = check(faults)
    if arguments.check or not faults:
        return 0
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_checkout(folder)
        print("| fault | found | by | after, s |\n|---|---|---|---|")
        for fault in (None, *faults):
            began = time.monotonic()
            concerned = fault.tests if fault is not None else sorted({test for each in faults for test in each.tests})
            given = [*concerned, "-n0"] if arguments.all is None else shlex.split(arguments.all)
            with planted(fault, folder / places[fault].relative_to(ROOT)) if fault is not None else nullcontext():
                found, by = run_tests(folder, given, arguments.limit_s * (1 if fault is not None else len(faults)))
            if fault is None and found != "no":
                raise SystemExit(f"tests fail, or do not end, although no fault is planted: {by}")
            missed += fault is not None and found != "yes"
            what = fault.what if fault is not None else "none"
            print(f"| {what} | {found} | {by} | {time.monotonic() - began:.0f} |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
