"""Reads options from environment variables, then from one TOML file.

For example, the variable `SPLITNET_PEER_KV_MEMORY`, or `kv-memory` in the table `[peer]` of the file, sets the option
`splitnet peer --kv-memory`. An option with the same meaning in several commands is declared as shared
(`splitnet/cli/arguments.py`): one variable, or the table `[common]`, sets the option for all its commands. `[common]`
also contains the options that are written before the command.
"""

from __future__ import annotations

import inspect
import os
import tomllib
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import platformdirs
import typer
from typer.core import TyperGroup

from splitnet.errors import ConfigurationError, SplitnetError

COMMON = "common"
CONFIG_VARIABLE = "SPLITNET_CONFIG"
_PREFIX = "SPLITNET"
_GIVEN = "splitnet.given"
SIMILAR_COMMANDS = {
    "list": "'models'",
    "ps": "'status'",
    "train": "'tune'",
}
"""Commands of other programs, and the equivalent commands of splitnet, if these have a different spelling."""
_EXPECTED = {bool: "true or false", int: "an integer", float: "a number", str: "a text in quotes"}


@dataclass(frozen=True)
class Setting:
    """An option with all of its names."""

    command: str  # the command that has the option; `common` for the options before the command
    parameter: Any  # click's parameter
    kind: type  # type of the value, or of each value of a repeatable option
    shared: str  # name of the variable that sets the option in several commands; "" if there is no such variable

    @property
    def key(self) -> str:
        return next(flag for flag in self.parameter.opts if flag.startswith("--")).removeprefix("--")

    @property
    def variables(self) -> list[str]:
        """Environment variables that set the option; the first variable that is set counts."""
        path = [_PREFIX, self.key] if self.command == COMMON else [_PREFIX, self.command, self.key]
        own = "_".join(path).upper().replace("-", "_")
        return [own, self.shared] if self.shared else [own]

    @property
    def tables(self) -> tuple[str, ...]:
        """Tables of the file that may contain the option; the first table that contains the option counts."""
        return (self.command, COMMON) if self.shared else (self.command,)

    def converted(self, value: Any) -> Any:
        """Converts a value from the file for click. Raises ConfigurationError if the value has another type."""
        if not self.parameter.multiple:
            return self._of_kind(value)
        if not isinstance(value, list):
            raise ConfigurationError("expected an array, as in [...]")
        return [self._of_kind(item) for item in value]

    def check_value(self, value: Any, context: typer.Context) -> None:
        """Raises ConfigurationError if the option refuses a value from the file."""
        try:
            self.parameter.process_value(context, value)
        except (typer.BadParameter, SplitnetError) as error:
            reason = error.message if isinstance(error, typer.BadParameter) else str(error)
            raise ConfigurationError(reason.removeprefix("Value error, ")) from None

    def _of_kind(self, value: Any) -> Any:
        kind = self.kind if self.kind in _EXPECTED else str
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConfigurationError(f"expected {_EXPECTED[kind]}")
        return str(Path(value).expanduser()) if issubclass(self.kind, Path) else value


@contextmanager
def _at(place: str) -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{place}: {error}") from None


class ConfigurableGroup(TyperGroup):
    """A group of commands whose options all have environment variables and keys in the configuration file."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.settings = list(_settings(self))
        for setting in self.settings:
            setting.parameter.envvar = setting.variables
            # Users can derive the names of variables from the flags, and with these names, help would be twice as long.
            setting.parameter.show_envvar = False

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Resolves a command as click does, and then checks the file's values for the command.

        For commands of other programs, the error names the equivalent commands of splitnet. The check may import large
        modules.
        """
        if (word := args[0]) not in self.commands and word in SIMILAR_COMMANDS:
            ctx.fail(f"No such command {word!r}. Did you mean {SIMILAR_COMMANDS[word]}?")
        resolved = super().resolve_command(ctx, args)
        for setting, value, place in ctx.meta.get(_GIVEN, ()):
            if setting.command in (resolved[0], COMMON):
                with _at(place):
                    setting.check_value(value, ctx)
        return resolved


