"""One gateway with two models and an adapter, in a swarm of five peers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch
from openai import OpenAI
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from splitnet.checkpoint.checkpoint import Checkpoint
from tests.e2e.conftest import Here
from tests.e2e.daemons import Background, background, starting
from tests.e2e.small_model import small_model
from tests.swarm.harness import local_swarm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

MIB = 2**20
PARTS = {"alpha": [(0, 2), (2, 4), (4, 6)], "beta": [(0, 3), (3, 6)]}


@pytest.fixture(scope="module")
def folders(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    found = {name: small_model(home / name, demo_checkpoint, seed=seed) for seed, name in enumerate(PARTS)}
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(found["alpha"]), lora)
    tuned.save_pretrained(str(home / "adapter"))
    return found | {"adapter": home / "adapter"}


@pytest.fixture
def gateway(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Background, OpenAI]]:
    with ExitStack() as stack:
        swarm = stack.enter_context(local_swarm(folders["alpha"], PARTS["alpha"]))
        for blocks in PARTS["beta"]:
            swarm.add(*blocks, folder=folders["beta"])
        models = [str(folders[name]) for name in PARTS]
        options = ("--adapter", f"tuned={folders['adapter']}", "--codec", "none", "--port", "0")
        home = tmp_path_factory.mktemp("home")
        server = stack.enter_context(background(home, "serve", *models, "--join", swarm.addresses[0], *options))
        assert server.process.stdout is not None
        line = server.process.stdout.readline().decode()
        assert line.startswith("serving alpha and beta and alpha:tuned at "), line
        yield server, stack.enter_context(OpenAI(base_url=line.split()[-1], api_key="-", max_retries=0))
        assert server.stop(signal.SIGTERM).code == 0


@pytest.mark.full
def test_each_model_and_its_adapter_answer_like_plain_transformers(
    gateway: tuple[Background, OpenAI], folders: dict[str, Path], demo_checkpoint: Path
) -> None:
    server, client = gateway
    assert [model.id for model in client.models.list()] == ["alpha", "beta", "alpha:tuned"]
    tokenizer = Checkpoint.open(demo_checkpoint).tokenizer()
    ids = tokenizer("Bees fly", return_tensors="pt").input_ids
    wanted: dict[str, str] = {}
    for name in ("alpha", "beta", "alpha:tuned"):
        whole: Any = AutoModelForCausalLM.from_pretrained(folders[name.partition(":")[0]], dtype=torch.float32)
        if ":" in name:
            whole.load_adapter(str(folders["adapter"]))
        answer = whole.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        wanted[name] = tokenizer.decode(answer)
    assert len(set(wanted.values())) == 3
    asked = [*wanted] * 4
    sizes: list[int] = []
    for name in asked:
        told = client.completions.create(model=name, prompt="Bees fly", max_tokens=8, temperature=0)
        assert (told.model, told.choices[0].text) == (name, wanted[name])
        sizes.append(psutil.Process(server.process.pid).memory_info().rss)
    assert sizes[-1] - sizes[2] < 64 * MIB, "models stay loaded, and nothing is loaded again"
    with pytest.raises(openai.NotFoundError, match="has no model 'gamma': use 'alpha' or 'beta' or 'alpha:tuned'"):
        client.completions.create(model="gamma", prompt="Bees fly")


@pytest.mark.full
def test_a_peer_without_a_fixed_model_serves_a_model_in_demand(
    folders: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    models = [str(folders[name]) for name in PARTS]
    (tmp_path / "allowed").write_text("\n".join(models), encoding="utf-8")
    with ExitStack() as stack:
        swarm = stack.enter_context(local_swarm(folders["alpha"], [(0, 6)]))
        join = ["--join", swarm.addresses[0]]
        any_model = ["--any-model", "--allow", str(tmp_path / "allowed"), *join]
        idle = stack.enter_context(starting(tmp_path_factory.mktemp("idle"), *any_model))
        server = stack.enter_context(background(tmp_path, "serve", *models, "--port", "0", *join))
        idle.address()
        assert server.process.stdout is not None
        url = server.process.stdout.readline().decode().split()[-1]
        client = stack.enter_context(OpenAI(base_url=url, api_key="-", max_retries=0))

        def is_answered() -> bool:
            try:
                return bool(client.completions.create(model="beta", prompt="Bees fly", max_tokens=2).choices)
            except openai.InternalServerError:  # Its blocks have no peer.
                return False

        assert not is_answered()
        idle.wait_for(is_answered)
        assert client.completions.create(model="alpha", prompt="Bees fly", max_tokens=2).choices
        assert server.stop(signal.SIGTERM).code == 0


def test_invalid_adapters_are_refused_at_the_start(folders: dict[str, Path], here: Here) -> None:
    finished = here("serve", str(folders["alpha"]), "--adapter", "tuned=nowhere")
    assert finished.code == 1 and "give NAME=DIR with a folder" in finished.errors
