"""PEFT's own tests of decoders, run on models whose blocks are on peers.

PEFT's wheel lacks these tests: `PEFT_CHECKOUT=FOLDER` names PEFT's unpacked sdist, or a checkout of its repository, of
the installed version. `CONFORMANCE_FAMILIES="llama gpt2 ..."` chooses families; `CONFORMANCE_METHODS=all` takes every
method of PEFT, also methods that peers do not apply. `pytest -rs` prints why tests are skipped.

Small random models replace the hub's models. Attention masks of inputs have no holes, because peers refuse such masks,
and LoRA has no dropout. A test that also fails on the whole model in plain transformers is skipped.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitnet.errors import AdapterError, UnsupportedModel, UnsupportedParameter
from tests.conformance.counts import Outcome, counted
from tests.swarm.harness import LocalSwarm, shared_swarm
from tests.unit.random_models import random_checkpoint

CHECKOUT = os.environ.get("PEFT_CHECKOUT", "")
FAMILIES = os.environ.get("CONFORMANCE_FAMILIES", "llama").split()
ALL_METHODS = os.environ.get("CONFORMANCE_METHODS") == "all"
APPLIED = ("LoraConfig", "PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig", "CPTConfig")
PARTS = {"llama": "Llama", "gpt2": "GPT2LM", "gptj": "GPTJ", "opt": "OPT", "qwen2": "qwen2", "gemma3_text": "Gemma3"}
"""For each family, a part of the name of its model on the hub."""

PACKAGE = "peft_tests"

pytestmark = [
    pytest.mark.swarm,
    pytest.mark.skipif(not CHECKOUT, reason="PEFT_CHECKOUT names no sources of PEFT"),
]


def peft_tests() -> Any:
    """The module with the tests."""
    if loaded := sys.modules.get(f"{PACKAGE}.test_decoder_models"):
        return loaded
    importlib.import_module("transformers.trainer")  # The trainer must not see the replacements below.
    package: Any = ModuleType(PACKAGE)
    package.__path__ = [str(Path(CHECKOUT) / "tests")]
    absent: Any = {"diffusers": ["StableDiffusionPipeline"], "datasets": ["load_dataset", "Dataset"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytest.mark, "_config", None)  # The tests have marks that are not declared here.
        for name, members in absent.items():  # Tests of other models need these packages.
            stand_in: Any = ModuleType(name)
            vars(stand_in).update(dict.fromkeys(members, object))
            patch.setitem(sys.modules, name, stand_in)
        sys.modules[PACKAGE] = package
        try:
            return importlib.import_module(f"{PACKAGE}.test_decoder_models")
        except ImportError as error:
            pytest.skip(f"PEFT's tests in {CHECKOUT} do not work with the installed packages: {error}")


@dataclasses.dataclass(frozen=True)
class Case:
    """A test, with the values of its parameters."""

    name: str
    values: dict[str, Any]

    @property
    def is_usual(self) -> bool:
        """Whether peers apply the method under test. aLoRA is left out, because it repeats all tests of LoRA."""
        method = getattr(self.values.get("config_cls"), "__name__", APPLIED[0])
        return method in APPLIED and "alora_invocation_tokens" not in self.values.get("config_kwargs", ())

    def __str__(self) -> str:
        told = (getattr(value, "__name__", None) or str(value) for value in self.values.values())
        return "-".join([self.name.removeprefix("test_"), *(text[:40] for text in told)])


def cases() -> Iterator[Any]:
    if not CHECKOUT:
        yield pytest.param("", None, id="none")
        return
    for family, (name, function) in itertools.product(FAMILIES, vars(peft_tests().TestDecoderModels).items()):
        if not name.startswith("test_"):
            continue
        marks = [mark for mark in getattr(function, "pytestmark", ()) if mark.name == "parametrize"]
        if not marks and family != FAMILIES[0]:
            continue  # The test chooses its model itself.
        for values in itertools.product(*(_choices(mark, family) for mark in marks)):
            case = Case(name, {key: value for each in values for key, value in each.items()})
            if ALL_METHODS or case.is_usual:
                yield pytest.param(family, case, id=f"{family}-{case}")


def _choices(mark: pytest.Mark, family: str) -> list[dict[str, Any]]:
    names = mark.args[0].replace(" ", "").split(",")
    rows = [getattr(row, "values", row) if len(names) > 1 else (row,) for row in mark.args[1]]
    found = [dict(zip(names, row, strict=True)) for row in rows]
    if names != ["model_id"]:
        return found
    return [each for each in found if PARTS[family].lower() in each["model_id"].lower()][:1]


@pytest.fixture(scope="module")
def swarms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, LocalSwarm]]:
    """Peers that serve a small model of each family."""
    with ExitStack() as stack:
        started: dict[str, LocalSwarm] = {}
        for family in FAMILIES:
            folder = tmp_path_factory.mktemp("models") / family
            random_checkpoint(family, folder, blocks=2, hidden=32, vocab=1024, eos_token_id=None)
            started[family] = stack.enter_context(shared_swarm(folder, [(0, 1), (1, 2)]))
        yield started


def stand_in(swarms: dict[str, LocalSwarm], *, remote: bool) -> Any:
    """Replaces `AutoModelForCausalLM`."""

    class AutoModel:
        @staticmethod
        def from_pretrained(model_id: str, **options: Any) -> Any:
            family = next((one for one in swarms if PARTS[one].lower() in str(model_id).lower()), None)
            if family is None:
                pytest.skip(f"needs the hub's model {model_id}")
            swarm = swarms[family]
            dtype = options.get("dtype") or torch.float32
            if remote:
                return swarm.model(dtype=dtype)
            return AutoModelForCausalLM.from_pretrained(swarm.folder, dtype=dtype)

    return AutoModel


def needs_hub(*args: Any, **options: Any) -> Any:
    pytest.skip("needs a tokenizer from the hub")


def inputs(self: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[1, 1, 1], [1, 2, 1]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}


def attempt(case: Case, model_class: Any, request: pytest.FixtureRequest) -> BaseException | None:
    """Runs a test, and returns the exception that it raises."""
    module = peft_tests()
    test = module.TestDecoderModels()
    function = getattr(test, case.name)
    values = {name: value.copy() if isinstance(value, dict) else value for name, value in case.values.items()}
    if "lora_dropout" in values.get("config_kwargs", ()):
        values["config_kwargs"]["lora_dropout"] = 0.0
    fixtures = inspect.signature(function).parameters.keys() - values.keys()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("transformers_class", "AutoModelForCausalLM"):
            patch.setattr(module.TestDecoderModels if name == "transformers_class" else module, name, model_class)
        patch.setattr(module.TestDecoderModels, "torch_device", "cpu", raising=False)
        patch.setattr(module.TestDecoderModels, "prepare_inputs_for_testing", inputs)
        patch.setattr("transformers.AutoTokenizer.from_pretrained", needs_hub)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        for each in (module, sys.modules[f"{PACKAGE}.testing_common"]):
            patch.setattr(each, "hub_online_once", nullcontext)
        torch.manual_seed(0)
        try:
            function(**values, **{name: request.getfixturevalue(name) for name in fixtures})
        except (Exception, pytest.skip.Exception, pytest.fail.Exception) as error:
            return error
    return None


PEFTS_OWN = "not a plain torch.nn.Linear"
"""A part of GLoRA's error message about the layers that stand in for remote layers."""


