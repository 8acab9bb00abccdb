"""The table of all options in docs/configuration.md: `python -m tests.option_table docs/configuration.md`."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path

import typer.main

from splitnet.cli.configuration import COMMON, CONFIG_VARIABLE, ConfigurableGroup, Setting
from splitnet.cli.main import app

BEGIN, END = "<!-- options: begin -->", "<!-- options: end -->"
COLUMNS = ("command", "flag", "environment variable", "key in the file", "default", "meaning")


def settings() -> list[Setting]:
    """Every option of every command that can be set from elsewhere than the command line."""
    group = typer.main.get_command(app)
    assert isinstance(group, ConfigurableGroup)
    return group.settings


def with_table(text: str) -> str:
    """A document with the present table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def table() -> str:
    """All options in Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), _config_row(), *map(_row, settings())]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def _config_row() -> tuple[str, ...]:
    return "(before it)", "`--config`", f"`{CONFIG_VARIABLE}`", "", "", "This file, if not in its usual place."


def _row(setting: Setting) -> tuple[str, ...]:
    parameter = setting.parameter
    flags = [*parameter.opts, *parameter.secondary_opts]
    return (
        "(before it)" if setting.command == COMMON else setting.command,
        ", ".join(f"`{flag}`" for flag in flags),
        " or ".join(f"`{variable}`" for variable in setting.variables),
        " or ".join(f"`{table}.{setting.key}`" for table in setting.tables),
        _default(setting),
        parameter.help or "",
    )


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
    """Writes the table into the documents that are named."""
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(with_table(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
