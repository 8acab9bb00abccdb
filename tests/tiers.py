"""Which tests run when: `make test` runs the default tier, `make test-all` everything, `make test-rest` the difference.

Marks of a test decide its tier:

- `@pytest.mark.full`: the default tier leaves the test out.
- `@pytest.mark.default_cases(family=("llama", "gpt2"))`: the default tier takes only cases with these values of the
  parameters. If a test has several such marks, a case must match one of them. A mark of a file does not affect tests
  without these parameters.
- The profile of the tier sets the number of examples of a property test, unless the test sets
  `settings(max_examples=examples(400))`.
"""

from __future__ import annotations

import os

import hypothesis
import pytest

TIERS = ("default", "all", "rest")
MOST_EXAMPLES, DEFAULT_EXAMPLES = 100, 25

WITHOUT_SHRINKING = "TESTS_WITHOUT_SHRINKING"
"""An environment variable for runs in which only the failure of a property test matters, and not its smallest example,
as in benchmarks/mutations.py."""

PHASES = [phase for phase in hypothesis.Phase if phase.name != "shrink" or WITHOUT_SHRINKING not in os.environ]

# There is no deadline: a property test must not fail because the machine is busy.
hypothesis.settings.register_profile("all", deadline=None, phases=PHASES, max_examples=MOST_EXAMPLES)
hypothesis.settings.register_profile("default", deadline=None, phases=PHASES, max_examples=DEFAULT_EXAMPLES)


def load_profile(tier: str) -> None:
    """Sets the number of examples of properties. Call this before test files are imported, because test
    files call `examples`."""
    hypothesis.settings.load_profile("default" if tier == "default" else "all")


def examples(most: int) -> int:
    """The number of examples of a property test in this tier; `most`: the number in a full run."""
    profile = hypothesis.settings.get_profile(hypothesis.settings.get_current_profile_name())
    return most * profile.max_examples // MOST_EXAMPLES


def select(items: list[pytest.Item], tier: str) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Splits tests into those of a tier and the others.

    Raises:
        pytest.UsageError: marks leave a test no case in the default tier, or name a parameter that the test does not
            have.
    """
    default = [item for item in items if in_default(item)]
    lost = {_test_of(item) for item in items if not item.get_closest_marker("full")} - {_test_of(i) for i in default}
    if lost:
        raise pytest.UsageError(f"no case of these tests is in the default tier: {', '.join(sorted(lost))}")
    if tier == "all":
        return items, []
    chosen = {*default} if tier == "default" else {*items} - {item for item in default if not _is_property(item)}
    return [item for item in items if item in chosen], [item for item in items if item not in chosen]


def in_default(item: pytest.Item) -> bool:
    """Whether the default tier includes this test."""
    if item.get_closest_marker("full"):
        return False
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    marks: dict[pytest.Item | pytest.Collector, list[pytest.Mark]] = {}
    for node, mark in item.iter_markers_with_node("default_cases"):
        unknown = mark.kwargs.keys() - parameters.keys()
        if node is item and unknown:
            raise pytest.UsageError(
                f"{item.nodeid}: default_cases names {', '.join(unknown)}, which are not parameters of the test"
            )
        marks.setdefault(node, []).append(mark)  # pyright: ignore[reportArgumentType]
    return all(any(_takes(mark, parameters) for mark in some) for some in marks.values())


def _takes(mark: pytest.Mark, parameters: dict[str, object]) -> bool:
    return all(parameters[name] in values for name, values in mark.kwargs.items() if name in parameters)


def _test_of(item: pytest.Item) -> str:
    """The name of a test without its parameters."""
    return item.nodeid.partition("[")[0]


def _is_property(item: pytest.Item) -> bool:
    """Whether the test is a property test for which a full run takes more examples."""
    return isinstance(item, pytest.Function) and hypothesis.is_hypothesis_test(item.obj)
