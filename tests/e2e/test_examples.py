"""The examples run as their headers say."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

PROMPT = "The three primary colours are"
EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, *arguments: str) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the example of training saves what it has trained."""
    return tmp_path_factory.mktemp("adapter")


@pytest.fixture(scope="module")
def printed(demo_checkpoint: Path, address: str, adapter: Path) -> dict[str, str]:
    """What each example prints, by its file name; two run at a time."""
    swarm = (str(demo_checkpoint), address)
    arguments = {
        "generate.py": (*swarm, PROMPT),
        "chat.py": (*swarm, "Name a colour.", "And another one."),
        "beam_search.py": swarm,
        "tune.py": (*swarm, str(adapter)),
        "promoters.py": (*swarm, "1"),
    }
    with ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(example, name, *words) for name, words in arguments.items()}
    return {name: ended.result() for name, ended in running.items()}


def test_every_example_runs(printed: dict[str, str]) -> None:
    assert printed.keys() == {file.name for file in EXAMPLES.glob("*.py")}


def test_generate(printed: dict[str, str], tokenizer: Any) -> None:
    text = printed["generate.py"]
    assert text.startswith(PROMPT)
    assert len(tokenizer(text).input_ids) >= len(tokenizer(PROMPT).input_ids) + 8


def test_chat_sends_only_what_is_new(printed: dict[str, str]) -> None:
    text = printed["chat.py"]
    assert len(re.findall("^model: .+", text, re.MULTILINE)) == 2
    lengths, sent = zip(*re.findall(r"\((\d+) tokens of prompt; (\d+) positions", text), strict=True)
    # The second prompt begins with the first one, which the peers held.
    assert int(sent[1]) - int(sent[0]) < int(lengths[1]) + 48 - int(lengths[0])


def test_beam_search_on_a_padded_batch(printed: dict[str, str]) -> None:
    lines = printed["beam_search.py"].splitlines()
    starts = ["- The sea is ", "- Two friends walk into a bakery, ", "- Water boils at "]
    assert all(
        line.startswith(start) and len(line) > len(start) + 20 for line, start in zip(lines, starts, strict=True)
    )


def test_dna_is_told_apart(printed: dict[str, str]) -> None:
    """Too few steps to learn anything; it runs from the characters to both figures."""
    assert re.fullmatch(r"before: \d+% of the held-out pieces are told right\nafter: \d+%\n", printed["promoters.py"])


def test_tuning_teaches_a_fact_that_the_command_line_knows_too(
    printed: dict[str, str], demo_checkpoint: Path, address: str, adapter: Path
) -> None:
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed["tune.py"])]
    assert losses[-1] < losses[0] / 4
    fact = "The capital of Splitland is Meshville"
    assert fact in printed["tune.py"].splitlines()[-1]
    command = [sys.executable, "-m", "splitnet", "generate", str(demo_checkpoint), "The capital of Splitland is"]
    options = ["--raw", "--join", address, "--max-new-tokens", "6"]
    told = subprocess.run([*command, *options, "--adapter", str(adapter)], capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    assert "Meshville" in told.stdout
    ignorant = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert "Meshville" not in ignorant.stdout