def is_refusal(error: BaseException | None) -> bool:
    """Whether the error names a feature that remote blocks do not have, or was caused by such an error."""
    while error is not None:
        if isinstance(error, AdapterError | UnsupportedParameter | UnsupportedModel) or PEFTS_OWN in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


SENSELESS = {
    "test_training_decoders_layer_indexing": "counts the blocks of the model, after all its comparisons have passed",
    "test_lora_layer_replication": "counts the blocks of the model",
}
"""Tests of properties that a remote model does not have."""


@pytest.mark.parametrize(("family", "case"), [*cases()])
def test_peft_tests_of_decoders_pass_on_remote_blocks(
    family: str, case: Case, swarms: dict[str, LocalSwarm], request: pytest.FixtureRequest
) -> None:
    count = counted(request.config, f"PEFT's tests of decoders on {family}")
    raised = attempt(case, stand_in(swarms, remote=True), request)
    if raised is None:
        count(Outcome.PASSED)
        return
    why = ""
    if isinstance(raised, pytest.skip.Exception):
        why = str(raised)
    elif case.name in SENSELESS:
        why = SENSELESS[case.name]
    elif attempt(case, stand_in(swarms, remote=False), request) is not None:
        why = f"fails on the whole model, too ({type(raised).__name__}: {raised})"
    if why:
        count(Outcome.NOT_APPLICABLE)
        pytest.skip(f"not applicable: {why}")
    if is_refusal(raised):
        count(Outcome.REFUSED)
        pytest.skip(f"refused by name: {raised}")
    count(Outcome.FAILED)
    raise raised
