"""Tables of commands: no text is cut at any width of the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

import splitnet
from splitnet.cli.tables import table
from splitnet.tools.tune.costs import Cost, print_costs
from splitnet.tools.tune.methods import TrainingSettings

HEADS = ("blocks", "address", "ms/\ntoken", "device", "key")
ROWS = (
    ("0..11", "192.0.2.7:31331", "12.3", "cuda:1 bfloat16, int4 of groups", "sn17jfxqw"),
    ("12..29 -> 8..25", "[2001:db8::7]:40677", "7.0", "cpu stored/float32", "sn1hs76a3"),
)
words = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=12)
cells = st.lists(words, min_size=1, max_size=4).map(" ".join)


def shown(width: int, monkeypatch: pytest.MonkeyPatch, rows: Sequence[Sequence[str]] = ROWS) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    return table(HEADS, rows, ("ms/\ntoken",), title="small, 30 blocks").splitlines()


def test_columns_that_do_not_fit_are_printed_below_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(200, monkeypatch) == [
        "small, 30 blocks",
        "                                        ms/",
        "blocks           address              token  device                           key",
        "0..11            192.0.2.7:31331       12.3  cuda:1 bfloat16, int4 of groups  sn17jfxqw",
        "12..29 -> 8..25  [2001:db8::7]:40677    7.0  cpu stored/float32               sn1hs76a3",
    ]
    assert shown(80, monkeypatch)[2:5] == [
        "blocks           address              token  device",
        "0..11            192.0.2.7:31331       12.3  cuda:1 bfloat16, int4 of groups",
        "  key sn17jfxqw",
    ]
    assert shown(45, monkeypatch)[2:6] == [
        "blocks           address              token",
        "0..11            192.0.2.7:31331       12.3",
        "  device cuda:1 bfloat16, int4 of groups,",
        "  key sn17jfxqw",
    ]


@given(st.lists(st.tuples(*[cells] * len(HEADS)), min_size=1, max_size=4), st.integers(1, 200))
def test_no_cell_is_cut_and_no_line_is_too_long(rows: list[tuple[str, ...]], width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        lines = shown(width, patch, rows)
    text = "\n".join(lines)
    assert all(" ".join(cell.split()) in text for row in rows for cell in row)
    longest = max(
        cell_len(f"  {head} {cell},".replace("\n", " ")) for row in rows for head, cell in zip(HEADS, row, strict=True)
    )
    assert all(cell_len(line) <= max(width, longest) for line in lines[1:])


def test_names_from_other_peers_stay_in_their_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    told = shown(80, monkeypatch, [("0..1", "a\n0..1  b", "\x1b[2J", "[bold]cpu[/bold]", "k")])
    assert len(told) <= 5 and "a 0..1 b" in told[3] and "\x1b[2J" not in "\n".join(told)
    assert "[bold]cpu[/bold]" in "\n".join(told)


def test_costs_of_tuning_name_their_methods_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    method = "gradients from forward passes alone"
    cost = Cost(method, 12_345, 1_234_567, 99.0, (9 << 30, 9 << 30), 5 << 30, 12.0, 30.0, (1e9, 2e9), 1e5, 2e5, 9 << 30)
    print_costs([cost], TrainingSettings(1000, 1e-4))
    told = capsys.readouterr().out
    row = told[told.index(method) :].partition("Epochs and")[0]
    assert "…" not in told and all(f"{head} " in row for head in ("disk MiB", "peers kJ"))
    assert all(len(line) <= 80 for line in row.splitlines()) and "1,234,567" in row


def test_no_command_uses_tables_of_rich() -> None:
    root = Path(splitnet.__file__).parents[1]
    files = [file for folder in ("splitnet", "peers", "simulator") for file in (root / folder).rglob("*.py")]
    assert [file for file in files if "rich.table" in file.read_text(encoding="utf-8")] == []
