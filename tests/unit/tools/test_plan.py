from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from scheduler.cost import BlockWork, roofline
from scheduler.facts import CLIENT, Link, Network, Speed
from scheduler.partition import HOP_MS
from splitnet.blocks.model_sizes import ModelSizes
from splitnet.cli.arguments import parse_blocks
from splitnet.cli.main import app
from splitnet.errors import SplitnetError
from splitnet.limits import parse_bytes
from splitnet.tools.plan.devices_file import SAME_MACHINE, DevicesFile, KnownDevice, MachineSpeed
from splitnet.tools.plan.planning import Demand, ModelTooBig, make_plan, summary
from tests.unit.random_models import random_config

MIB = 2**20
SIZES = ModelSizes(
    name="model",
    dtype="bfloat16",
    num_blocks=8,
    hidden_size=1024,
    block_bytes=10 * MIB,
    expert_bytes=0,
    expert_share=1.0,
    kv_bytes=1024,
    client_part_bytes=30 * MIB,
    head_bytes=20 * MIB,
    max_positions=4096,
)
DEMAND = Demand(context=1024, prompt=512, sessions=1, throughput=False)
PER_BLOCK = 11 * MIB  # The weights and the KV cache of one session.
NEAR = Network(unmeasured=Link(1.0, 1e5))


def device(name: str, memory_mib: int, decode_ms: float = 1.0, torch_device: str | None = None) -> KnownDevice:
    return KnownDevice(name, memory_mib * MIB, Speed.of(decode_ms, 0.01), torch_device)


def test_memory_holds_weights_caches_and_the_client_part_of_the_host() -> None:
    devices = device("a", 4 * 11), device("b", 4 * 11)
    plan = make_plan(SIZES, DevicesFile(devices, None, NEAR), DEMAND)
    assert [(span.start, span.end) for span in plan.spans] == [(0, 4), (4, 8)]
    assert all(span.memory_used == span.device.memory for span in plan.spans)
    assert all(span.kv_memory == 4 * MIB for span in plan.spans)
    with pytest.raises(ModelTooBig) as error:
        make_plan(SIZES, DevicesFile(devices, "a", NEAR), DEMAND)
    assert error.value.missing_blocks == 3  # For a device of 30 MiB.
    assert error.value.missing_bytes == 3 * PER_BLOCK
    on_host = make_plan(SIZES, DevicesFile((device("a", 4 * 11 + 30), devices[1]), "a", NEAR), DEMAND)
    assert {span.device.name: span.memory_used for span in on_host.spans} == {"a": 74 * MIB, "b": 44 * MIB}


def test_more_sessions_take_more_memory() -> None:
    file = DevicesFile((device("a", 4 * 11), device("b", 4 * 11)), None, NEAR)
    with pytest.raises(ModelTooBig, match=r"3 sessions of 1024 tokens"):
        make_plan(SIZES, file, replace(DEMAND, sessions=3))
    roomy = DevicesFile((device("a", 4 * 13), device("b", 4 * 15)), None, NEAR)
    assert make_plan(SIZES, roomy, replace(DEMAND, sessions=3)).sessions == 3
    # As many sessions as the device with less memory has room for.
    assert make_plan(SIZES, roomy, DEMAND).sessions == 3


def test_a_single_device_is_recommended_where_it_is_faster() -> None:
    file = DevicesFile((device("slow", 200, 3.0), device("fast", 200)), "fast", NEAR)
    plan = make_plan(SIZES, file, DEMAND)
    assert [span.device.name for span in plan.spans] == ["fast"]
    assert plan.everyone is not None and plan.everyone < plan.tokens_per_s == plan.alone["fast"]
    text = " ".join(summary(plan))
    assert "fast alone is faster than any route through several devices" in text
    assert f"would give {plan.everyone:.1f} tokens/s" in text
    assert "you need no splitnet" in text
    elsewhere = make_plan(SIZES, replace(file, client_host="slow"), DEMAND)
    assert "you need no splitnet" not in " ".join(summary(elsewhere))


def test_fewer_devices_are_recommended_where_they_are_faster_than_all() -> None:
    file = DevicesFile((device("a", 44), device("b", 44), device("far", 44, 50.0)), None, NEAR)
    plan = make_plan(SIZES, file, DEMAND)
    assert {span.device.name for span in plan.spans} == {"a", "b"}
    text = " ".join(summary(plan))
    assert "These 2 devices are faster than more of them" in text
    assert "No device has memory for the model alone" in text
    assert "name the device that it runs on" in text
    slow = DevicesFile((*file.devices[:2], device("slow", 200, 90.0)), None, NEAR)
    assert "slow alone would give 1.3 tokens/s" in " ".join(summary(make_plan(SIZES, slow, DEMAND)))


