"""Methods of fine-tuning on three tasks: accuracy, seconds, bytes and memory, and LoRA with PEFT in one process.

Three daemons of one thread each serve a third of the model each. Parts: `runs` trains with `splitnet tune`; `alone`
trains with PEFT in one process; `seconds` times steps of all methods in turns, and needs an otherwise idle machine;
`table` prints the results in the folder. Existing results are not computed again. The task `glosses` is made from
WordNet 3.0 (the package wordnet-base of Debian and Ubuntu).

    python -m benchmarks.tuning_tasks MODEL --output DIR [--tasks intents promoters glosses] [--methods lora side ...]
        [--seeds 0 1] [--parts runs alone seconds table] [--wordnet /usr/share/wordnet]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.tuning import PEERS
from benchmarks.tuning_memory import peak, reset
from splitnet.blocks.backbone import load_whole
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.demo import LocalSwarm
from splitnet.hf.causal_lm import attach
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.tools.tune.data import TEMPLATE, read_examples
from splitnet.tools.tune.folder import TuningFolder
from splitnet.tools.tune.job import evaluate
from splitnet.tools.tune.methods import AdapterOptions, Method, TrainingSettings, with_new_adapter
from splitnet.tools.tune.run import Encoded, Encoder, TuningRun, pad_of
from splitnet.tools.tune.side_tuner import SideTuner
from splitnet.tools.tune.states import States

DATA = Path(__file__).parents[1] / "examples" / "data"
ZEROTH, ALONE = "zeroth-order", "peft"
METHODS = [Method.LORA, Method.PREFIX, Method.PROMPT, Method.SIDE, ZEROTH]
STEPS = {
    "intents": {Method.LORA: 90, Method.PREFIX: 120, Method.PROMPT: 120, Method.SIDE: 200, ZEROTH: 500},
    "promoters": {Method.LORA: 50, Method.PREFIX: 60, Method.PROMPT: 60, Method.SIDE: 200},
    "glosses": {Method.LORA: 125, Method.PREFIX: 125, Method.PROMPT: 125, Method.SIDE: 1000},
}
BATCH = 16
BATCHES = {ZEROTH: 8}
OPTIONS = {ZEROTH: ["--method", "prompt", "--tokens", "2", "--zeroth-order", "--directions", "1", "--lr", "5e-3"]}
PARTS = ["runs", "alone", "seconds", "table"]
CLASSES = {4: "act", 5: "animal", 6: "artifact", 8: "body", 13: "food", 15: "location", 18: "person", 20: "plant"}
"""Names of WordNet's lexicographer files of nouns, by the numbers in lexnames(5WN)."""
PER_CLASS = 300  # glosses of each class; the last 50 are held out
HELD_OUT = 50
LENGTHS = range(20, 121)  # characters of a gloss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint, or GGUF file")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder with data.noun")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each method in `seconds`, after a first one")
    parser.add_argument("--only", help="train this task with PEFT, in this process")
    arguments = parser.parse_args()
    if arguments.only:
        train_alone(arguments.model, arguments.only, arguments.seeds[0], arguments.output)
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    for task in arguments.tasks:
        write_task(task, arguments.output, arguments.wordnet)
        methods = [method for method in arguments.methods if method in STEPS[task]]
        if "runs" in arguments.parts:
            for method in methods:
                run_method(arguments.model, task, method, arguments.seeds, arguments.output)
        if "alone" in arguments.parts:
            for seed in arguments.seeds:
                run_alone(arguments.model, task, seed, arguments.output)
        if "seconds" in arguments.parts:
            measure_seconds(arguments.model, task, methods, arguments.output, arguments.rounds)
    if "table" in arguments.parts:
        print_table(arguments.tasks, arguments.methods, arguments.output)


