"""`splitnet simulate`: simulates a swarm and shows its clients' results in tables and a chart.

Heavy modules are imported where they are used, because `splitnet --help` imports this file.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import typer

from splitnet.cli.arguments import option_group, require
from splitnet.cli.tables import table
from splitnet.errors import SplitnetError

if TYPE_CHECKING:
    from simulator.outcome import Outcome
    from simulator.world import SimulationSettings, World

RESULTS = "results.json"
in_world = option_group("World")
PLANNED_CLIENTS = 50
"""For --coordinates; routes of each client are planned with every method."""


def simulate(
    peers: Annotated[int, in_world(min=1, help="Mean number of live peers.")] = 1000,
    clients: Annotated[int, in_world(min=1, help="Clients that arrive one after the other.")] = 1000,
    rate: Annotated[
        float | None,
        in_world(min=0.01, max=1e6, help="Clients per peer and hour; by default 10, or the scenario's."),
    ] = None,
    scenario: Annotated[
        str | None,
        in_world(
            help="light (10 clients per peer and hour), heavy (30), burst (all within a second), or dark (all peers of "
            "a continent vanish half way)."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="`all`: compare splitnet with all other policies and with an oracle, world by world."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="A policy, `baselines` (the default), or `ablations`; repeat for several."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first world.")] = 1,
    worlds: Annotated[int, typer.Option(min=1, help="Number of worlds; their sessions are pooled.")] = 1,
    blocks: Annotated[int, in_world(min=1, help="Blocks of the model.")] = 80,
    hidden: Annotated[int, in_world(min=1, help="Hidden size of the model.")] = 8192,
    uptime: Annotated[float, in_world(min=0.01, help="Factor to the time for which peers stay.")] = 1.0,
    latencies: Annotated[
        Path | None,
        in_world(help="A file with a square table of round trips in ms between the nodes of a network."),
    ] = None,
    liars: Annotated[
        float, in_world(min=0, max=1, help="Part of the peers that lie: five times their speed, and no load.")
    ] = 0.0,
    coordinates: Annotated[
        bool, typer.Option("--coordinates", help="Print errors of coordinates and costs of candidates, instead.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="A folder for results.json, created if missing.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A file for a chart (SVG).")] = None,
) -> None:
    """Simulate a swarm of thousands of peers and compare ways to route and to place blocks."""
    from simulator.outcome import pooled
    from simulator.policies import AGAINST
    from simulator.world import SCENARIOS, SimulationSettings, World

    if plot:
        require("plot", "splitnet simulate --plot")
    if coordinates:
        unused = {
            "--rate": rate, "--scenario": scenario, "--against": against, "--policy": policy, "--output": output,
            "--plot": plot, "--worlds": worlds > 1,
        }  # fmt: skip
        if given := [option for option, value in unused.items() if value]:
            raise SplitnetError(f"--coordinates simulates no sessions: leave out {', '.join(given)}")
    if against not in (None, "all") or (against and policy):
        raise SplitnetError("--against takes only `all`, without --policy")
    if scenario is not None and scenario not in SCENARIOS:
        raise SplitnetError(f"unknown scenario {scenario}: use {', '.join(SCENARIOS)}")
    names: list[str] = [*AGAINST] if against else _policies(policy or ["baselines"])
    chosen: dict[str, Any] = {"sessions_per_peer_hour": 10.0, **(SCENARIOS[scenario] if scenario else {})}
    if rate is not None:
        if chosen.get("burst"):
            raise SplitnetError("in a burst all clients arrive at once: leave out --rate")
        chosen["sessions_per_peer_hour"] = rate
    settings = SimulationSettings(
        peers=peers,
        clients=clients,
        seed=seed,
        num_blocks=blocks,
        hidden=hidden,
        uptime=uptime,
        latencies=latencies,
        liars=liars,
        **chosen,
    )
    results = output / RESULTS if output else None
    if results and plot and results.resolve() == plot.resolve():
        raise SplitnetError(f"--plot names {plot}, where --output writes its results: name another file")
    _check_writable(results, plot)
    all_settings = [dataclasses.replace(settings, seed=seed + number) for number in range(worlds)]
    if coordinates:
        _print_coordinates(World(settings))
        return
    outcomes = _run(all_settings, names)
    figures = {name: pooled(parts).figures() for name, parts in outcomes.items()}
    load = f"{settings.sessions_per_peer_hour:g} per peer and hour"
    title = f"{peers:,} peers, {worlds} x {clients:,} sessions, " + {
        "burst": "all within a second", "dark": f"{load}; half way through a continent vanishes"
    }.get(scenario or "", load)  # fmt: skip
    _print_table(outcomes, figures, title, against=bool(against))
    if results:
        told = {"settings": dataclasses.asdict(settings), "worlds": worlds, "policies": figures}
        text = json.dumps(_for_json(told), indent=1, default=str, allow_nan=False)  # `Path` is written as text
        results.write_text(text + "\n", encoding="utf-8")
    if plot:
        plot.write_text(chart(figures, f"{peers:,} peers, {worlds * clients:,} sessions"), encoding="utf-8")


def _check_writable(*files: Path | None) -> None:
    """Makes folders, and checks that files can be written, before the computation."""
    for file in files:
        if file is None:
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            is_new = not file.exists()
            file.open("a", encoding="utf-8").close()
            if is_new:
                file.unlink()
        except OSError as error:
            raise SplitnetError(f"{file} cannot be written ({error.strerror}): name another place") from error


def _for_json(value: Any) -> Any:
    """Replaces infinity and NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _for_json(item) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _policies(wanted: list[str]) -> list[str]:
    from simulator.policies import ABLATIONS, BASELINES, POLICIES

    groups = {"baselines": BASELINES, "ablations": ABLATIONS}
    names = [name for word in wanted for name in groups.get(word, (word,))]
    unknown = [name for name in names if name not in POLICIES]
    if unknown:
        raise SplitnetError(f"unknown policy {unknown[0]}: use baselines, ablations, or of {', '.join(POLICIES)}")
    return list(dict.fromkeys(names))


