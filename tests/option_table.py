"""The table of all options in docs/configuration.md: `python -m tests.option_table docs/configuration.md`."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path

import typer.main

from splitnet.cli.configuration import COMMON, CONFIG_VARIABLE, ConfigurableGroup, Setting
from splitnet.cli.main import app

BEGIN, END = "<!-- options: begin -->", "<!-- options: end -->"
COLUMNS = ("flag", "commands", "for all of them", "default", "meaning")


def settings() -> list[Setting]:
    """Every option of every command that the environment or a file can set."""
    group = typer.main.get_command(app)
    assert isinstance(group, ConfigurableGroup)
    return group.settings


def with_table(text: str) -> str:
    """A document with the current table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def table() -> str:
    """All options in Markdown; commands with the same option share a row."""
    commands: dict[tuple[str, ...], list[str]] = {_config_row(): ["(before the command)"]}
    for setting in settings():
        name = "(before the command)" if setting.command == COMMON else setting.command
        commands.setdefault(_option(setting), []).append(name)
    rows = [(flag, ", ".join(names), *rest) for (flag, *rest), names in commands.items()]
    cells = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells)


def _config_row() -> tuple[str, ...]:
    return "`--config`", f"`{CONFIG_VARIABLE}`", "", "This file, if not in its usual place."


def _option(setting: Setting) -> tuple[str, ...]:
    parameter = setting.parameter
    shared = setting.variables[-1] if COMMON in setting.tables else ""
    flags = ", ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
    return flags, f"`{shared}`" if shared else "", _default(setting), parameter.help or ""


def _default(setting: Setting) -> str:
    shown, default = setting.parameter.show_default, setting.parameter.default
    if isinstance(shown, str):
        return f"`{shown}`"
    if setting.parameter.required:
        return "required"
    if default is None:
        return ""
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"`{default.value if isinstance(default, Enum) else default}`"


def main() -> None:
    """Writes the table into the named documents."""
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(with_table(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