def write_task(task: str, output: Path, wordnet: Path) -> None:
    """Writes `TASK.train.jsonl` and `TASK.test.jsonl` for `splitnet tune`, if they do not exist."""
    if (output / f"{task}.test.jsonl").exists():
        return
    if task == "glosses":
        train, test = glosses(wordnet / "data.noun")
    else:
        train, test = (
            [json.loads(line) for line in (DATA / f"{task}.{part}.jsonl").read_text().splitlines()]
            for part in ("train", "test")
        )
    for part, rows in (("train", train), ("test", test)):
        (output / f"{task}.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def glosses(nouns: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Glosses of nouns, without examples of their use, with the class of each; equally many of each class."""
    found: dict[str, set[str]] = defaultdict(set)
    for line in nouns.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue  # a line of the licence
        fields, _, gloss = line.partition(" | ")
        label = CLASSES.get(int(fields.split()[1]))
        text = re.sub(r'"[^"]*"?', "", gloss).strip(" ;:")
        if label and len(text) in LENGTHS:
            found[text].add(label)
    classes: dict[str, list[str]] = {label: [] for label in CLASSES.values()}
    for text, labels in sorted(found.items()):
        if len(labels) == 1:
            classes[labels.pop()].append(text)
    chance = random.Random(0)
    chosen = {label: chance.sample(texts, PER_CLASS) for label, texts in classes.items()}
    train, test = (
        [{"text": text, "label": label} for label, texts in chosen.items() for text in texts[part]]
        for part in (slice(0, -HELD_OUT), slice(-HELD_OUT, None))
    )
    chance.shuffle(train)
    chance.shuffle(test)
    return train, test


def rows_of(checkpoint: Checkpoint, task: str, output: Path) -> tuple[list[Encoded], list[Encoded], list[int], int]:
    """Training rows, held-out rows, the first token of each label, and the padding token."""
    train, test = (read_examples(output / f"{task}.{part}.jsonl") for part in ("train", "test"))
    tokenizer = checkpoint.tokenizer()
    encoder = Encoder(tokenizer, 1024, template=TEMPLATE, labels=train.labels)
    return encoder.encode_file(train), encoder.encode_file(test), encoder.words(), pad_of(tokenizer)


def run_method(model: str, task: str, method: str, seeds: Sequence[int], output: Path) -> None:
    """Trains with new daemons, and saves the memory of all processes: MiB before the training, and the largest
    increase."""
    left = [seed for seed in seeds if not (output / f"{task}-{method}-{seed}" / "memory.json").exists()]
    if not left:
        return
    with LocalSwarm(model, PEERS) as peers:
        address = peers.wait()
        before = [reset(process.pid) for process in peers.processes]
        for seed in left:
            folder = output / f"{task}-{method}-{seed}"
            command = [sys.executable, "-m", "splitnet", "tune", model, "--join", address, "--codec", "none"]
            command += ["--data", str(output / f"{task}.train.jsonl"), "--eval", str(output / f"{task}.test.jsonl")]
            command += ["--steps", str(STEPS[task][method]), "--batch-size", str(BATCHES.get(method, BATCH))]
            command += [*OPTIONS.get(method, ["--method", method]), "--seed", str(seed), "--output", str(folder)]
            resumed = (folder / "settings.json").exists()
            client = watched([*command, "--resume"] if resumed else command, folder / "settings.json")
            grown = [peak(process.pid) - held for process, held in zip(peers.processes, before, strict=True)]
            memory = {} if resumed else {"client": client, "peer": [max(before), max(grown)]}
            (folder / "memory.json").write_text(json.dumps(memory))
            print(f"{task} {method} {seed}: accuracy {accuracy(folder):.1%}, {json.dumps(memory)}", flush=True)


def watched(command: Sequence[str], begun: Path) -> tuple[float, float]:
    """Runs a command. Returns its memory in MiB when the file `begun` appears, and the largest increase after that."""
    held = most = 0.0
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            if not held and begun.exists():
                held = reset(process.pid)
            most = peak(process.pid)
        except (StopIteration, OSError):
            pass  # the process has just ended
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} has ended with {process.returncode}")
    return held, most - held


def run_alone(model: str, task: str, seed: int, output: Path) -> None:
    if (output / f"{task}-{ALONE}-{seed}" / "memory.json").exists():
        return
    command = [sys.executable, "-m", "benchmarks.tuning_tasks", model, "--output", str(output)]
    subprocess.run([*command, "--only", task, "--seeds", str(seed)], check=True)


def alone(checkpoint: Checkpoint, settings: TrainingSettings) -> Any:
    """The whole model in this process, with the same new LoRA as in `splitnet tune`."""
    torch.manual_seed(settings.seed)
    return with_new_adapter(
        load_whole(checkpoint, torch.float32),
        Method.LORA,
        AdapterOptions(),
        checkpoint.tokenizer(),
        tokenizer_source="",
    )


def settings_of(task: str, method: str, seed: int = 0) -> TrainingSettings:
    one = Method.PROMPT if method == ZEROTH else Method(method)
    rate = 5e-3 if method == ZEROTH else one.learning_rate
    settings = TrainingSettings(STEPS[task][method], rate, batch_size=BATCHES.get(method, BATCH), seed=seed)
    return settings if method != ZEROTH else replace(settings, zeroth_order=True, directions=1)


def train_alone(model: str, task: str, seed: int, output: Path) -> None:
    checkpoint = Checkpoint.open(model)
    rows, held_out, words, pad = rows_of(checkpoint, task, output)
    settings = settings_of(task, Method.LORA, seed)
    run = TuningRun(alone(checkpoint, settings), rows, settings, pad=pad)
    folder = output / f"{task}-{ALONE}-{seed}"
    folder.mkdir(exist_ok=True)
    before = reset()
    for _ in range(settings.steps):
        run.take_step()
    grown = peak() - before
    found = evaluate(run, held_out, words, lambda _: None)
    line = {"step": settings.steps, "eval_loss": found.loss, "eval_accuracy": found.accuracy}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "memory.json").write_text(json.dumps({"client": [before, grown], "peer": None}))
    print(f"{task} {ALONE} {seed}: accuracy {found.accuracy:.1%}, {before:.0f} MiB and {grown:.0f}", flush=True)


