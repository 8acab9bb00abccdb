"""Embeddings and ranked documents of a small swarm, with OpenAI's client, compared with transformers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import AsyncOpenAI
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import UnsupportedModel
from splitnet.hf.causal_lm import RemoteCausalLM, attach, attached
from splitnet.hf.side_network import SideNetwork
from splitnet.serve.pooling import Pooling
from splitnet.session.options import ConnectionOptions
from tests.swarm.harness import LocalSwarm, local_swarm
from tests.swarm.test_serve import sessions
from tests.unit.random_models import random_checkpoint
from tests.unit.serve.serving import MODEL, Server

pytestmark = pytest.mark.swarm

TEXTS = ["Bees fly.", "What is the capital of France? " * 9, "x", "Rome is old, and Paris is large."]
PROMPT = "Instruct: find it\nQuery:"
Using = Callable[[AsyncOpenAI, Server], Awaitable[Any]]


@pytest.fixture(scope="module")
def folder(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the form of Qwen3-Embedding-8B: without a head, and without `model.` before names."""
    whole = random_checkpoint("qwen3", tmp_path_factory.mktemp("whole"), vocab=49152, tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("embedding")
    AutoModel.from_pretrained(whole).save_pretrained(folder)
    tokenizer = Checkpoint.open(demo_checkpoint).tokenizer()
    end = "<|endoftext|>"
    ends = [(end, tokenizer.convert_tokens_to_ids(end))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=ends)
    tokenizer.save_pretrained(folder)
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds]
    written = {
        "modules.json": modules,
        "1_Pooling/config.json": {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False},
        "config_sentence_transformers.json": {"prompts": {"query": PROMPT, "document": ""}},
    }
    (folder / "1_Pooling").mkdir()
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def swarm(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with local_swarm(folder, [(0, 2), (2, 6)], node=node) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def model(folder: Path, swarm: LocalSwarm) -> RemoteCausalLM:
    options = ConnectionOptions.of({"codec": "auto"})
    return attached(Checkpoint.open(folder), swarm.client, options, headless=True)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def asking(folder: Path, model: RemoteCausalLM, tokenizer: Any) -> Iterator[Callable[..., Any]]:
    """Runs the coroutine of a test with OpenAI's client."""
    made: list[Server] = []

    def run(does: Using, on: RemoteCausalLM = model, own_tokenizer: Any = tokenizer, **options: Any) -> Any:
        chosen: dict[str, Any] = {"pooling": Pooling.of(Checkpoint.open(folder)), **options}
        server = Server(on, own_tokenizer, **chosen)
        made.append(server)
        return server.with_openai(does)

    yield run
    for server in made:
        server.generations.close()


@torch.no_grad()
def states(whole: Any, ids: list[int]) -> torch.Tensor:
    return whole(input_ids=torch.tensor([ids])).last_hidden_state[0]


def cosines(found: Any, expected: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(torch.as_tensor(found), torch.stack(expected), dim=1)


def test_embeddings_are_the_pooled_states_of_the_whole_model(
    asking: Callable[..., Any], whole: Any, tokenizer: Any, swarm: LocalSwarm
) -> None:
    ids = [tokenizer(text).input_ids for text in TEXTS]

    async def does(client: AsyncOpenAI, server: Server) -> Any:
        create = client.embeddings.create
        return [
            await create(model=MODEL, input=TEXTS),
            await create(model=MODEL, input=TEXTS, encoding_format="float"),
            await create(model=MODEL, input=TEXTS[0], dimensions=16),
            await create(model=MODEL, input=ids[1]),
            await create(model=MODEL, input=ids),
            await create(model=MODEL, input="Bees", extra_body={"prompt_name": "query"}),
            await create(model=MODEL, input=TEXTS[1], extra_body={"truncate_prompt_tokens": 8}),
            await server.http.get("/metrics"),
        ]

    coded, floats, cut, one, tokens, prompted, truncated, metrics = asking(does)
    expected = [states(whole, each)[-1] for each in ids]
    for reply in (coded, floats, tokens):
        assert [each.index for each in reply.data] == [0, 1, 2, 3]
        vectors = torch.tensor([each.embedding for each in reply.data])
        assert float(cosines(vectors, expected).min()) > 0.9999
        assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-5)
        assert reply.model == MODEL and reply.usage.prompt_tokens == reply.usage.total_tokens == sum(map(len, ids))
    assert float(cosines([cut.data[0].embedding], [expected[0][:16]])) > 0.9999
    assert abs(float(torch.tensor(cut.data[0].embedding).norm()) - 1) < 1e-5
    assert float(cosines([one.data[0].embedding], [expected[1]])) > 0.9999
    query = states(whole, tokenizer(PROMPT + "Bees").input_ids)[-1]
    assert float(cosines([prompted.data[0].embedding], [query])) > 0.9999
    shorter = states(whole, [*ids[1][:7], ids[1][-1]])[-1]
    assert float(cosines([truncated.data[0].embedding], [shorter])) > 0.9999
    read = [coded, floats, cut, one, tokens, prompted, truncated]
    assert truncated.usage.prompt_tokens == 8
    counted = float(sum(reply.usage.total_tokens for reply in read))
    assert f"splitnet_gateway_prompt_tokens_total {counted}\n" in metrics.text
    assert sessions(swarm) == [0, 0]


def test_a_side_network_adds_to_embeddings(
    asking: Callable[..., Any], folder: Path, swarm: LocalSwarm, whole: Any, tokenizer: Any
) -> None:
    """With texts of several lengths, which are read in a batch with padding."""
    torch.manual_seed(0)
    side = SideNetwork.beside(whole.config.hidden_size, whole.config.num_hidden_layers)
    torch.nn.init.normal_(side.write.weight, std=0.5)
    options = ConnectionOptions.of({"codec": "none"})
    tuned = attached(Checkpoint.open(folder), swarm.client, options, headless=True)
    tuned.use_side(side.eval())

    async def does(client: AsyncOpenAI, server: Server) -> Any:
        return await client.embeddings.create(model=MODEL, input=TEXTS)

    vectors = [each.embedding for each in asking(does, tuned).data]
    expected: list[torch.Tensor] = []
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text).input_ids])
            each = whole(input_ids=ids, output_hidden_states=True).hidden_states
            read = torch.cat([each[tap] for tap in (*side.taps, -1)], dim=-1)
            expected.append((each[-1] + side(read))[0, -1])
    assert float(cosines(vectors, expected).min()) > 0.9999


