"""The examples run as their headers describe."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Here

pytestmark = [pytest.mark.e2e, pytest.mark.full, pytest.mark.timeout(240)]

PROMPT = "The three primary colours are"
EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, *arguments: str) -> str:
    """The output of an example, which runs in this process, where the libraries are loaded."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return printed.getvalue()


def example_by_itself(name: str, *arguments: str) -> str:
    """The output of an example in a separate process."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the training example saves its adapter."""
    return tmp_path_factory.mktemp("adapter")


@pytest.fixture(scope="module")
def printed(demo_checkpoint: Path, address: str, adapter: Path, small: Path, duo: str) -> dict[str, str]:
    """The output of each example, by file name; one example runs parallel to the others."""
    swarm = (str(demo_checkpoint), address)
    arguments = {
        "chat.py": (*swarm, "Name a colour.", "And another one."),
        "beam_search.py": swarm,
        "tune.py": (*swarm, str(adapter)),
        "promoters.py": (str(small), duo, "1"),
    }
    with ThreadPoolExecutor(1) as pool:
        generated = pool.submit(example_by_itself, "generate.py", *swarm, PROMPT)
        told = {name: example(name, *words) for name, words in arguments.items()}
    return {**told, "generate.py": generated.result()}


def test_every_example_runs(printed: dict[str, str]) -> None:
    assert printed.keys() == {file.name for file in EXAMPLES.glob("*.py")}


def test_the_generate_example_continues_its_prompt(printed: dict[str, str], tokenizer: Any) -> None:
    text = printed["generate.py"]
    assert text.startswith(PROMPT)
    assert len(tokenizer(text).input_ids) >= len(tokenizer(PROMPT).input_ids) + 8


def test_chat_sends_only_new_positions(printed: dict[str, str]) -> None:
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


def test_the_dna_example_prints_both_figures(printed: dict[str, str]) -> None:
    """The model is too small and the steps too few to learn; the test runs all code up to both figures."""
    assert re.fullmatch(r"before: \d+% of the held-out pieces are right\nafter: \d+%\n", printed["promoters.py"])


def test_a_tuned_fact_is_known_to_the_command_line(
    printed: dict[str, str], demo_checkpoint: Path, address: str, adapter: Path, here: Here
) -> None:
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed["tune.py"])]
    assert losses[-1] < losses[0] / 4
    fact = "The capital of Splitland is Meshville"
    assert fact in printed["tune.py"]
    command = ["generate", str(demo_checkpoint), "The capital of Splitland is", "--raw", "--join", address]
    told = here(*command, "--max-new-tokens", "6", "--adapter", str(adapter))
    assert told.code == 0, told.errors
    assert "Meshville" in told.output
    ignorant = here(*command, "--max-new-tokens", "6")
    assert ignorant.code == 0 and "Meshville" not in ignorant.output
