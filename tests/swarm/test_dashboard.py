"""The data of the dashboard on a small swarm."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from splitnet import __version__
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.session.inference import Session
from tests.e2e.small_model import small_model
from tests.swarm.harness import LocalSwarm, local_swarm, shared_swarm
from tests.unit.serve.serving import GREEDY, MODEL, TEMPLATE, Server, until

pytestmark = pytest.mark.swarm

KEY = "sk-dashboard"
WATTS = 10.0


@pytest.fixture(scope="module")
def swarm(demo_checkpoint: Path, node: DhtDirectory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    folder = small_model(tmp_path_factory.mktemp("dashboard") / MODEL, demo_checkpoint, seed=0)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with shared_swarm(folder, [(0, 2), (2, 6)], node=node, watts=WATTS) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def model(swarm: LocalSwarm) -> RemoteCausalLM:
    return swarm.model()


@pytest.fixture
def server(swarm: LocalSwarm, model: RemoteCausalLM) -> Iterator[Server]:
    server = Server(model, AutoTokenizer.from_pretrained(swarm.folder), keys=[KEY])
    yield server
    server.generations.close()


async def shown(server: Server, **headers: str) -> list[Any]:
    """The events that a viewer gets from a server that is about to end, so that the stream ends."""
    server.generations.draining = True
    reply = await server.http.get("/dashboard/events", headers={"Authorization": f"Bearer {KEY}"} | headers)
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
    return [json.loads(event.removeprefix("data: ")) for event in reply.text.split("\n\n")[:-1]]


def test_a_snapshot_has_the_peers_and_answers_with_their_routes(server: Server, swarm: LocalSwarm) -> None:
    async def does() -> None:
        async with server.running():
            server.http.headers["Authorization"] = f"Bearer {KEY}"
            server.generations.speculate = "auto"
            reply = await server.complete(prompt="Bees", max_tokens=6)
            await until(lambda: server.generations.progress.answers()[0].ended is not None)
            snapshot, events = await shown(server)
        assert (snapshot["type"], events["type"]) == ("snapshot", "events")
        assert (snapshot["model"], snapshot["num_blocks"], snapshot["holes"]) == (MODEL, 6, [])
        assert snapshot["requests"] == {"running": 0, "waiting": 0}
        assert snapshot["tokens_per_round_trip"] >= 1
        peers = snapshot["peers"]
        assert [(peer["start"], peer["end"]) for peer in peers] == [(0, 2), (2, 6)]
        assert [peer["key"] for peer in peers] == [peer.identity.public.text for peer in swarm.peers]
        assert all(peer["version"] == __version__ and peer["kv_free"] > 0 and peer["device"] for peer in peers)
        assert [peer["token_joules"] for peer in peers] == [
            pytest.approx(WATTS * peer["token_ms"] / 1000) for peer in peers
        ]
        (answer,) = snapshot["answers"]
        assert (answer["id"], answer["ended"], answer["tokens"]) == (reply["id"], True, 6)
        assert answer["prompt"] == answer["read"] == reply["usage"]["prompt_tokens"]
        (route,) = answer["routes"]
        assert [hop["peer"] for hop in route["hops"]] == [peer["key"] for peer in peers]
        assert [link["codec"] for link in route["links"]] == ["none"] * 3
        assert all(link["bytes_per_token"] > 0 and link["delay_ms"] is not None for link in route["links"])

    asyncio.run(does())


def test_peers_are_shown_as_long_as_the_swarm_knows_them(
    server: Server, model: RemoteCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client asks for changes only, so it may hold a record that was renewed long ago."""
    old = [dataclasses.replace(record, issued_at=record.issued_at - 3600) for record in model.swarm.peers()]
    assert all(record.expires_at < time.time() for record in old)
    monkeypatch.setattr(model.swarm, "peers", lambda fresh: old)

    async def does() -> None:
        async with server.running():
            snapshot, _ = await shown(server)
        assert [(peer["start"], peer["end"]) for peer in snapshot["peers"]] == [(0, 2), (2, 6)]
        assert snapshot["holes"] == []

    asyncio.run(does())


@pytest.mark.default_cases(local_blocks=("2:4",))
@pytest.mark.parametrize("local_blocks", [None, "2:4"])
def test_events_show_the_progress_of_a_prompt(
    swarm: LocalSwarm, local_blocks: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a second turn, whose beginning the peers hold. A stream has the id of its answer from the beginning."""
    model = swarm.model(local_blocks=local_blocks)
    server = Server(model, AutoTokenizer.from_pretrained(swarm.folder), keys=[KEY])
    read: list[int] = []
    decoded = Session._decoded

    def noted(self: Session, request: Any) -> Any:
        read.append(server.generations.progress.answers()[-1].prompt_done())
        return decoded(self, request)

    monkeypatch.setattr(Session, "_decoded", noted)
    monkeypatch.setattr(Session, "step_positions", lambda *_: 8)

    async def does() -> None:
        async with server.running():
            server.http.headers["Authorization"] = f"Bearer {KEY}"
            body = GREEDY | {"prompt": list(range(100, 140)), "max_tokens": 2, "stream": True}
            reply = await server.http.post("/v1/completions", json=body)
            (answer,) = server.generations.progress.answers()
            assert reply.headers["x-answer-id"] == answer.answer and answer.answer in reply.text
            first = sorted(set(read))
            assert first == [0, 8, 16, 24, 32, 40] and read == sorted(read)
            read.clear()
            await server.complete(prompt=list(range(100, 160)), max_tokens=2)
            assert sorted(set(read)) == [40, 48, 56, 60] and read == sorted(read)

    asyncio.run(does())
    server.generations.close()


def test_local_blocks_of_the_server_are_shown_beside_the_route(swarm: LocalSwarm) -> None:
    model = swarm.model(local_blocks="0:2")
    server = Server(model, AutoTokenizer.from_pretrained(swarm.folder), keys=[KEY])

    async def does() -> None:
        async with server.running():
            server.http.headers["Authorization"] = f"Bearer {KEY}"
            await server.complete(prompt="Bees", max_tokens=3)
            snapshot, _ = await shown(server)
        assert snapshot["local_spans"] == [[0, 2]]
        (answer,) = snapshot["answers"]
        (route,) = answer["routes"]
        assert [(hop["start"], hop["end"]) for hop in route["hops"]] == [(2, 6)] and len(route["links"]) == 2

    asyncio.run(does())
    server.generations.close()


def test_missing_blocks_are_shown_with_advice(swarm: LocalSwarm) -> None:
    with local_swarm(swarm.folder, [(0, 4)]) as holed:
        model = holed.model()
        server = Server(model, AutoTokenizer.from_pretrained(swarm.folder), keys=[KEY])

        async def does() -> None:
            async with server.running():
                snapshot, _ = await shown(server)
            assert snapshot["holes"] == [
                {
                    "start": 4,
                    "end": 6,
                    "advice": "blocks 4..5 are served by nobody: start a peer with "
                    f"`splitnet peer {swarm.folder} --blocks 4:6 --join {' --join '.join(holed.addresses[:2])}`",
                }
            ]

        asyncio.run(does())
        server.generations.close()
        model.close()