def test_many_sessions_get_the_highest_throughput_from_equally_fast_hops() -> None:
    file = DevicesFile((device("a", 300), device("b", 300, 1.5)), None, NEAR)
    slow_in_batches = [
        replace(known, speed=Speed.of(size, size)) for known, size in zip(file.devices, (1.0, 1.5), strict=True)
    ]
    file = replace(file, devices=tuple(slow_in_batches))
    one = make_plan(SIZES, file, replace(DEMAND, sessions=8))
    many = make_plan(SIZES, file, replace(DEMAND, sessions=8, throughput=True))
    assert [span.device.name for span in one.spans] == ["a"]
    assert {span.device.name: span.end - span.start for span in many.spans} == {"a": 5, "b": 3}
    assert many.all_tokens_per_s > 1.3 * one.all_tokens_per_s
    assert many.tokens_per_s < one.tokens_per_s


def test_the_times_of_blocks_and_head_follow_from_the_machine() -> None:
    machine = MachineSpeed(bytes_per_ms=10.0 * MIB, flops_per_ms=1e9)
    links = {(CLIENT, "a"): SAME_MACHINE, ("a", CLIENT): SAME_MACHINE}
    plan = make_plan(SIZES, DevicesFile((KnownDevice("a", 300 * MIB, machine),), "a", Network(links)), DEMAND)
    assert plan.client_ms == pytest.approx(2.0)
    work = BlockWork(10 * MIB, SIZES.flops_per_position, cache_bytes=MIB, sessions=16)
    block_ms = roofline(work, bytes_per_ms=machine.bytes_per_ms, flops_per_ms=machine.flops_per_ms).block_ms_at(1)
    assert block_ms == pytest.approx(1.1)
    assert plan.spans[0].ms_per_token == pytest.approx(8 * 1.1 + HOP_MS)
    shared_ms = 8 * 2.6 + HOP_MS + 2.0  # 16 sessions share the weights, but each reads its own cache.
    assert plan.all_tokens_per_s == pytest.approx(16_000 / shared_ms, rel=0.03)
    measured = make_plan(SIZES, DevicesFile((device("a", 300),), "a", Network(links)), DEMAND)
    assert measured.client_ms == pytest.approx(2.0)  # A head as large as two blocks.
    parts = sum(span.ms_per_token for span in plan.spans) + sum(link.ms_per_token for link in plan.links)
    assert 1000 / plan.tokens_per_s == pytest.approx(parts + 2.0)


def test_a_longer_context_takes_memory_and_time() -> None:
    machine = MachineSpeed(bytes_per_ms=10.0 * MIB, flops_per_ms=1e9)
    devices = (KnownDevice("a", 60 * MIB, machine), KnownDevice("b", 60 * MIB, machine), device("c", 30))
    file = DevicesFile(devices, None, NEAR)
    short, long = (make_plan(SIZES, file, replace(DEMAND, context=context)) for context in (1024, 4096))
    assert [span.max_blocks for span in short.spans] == [5, 5] and short.left_out == {"c": 2}
    assert {span.device.name: span.max_blocks for span in long.spans} == {"a": 4, "b": 4}
    for plan, tokens in ((short, 1), (long, 4)):
        assert sum(span.kv_needed for span in plan.spans) == 8 * tokens * MIB
        on_devices_ms = sum(span.ms_per_token for span in plan.spans) - HOP_MS * len(plan.spans)
        assert on_devices_ms == pytest.approx(8 * (1.0 + tokens * 0.1)), "weights, and the cache"
    assert long.first_token_ms == pytest.approx(short.first_token_ms, rel=0.2), "of a prompt of 512"
    # The chunks pass both devices in sequence, after half of the prompt on average.
    arithmetic_ms = 4 * 4096 * 2048 * SIZES.hidden_size / machine.flops_per_ms
    plain_ms = 4096 * SIZES.flops_per_position / machine.flops_per_ms
    slowest_stage_ms = 4 * (arithmetic_ms + plain_ms)
    assert long.longest_first_token_ms == pytest.approx(slowest_stage_ms * 9 / 8, rel=0.1)
    assert "a prompt of this length gets its first token in" in " ".join(summary(long))