def test_a_checkpoint_without_a_head_generates_nothing(
    asking: Callable[..., Any], folder: Path, swarm: LocalSwarm
) -> None:
    async def does(client: AsyncOpenAI, server: Server) -> Any:
        with pytest.raises(openai.BadRequestError, match="no head to answer with") as refused:
            await client.completions.create(model=MODEL, prompt="Bees")
        return refused.value.param

    assert asking(does) == "model"
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight is missing"):
        attach(Checkpoint.open(folder), swarm.client)


def test_the_lengths_of_other_texts_do_not_change_rope_frequencies(
    tmp_path: Path, node: DhtDirectory, tokenizer: Any
) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [32.0] * 8}
    folder = random_checkpoint("llama", tmp_path / "long", vocab=49152, rope_parameters=rope, seed=9)
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().model
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert max(map(len, ids)) > 32

    async def does(server: Server) -> Any:
        reply = await server.http.post("/v1/embeddings", json={"model": MODEL, "input": ids})
        return torch.tensor([each["embedding"] for each in reply.json()["data"]])

    with local_swarm(folder, [(0, 6)], node=node) as swarm:
        server = Server(swarm.model(), tokenizer)

        async def running() -> Any:
            async with server.running():
                return await does(server)

        found = asyncio.run(running())
        server.generations.close()
    assert float(cosines(found, [states(local, each)[-1] for each in ids]).min()) > 0.9999


ASKED = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


@pytest.fixture(scope="module")
def reranker(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the form of Qwen3-Reranker."""
    folder = random_checkpoint("qwen3", tmp_path_factory.mktemp("reranker"), vocab=49152, seed=3)
    Checkpoint.open(demo_checkpoint).tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\ntags: x\n---\n# Qwen3-Reranker-0.6B\n")
    return folder


def test_documents_are_ranked_by_the_probability_of_yes(
    asking: Callable[..., Any], reranker: Path, node: DhtDirectory
) -> None:
    local = AutoModelForCausalLM.from_pretrained(reranker, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(reranker)
    documents = ["Paris is large.", "Bees fly. " * 20, "No."]
    instruction = "Given a web search query, retrieve relevant passages that answer the query"
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])

    @torch.no_grad()
    def probability(ids: list[int]) -> float:
        logits = local(input_ids=torch.tensor([ids])).logits[0, -1]
        return float(logits[[yes, no]].softmax(dim=0)[0])

    asked = [ASKED.format(instruction=instruction, query="Paris?", document=each) for each in documents]
    ids = [tokenizer(each, add_special_tokens=False).input_ids for each in asked]

    async def does(client: AsyncOpenAI, server: Server) -> None:
        body = {"model": MODEL, "query": "Paris?", "documents": documents}
        reply = (await server.http.post("/v1/rerank", json=body)).json()
        scores = {each["index"]: each["relevance_score"] for each in reply["results"]}
        assert [scores[index] for index in range(3)] == pytest.approx([*map(probability, ids)], abs=1e-5)

    with local_swarm(reranker, [(0, 6)], node=node) as swarm:
        pooling = Pooling.of(Checkpoint.open(reranker))
        asking(does, on=swarm.model(), pooling=pooling, own_tokenizer=tokenizer)
