"""transformers' own tests of `generate()`, run on models whose blocks are on peers.

transformers' wheel lacks these tests: `TRANSFORMERS_CHECKOUT=FOLDER` names a checkout of its repository, close to the
installed version; the tests also need the package `parameterized`. `CONFORMANCE_FAMILIES="llama gpt2 ..."` chooses
families; each family takes a minute or two. pytest prints the counts at the end.

Hidden states and attentions, which peers do not send, are not requested; caches are compared by their length.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import unittest
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import isfunction
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import UnsupportedModel, UnsupportedParameter
from tests.conformance.counts import Outcome, counted
from tests.swarm.harness import dht_node, local_swarm
from tests.unit.random_models import random_config

CHECKOUT = os.environ.get("TRANSFORMERS_CHECKOUT", "")
FAMILIES = os.environ.get("CONFORMANCE_FAMILIES", "llama").split()
HERE = "tests"
"""The package name of both transformers' tests and splitnet's tests."""

pytestmark = [
    pytest.mark.swarm,
    pytest.mark.skipif(not CHECKOUT, reason="TRANSFORMERS_CHECKOUT names no checkout of transformers"),
]


def transformers_tests() -> Any:
    """The module with the tests; it is imported in place of splitnet's own `tests`, which is restored afterwards."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if f"{name}.".startswith(f"{HERE}.")}
    sys.path.insert(0, CHECKOUT)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pytest.mark, "_config", None)  # The tests have marks that are not declared here.
            return importlib.import_module(f"{HERE}.generation.test_utils")
    except ImportError as error:
        pytest.skip(f"transformers' tests in {CHECKOUT} do not work with the installed packages: {error}")
    finally:
        sys.path.remove(CHECKOUT)
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{HERE}.")]:
            del sys.modules[name]
        sys.modules.update(ours)


def names() -> list[str]:
    """The names of the tests, or none if the tests cannot be imported: collection must not fail then."""
    if not CHECKOUT:
        return ["none"]
    try:
        mixin = transformers_tests().GenerationTesterMixin
    except pytest.skip.Exception:
        return ["none"]
    return sorted(name for name, test in vars(mixin).items() if name.startswith("test_") and isfunction(test))


class Inputs:
    """Provides models and inputs to transformers' tests: small ones, padded on the left."""

    batch_size = 3
    seq_length = 7

    def __init__(self, family: str) -> None:
        self._family = family

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        config = random_config(self._family, blocks=2, hidden=64, vocab=99)
        ids = torch.randint(3, 99, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        return config, {"input_ids": ids, "attention_mask": mask}


@contextmanager
def remote_class(family: str, node: DhtDirectory, folder: Path) -> Iterator[type[PreTrainedModel]]:
    """A class of transformers whose instances have their blocks on two peers; the peers run until the `with` statement
    ends."""
    config = random_config(family, blocks=2, hidden=64, vocab=99)
    original: Any = type(AutoModelForCausalLM.from_config(config))
    made: list[Path] = []
    with ExitStack() as stack:

        def remote(local: PreTrainedModel) -> Any:
            made.append(folder / str(len(made)))
            state = torch.get_rng_state()
            local.save_pretrained(made[-1])
            swarm = stack.enter_context(local_swarm(made[-1], [(0, 1), (1, 2)], node=node))
            torch.set_rng_state(state)
            model = swarm.model()
            generate = model.generate
            model.generate = lambda *args, **options: generate(*args, **(options | NOT_ASKED))
            return model

        def new(cls: Any, config: PreTrainedConfig, *args: Any, **options: Any) -> Any:
            return remote(original(config, *args, **options))

        members = {
            "__new__": new,
            "_from_config": classmethod(lambda cls, *args, **options: remote(original._from_config(*args, **options))),
            "from_pretrained": classmethod(lambda cls, path, **options: remote(original.from_pretrained(path))),
        }
        yield type(original.__name__, (original,), members)


NOT_ASKED = {"output_attentions": None, "output_hidden_states": None}


class Adapted:
    """Overrides checks of transformers' tests: attentions and hidden states are not checked, and caches are compared
    only by their size."""

    has_attentions = True

    def _check_attentions_for_generate(self, *args: Any, **given: Any) -> None: ...

    def _check_hidden_states_for_generate(self, *args: Any, **given: Any) -> None: ...

    def _check_past_key_values_for_generate(self, *args: Any, **given: Any) -> None:
        rows, cache, length, _ = (*args, *given.values())
        assert (cache.remote.batch, cache.get_seq_length()) == (rows, length)

    def _check_caches_are_equal(self, one: Any, other: Any) -> None:
        assert one.get_seq_length() == other.get_seq_length()


class Observed(unittest.TestResult):
    """A test result that keeps the exceptions themselves instead of their texts."""

    def __init__(self) -> None:
        super().__init__()
        self.raised: list[BaseException] = []

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        super().addError(test, err)
        self.raised.append(err[1])

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addFailure(test, err)
        self.raised.append(err[1])

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            self.raised.append(err[1])


REFUSED = re.compile("^cache_implementation |would lack them")
"""Matches error messages about features that remote blocks do not have: other kinds of caches, and saving."""


def is_refusal(error: BaseException) -> bool:
    """Whether the error names a feature that remote blocks do not have."""
    return isinstance(error, UnsupportedParameter | UnsupportedModel) and bool(REFUSED.search(str(error)))


SENSELESS = {
    "test_inherits_generation_mixin": "looks at the class that stands in for transformers'",
    "test_generate_compile_model_forward_fullgraph": "compiles the blocks",
    "test_prompt_lookup_decoding_matches_greedy_search": "does nothing, as its decorator lacks its parentheses",
    "test_custom_4d_attention_mask": "gives a mask that is used inside the blocks",
    **{f"test_eager_matches_{other}_generate": "compares attentions" for other in ("sdpa", "fa2", "fa3", "fa4")},
}
"""Tests of properties that a remote model does not have."""


@pytest.fixture(scope="module")
def node() -> Iterator[DhtDirectory]:
    with dht_node() as directory:
        yield directory


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_tests_of_generation_pass_on_remote_blocks(
    family: str, name: str, node: DhtDirectory, tmp_path: Path, request: Any
) -> None:
    mixin = transformers_tests().GenerationTesterMixin
    count: Callable[[Outcome], None] = counted(request.config, f"transformers' tests of generate() on {family}")
    if name in SENSELESS:
        count(Outcome.NOT_APPLICABLE)
        pytest.skip(SENSELESS[name])
    with remote_class(family, node, tmp_path) as model_class:
        members: dict[str, Any] = {"model_tester": Inputs(family)}
        members |= dict.fromkeys(("all_model_classes", "all_generative_model_classes"), (model_class,))
        case = type("Conformance", (Adapted, mixin, unittest.TestCase), members)(name)
        result = Observed()
        case.run(result)
    if result.skipped:
        count(Outcome.NOT_APPLICABLE)
        pytest.skip(result.skipped[0][1])
    refused = [error for error in result.raised if is_refusal(error)]
    if result.wasSuccessful():
        count(Outcome.PASSED)
    elif len(refused) == len(result.raised):
        count(Outcome.REFUSED)
        pytest.skip(f"refused: {refused[0]}")
    else:
        count(Outcome.FAILED)
        pytest.fail("\n".join(text for _, text in (*result.errors, *result.failures)), pytrace=False)
