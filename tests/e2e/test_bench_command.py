"""`splitnet bench` as a user runs it, on a small model. Speed depends on the machine, so it is not tested."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.quant.native import path_in_use
from tests.e2e.conftest import DUO_SPANS, Here
from tests.e2e.daemons import run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

ROUNDS = 2
TESTS = [
    # test, tokens, context, clients
    ("prefill", 8, 0, 1),
    ("prefill", 13, 0, 1),
    ("decode", 5, 0, 1),
    ("decode", 5, 0, 3),
    ("decode", 5, 17, 1),
    ("decode", 5, 17, 3),
]
SIZES = ("--prefill", "8", "--prefill", "13", "--decode", "5", "--context", "0", "--context", "17")
MORE = ("--clients", "1", "--clients", "3", "--rounds", str(ROUNDS), "--threads", "1")


@pytest.mark.full
def test_bench_measures_a_swarm_and_plain_transformers_alternately(small: Path, duo: str, home: Path) -> None:
    where = ("--join", duo, "--local", "--codec", "none")
    finished = run(home, "bench", str(small), *where, *SIZES, *MORE, "--json")
    assert finished.code == 0, finished.errors
    stages = [line for line in finished.errors.splitlines() if not line.startswith("loading ")]
    assert stages == ["warm-up 1 of 1 ...", "round 1 of 2 ...", "round 2 of 2 ..."]
    document: dict[str, Any] = json.loads(finished.output)
    assert document["model"] == small.name
    assert document["environment"]["threads"] == 1
    assert document["environment"]["kernels"] == path_in_use()
    hidden_bytes = 4 * Checkpoint.open(small).hidden_size

    (route,) = document["routes"]
    assert [(hop["start"], hop["end"]) for hop in route["hops"]] == DUO_SPANS
    assert [link["codec"] for link in route["links"]] == ["none"] * 3
    assert all(hidden_bytes < link["bytes_per_token"] < hidden_bytes + 200 for link in route["links"])

    seen = [(test["test"], test["tokens"], test["context"], test["clients"]) for test in document["tests"]]
    assert seen == TESTS
    for test in document["tests"]:
        prompt, decoded = (test["tokens"], 0) if test["test"] == "prefill" else (max(1, test["context"]), 5)
        assert test["prompt_tokens"] == prompt
        assert test["swarm_to_local"]["low"] <= test["swarm_to_local"]["median"] <= test["swarm_to_local"]["high"]
        for arm in ("swarm", "local"):
            assert len(test[arm]["rounds"]) == ROUNDS
            assert test[arm]["tokens_per_s"]["median"] > 0
            answers = [answer for each in test[arm]["rounds"] for answer in each["answers"]]
            assert len(answers) == ROUNDS * test["clients"]
            for answer in answers:
                assert answer["new_tokens"] == 1 + decoded and len(answer["token_ms"]) == decoded
                assert answer["first_token_ms"] > 0 and all(took > 0 for took in answer["token_ms"])
                # The positions computed by the peers count the tokens, too.
                assert answer.get("positions") == (prompt + decoded if arm == "swarm" else None)
        for each in test["swarm"]["rounds"]:
            assert each["received_bytes_per_token"] == (hidden_bytes if decoded else hidden_bytes / prompt)
            assert hidden_bytes <= each["sent_bytes_per_token"] < hidden_bytes + 200
            assert all(answer["route"] == 0 and answer["repairs"] == 0 for answer in each["answers"])


def test_bench_prints_a_table(small: Path, here: Here) -> None:
    finished = here("bench", str(small), "--local", "--prefill", "8", "--decode", "5", "--rounds", "1")
    assert finished.code == 0, finished.errors
    title, *head, prefill, decode, sentence = finished.output.splitlines()
    assert title.split() == [f"{small.name},", "one", "round"]
    assert " ".join(head).split() == ["first", "test", "tokens/s", "token", "ms", "ms/token", "p95"]
    assert re.fullmatch(r"prefill 8 +[\d.,]+ +[\d.,]+ *", prefill)
    assert re.fullmatch(r"decode 5 +[\d.,]+ +[\d.]+ +[\d.]+ *", decode)
    assert re.fullmatch(r"By plain transformers in this process, with \d+ threads?\.", sentence)
