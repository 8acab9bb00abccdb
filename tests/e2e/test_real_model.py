"""The real model through three daemon processes gives the tokens of plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

import splitnet
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.security.identity import Identity
from tests.e2e.daemons import Daemon

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

TOKENS = 16
PROMPTS = [
    "The three primary colours are",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
]
CITIES = [("Vienna", "Austria"), ("Hamburg", "Germany"), ("Warsaw", "Poland"), ("Prague", "Czechia")]


def connect(checkpoint: Path, address: str, codec: str) -> Any:
    return splitnet.AutoModelForCausalLM.from_pretrained(
        checkpoint, initial_peers=[address], codec=codec, identity=Identity.generate()
    )


@pytest.fixture(scope="module")
def remote(demo_checkpoint: Path, address: str) -> Iterator[RemoteCausalLM]:
    model = connect(demo_checkpoint, address, "none")
    yield model
    model.close()


def generate(model: Any, inputs: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(11)
    chosen = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(**inputs, **chosen)


def same(local: PreTrainedModel, remote: RemoteCausalLM, inputs: Any, **options: Any) -> None:
    """Generates with both models, to the full length, and expects equal tokens."""
    with ThreadPoolExecutor(1) as beside:
        reference = beside.submit(generate, local, inputs, **options)
        if options.get("do_sample"):
            reference.result()  # All threads share one random number generator.
        got = generate(remote, inputs, **options)
    expected = reference.result()
    assert got.shape[1] == inputs["input_ids"].shape[1] + TOKENS
    assert torch.equal(got, expected)


@pytest.mark.default_cases(prompt=PROMPTS[:1])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_generation(local: PreTrainedModel, remote: RemoteCausalLM, tokenizer: Any, prompt: str) -> None:
    same(local, remote, tokenizer(prompt, return_tensors="pt"))


@pytest.mark.full
def test_left_padded_batch(local: PreTrainedModel, remote: RemoteCausalLM, tokenizer: Any) -> None:
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert 0 in inputs["attention_mask"]
    same(local, remote, inputs)


@pytest.mark.full
def test_beam_search(local: PreTrainedModel, remote: RemoteCausalLM, tokenizer: Any) -> None:
    same(local, remote, tokenizer(PROMPTS[0], return_tensors="pt"), num_beams=3)


@pytest.mark.full
def test_sampling_with_a_seed(local: PreTrainedModel, remote: RemoteCausalLM, tokenizer: Any) -> None:
    inputs = tokenizer(PROMPTS[2], return_tensors="pt")
    same(local, remote, inputs, do_sample=True, temperature=0.9, top_p=0.95)


@pytest.mark.full
def test_drafts_and_local_blocks(demo_checkpoint: Path, address: str, local: PreTrainedModel, tokenizer: Any) -> None:
    rows = "\n".join(f"| {city} | {country} |" for city, country in CITIES)
    inputs = tokenizer(f"{rows}\n\nThe same table once more:\n\n| Vienna |", return_tensors="pt")
    model = splitnet.AutoModelForCausalLM.from_pretrained(
        demo_checkpoint,
        initial_peers=[address],
        codec="none",
        identity=Identity.generate(),
        local_blocks="0:3,28:30",
    )
    try:
        got = generate(model, inputs, speculate="prompt-lookup")
    finally:
        model.close()
    assert torch.equal(got, generate(local, inputs))


@pytest.mark.full
def test_a_chat_over_int8_makes_sense(demo_checkpoint: Path, address: str, tokenizer: Any) -> None:
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    model = connect(demo_checkpoint, address, "int8")
    try:
        output = model.generate(**chat, max_new_tokens=16, do_sample=False)
    finally:
        model.close()
    assert "Paris" in tokenizer.decode(output[0, chat["input_ids"].shape[1] :])


def test_the_client_holds_no_blocks(remote: RemoteCausalLM, demo_checkpoint: Path) -> None:
    """It holds the embeddings, which are also the head, in the codes of the file, and the last norm."""
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*remote.parameters(), *remote.buffers())}
    facts = Checkpoint.open(demo_checkpoint).store.tensor_facts(["model.embed_tokens.weight"])[
        "model.embed_tokens.weight"
    ]
    assert facts.layout is not None
    assert facts.nbytes < sum(held.values()) < 1.1 * facts.nbytes < demo_checkpoint.stat().st_size / 2


@pytest.mark.full
def test_memory_of_a_daemon_grows_with_its_span(trio: list[Daemon], demo_checkpoint: Path, local: Any) -> None:
    # The spans have 7 and 12 blocks: the memory differs by five blocks, without a second copy of them.
    small, large = (psutil.Process(daemon.process.pid).memory_full_info().uss for daemon in trio[:2])
    block = sum(parameter.nbytes for parameter in local.model.layers[0].parameters())
    assert abs((large - small) - 5 * block) < 3 * block
