from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitnet.cli.main import app
from splitnet.errors import SplitnetError

SMALL = ["simulate", "--peers", "30", "--clients", "20", "--blocks", "12", "--hidden", "512", "--policy", "own"]


def run(*options: str) -> str:
    result = CliRunner().invoke(app, [*SMALL, *options], catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0
    return result.output


def test_it_prints_a_row_for_each_policy_and_writes_results_and_chart(tmp_path: Path) -> None:
    output = run(
        "--policy", "fewest-hops", "--worlds", "2", "--output", str(tmp_path), "--plot", str(tmp_path / "a.svg")
    )
    assert "30 peers, 2 x 20 sessions" in output
    assert "fewest hops" in output
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["peers"] == 30
    assert list(results["policies"]) == ["own", "fewest-hops"]
    assert all(row["sessions"] == 40 for row in results["policies"].values())
    assert results["policies"]["own"]["token_p50_ms"] > 0
    assert (tmp_path / "a.svg").read_text().startswith("<svg")


def test_it_tells_what_coordinates_cost() -> None:
    output = run("--coordinates")
    assert "relative error" in output
    assert "measured links, no coordinates, of all peers" in output


def test_an_unknown_policy_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(SplitnetError, match=r"unknown policy best: use baselines, ablations, or of own, "):
        run("--policy", "best")


def test_against_all_is_one_table_with_intervals() -> None:
    arguments = [*SMALL[:-2], "--against", "all", "--scenario", "burst", "--worlds", "2"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "250"})
    assert "30 peers, burst, 2 x 20 sessions" in result.output
    for policy in ("own", "Petals, pushing", "oracle"):
        assert policy in result.output
    assert "% to +" in result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--against", "all"), "no --policy beside it"),
        (("--scenario", "flood"), "use light, heavy, burst, dark"),
        (("--scenario", "burst", "--rate", "3"), "--rate says nothing"),
    ],
)
def test_what_goes_not_together_is_refused(options: tuple[str, ...], said: str) -> None:
    with pytest.raises(SplitnetError, match=said):
        run(*options)
