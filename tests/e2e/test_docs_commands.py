"""The commands in the documents work: they run on a real swarm if they end by themselves, and are parsed otherwise."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import json
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import typer

from splitnet.cli.main import app
from tests.e2e.conftest import Here
from tests.e2e.daemons import background
from tests.e2e.docs_commands import ROOT, Command, commands_in, commands_of, documents, mentions_of, python_blocks
from tests.e2e.test_commands import NOBODY

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

COMMANDS = list({command.words: command for document in documents() for command in commands_of(document)}.values())
EXECUTED = {"chat", "generate", "key", "plan", "status"}
"""Commands of splitnet that end by themselves within seconds."""
NEEDS_SWARM = {"chat", "generate", "status"}
"""Without --join, these commands search the local network, where tests must not find a swarm."""
SERVED_NAMES = {name for command in COMMANDS for option, name in pairwise(command.words) if option == "--served-name"}
NEEDS_MORE = {"--adapter", "--image", "--swarm-key", "round", "simulate", "tune"}
"""Commands that need files of an earlier command, or minutes."""
PLACEHOLDERS = {
    "ADDR": NOBODY,
    "CHECKPOINT": "demo",
    "DIR": "adapter",
    "FILE": "examples/devices.yaml",
    "KIND": "int8",
    "MODEL": "demo",
    "N": "4",
    "SECONDS": "5",
    "SMALL_MODEL": "demo",
    "TOKENS": "64",
    "TYPE": "bfloat16",
    "devices.yaml": "examples/devices.yaml",
}


def of_program(*programs: str) -> Any:
    """A parameter for each command of a program."""
    chosen = [command for command in COMMANDS if command.program in programs]
    assert chosen, f"no document shows a command of {programs}"
    return pytest.mark.parametrize("command", chosen, ids=lambda command: command.place)


def filled(words: tuple[str, ...], **others: str) -> list[str]:
    """The words, with values in place of their placeholders."""
    return [{**PLACEHOLDERS, **others}.get(word, word) for word in words]


@functools.cache
def commands() -> Any:
    """The group of all commands, each without effect."""
    group: Any = typer.main.get_command(app)
    for command in group.commands.values():
        command.invoke = lambda context: None
    return group


def parse(words: list[str]) -> Any:
    """Parses a command line with splitnet's own parser, and returns the exit code."""
    with pytest.raises(SystemExit) as end:
        commands().main(words, prog_name="splitnet")
    return end.value.code


@of_program("splitnet")
def test_documented_splitnet_commands_are_parsed(command: Command, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")  # The file that is checked first.
    words = filled(command.words[1:])
    given = [str(tmp_path) if before == "--adapter" else word for before, word in pairwise(["", *words])]
    assert parse(given) == 0


@pytest.mark.full
@pytest.mark.parametrize(
    "command",
    [
        command
        for command in COMMANDS
        if command.program == "splitnet"
        and EXECUTED & {*command.words}
        and not NEEDS_MORE & {*command.words}
        and not any(word.startswith("eagle=") for word in command.words)  # See test_draft_head_command.
        and ("--join" in command.words or not NEEDS_SWARM & {*command.words})
    ],
    ids=lambda command: command.place,
)
def test_documented_splitnet_commands_run(
    command: Command, address: str, demo_checkpoint: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path if "key" in command.words else ROOT)
    model = str(demo_checkpoint)
    words = filled(command.words[1:], ADDR=address, MODEL=model, demo=model, SMALL_MODEL=model)
    short = ["--max-new-tokens", "4"] if {"chat", "generate"} & {*words} else []
    finished = here(*words, *short, given="Hello\n")
    assert finished.code == 0, finished.errors
    assert finished.output.strip()


TEXT = """
    splitnet plan MODEL [--for latency|throughput]
                  [--json]

```bash
sudo A=1 .venv/bin/python x.py "a b" \\
    --c   # why
```

<!-- not run: it installs -->

```bash
pip install .
```

    client --> peer
"""


def test_commands_in_documents_are_split_like_in_a_shell() -> None:
    assert [(command.place, *command.words) for command in commands_in(TEXT, "page")] == [
        ("page:2", "splitnet", "plan", "MODEL", "--for", "latency", "--json"),
        ("page:6", "python", "x.py", "a b", "--c"),
    ]
    with pytest.raises(ValueError, match="page:2: no test runs 'pip install"):
        list(commands_in("```bash\n$ make demo && pip install .\n```", "page"))


def test_missing_commands_and_options_are_found() -> None:
    assert parse(["generate", "demo", "hi", "--join", NOBODY, "--fast"]) == 2
    assert parse(["fly"]) == 2
    assert wrong_options(("splitnet", "serve", "--port", "1", "--fast")) == {"--fast"}


def wrong_options(words: tuple[str, ...]) -> set[str]:
    """Options in a text such as `splitnet serve --port` that the command does not have."""
    command = commands().commands[words[1]]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help"
    }
    return {word for word in words if word.startswith("--")} - known