def read_configuration(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of --config: takes the defaults of all options from the file.

    path: None reads the user's file, if it exists.

    Raises ConfigurationError if the file cannot be read, or contains a value that no option accepts.
    """
    file = path or platformdirs.user_config_path("splitnet") / "config.toml"
    if context.resilient_parsing or (path is None and not file.is_file()):
        return path
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read ({error.strerror}): give another --config") from None
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{file} is not TOML: {error}") from None
    group: Any = context.command
    context.meta[_GIVEN] = given = list(_given(file, content, group.settings))
    context.default_map = defaults = dict[str, Any]()
    for setting, value, _ in given:
        place = defaults if setting.command == COMMON else defaults.setdefault(setting.command, {})
        place[setting.parameter.name] = value
    return path


def given_options(context: typer.Context, environment: Mapping[str, str]) -> Iterator[tuple[str, Setting, Any]]:
    """All options that the environment, the file or the command line of `context` set: name, option, value."""
    group: Any = context.find_root().command
    for setting in group.settings:
        for variable in setting.variables:
            if variable in environment:
                yield variable, setting, environment[variable]
        name = setting.parameter.name
        source = getattr(context.get_parameter_source(name), "name", "") if setting.command == context.info_name else ""
        if source == "COMMANDLINE":
            yield f"--{setting.key}", setting, context.params[name]
    for setting, value, place in context.meta.get(_GIVEN, ()):
        yield f"{setting.key} in {place.rpartition(' in ')[2]}", setting, value


def without_options(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a `splitnet peer` whose options are all on its command line: without option variables."""
    taken = (*(f"{_PREFIX}_{name}" for name in ("JOIN", "LAN", "DEVICE", "SWARM_KEY", "INVITE")), f"{_PREFIX}_PEER_")
    kept = {name: value for name, value in environment.items() if not name.startswith(taken)}
    return {**kept, CONFIG_VARIABLE: os.devnull}


def _settings(group: Any) -> Iterator[Setting]:
    for name, command in ((COMMON, group), *group.commands.items()):
        types_of = typing.get_type_hints(inspect.unwrap(command.callback)) if command.callback else {}
        for parameter in command.params:
            # Eager options, such as --version, are actions.
            if parameter.param_type_name == "option" and not parameter.is_eager and parameter.name in types_of:
                yield Setting(name, parameter, _kind(types_of[parameter.name]), parameter.envvar or "")


def _kind(annotation: Any) -> type:
    """The type within an annotation such as `int | None` or `list[int]`."""
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    return _kind(parts[0]) if parts else annotation


def _given(file: Path, content: dict[str, Any], settings: list[Setting]) -> Iterator[tuple[Setting, Any, str]]:
    """The options that the file sets, their values, and their places in the file."""
    tables = {setting.command for setting in settings}
    for name, table in content.items():
        if not isinstance(table, dict):
            raise ConfigurationError(f"{file}: {name!r} is in no table: move it to [{COMMON}] or a command's table")
        if name not in tables:
            raise ConfigurationError(f"{file}: there is no command [{name}]; {_nearest(name, tables)}")
        known = {setting.key for setting in settings if name in setting.tables}
        for key in table:
            if key not in known:
                elsewhere = sorted({setting.command for setting in settings if setting.key == key})
                fix = f"it goes in [{'] or ['.join(elsewhere)}]" if elsewhere else _nearest(key, known)
                raise ConfigurationError(f"{file}: [{name}] has no key {key!r}; {fix}")
    for setting in settings:
        table = next((name for name in setting.tables if setting.key in content.get(name, {})), None)
        if table is not None:
            with _at(place := f"{file}: {setting.key} in [{table}]"):
                value = setting.converted(content[table][setting.key])
            yield setting, value, place


def _nearest(word: str, known: set[str]) -> str:
    near = get_close_matches(word, sorted(known), n=1, cutoff=0.0)
    return f"the nearest is {near[0]!r}" if near else "it takes no options"
