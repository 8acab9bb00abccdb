"""`splitnet tune --draft-head`, run as a user runs it, on a small model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.e2e.conftest import Here

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

WORDS = ("dark", "book", "song", "light", "Bach", "see", "play", "night")


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "work" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    lines = [{"prompt": f"{one} {other}"} for one in WORDS for other in WORDS]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.full
def test_a_head_is_trained_on_answers_of_the_model_and_used_for_drafts(
    here: Here, small: Path, duo: str, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "head"
    words = ["tune", str(small), "--join", duo, "--output", str(output), "--draft-head", "--data", str(prompts)]
    words += ["--generate", "64", "--max-length", "100", "--epochs", "2", "--draft-vocabulary", "512", "--lr", "0.003"]
    finished = here(*words)
    assert finished.code == 0, finished.errors
    assert re.search(r"states of 64 of 64 texts", finished.errors)
    told = re.search(
        r"epoch 2 of 2: held-out loss (\S+), acceptance (\S+).* (\S+) tokens per round trip", finished.errors
    )
    assert told
    losses = [line["loss"] for line in metrics(output) if "acceptance" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]
    with safe_open(output / "model.safetensors", framework="pt") as file:
        assert file.get_slice("lm_head.weight").get_shape() == [512, 64]
    assert json.loads((output / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"] == [6]
    command = re.search(r"Use it: splitnet (.*)", finished.output)
    assert command
    plain = here("generate", str(small), "--join", duo, "--speculate", "off", "--max-new-tokens", "12", "dark book")
    drafted = here(*shlex.split(command[1])[:-1], "--max-new-tokens", "12", "dark book")
    assert drafted.code == 0, drafted.errors
    assert drafted.output == plain.output

    again = here(*words)
    assert again.code != 0 and "continue it with --resume" in again.errors
    resumed = here(*words, "--resume")  # No step is left.
    assert resumed.code == 0, resumed.errors
    assert "continuing after step" in resumed.errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--draft-head"], "nothing to learn from"),
        (["--draft-head", "--generate", "4", "--rank", "4"], "--rank has no effect with --draft-head"),
        (["--epochs", "3", "--data", "x.jsonl"], "--epochs is for --draft-head"),
        (["--draft-head", "--data", "PROMPTS"], "'completion'"),
        ([], "give examples with --data"),
        (["--draft-head", "--generate", "4", "--states-limit", "much"], "'much' is not an amount of memory"),
        (["--draft-head", "--generate", "4", "--max-length", "999999"], "lower --max-length"),
    ],
)
def test_invalid_options_are_refused_by_name(
    here: Here, small: Path, duo: str, prompts: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    words = ["tune", str(small), "--join", duo, "--output", str(tmp_path / "head")]
    finished = here(*words, *(str(prompts) if option == "PROMPTS" else option for option in options))
    assert finished.code != 0
    assert said in finished.errors
    assert not (tmp_path / "head").exists()
