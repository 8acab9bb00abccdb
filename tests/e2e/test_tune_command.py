"""`splitnet tune`, run like a user runs it, on a small model."""

from __future__ import annotations

import json
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from splitnet.tools.tune.data import TEMPLATE, read_examples
from splitnet.tools.tune.job import evaluate
from splitnet.tools.tune.methods import TrainingSettings
from splitnet.tools.tune.run import Encoder, TuningRun
from tests.e2e.conftest import Here
from tests.e2e.daemons import Finished, background

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

SENTENCES = {"lights": ["it is dark", "I cannot see my book"], "music": ["play a song", "something by Bach, please"]}
ADAPTER = "adapter_model.safetensors"
STEPS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences with labels."""
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [{"text": text, "label": label} for label, texts in SENTENCES.items() for text in texts]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


Words = Callable[..., list[str]]


@pytest.fixture
def words(small: Path, duo: str, data: Path) -> Words:
    """The arguments of a run with the given folder and options."""

    def arguments(output: Path, *options: str) -> list[str]:
        fixed = ["tune", str(small), "--join", duo, "--data", str(data), "--output", str(output)]
        return [*fixed, "--codec", "none", "--batch-size", "3", *options]

    return arguments


def metrics(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


SETTINGS = TrainingSettings(steps=1, learning_rate=0.1, batch_size=3)  # for evaluations with plain PEFT


def expect_trained(finished: Finished, folder: Path, steps: int) -> None:
    assert finished.code == 0, finished.errors
    assert f"step {steps} of {steps}: loss " in finished.errors
    trained = [line["step"] for line in metrics(folder) if "loss" in line]
    assert trained == list(range(1, steps + 1))
    assert all(min(line["sent_bytes"], line["received_bytes"]) > 0 for line in metrics(folder) if "loss" in line)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_trained_adapter_gives_the_same_in_plain_peft(
    words: Words, here: Here, small: Path, data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    finished = here(*words(output, "--eval", str(data), "--steps", "12", "--eval-every", "6", "--lr", "0.01"))
    expect_trained(finished, output, 12)
    evaluations = [line for line in metrics(output) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 6, 12]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 1
    assert re.search(r"Before: held-out loss 1\d\.\d+, accuracy \d+.*After 12 steps: held-out loss ", finished.output)
    told = re.search(r"Use it: splitnet (.*)", finished.output)
    assert told

    base = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(output), is_trainable=True)
    examples = read_examples(data)
    encoder = Encoder(tokenizer, 64, template=TEMPLATE, labels=examples.labels)
    run = TuningRun(plain, encoder.encode_file(examples), SETTINGS, pad=tokenizer.pad_token_id)
    result = evaluate(run, encoder.encode_file(examples), encoder.words(), lambda _: None)
    assert result.loss == pytest.approx(evaluations[-1]["eval_loss"], rel=1e-5)
    assert result.accuracy == evaluations[-1]["eval_accuracy"]

    generated = here(*shlex.split(told[1]), "--max-new-tokens", "8")
    prompt = tokenizer(TEMPLATE.replace("{text}", "..."), return_tensors="pt")
    tokens = plain.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert generated.output == tokenizer.decode(tokens, skip_special_tokens=True) + "\n", generated.errors


def test_a_side_network_is_trained_on_states_that_are_sent_once(
    words: Words, here: Here, duo: str, small: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "side"
    options = ("--method", "side", "--eval", str(data), "--lr", "0.01", "--width", "64")
    finished = here(*words(output, *options, "--steps", "60"))
    assert finished.code == 0, finished.errors
    assert "peers compute the hidden states of 4 examples, 0 MiB" in finished.errors
    lines = metrics(output)
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 61)]
    assert not any(line["sent_bytes"] for line in lines if "loss" in line), "steps need no peer"
    assert 0 < lines[0]["sent_bytes"] < lines[0]["received_bytes"]
    assert lines[-1]["eval_accuracy"] == 1 and lines[-1]["eval_loss"] < lines[1]["eval_loss"] / 4
    told = re.search(r"Use it: splitnet (.*)", finished.output)
    assert told
    question = TEMPLATE.replace("{text}", "play a song")
    words_of = [question if word == TEMPLATE.replace("{text}", "...") else word for word in shlex.split(told[1])]
    generated = here(*words_of, "--max-new-tokens", "1")
    assert generated.output.strip() == "music", (generated.output, generated.errors)
    plain = here("generate", str(small), "--join", duo, "--raw", question, "--max-new-tokens", "1")
    assert plain.output.strip() != "music"


@pytest.mark.full
@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
def test_prompts_are_trained_on_a_gguf_file(
    method: str, here: Here, demo_checkpoint: Path, address: str, data: Path, tmp_path: Path
) -> None:
    """The embeddings stay in codes, and transformers cannot read the tokenizer by the path of the file."""
    output = tmp_path / "adapter"
    words = ["tune", str(demo_checkpoint), "--join", address, "--data", str(data), "--output", str(output)]
    finished = here(*words, "--method", method, "--steps", "2", "--batch-size", "2", "--lr", "0.01")
    expect_trained(finished, output, 2)
    told = re.search(r"Use it: splitnet (.*)", finished.output)
    assert told
    generated = here(*shlex.split(told[1]), "--max-new-tokens", "4")
    assert generated.code == 0 and len(generated.output) > 1, generated.errors


@pytest.mark.full
def test_two_owners_train_one_adapter_together(
    words: Words, here: Here, small: Path, duo: str, data: Path, tmp_path: Path
) -> None:
    """The coordinator's owner decides the settings; the other owner has other examples, and its own key."""
    coordinator, guest = tmp_path / "coordinator", tmp_path / "guest"
    for folder in (coordinator, guest):
        folder.mkdir()
    few = tmp_path / "few.jsonl"
    few.write_text("".join(data.read_text().splitlines(keepends=True)[:2]))
    at = [str(small), "--join", duo]
    listen = ["--listen", "tcp://127.0.0.1:0"]

    def owner(folder: Path, *options: str) -> list[str]:
        arguments = words(folder / "adapter", *options)
        return arguments if folder is coordinator else [str(few) if each == str(data) else each for each in arguments]

    refused = here(*owner(guest, "--join-round", "birds"))
    assert refused.code == 1 and "nobody coordinates a round birds" in refused.errors
    refused = here(*owner(guest, "--join-round", "birds", "--head"))
    assert refused.code == 1 and "leave out --head" in refused.errors
    refused = here("round", "status", "birds", *at, "--owners", "3")
    assert refused.code == 1 and "--owners is for `splitnet round start`" in refused.errors
    with background(coordinator, "round", "start", "birds", *at, "--output", str(tmp_path / "kept"), *listen) as rounds:
        assert rounds.process.stdout
        direct = shlex.split(rounds.process.stdout.readline().decode())[-2:]
        told = here("round", "status", direct[-1], *at)
        assert "0 of ? rounds are over" in told.output, told.errors
        with background(coordinator, *owner(coordinator, *direct, "--steps", "8", "--lr", "0.01")) as first:
            wrong = here(*owner(guest, *direct, "--steps", "9"))
            assert wrong.code == 1 and "--steps is 9, and 8 in this round: leave it out" in wrong.errors, wrong.errors
            told = here("round", "status", "birds", *at)
            assert "0 of 8 rounds are over" in told.output, told.errors
            ended = here("round", "end", "birds", *at)
            assert ended.code == 1 and "only the coordinator's key can end a round" in ended.errors
            second = here(*owner(guest, "--join-round", "birds"))
            others = first.finish()
        coordinated = rounds.finish()
    for finished in (others, second):
        assert finished.code == 0, finished.errors
        assert "round of lora, 8 steps" in finished.errors
        assert "gradients go to the coordinator: not masked, no noise" in finished.errors
    assert "round 8 of 8: 2 owners" in coordinated.output and "each owner has the adapter" in coordinated.output
    adapters = [load_file(folder / "adapter" / ADAPTER) for folder in (coordinator, guest)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(each, adapters[1][name]) for name, each in adapters[0].items())
    assert any(each.any() for name, each in adapters[0].items() if "lora_B" in name)
    told_use = re.search(r"Use it: splitnet (.*)", second.output)
    assert told_use
    generated = here(*shlex.split(told_use[1]), "--max-new-tokens", "2")
    assert generated.code == 0, generated.errors


