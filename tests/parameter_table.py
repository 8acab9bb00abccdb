"""The tables in docs/parameters.md: `python -m tests.parameter_table docs/parameters.md`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from splitnet.hf.parameters import FORWARD, GENERATION, RefusedParameter

TABLES = {"generation": GENERATION, "forward": FORWARD}


def with_tables(text: str) -> str:
    """A document with the current tables between their marks."""
    for name, parameters in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{table(parameters)}\n{end}{after}"
    return text


def table(parameters: Mapping[str, str | RefusedParameter]) -> str:
    """Parameters and their verdicts in Markdown."""
    rows = ["| parameter | verdict |", "|---|---|"]
    rows += [f"| `{name}` | {_verdict(rule)} |" for name, rule in sorted(parameters.items())]
    return "\n".join(rows)


def _verdict(rule: str | RefusedParameter) -> str:
    if isinstance(rule, str):
        return rule
    unless = " or ".join(f"`{value}`" for value in rule.unless if value is not False)
    return f"refused{unless and f', unless it is {unless}'}: {rule.why}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_tables(page.read_text()))