def test_measured_chains_are_predicted() -> None:
    """The table "What a hop adds" of docs/benchmarks.md: one peer with all 30 blocks, and three peers with ten each."""
    smollm = replace(SIZES, num_blocks=30, hidden_size=576, block_bytes=13 * MIB, client_part_bytes=0, head_bytes=0)
    loopback = Network(unmeasured=SAME_MACHINE)
    for on_device_ms, total_ms, count in [(29.61, 31.41, 1), (32.89, 36.36, 3)]:
        devices = tuple(device(str(index), 14 * 30 // count, on_device_ms / 30) for index in range(count))
        plan = make_plan(smollm, DevicesFile(devices, None, loopback), replace(DEMAND, context=1))
        assert len(plan.spans) == count
        assert 1000 / plan.tokens_per_s == pytest.approx(total_ms, rel=0.05)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = random_config("llama", blocks=6, hidden=64, vocab=300)
    config.dtype = torch.float32
    config.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def run(model: Path, devices: str, *options: str) -> Result:
    file = model.parent / "devices.yaml"
    file.write_text(devices)
    return CliRunner().invoke(app, ["plan", str(model), "--devices", str(file), *options])


TWO = """
devices:
  - {name: desk, memory: 700KiB, block_ms: {decode: 1, prefill: 0.1}, device: cuda}
  - {name: lap, memory: 700KiB, block_ms: {decode: 2, prefill: 0.1}}
links:
  default: {latency_ms: 1, bandwidth: 1Gbit/s}
"""


def test_the_command_prints_tables_and_commands(model: Path) -> None:
    result = run(model, TWO, "--context", "64", "--prompt", "16")
    assert result.exit_code == 0, result.output
    for text in ("desk", "0..", "-> desk", "tokens/s for one session", "first token of a prompt of 16", "--join ADDR"):
        assert text in result.output


def test_json_holds_the_plan_and_valid_peer_commands(model: Path) -> None:
    result = run(model, TWO, "--context", "64", "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    assert plan["fits"] and plan["exact"] and plan["num_blocks"] == 6
    assert [plan["devices"][0]["start"], plan["devices"][-1]["end"]] == [0, 6]
    for index, span in enumerate(plan["devices"]):
        assert span["memory_used"] <= span["memory"] == 700 * 1024
        words = shlex.split(span["command"])
        assert words[:3] == ["splitnet", "peer", str(model)]
        assert parse_blocks(words[words.index("--blocks") + 1]) == (span["start"], span["end"])
        caches = (span["end"] - span["start"]) * 64 * 2 * 2 * 16 * 4  # positions, keys and values, heads, size, bytes
        assert caches <= parse_bytes(words[words.index("--kv-memory") + 1]) <= span["memory"]
        assert ("--device" in words) == (span["name"] == "desk")
        assert ("--join" in words) == (index > 0)
        assert words[words.index("--dtype") + 1] == "float32"


def test_peer_commands_have_the_type_of_the_planned_caches(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = json.loads(run(tmp_path, TWO, "--context", "64", "--json").output)
    assert plan["dtype"] == "float16"
    assert all("--dtype float16" in span["command"] for span in plan["devices"])


def test_energy_is_printed_if_known(model: Path) -> None:
    one = TWO.replace("decode: 1,", "decode: 1.0,").replace("name: desk,", "name: desk, watts: 100,")
    plan = json.loads(run(model, one, "--json").output)
    by_name = {span["name"]: span for span in plan["devices"]}
    desk = by_name["desk"]
    assert desk["joules_per_token"] == pytest.approx(100 * (desk["ms_per_token"] - HOP_MS) / 1000)
    assert "--watts 100 " in desk["command"] + " "
    assert by_name["lap"]["joules_per_token"] is None and "--watts" not in by_name["lap"]["command"]
    assert plan["joules_per_token"] is None
    assert "J/token" in run(model, one).output and "A token takes" not in run(model, one).output
    both = one.replace("name: lap,", "name: lap, watts: 7.5,")
    plan = json.loads(run(model, both, "--json").output)
    by_name = {span["name"]: span for span in plan["devices"]}
    lap = by_name["lap"]
    assert lap["joules_per_token"] == pytest.approx(7.5 * (lap["ms_per_token"] - HOP_MS) / 1000)
    assert plan["joules_per_token"] == pytest.approx(desk["joules_per_token"] + lap["joules_per_token"])
    assert f"A token takes {plan['joules_per_token']:.3g} J" in run(model, both).output
    assert "J/token" not in run(model, TWO).output


def test_a_model_that_does_not_fit_is_refused(model: Path) -> None:
    result = run(model, TWO.replace("700KiB", "300KiB"), "--json")
    assert result.exit_code == 1
    told = json.loads(result.output)
    assert not told["fits"]
    assert told["missing_blocks"] > 0
    result = run(model, TWO.replace("700KiB", "300KiB"))
    assert isinstance(result.exception, SplitnetError)
    assert "1 MiB are missing" in str(result.exception)


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--context", "999"], "context of 256 positions"), (["--context", "16", "--prompt", "17"], "raise --context")],
)
def test_impossible_lengths_are_refused(model: Path, options: list[str], said: str) -> None:
    result = run(model, TWO, *options)
    assert isinstance(result.exception, SplitnetError)
    assert said in str(result.exception)