@pytest.mark.parametrize("document", documents(), ids=lambda document: document.name)
def test_options_in_the_text_exist(document: Path) -> None:
    for words in mentions_of(document):
        assert not wrong_options(words), words


@of_program("make")
def test_documented_make_targets_exist(command: Command) -> None:
    shown = subprocess.run(["make", "--dry-run", *filled(command.words[1:])], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


class _Parsed(Exception):
    """Raised in place of the script's work on its arguments."""


@of_program("python")
def test_documented_scripts_accept_their_arguments(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    is_module = command.words[1] == "-m"
    script, *arguments = filled(command.words[1 + is_module :])
    path = ROOT / script
    if path.parent.name == "examples":
        _expect_arguments(path, arguments)
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *given: Any) -> argparse.Namespace:
        parse_args(self, *given)
        raise _Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str(path.parent))
    run: Any = runpy.run_module if is_module else runpy.run_path
    with pytest.raises(_Parsed):
        run(script if is_module else str(path), run_name="__main__")


def _expect_arguments(example: Path, arguments: list[str]) -> None:
    """Checks the number of arguments; examples pass them to a function `main`."""
    for main in ast.parse(example.read_text()).body:
        if isinstance(main, ast.FunctionDef) and main.name == "main":
            least = len(main.args.args) - len(main.args.defaults)
            most = len(arguments) if main.args.vararg else len(main.args.args)
            assert least <= len(arguments) <= most
            return
    pytest.fail(f"{example.name} has no main")


@pytest.mark.parametrize("document", documents(), ids=lambda document: document.name)
def test_documented_python_compiles_and_its_imports_exist(document: Path) -> None:
    for place, code in python_blocks(document):
        tree = ast.parse(code, place)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("splitnet", "benchmarks"):
                exec(compile(ast.Module([node], []), place, "exec"), {})


@pytest.mark.full
@pytest.mark.parametrize("benchmark", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda benchmark: benchmark.stem)
def test_imports_of_benchmarks_exist(benchmark: Path) -> None:
    importlib.import_module(f"benchmarks.{benchmark.stem}")


@pytest.fixture(scope="module")
def chat_server(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL at which `splitnet demo --serve` answers, with a small model in place of the demo's."""
    home = tmp_path_factory.mktemp("home")
    with background(home, "demo", str(small), "--peers", "2", "--serve", "--port", "0") as server:
        assert server.process.stdout is not None
        line = server.process.stdout.readline().decode()
        said = re.fullmatch(rf"serving {small.name} at (http://127\.0\.0\.1:\d+)/v1\n", line)
        assert said, line
        yield said[1]
        finished = server.stop(signal.SIGINT)
    assert finished.code == 0
    assert "others on this machine join with --join /ip4/127.0.0.1/tcp/" in finished.errors
    assert finished.errors.endswith("nothing is running any more\n")


@pytest.mark.full
@of_program("curl")
def test_documented_curl_requests_are_answered(
    command: Command, chat_server: str, small: Path, demo_checkpoint: Path
) -> None:
    _, url, *options = command.words
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert given.keys() <= {"-H", "-d"}
    headers = dict([given["-H"].split(": ")]) if "-H" in given else {}
    url = chat_server + urlsplit(url).path
    if "-d" not in given:
        assert httpx.get(url, headers=headers, timeout=60).status_code == 200
        return
    shown = json.loads(given["-d"])
    assert shown["model"] in {demo_checkpoint.stem, *SERVED_NAMES}, "no server in the documents has this model"
    body = {**shown, "model": small.name, "max_tokens": 4}
    reply = httpx.post(url, content=json.dumps(body), headers=headers, timeout=60)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["role"] == "assistant"