def measure_seconds(model: str, task: str, methods: Sequence[str], output: Path, rounds: int) -> None:
    """Saves the median seconds of steps in turns, and the seconds for the hidden states of all training rows."""
    torch.set_num_threads(2)
    checkpoint = Checkpoint.open(model)
    rows, _, _, pad = rows_of(checkpoint, task, output)
    with LocalSwarm(model, PEERS) as peers, tempfile.TemporaryDirectory() as folder:
        swarm = Swarm(ModelFacts.of(checkpoint), [peers.wait()])
        runs: dict[str, TuningRun] = {}
        states_s = 0.0
        for method in (*methods, ALONE):
            settings = settings_of(task, Method.LORA if method == ALONE else method)
            if method == ALONE:
                adapted = alone(checkpoint, settings)
            elif method == Method.SIDE:
                states = States(TuningFolder(Path(folder) / "work"))
                adapted = SideTuner(attach(checkpoint, swarm, codec="none"), None, states, rows, 1 << 40)
                began = time.perf_counter()
                adapted.compute_states(pad, print, [])
                states_s = time.perf_counter() - began
            else:
                options = AdapterOptions(tokens=2 if method == ZEROTH else 16, init_text="Tell the label of the text.")
                kind = Method.PROMPT if method == ZEROTH else Method(method)
                remote, tokenizer = attach(checkpoint, swarm, codec="none"), checkpoint.tokenizer()
                adapted = with_new_adapter(
                    remote, kind, options, tokenizer, tokenizer_source=checkpoint.tokenizer_source
                )
            runs[method] = TuningRun(adapted, rows, settings, pad=pad)
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(1 + rounds):
            for method, run in runs.items():
                began = time.perf_counter()
                run.take_step()
                times[method].append(time.perf_counter() - began)
        swarm.close()
    found = {method: statistics.median(each[1:]) for method, each in times.items()}
    (output / f"{task}.seconds.json").write_text(json.dumps({"states": states_s, "steps": found, "all": times}))
    print(f"{task}: states {states_s:.1f} s; " + ", ".join(f"{m} {s:.3f} s" for m, s in found.items()), flush=True)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def accuracy(folder: Path) -> float:
    """The accuracy at the end of a training."""
    return next(line["eval_accuracy"] for line in reversed(lines_of(folder)) if "eval_accuracy" in line)


HEADS = "task|method|steps|accuracy|seconds|an epoch, s|MB sent|received|client, MiB|training adds|a peer, MiB|adds"


def print_table(tasks: Sequence[str], methods: Sequence[str], output: Path) -> None:
    """Prints a row for each task and method with results; `?`: this part was not run. Evaluations are not counted."""
    print(f"|{HEADS}|")
    print("|---" * len(HEADS.split("|")) + "|")
    for task in tasks:
        measured = output / f"{task}.seconds.json"
        seconds = json.loads(measured.read_text()) if measured.exists() else {"states": 0.0, "steps": {}}
        count, test = (len((output / f"{task}.{part}.jsonl").read_text().splitlines()) for part in ("train", "test"))
        for method in (*(each for each in methods if each in STEPS[task]), ALONE):
            found = output.glob(f"{task}-{method}-*")
            folders = sorted(folder for folder in found if (folder / "memory.json").exists())
            settings = settings_of(task, Method.LORA if method == ALONE else method)
            cells = [task, method, str(settings.steps), " and ".join(f"{accuracy(one):.1%}" for one in folders) or "?"]
            if step_s := seconds["steps"].get(method):
                states_s = seconds["states"] if method == Method.SIDE else 0.0
                cells += [f"{states_s + settings.steps * step_s:.0f}", f"{count / settings.batch_size * step_s:.2f}"]
            else:
                cells += ["?", "?"]
            cells += moved(folders[0], count / (count + test)) if folders else ["?", "?"]
            memory = max((json.loads((one / "memory.json").read_text()) for one in folders), key=len, default={})
            for process in ("client", "peer"):
                cells += [f"{size:,.0f}" for size in memory.get(process) or ()] or ["?", "?"]
            print(f"| {' | '.join(cells)} |")


def moved(folder: Path, share: float) -> list[str]:
    """MB sent and received in all steps and for the hidden states of the training rows, which are `share` of all
    rows."""
    lines = [line for line in lines_of(folder) if "sent_bytes" in line]
    totals = (
        sum(line[key] * (share if line["step"] == -1 else 1) for line in lines)
        for key in ("sent_bytes", "received_bytes")
    )
    return [f"{total / 1e6:,.1f}" for total in totals]


if __name__ == "__main__":
    main()