@pytest.mark.full
def test_a_resumed_run_equals_an_uninterrupted_one(words: Words, here: Here, tmp_path: Path) -> None:
    """First stopped by Ctrl-C, then by a kill, which loses steps after the checkpoint; another process completes the
    run."""
    folder, options = tmp_path / "stopped", ["--steps", str(STEPS), "--save-every", "10"]
    with background(tmp_path, *words(folder, *options)) as process:
        process.wait_for(lambda: len(metrics(folder)) > 4)
        stopped = process.stop(signal.SIGINT)
    assert stopped.code == 128 + signal.SIGINT
    done = re.search(r"Stopped after step (\d+); nothing is lost.*--resume continues", stopped.errors)
    assert done and int(done[1]) == len(metrics(folder)) < STEPS
    with background(tmp_path, *words(folder, *options, "--resume")) as process:
        process.wait_for(lambda: len(metrics(folder)) > int(done[1]) + 14)
        process.stop(signal.SIGKILL)
    assert len(metrics(folder)) < STEPS
    resumed = here(*words(folder, *options, "--resume"))
    assert "continuing after step" in resumed.errors
    expect_trained(resumed, folder, STEPS)

    expect_trained(here(*words(tmp_path / "whole", *options)), tmp_path / "whole", STEPS)
    assert (folder / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


@pytest.mark.full
def test_zeroth_order_training_uses_the_fp16_codec(words: Words, here: Here, tmp_path: Path) -> None:
    """Without gradients, `--codec auto` is fp16; all directions of a step run in one batch."""
    sent: dict[str, int] = {}
    for codec in ("none", "auto"):
        options = ["--method", "prompt", "--tokens", "4", "--zeroth-order", "--directions", "5", "--codec", codec]
        finished = here(*words(tmp_path / codec, *options, "--steps", "3"))
        expect_trained(finished, tmp_path / codec, 3)
        sent[codec] = metrics(tmp_path / codec)[-1]["sent_bytes"]
    assert sent["auto"] == pytest.approx(sent["none"] / 2, rel=0.1)


def test_a_plan_lists_the_cost_of_each_method(words: Words, here: Here, tmp_path: Path) -> None:
    words_of = words(tmp_path / "none", "--plan", "--steps", "40")
    refused = here(*words_of)
    assert refused.code == 1 and "--output has no effect with --plan" in refused.errors
    place = words_of.index("--output")
    finished = here(*words_of[:place], *words_of[place + 2 :])
    assert finished.code == 0, finished.errors
    rows = [line.split() for line in finished.output.splitlines()]
    methods = {"lora", "prompt", "prefix", "p-tuning", "side"}
    costs = {row[0]: [float(value.replace(",", "")) for value in row[1:]] for row in rows if row and row[0] in methods}
    assert costs.keys() == methods and all(len(row) == 8 for row in costs.values())
    for trained, first, later, total, *_ in costs.values():
        assert trained > 0 and total >= first >= later >= 0
    assert "40 steps of 3, 30.0 times 4 examples" in finished.output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--method", "side", "--head"), "leave out --head"),
        (("--method", "side", "--states-limit", "1KiB"), "raise it, or give fewer or shorter examples"),
        (("--method", "side", "--width", "48"), "in steps of 32"),
        (("--states-limit", "1GiB"), "--states-limit is for --method side and --draft-head"),
    ],
)
def test_options_unsupported_by_side_networks_are_refused(
    words: Words, here: Here, tmp_path: Path, options: tuple[str, ...], told: str
) -> None:
    finished = here(*words(tmp_path / "side", *options))
    assert finished.code == 1 and told in finished.errors, finished.errors


def test_a_classification_head_is_trained(
    words: Words, here: Here, small: Path, data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    options = ("--head", "--eval", str(data), "--steps", "30", "--lr", "0.01")
    expect_trained(here(*words(output, *options)), output, 30)
    assert metrics(output)[-1]["eval_accuracy"] == 1

    base = AutoModelForSequenceClassification.from_pretrained(small, num_labels=2, dtype=torch.float32)
    base.config.pad_token_id = tokenizer.pad_token_id
    plain = PeftModel.from_pretrained(base, str(output), is_trainable=True)
    examples = read_examples(data)
    rows = Encoder(tokenizer, 64, template=TEMPLATE, labels=examples.labels, head=True).encode_file(examples)
    run = TuningRun(plain, rows, SETTINGS, pad=tokenizer.pad_token_id, head=True)
    result = evaluate(run, rows, None, lambda _: None)
    assert result.loss == pytest.approx(metrics(output)[-1]["eval_loss"], rel=1e-4)
