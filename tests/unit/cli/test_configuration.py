from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from splitnet.cli.configuration import ConfigurableGroup, read_configuration, without_options
from splitnet.errors import ConfigurationError
from tests.option_table import settings, with_table

ROOT = Path(__file__).resolve().parents[3]

small = typer.Typer(cls=ConfigurableGroup)


@small.callback()
def before(
    loud: bool = False,
    config: Annotated[
        Path | None, typer.Option(envvar="SPLITNET_CONFIG", callback=read_configuration, is_eager=True)
    ] = None,
) -> None:
    if loud:
        typer.echo("loud")


@small.command()
def sail(
    place: Annotated[list[str] | None, typer.Option("--to", envvar="SPLITNET_TO")] = None,
    knots: Annotated[float, typer.Option(min=0)] = 5.0,
    crew: Annotated[int, typer.Option("--crew-size", min=1, max=9)] = 1,
    log: Path = Path("log"),
    night: Annotated[bool, typer.Option("--night/--day")] = True,
) -> None:
    typer.echo(f"{place} {knots} {crew} {log} {night}")


@small.command()
def moor(place: Annotated[list[str] | None, typer.Option("--to", envvar="SPLITNET_TO")] = None) -> None:
    typer.echo(f"{place}")


def told(arguments: str, file: Path | None = None, **environment: str) -> str:
    """The output of a command; `file` and `environment` are its configuration."""
    variables = {"SPLITNET_CONFIG": str(file or os.devnull), **environment}
    result = CliRunner().invoke(small, arguments.split(), env=variables, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.strip()


def written(folder: Path, text: str) -> Path:
    file = folder / "config.toml"
    file.write_text(text)
    return file


def test_flags_override_the_environment_then_the_file_then_defaults(tmp_path: Path) -> None:
    common = '[common]\nto = ["Rio"]\n'
    both = written(tmp_path, f'{common}[sail]\nto = ["Bergen", "Ulvik"]\ncrew-size = 3\n')
    assert told("sail") == "None 5.0 1 log True"
    assert told("moor", both) == "['Rio']"
    assert told("sail", both) == "['Bergen', 'Ulvik'] 5.0 3 log True"
    assert told("sail", both, SPLITNET_TO="Oslo Bodo") == "['Oslo', 'Bodo'] 5.0 3 log True"
    assert told("sail", both, SPLITNET_TO="Oslo", SPLITNET_SAIL_TO="Narvik") == "['Narvik'] 5.0 3 log True"
    assert told("moor", both, SPLITNET_SAIL_TO="Narvik") == "['Rio']"
    assert told("sail --to Cork --crew-size 4", both, SPLITNET_SAIL_TO="Narvik") == "['Cork'] 5.0 4 log True"


def test_options_of_every_type_are_read_from_the_file_and_the_environment(tmp_path: Path) -> None:
    file = written(tmp_path, '[common]\nloud = true\n[sail]\nknots = 7\nlog = "~/log"\nnight = false\n')
    assert told("sail", file) == f"loud\nNone 7.0 1 {Path.home()}/log False"
    assert told("sail --night", file, SPLITNET_LOUD="0", SPLITNET_SAIL_KNOTS="1.5") == (
        f"None 1.5 1 {Path.home()}/log True"
    )
    assert told("sail", None, SPLITNET_SAIL_NIGHT="false", SPLITNET_SAIL_CREW_SIZE="2") == "None 5.0 2 log False"


def test_the_file_of_the_command_line_has_priority(tmp_path: Path) -> None:
    file = written(tmp_path, "[sail]\ncrew-size = 3\n")
    assert told(f"--config {file} sail", Path("/no/such/file")) == "None 5.0 3 log True"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[sail]\ncrew = 3", r"\[sail\] has no key 'crew'; the nearest is 'crew-size'"),
        ("[sial]\ncrew-size = 3", r"there is no command \[sial\]; the nearest is 'sail'"),
        ("crew-size = 3", r"'crew-size' is in no table: move it to \[common\] or a command's"),
        ("[common]\ncrew-size = 3", r"\[common\] has no key 'crew-size'; it goes in \[sail\]"),
        ("[moor]\nloud = true", r"\[moor\] has no key 'loud'; it goes in \[common\]"),
        ("[sail]\nversion = true", r"\[sail\] has no key 'version'; the nearest is"),
        ('[sail]\ncrew-size = "3"', r"crew-size in \[sail\]: expected an integer"),
        ("[sail]\ncrew-size = true", r"crew-size in \[sail\]: expected an integer"),
        ("[sail]\ncrew-size = 3.0", r"crew-size in \[sail\]: expected an integer"),
        ("[sail]\ncrew-size = 10", r"crew-size in \[sail\]: .*9"),
        ("[sail]\nknots = true", r"knots in \[sail\]: expected a number"),
        ("[sail]\nnight = 1", r"night in \[sail\]: expected true or false"),
        ("[sail]\nlog = 1", r"log in \[sail\]: expected a text in quotes"),
        ('[common]\nto = "Rio"', r"to in \[common\]: expected an array"),
        ("[common]\nto = [1]", r"to in \[common\]: expected a text in quotes"),
        ("[sail", "is not TOML: "),
        ("a = " + "[" * 100_000, "is not TOML: "),
    ],
)
def test_the_error_of_a_bad_file_names_the_mistake(tmp_path: Path, text: str, sentence: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigurationError, match=f"^{re.escape(str(file))}.*{sentence}"):
        told("sail", file)


def test_values_for_other_commands_are_not_checked(tmp_path: Path) -> None:
    file = written(tmp_path, "[sail]\ncrew-size = 10\n")
    assert told("moor", file) == "None"


def test_a_missing_configuration_file_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^/no/file cannot be read \(No such file or directory\): give"):
        told("--config /no/file sail")


def test_options_have_unique_variables() -> None:
    own = Counter(setting.variables[0] for setting in settings())
    shared = {setting.shared for setting in settings() if setting.shared}
    assert {name: count for name, count in own.items() if count > 1} == {}
    assert not shared & own.keys()
    assert not {"SPLITNET_CONFIG", "SPLITNET_CACHE"} & (shared | own.keys())


def test_the_default_of_every_option_is_valid_in_the_file() -> None:
    context: Any = None
    defaults = [(setting, setting.parameter.default) for setting in settings()]
    plain = [(setting, default) for setting, default in defaults if type(default) in (bool, int, float, str)]
    assert len(plain) > 50
    for setting, default in plain:
        assert setting.converted(default) == default
        setting.check_value(default, context)


def test_daemons_of_a_demo_ignore_the_users_configuration() -> None:
    variables = {name: "x" for setting in settings() if setting.command == "peer" for name in setting.variables}
    assert "SPLITNET_JOIN" in variables
    assert without_options({**variables, "HOME": "/", "SPLITNET_CACHE": "/c"}) == {
        "HOME": "/",
        "SPLITNET_CACHE": "/c",
        "SPLITNET_CONFIG": os.devnull,
    }


def test_the_documented_table_of_options_is_up_to_date() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text == with_table(text), "run: python -m tests.option_table docs/configuration.md"
