"""Energy as a user sees it: a daemon with --watts, a peer with a sensor, and the output of commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import DUO_SPANS, Here
from tests.e2e.daemons import starting
from tests.swarm.harness import local_swarm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


@pytest.mark.full
def test_status_and_bench_print_the_energy_per_token(small: Path, tmp_path: Path, here: Here) -> None:
    chip = tmp_path / "sys/class/hwmon/hwmon0"
    chip.mkdir(parents=True)
    (chip / "name").write_text("ina3221\n")
    (chip / "in1_input").write_text("5000\n")
    (chip / "curr1_input").write_text("800\n")
    blocks = ":".join(map(str, DUO_SPANS[0]))
    with (
        local_swarm(small, DUO_SPANS[1:], sysfs=tmp_path / "sys") as swarm,
        starting(tmp_path, small, "--blocks", blocks, "--join", swarm.addresses[0], "--watts", "10") as daemon,
    ):
        daemon.address()
        assert "power: 10 W while it computes, as --watts says\n" in daemon.log
        where = str(small), "--join", swarm.addresses[0]
        first, second = json.loads(here("status", *where, "--json").output)["peers"]
        for peer, watts in ((first, 10.0), (second, 4.0)):
            token_ms = peer["block_ms"][0] * (peer["end"] - peer["start"])
            assert peer["watts"] == pytest.approx(watts)
            assert peer["joules_per_token"] == pytest.approx(watts * token_ms / 1000)
        assert "J/token" in here("status", *where).output

        sizes = ("--prefill", "0", "--decode", "5", "--rounds", "2", "--warm-up", "0")
        preference = ("--prefer", "energy", "--energy-slowdown", "2")
        document: dict[str, Any] = json.loads(here("bench", *where, *sizes, *preference, "--json").output)
        (test,) = document["tests"]
        joules = [answer["joules_per_token"] for each in test["swarm"]["rounds"] for answer in each["answers"]]
        assert len(joules) == 2 and min(joules) > 0
        told = test["swarm"]["joules_per_token"]
        assert (told["low"], told["high"]) == (min(joules), max(joules))
        assert "J/token" in here("bench", *where, *sizes).output
