"""Plants faults in the state machine of sessions, one at a time, and looks whether its stateful tests find each.

    .venv/bin/python -m benchmarks.session_mutations [--examples 400]

Prints a table: the fault, whether it was found, after how many seconds. Ends with 1 if one was not.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from typing import NamedTuple

MODULE = "splitnet.client."


class Mutation(NamedTuple):
    """What is planted: `old` becomes `new` in a module of the client."""

    what: str
    module: str
    old: str
    new: str


MUTATIONS = [
    Mutation(
        "a hop that holds nothing counts as filled",
        "route_hop",
        "            self.filled, self.adapter_version = False, 0",
        "            pass",
    ),
    Mutation(
        "an adapter is not loaded again",
        "session_route",
        "if tensors and hop.adapter_version != self.adapter_version:",
        "if tensors and not hop.adapter_version and self.epoch == 1:",
    ),
    Mutation(
        "a relay log is kept while hops reach each other",
        "route_hop",
        "            self.relay_log = None  # what the hop pushes itself would be missing in it",
        "            pass",
    ),
    Mutation("what is under way is not sent again", "session_state", "self._in_flight[number].send(self)", "pass"),
    Mutation(
        "a step that overtakes a lost one is believed",
        "session_state",
        "if isinstance(request, StepRequest) and hop.endpoint == self.tail and self._came_too_soon(request):",
        "if False:",
    ),
    Mutation(
        "a step that a later one undid is sent again", "session_state", "self._end_what_is_undone(step)\n", "pass\n"
    ),
    Mutation(
        "the size of an answer is not checked",
        "requests",
        "from splitnet.net.codecs import check_size",
        "check_size = lambda *_: None",
    ),
    Mutation(
        "any hop may answer for the tail",
        "requests",
        "if not isinstance(message, Result) or source != route.tail or message.end != route.blocks[1]:",
        "if not isinstance(message, Result) or message.end != route.blocks[1]:",
    ),
    Mutation(
        "a hop is not told that the session has ended",
        "session_route",
        "self._members[hop.endpoint] = hop.blocks",
        "pass",
    ),
    Mutation(
        "silence is not noticed",
        "session_state",
        "times.append(self._liveness.wake_at(self._silence_s))",
        "pass",
    ),
    Mutation(
        "a peer that failed is asked again",
        "session_route",
        "making.excluded.add(hop.name)",
        "return",
    ),
    Mutation(
        "a batch is sent back before all its passes are repeated",
        "requests",
        "            self.back.batch.rewind()",
        "            pass",
    ),
    Mutation(
        "the sum of gradients is not waited for",
        "requests",
        "for each in self.passes) and self.sums.whole",
        "for each in self.passes)",
    ),
    Mutation("a replay goes on past a relay", "requests", "group = group[: direct + 1]", "pass"),
    Mutation(
        "requests are kept after the end",
        "session_state",
        "self._in_flight, self._making = {}, None",
        "self._making = None",
    ),
    Mutation(
        "a hop that was replaced is still listened to",
        "session_route",
        "return next((hop for hop in self.hops if hop.endpoint == endpoint and not hop.lost), None)",
        "return next((hop for hop in self.hops if hop.endpoint == endpoint), self.hops[0] if self.hops else None)",
    ),
    Mutation("one complaint is believed", "session_state", "if len(complaints) > 1:", "if complaints:"),
    Mutation("what a hop pushes is never doubted", "session_state", "if len(refusing) > 1:", "if False:"),
    Mutation("only the tail is doubted", "session_state", "if not request.makers:", "if True:"),
]


def plant(mutation: Mutation) -> None:
    """Makes the module with the fault the one that is imported."""
    spec = importlib.util.find_spec(MODULE + mutation.module)
    assert spec is not None and spec.origin is not None
    with open(spec.origin) as file:
        source = file.read()
    if source.count(mutation.old) != 1:
        raise SystemExit(f"the fault {mutation.what!r} does not fit {spec.origin} any more: mend the list")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    exec(compile(source.replace(mutation.old, mutation.new), spec.origin, "exec"), module.__dict__)


def run_tests(examples: int) -> None:
    """The stateful tests, without a search for the smallest example."""
    from hypothesis import Phase, settings
    from hypothesis.stateful import run_state_machine_as_test

    from tests.unit import test_session_machine as tests
    from tests.unit.session_world import Faulty

    options = settings(
        tests.MANY,
        max_examples=examples,
        stateful_step_count=40,
        phases=[Phase.generate],
        database=None,
        derandomize=True,
    )
    for fault in (*Faulty.KINDS, *Faulty.WITH_STEPS):
        tests.test_beside_honest_peers_one_that_lies_costs_no_request(fault)
    tests.test_a_replay_of_a_hop_ends_where_the_client_relays()
    for machine in (tests.Passes, tests.Steps):
        run_state_machine_as_test(machine, settings=options)


def main() -> int:
    parser = argparse.ArgumentParser(description="Plants faults in the state machine of sessions.")
    parser.add_argument("--examples", type=int, default=400, help="runs of each machine")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        if arguments.one >= 0:
            plant(MUTATIONS[arguments.one])
        run_tests(arguments.examples)
        return 0
    print("| fault | found | after, s |\n|---|---|---|")
    missed = 0
    for index in range(-1, len(MUTATIONS)):
        began = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.session_mutations", "--one", str(index)]
        command += ["--examples", str(arguments.examples)]
        ran = subprocess.run(command, capture_output=True, text=True)
        found = "Failing test case" in ran.stderr or "AssertionError" in ran.stderr
        if ran.returncode and not found:
            print(ran.stderr, file=sys.stderr)
            return 1
        missed += found if index < 0 else not found
        what = MUTATIONS[index].what if index >= 0 else "none"
        print(f"| {what} | {'yes' if found else 'no'} | {time.monotonic() - began:.1f} |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