def _run(all_settings: list[SimulationSettings], names: list[str]) -> dict[str, list[Outcome]]:
    """The results of each policy in each world. One world after the other, so that only one is in memory."""
    from simulator.outcome import simulate as simulate_policy
    from simulator.policies import POLICIES
    from simulator.world import World
    from splitnet.cli.stage_progress import StageProgress

    parts: dict[str, list[Outcome]] = {name: [] for name in names}
    with StageProgress() as progress:
        for settings in all_settings:
            progress.update(f"world {settings.seed}", 0, 0)
            world = World(settings)
            for name in names:
                stage = f"world {settings.seed}: {POLICIES[name].label}"
                progress.update(stage, 0, 100)
                parts[name].append(
                    simulate_policy(world, name, lambda share, at=stage: progress.update(at, int(100 * share), 100))
                )
    return parts


COLUMNS: Final[Sequence[tuple[str, str, str]]] = (
    ("TTFT s\np50", "ttft_p50_s", ".2f"), ("\np95", "ttft_p95_s", ".1f"), ("ms/token\np50", "token_p50_ms", ".0f"),
    ("\np95", "token_p95_ms", ".0f"), ("tokens/s", "goodput_tokens_per_s", ".1f"), ("failed", "failed", ".0f"),
    ("hops", "hops_mean", ".1f"), ("load\nGini", "utilisation_gini", ".2f"), ("\nmax", "utilisation_max", ".2f"),
    ("peer\nmoves", "peer_moves", ".0f"), ("session\nmoves", "session_moves", ".0f"), ("repairs", "repairs", ".0f"),
)  # fmt: skip
"""Heading, figure and format of each column."""
COMPARED: Final = COLUMNS[:6]


