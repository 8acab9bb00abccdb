from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from simulator.simulation import Simulation
from splitnet.cli.main import app
from splitnet.errors import SplitnetError

ROOT = Path(__file__).resolve().parents[3]
WORLD = ["simulate", "--peers", "30", "--clients", "20", "--blocks", "12", "--hidden", "512"]
FEW = [*WORLD, "--clients", "5"]
SMALL = [*WORLD, "--policy", "own"]


def run(*options: str, given: list[str] = SMALL, columns: int = 200) -> str:
    result = CliRunner().invoke(app, [*given, *options], catch_exceptions=False, env={"COLUMNS": str(columns)})
    assert result.exit_code == 0
    return result.output


def test_the_command_prints_a_row_per_policy_and_writes_results_and_chart(tmp_path: Path) -> None:
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
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_the_command_prints_the_cost_of_coordinates() -> None:
    output = run("--coordinates", given=WORLD)
    assert "routes of 20 clients" in output
    assert "relative error" in output
    assert "measured links, no coordinates, of all peers" in output


def test_an_unknown_policy_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(SplitnetError, match=r"unknown policy best: use baselines, ablations, or of own, "):
        run("--policy", "best")


@pytest.mark.full
def test_against_all_is_one_table_with_intervals() -> None:
    output = run("--against", "all", "--scenario", "burst", "--worlds", "2", given=FEW, columns=250)
    assert "30 peers, 2 x 5 sessions, all within a second" in output
    for policy in ("own", "Petals, pushing", "oracle"):
        assert policy in output
    assert "% to +" in output


def test_one_world_has_no_intervals() -> None:
    output = run("--against", "all", "--scenario", "burst", given=FEW, columns=250)
    assert "from a single world" in output and "nan" not in output


def test_a_narrow_terminal_shows_all_columns() -> None:
    narrow = run("--scenario", "dark", columns=60)
    assert "…" not in narrow and "a continent vanishes" in narrow and "repairs" in narrow


def test_missing_figures_are_null_in_the_results(tmp_path: Path) -> None:
    run(
        "--output", str(tmp_path), "--uptime", "inf", given=[*SMALL, "--peers", "1", "--clients", "1", "--blocks", "80"]
    )
    text = (tmp_path / "results.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)
    assert results["policies"]["own"]["ttft_p50_s"] is None and results["settings"]["uptime"] == "inf"


@pytest.mark.parametrize("option", ["--output", "--plot"])
def test_unwritable_outputs_are_refused_before_the_simulation(
    tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(Simulation, "run", lambda _: pytest.fail("it was simulated first"))
    with pytest.raises(SplitnetError, match="cannot be written"):
        run(option, str(tmp_path / "file" / "below"))
    with pytest.raises(SplitnetError, match="name another file"):
        run("--output", str(tmp_path), "--plot", str(tmp_path / "results.json"))
    with pytest.raises(SplitnetError, match="no square table of round trips"):
        run("--output", str(tmp_path), "--latencies", str(tmp_path / "file"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left of what failed"


@pytest.mark.parametrize(("peers", "said"), [("1", "simulate at least two"), ("2", "blocks .* are served by nobody")])
def test_too_few_peers_have_no_routes(peers: str, said: str) -> None:
    with pytest.raises(SplitnetError, match=said):
        run("--coordinates", "--peers", peers, "--blocks", "80", given=WORLD)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--against", "all"), "without --policy"),
        (("--scenario", "flood"), "use light, heavy, burst, dark"),
        (("--scenario", "burst", "--rate", "3"), "leave out --rate"),
        (("--coordinates", "--worlds", "3", "--plot", "a.svg"), "leave out --policy, --plot, --worlds"),
        (("--coordinates",), "leave out --policy"),
    ],
)
def test_conflicting_options_are_refused(options: tuple[str, ...], said: str) -> None:
    with pytest.raises(SplitnetError, match=said):
        run(*options)


def test_the_command_explains_a_missing_simulator() -> None:
    program = """
import sys
sys.modules["simulator"] = None
from splitnet.cli.main import main
sys.argv = ["splitnet", "simulate", "--peers", "30"]
main()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 1
    assert "needs simulator.command, which cannot be imported" in ran.stderr
    assert "environment of its own" in ran.stderr and "Traceback" not in ran.stderr
