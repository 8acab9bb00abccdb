"""Each option of `splitnet tune` has an effect in the run, or is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from splitnet.cli.main import app
from splitnet.errors import AdapterError, SplitnetError
from splitnet.tools.tune.methods import AdapterOptions, Method, with_new_adapter
from tests.unit.random_models import random_checkpoint

TAKEN = "there is nothing to learn from"  # The error of the next check.


def said(*options: str) -> str:
    ran = CliRunner().invoke(app, ["tune", "m", *options])
    assert isinstance(ran.exception, SplitnetError), ran.output
    return str(ran.exception)


NEEDS = {
    ("--rank", "3"): {"lora"},
    ("--alpha", "3"): {"lora"},
    ("--targets", "q_proj"): {"lora"},
    ("--tokens", "4"): {"prompt", "prefix", "p-tuning"},
    ("--init-text", "Hello"): {"prompt", "prefix"},
    ("--projection", "8"): {"prefix", "p-tuning"},
    ("--network", "LSTM"): {"p-tuning"},
    ("--width", "64"): {"side"},
    ("--states-limit", "1GiB"): {"side"},
}


@pytest.mark.parametrize("option", NEEDS)
def test_an_option_of_some_methods_is_refused_with_others(option: tuple[str, str]) -> None:
    for method in Method:
        told = said("--output", "x", "--method", method, *option)
        assert told.startswith(TAKEN if method in NEEDS[option] else f"{option[0]} is for --"), (method, told)
    assert said("--plan", *option).startswith(TAKEN), "a plan is for all methods"


def test_the_help_lists_the_adapter_options_of_the_table() -> None:
    parameters = get_command(app).commands["tune"].params  # pyright: ignore[reportAttributeAccessIssue]
    boxed = {each.opts[0] for each in parameters if getattr(each, "rich_help_panel", None) == "Adapter"}
    assert boxed == {option for option, _ in NEEDS} - {"--states-limit"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--method", "prefix", "--projection", "8", "--init-text", "a"), "--init-text is for --method prompt and"),
        (("--directions", "2"), "--directions is for --zeroth-order"),
        (("--directions", "2", "--zeroth-order"), TAKEN),
        (("--eval-every", "5"), "--eval-every is for --eval:"),
        (("--eval-every", "5", "--eval", "x"), TAKEN),
        (("--epochs", "2"), "--epochs is for --draft-head"),
        (("--draft-vocabulary", "64"), "--draft-vocabulary is for --draft-head"),
        (("--draft-head", "--epochs", "2", "--draft-vocabulary", "64", "--states-limit", "1GiB"), TAKEN),
        (("--draft-head", "--rank", "2"), "--rank has no effect with --draft-head"),
        (("--draft-head", "--plan"), "--plan has no effect with --draft-head"),
        (("--plan", "--lr", "0.1"), "--lr has no effect with --plan, which is for all methods"),
        (("--lr", "inf"), "--lr is inf: give a finite number"),
        (("--clip", "inf"), "--clip is inf: give a finite number"),
    ],
)
def test_an_option_without_effect_is_refused(options: tuple[str, ...], told: str) -> None:
    assert said("--output" if "--plan" not in options else "--seed", "1", *options).startswith(told)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--accumulate", "9"), "a step can be cut into at most 8 parts"),
        (("--accumulate", "2", "--zeroth-order", "--method", "prompt"), "a step can be cut into at most 1 parts"),
        (("--template", "{text} is"), "--template needs labels, and the data has none"),
        (("--targets", " ,"), "--targets names no layer"),
    ],
)
def test_an_option_that_contradicts_others_is_refused(
    tmp_path: Path, options: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}')
    monkeypatch.setattr("splitnet.tools.tune.resolve_model", str)
    assert told in said("--output", str(tmp_path / "new"), "--data", str(data), *options)


def test_targets_that_match_no_layer_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    random_checkpoint("llama", tmp_path, blocks=2)
    for wrong in ("foo", ".*q_proj", "proj"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        for targets in ((wrong,), ("q_proj", wrong)):
            with pytest.raises(AdapterError, match=r"no layer '.*' for --targets: take some of down_proj, [^.]*q_proj"):
                with_new_adapter(model, Method.LORA, AdapterOptions(targets=targets), None, tokenizer_source="")
    options = AdapterOptions(targets=("self_attn.q_proj", "v_proj"))
    adapted = with_new_adapter(model, Method.LORA, options, None, tokenizer_source="")
    assert {name.split(".lora_A")[0].split(".")[-1] for name, _ in adapted.named_parameters() if "lora_A" in name} == {
        "q_proj",
        "v_proj",
    }