def _print_table(
    outcomes: dict[str, list[Outcome]], figures: dict[str, dict[str, float]], title: str, *, against: bool
) -> None:
    """One row per policy; `against`: with differences to our own."""
    from simulator.outcome import differences
    from simulator.policies import POLICIES

    several = len(next(iter(outcomes.values()))) > 1
    if against:
        title += "; in brackets the difference to own in the same worlds"
        title += ", with 95% intervals" if several else ", from a single world"
    columns = COMPARED if against else COLUMNS
    rows: list[list[str]] = []
    for name, row in figures.items():
        cells: list[str] = []
        for _, figure, form in columns:
            cell = format(row[figure], form)
            if against and name != "own" and figure != "failed":
                share, low, high = differences(outcomes[name], outcomes["own"], figure)
                cell += f" ({share:+.0%}: {low:+.0%} to {high:+.0%})" if several else f" ({share:+.0%})"
            cells.append(cell)
        rows.append([POLICIES[name].label, *cells])
    figured = [heading for heading, _, _ in columns]
    typer.echo(table(["policy", *figured], rows, figured, title=title))


def _print_coordinates(world: World) -> None:
    from time import perf_counter

    from simulator.outcome import coordinate_error, percentile, plan_qualities
    from splitnet.cli.stage_progress import StageProgress

    error = coordinate_error(world)
    typer.echo(
        f"round trips between {world.settings.peers:,} peers, predicted from coordinates: relative error "
        f"{error.median:.0%} at the median, {error.p90:.0%} at p90; {error.fell_short:.0%} are predicted too short"
    )
    asking = min(PLANNED_CLIENTS, len(world.requests))
    figured = ["longer than the best\nmean", "\np90", "plan ms"]
    rows: list[list[str]] = []
    with StageProgress() as progress:
        for number, quality in enumerate(plan_qualities(world, asking, perf_counter)):
            progress.update("planning", number + 1, 0)
            mean = sum(quality.excess) / len(quality.excess)
            p90 = percentile(quality.excess, 90)
            rows.append([quality.name, f"{mean:.1%}", f"{p90:.1%}", f"{quality.plan_ms:.0f}"])
    typer.echo(table(["planned with", *figured], rows, figured, title=f"routes of {asking} clients, no peer is busy"))


OWN: Final = "#1f6f8b"
OTHER: Final = "#9aa5ab"

PANELS: Final[Sequence[tuple[str, Sequence[str]]]] = (
    ("time to first token, s: p50 | p95 (log)", ("ttft_p50_s", "ttft_p95_s")),
    ("time per token, ms: p50 | p95 (log)", ("token_p50_ms", "token_p95_ms")),
    ("failed sessions", ("failed",)),
)
"""Titles, and the two figures between which a line is drawn, or the one figure of a bar."""


def chart(figures: Mapping[str, Mapping[str, float]], title: str) -> str:
    """An SVG document: a row for each policy, a panel for each quantity, splitnet's policies coloured."""
    from matplotlib import rc_context  # pyright: ignore[reportUnknownVariableType]
    from matplotlib.figure import Figure  # without pyplot there is no window and no global state

    from simulator.policies import POLICIES

    labels = [POLICIES[name].label for name in figures]
    drawing: Any = Figure(figsize=(12.0, 1.2 + 0.3 * len(labels)), layout="constrained")
    drawing.suptitle(title)
    panels = drawing.subplots(1, len(PANELS), sharey=True)
    for axes, (quantity, shown) in zip(panels, PANELS, strict=True):
        axes.set_title(quantity, fontsize="medium")
        axes.set_yticks(range(len(labels)), labels)
        axes.margins(x=0.4)  # room for the numbers
        if len(shown) > 1:
            axes.set_xscale("log")
        for row, (label, values) in enumerate(zip(labels, figures.values(), strict=True)):
            colour, (low, *high) = OWN if label.startswith("own") else OTHER, [values[figure] for figure in shown]
            if math.isnan(low):
                axes.text(0.02, row, "nobody got one", va="center", transform=axes.get_yaxis_transform())
                continue
            if high:
                axes.plot([low, *high], [row, row], marker="|", color=colour)
                axes.plot(low, row, marker="o", color=colour)
            else:
                axes.barh(row, low, color=colour)
            told, at = " | ".join(map(_format_number, (low, *high))), (max([low, *high]), row)
            axes.annotate(told, at, (6, 0), textcoords="offset points", va="center")
    panels[0].invert_yaxis()
    with StringIO() as file, rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        drawing.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()


def _format_number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
