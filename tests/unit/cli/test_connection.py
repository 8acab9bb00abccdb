"""Every command that connects to a swarm passes on all its connection options."""

from __future__ import annotations

import os
import shlex
import socket
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from splitnet.cli import connection, main
from splitnet.cli.arguments import command_arguments
from splitnet.cli.main import EXAMPLES, app
from splitnet.errors import SplitnetError
from splitnet.security.identity import Identity
from splitnet.session.options import ConnectionOptions

ADDRESS = f"tcp://192.0.2.7:31331?key={Identity.generate().public.text}"

GIVEN: dict[str, tuple[str, Any]] = {
    "--codec": ("codec", "int8"),
    "--wait": ("recovery_timeout_s", 7.0),
    "--device": ("device", "cuda:1"),
    "--local-blocks": ("local_blocks", "0:2"),
    "--local-weights": ("local_weights", "int8"),
    "--tokenizer": ("tokenizer", "other"),
    "--prefer": ("prefer", "energy"),
    "--energy-slowdown": ("energy_slowdown", 2.0),
    "--key-file": ("key_file", Path("key")),
    "--swarm-key": ("swarm_key", Path("swarm.key")),
    "--trusted-peers": ("trusted_peers", Path("trusted")),
}
"""The field of each option, and a test value."""

LACKS = {
    "tune": {"--prefer", "--energy-slowdown"},
    "bench": {"--wait", "--tokenizer"},
    "status": GIVEN.keys() - {"--key-file", "--swarm-key"},
}


COMMANDS = {command.__name__: examples for command, examples in EXAMPLES.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_groups_of_options_and_valid_examples(name: str) -> None:
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    boxes = Counter(getattr(option, "rich_help_panel", None) for option in command.params if option.opts[0][0] == "-")
    assert max(boxes.values(), default=0) <= 13, boxes
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, [name, "--help"]).output
    for example in COMMANDS[name]:
        assert example in shown
        given = example.replace("/ip4/...", "/ip4/192.0.2.7/tcp/1/p2p/Qm1").replace("tcp://...", ADDRESS)
        words = shlex.split(given)
        assert words[:2] == ["splitnet", name]
        command.make_context(name, words[2:])  # Raises for invalid options.


EARLY = {
    "serve m --port {taken}": "127.0.0.1:{taken} is taken: choose another --port",
    "demo --serve --port {taken}": "127.0.0.1:{taken} is taken: choose another --port",
    "serve m --api-key-file {tmp}/none": "API keys in {tmp}/none cannot be read",
    "generate m hi --adapter {tmp}": "there is no adapter in {tmp}: give the folder",
    "chat m --adapter {tmp}": "there is no adapter in {tmp}: give the folder",
    "tune m --data {tmp}/data.jsonl --output {tmp}": "{tmp} already holds files: give another --output",
    "tune m --data {tmp}/data.jsonl --output {tmp}/data.jsonl/new": "cannot make {tmp}/data.jsonl/new",
    "tune m --data {tmp}/data.jsonl --output {tmp}/new --resume": "{tmp}/new holds no run to continue",
}


@pytest.mark.parametrize("command", EARLY)
def test_wrong_options_are_refused_before_slow_steps(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes before the model is looked for and before libraries are imported."""
    for module in ("cli.generate", "cli.demo", "tools.tune"):
        monkeypatch.setattr(f"splitnet.{module}.resolve_model", lambda _: pytest.fail("the model is looked for"))
    (tmp_path / "data.jsonl").write_text('{"text": "a"}')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = {"taken": taken.getsockname()[1], "tmp": tmp_path}
        ran = CliRunner().invoke(app, command.format_map(words).split())
    assert isinstance(ran.exception, SplitnetError), ran.output
    assert EARLY[command].format_map(words) in str(ran.exception)


@pytest.mark.parametrize(
    ("error", "is_told"),
    [
        (ModuleNotFoundError("No module named 'yaml'", name="yaml"), True),
        (ModuleNotFoundError("No module named 'splitnet.tools.plan'", name="splitnet.tools.plan"), True),
        (ModuleNotFoundError("No module named 'splitnet.blocks.absent'", name="splitnet.blocks.absent"), False),
        (ImportError("cannot import name 'absent'", name="splitnet.blocks.chosen_device"), False),
        (AttributeError("module 'splitnet' has no attribute 'absent'"), False),
    ],
)
def test_a_missing_library_is_explained_and_a_bug_is_raised(
    error: Exception, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> Never:
        raise error

    monkeypatch.setattr(main, "import_module", fail)
    if not is_told:
        with pytest.raises(type(error)):
            main.optional_command("splitnet.tools.plan:plan")
        return
    with pytest.raises(SplitnetError, match=f"needs splitnet.tools.plan, which cannot be imported .*{error}"):
        main.optional_command("splitnet.tools.plan:plan")()


class Reached(Exception):
    """Carries the arguments of the connection."""


def refuse(*given: Any) -> Never:
    raise Reached(*given)


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "tune", "bench", "status"])
def test_the_options_of_a_command_reach_its_connection(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    monkeypatch.setattr(connection, "ModelConnection", refuse)
    more = {"generate": ["prompt"], "tune": ["--data", str(data), "--output", str(tmp_path / "out")]}.get(command, [])
    taken = {option: one for option, one in GIVEN.items() if option not in LACKS.get(command, ())}
    words = [text for option, (_, value) in taken.items() for text in (option, str(value))]
    ran = CliRunner().invoke(app, [command, "m", *more, "--join", ADDRESS, "--no-lan", *words])
    assert isinstance(ran.exception, Reached), ran.output
    model, options = ran.exception.args
    assert model == "m" and options.initial_peers == [ADDRESS]
    assert {name: getattr(options, name) for name, _ in taken.values()} == dict(taken.values())
    assert options.lan is False and options.invite is None
    has = {option for parameter in get_command(app).commands[command].params for option in parameter.opts}  # pyright: ignore[reportAttributeAccessIssue]
    assert has & GIVEN.keys() == taken.keys()


@pytest.mark.parametrize(
    "given",
    [
        ConnectionOptions(
            initial_peers=[ADDRESS, ADDRESS], lan=False, codec="int8", prefer="energy", swarm_key=Path("a key")
        ),
        ConnectionOptions(invite=Path("invite"), key_file=Path("key"), recovery_timeout_s=7.0, model_id="0" * 64),
        ConnectionOptions(any_weights=True),
        ConnectionOptions(any_weights=False),
        ConnectionOptions(),
    ],
)
def test_connection_options_convert_to_arguments_of_another_command(
    given: ConnectionOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ModelConnection", refuse)
    for name in [name for name in os.environ if name.startswith("SPLITNET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SPLITNET_CONFIG", os.devnull)
    ran = CliRunner().invoke(app, ["generate", "m", "prompt", *command_arguments(given)])
    assert isinstance(ran.exception, Reached), ran.output
    assert ran.exception.args == ("m", replace(given, key_file=None) if given.invite else given)
